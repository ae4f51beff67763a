"""A graph of Dynamo's torn around what no plan can carry, so that the rest of it is planned.

Some calls run as eager runs them.  A write into a parameter, or into what has a gradient: prototypes
that are normalized in the forward, an embedding's ``max_norm``.  And a checkpoint of the author's within
which buffers are written to: a batch norm there updates its statistics again when it is recomputed.  And a
product, whose gradient eager makes by a formula that depends on values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from planner import _compat

__all__ = ["torn"]

# What names the same memory as its first argument, as Dynamo writes it.
_VIEWS = (
    "_get_data_attr",  # tensor.data
    "detach",
    "view",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "getitem",
    "permute",
    "narrow",
    "select",
)

_NORMS = ("batch_norm", "instance_norm")
_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias", "training")
_EMBEDDINGS = {
    "embedding": ("input", "weight", "padding_idx", "max_norm"),
    "embedding_bag": ("input", "weight", "offsets", "max_norm"),
}


def torn(graph: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]] | None:
    """A graph of parts, and why some of them run as eager runs them, by name; ``None``: it can stay whole."""
    place: dict[fx.Node, int] = {}
    why: dict[int, str] = {}
    now, last = 0, ""
    reasons = _reasons(graph)
    for node in graph.graph.nodes:
        reason = reasons.get(node, "")
        if node.target is operator.getitem and place.get(node.args[0]) == now:
            reason = last  # a part hands on tensors
        if node.op.startswith("call") and reason != last:
            now, last = now + 1, reason
        if reason:
            why[now] = reason
        place[node] = now
    if not why:
        return None
    whole = _compat.split_graph(graph, place.__getitem__)
    return whole, {f"submod_{k}": reason for k, reason in why.items()}


def _reasons(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The calls that eager runs, and why: of a stretch without gradients all or none."""
    found: dict[fx.Node, str] = {}
    stretch: list[fx.Node] = []
    for node in graph.graph.nodes:
        if not node.op.startswith("call"):
            continue
        reason = _why_eager(graph, node)
        if reason:
            found[node] = reason
        switched = _compat.switches_gradients(node)
        if stretch or switched is False:
            stretch.append(node)
        if switched is True:
            reason = next((found[n] for n in stretch if n in found), "")
            found.update(dict.fromkeys(stretch if reason else (), reason))
            stretch = []
    return found


def _why_eager(graph: fx.GraphModule, node: fx.Node) -> str:
    base = written(node)
    if base is not None:
        while base.op != "placeholder" and _name(base) in _VIEWS and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        value = base.meta.get("example_value")
        trained = isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and value.requires_grad)
        return (
            f"it writes into {base.name}, which has a gradient"
            if base.op == "placeholder" and trained
            else ""
        )
    if _name(node) in _EMBEDDINGS and _given(node, _EMBEDDINGS[_name(node)], "max_norm") is not None:
        return "it renormalizes its weights where it reads them (max_norm)"
    if _name(node) in ("prod", "cumprod") and _is_tracked(node):
        return f"its gradient ({_name(node)}'s) is made by one formula or another, as values are zero or not"
    if _compat.is_checkpoint(node.target) and isinstance(node.args[0], fx.Node):
        inner = getattr(graph, str(node.args[0].target), None)
        if isinstance(inner, fx.GraphModule) and _updates_buffers(inner):
            return "its author checkpoints it, and it writes to buffers again when it is recomputed"
    return ""


def _is_tracked(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _updates_buffers(graph: fx.GraphModule) -> bool:
    for node in graph.graph.nodes:
        if _name(node) in _NORMS and _updates_statistics(node):
            return True
        base = written(node)
        if base is not None and base.op == "placeholder":
            return True
        part = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(part, fx.GraphModule) and _updates_buffers(part):
            return True
    return False


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a call of a batch norm updates running statistics."""
    trains = node.kwargs.get("use_input_stats", _given(node, _STATISTICS, "training"))
    return _given(node, _STATISTICS, "running_mean") is not None and trains is not False


def _given(node: fx.Node, names: tuple[str, ...], name: str) -> Any:
    """An argument of a call, by its name; ``names``: of those that may be positional."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def written(node: fx.Node) -> fx.Node | None:
    """What a call writes into, as far as its name says so."""
    name = _name(node)
    in_place = (name.endswith("_") and not name.endswith("__")) or node.target is operator.setitem
    first = node.args[0] if node.args else None
    if node.op in ("call_function", "call_method") and in_place and isinstance(first, fx.Node):
        return first
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else None
