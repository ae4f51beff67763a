"""A graph of Dynamo's torn around what no plan can carry, so that the rest of it is planned.

Some calls run as eager runs them.  A write into a parameter, or into what has a gradient: prototypes
that are normalized in the forward, an embedding's ``max_norm``.  A buffer's ``.data =``.  And a checkpoint
of the author's within which buffers are written to: a batch norm there updates its statistics again when it
is recomputed.  And a Function or a hook of theirs that writes, in the backward, into what is no gradient:
amax histories of fp8, statistics of gradients.  And a product, whose gradient eager makes by a formula that
depends on values.  And what is sparse, or makes sparse gradients: what that takes is known only when it is
made.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from planner import _compat
from planner.regions.cut.writes import argument, base_of, name_of, positions, updates_statistics, written_by

__all__ = ["torn"]

_EMBEDDINGS = {
    "embedding": ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    "embedding_bag": (
        *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
    ),
}

_REPLACES = "set_", "shallow_copy_data_"  # what Dynamo writes for .data =; the second one 2.14+


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
    for base in map(base_of, written_by(node)):
        value = base.meta.get("example_value")
        trained = isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and value.requires_grad)
        if base.op == "placeholder" and trained:
            return f"it writes into {base.name}, which has a gradient"
        if base.op == "placeholder" and name_of(node) in _REPLACES:
            return f"it gives {base.name} another storage (.data =)"
    name = name_of(node)
    if name in _EMBEDDINGS and argument(node, _EMBEDDINGS[name], "max_norm") is not None:
        return "it renormalizes its weights where it reads them (max_norm)"
    makes_sparse = name in _EMBEDDINGS and argument(node, _EMBEDDINGS[name], "sparse") is True
    if makes_sparse or any(map(_is_sparse, (node, *node.all_input_nodes))):
        return f"what {name} or its gradient makes is sparse, of a size that is known when it is made"
    if name in ("prod", "cumprod") and _is_tracked(node):
        return f"its gradient ({name}'s) is made by one formula or another, as values are zero or not"
    if _compat.is_checkpoint(node.target) and isinstance(node.args[0], fx.Node):
        inner = getattr(graph, str(node.args[0].target), None)
        if isinstance(inner, fx.GraphModule) and _updates_buffers(inner):
            return "its author checkpoints it, and it writes to buffers again when it is recomputed"
    if _writes_in_backward(graph, node):
        return f"its backward writes into more than gradients ({name})"
    return ""


def _writes_in_backward(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call, or one in a graph that it is given, writes in its backward into what is no gradient."""
    bodies = [getattr(graph, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    inner = [body for body in bodies if isinstance(body, fx.GraphModule)]
    if _compat.is_autograd_function(node.target) and len(inner) == 2:
        forward, backward = inner
        (output,) = forward.graph.find_nodes(op="output")
        kept = len(output.args[0][1])  # saved or named by the backward: the last that it is given
        there = len(backward.graph.find_nodes(op="placeholder"))
        return any(position >= there - kept for position in positions(backward.graph))
    if _compat.is_hook(node.target) and inner:
        return any(position > 0 for position in positions(inner[0].graph))  # 0: the gradient
    return any(_writes_in_backward(body, n) for body in inner for n in body.graph.nodes)


def _is_sparse(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.layout != torch.strided


def _is_tracked(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _updates_buffers(graph: fx.GraphModule) -> bool:
    for node in graph.graph.nodes:
        if updates_statistics(node) or any(base.op == "placeholder" for base in written_by(node)):
            return True
        part = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(part, fx.GraphModule) and _updates_buffers(part):
            return True
    return False
