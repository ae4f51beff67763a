"""Weights that autocast casts: once per step, however often they are read, as a training loop does.

Autocast keeps the cast of each trainable weight until its context ends, so a weight that several
layers share is cast once, and its gradients are added in the low precision before they are cast back.
The tracer runs without that cache: it casts at every use and adds in the weight's own precision, which
are other bits and more memory.  Here the casts of one weight become one, with their gradients added in
the order in which they arrive.

Known limits: a model that casts a shared weight to autocast's type by itself, twice, is taken for
autocast; several forwards inside one autocast context share casts in eager, and not between planned
steps.
"""

from __future__ import annotations

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph.draft import Did, Draft

__all__ = ["cast_weights_once"]

aten = torch.ops.aten


def cast_weights_once(draft: Draft) -> Did:
    """Merge each weight's casts under autocast; runs under the autocast state of the capture."""
    replaced: dict[fx.Node, fx.Node] = {}
    merged = 0
    for parameter, (kind, name) in draft.sources.items():
        if kind != "parameter":
            continue
        low = _autocast_dtype(meta.tensor(parameter).device)
        casts = [n for n in parameter.users if _is_cast(n, low)]
        if low is None or len(casts) < 2:
            continue
        for other in casts[1:]:
            other.replace_all_uses_with(casts[0])
            draft.graph.erase_node(other)
        merged += len(casts) - 1
        gradient = draft.gradients.get(name)
        new = None if gradient is None else _summed_low(draft.graph, gradient, low)
        if gradient is not None and new is not None:
            gradient.replace_all_uses_with(new)
            replaced[gradient] = new
    draft.gradients = {name: replaced.get(node, node) for name, node in draft.gradients.items()}
    draft.sweep()
    return {"casts merged": merged}


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _is_cast(node: fx.Node, dtype: torch.dtype | None) -> bool:
    return node.target is aten._to_copy.default and node.kwargs == {"dtype": dtype}


def _summed_low(graph: fx.Graph, gradient: fx.Node, low: torch.dtype) -> fx.Node | None:
    """``gradient``, a sum of casts and other terms, with the terms that were cast added before one cast."""
    terms = _terms(gradient)
    below = {n: n.all_input_nodes[0] for n in terms if n.target is aten._to_copy.default}
    cast = [n for n in terms if n in below and meta.tensor(below[n]).dtype == low]
    if len(cast) < 2:
        return None
    total = below[cast[0]]
    for term in cast[1:]:
        total = _add(graph, total, below[term])
    with graph.inserting_after(total):
        back = graph.call_function(aten._to_copy.default, (total,), dict(cast[0].kwargs))
    meta.describe(back, meta.value(cast[0]), cast[0])
    rest = [n for n in terms if n not in cast]
    if not rest:
        return back
    others = rest[0]
    for term in rest[1:]:
        others = _add(graph, others, term)
    return _add(graph, others, back)


def _terms(node: fx.Node) -> list[fx.Node]:
    """What the engine added up, in the order of arrival."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return [node]
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return [node]
    return [*(_terms(a) if len(a.users) == 1 else [a]), b]


def _add(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    order = {n: i for i, n in enumerate(graph.nodes)}
    later = max(a, b, key=order.__getitem__)
    with graph.inserting_after(later):
        node = graph.call_function(aten.add.Tensor, (a, b))
    with _compat.fake_mode_of(meta.tensor(a)):
        meta.describe(node, torch.empty_like(meta.tensor(a)), later)
    return node
