"""Gradients that autograd would have to copy: copied in the graph, so that memory is known to the byte.

The engine takes a gradient as it is where nobody else holds it, it owns its storage and is laid out as its
leaf (``AccumulateGrad``'s layout contract, ``torch/csrc/autograd/functions/accumulate_grad.h``).  Two
parameters that share one, another layout and a view into something larger are copied.
"""

from __future__ import annotations

import torch

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
    copies = 0
    for name, node in draft.gradients.items():
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
