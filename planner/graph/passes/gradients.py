"""Gradients that autograd would have to copy: copied in the graph, so that memory is known to the byte.

The engine takes a gradient as it is where nobody else holds it, it owns its storage and is laid out as its
leaf (``AccumulateGrad``'s layout contract, ``torch/csrc/autograd/functions/accumulate_grad.h``).  Two
parameters that share one, another layout and a view into something larger are copied.

The gradient of what other code made goes on into that code's backward, whose sums depend on its layout: it
stays as it is, and is copied only where it lies on what the step was given, or is of another too.
"""

from __future__ import annotations

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft
from planner.graph.nodes import last_of, same_layout, tensors_of

__all__ = ["copy_gradients"]


def copy_gradients(draft: Draft) -> Did:
    """Copy, where the engine would, so that it never has to."""
    by_name = {name: n for n, (kind, name) in draft.sources.items() if kind in ("parameter", "input")}
    taken = {_compat.storage_key(t) for n in (*draft.sources, *draft.outputs) for t in tensors_of(n)}
    given = {_compat.storage_key(t) for n in draft.sources for t in tensors_of(n)}
    once: set[fx.Node] = set()
    copies = 0
    for name, node in draft.gradients.items():
        if meta.goes_on(by_name[name]):
            if node in once or _compat.storage_key(meta.tensor(node)) in given:
                with draft.graph.inserting_after(last_of(node)):
                    copy = draft.graph.call_function(kernels.gradient_apart, (node,))
                with _compat.fake_mode_of(meta.tensor(node)):
                    meta.describe(copy, kernels.gradient_apart(meta.tensor(node)), node)
                draft.gradients[name] = node = copy
                copies += 1
            once.add(node)
            taken.add(_compat.storage_key(meta.tensor(node)))
            continue
        grad, leaf = meta.tensor(node), meta.tensor(by_name[name])
        key = _compat.storage_key(grad)
        fits = same_layout(grad, leaf)
        owns = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
        alone = not node.users
        if key in taken or not (fits and owns and alone):
            with draft.graph.inserting_after(last_of(node)):
                copy = draft.graph.call_function(kernels.gradient_like, (node, by_name[name]))
            with _compat.fake_mode_of(grad):
                meta.describe(copy, torch.empty_like(leaf), node)
            draft.gradients[name] = copy
            key = _compat.storage_key(meta.tensor(copy))
            copies += 1
        taken.add(key)
    return {"copies": copies}
