"""``native_dropout`` as the draw of a mask and its application: either can be repeated without the other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft
from planner.graph.nodes import last_of

__all__ = ["split_dropout"]

aten = torch.ops.aten


def split_dropout(draft: Draft) -> Did:
    """``native_dropout`` -> the draw of its mask, and ``dropout_apply`` on that mask."""
    split = 0
    for node in draft.graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        parts: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
        x, p, train = node.args
        if train is not True or 0 not in parts or not 0 < p < 1:
            continue
        result = parts[0]
        mask = parts[1] if 1 in parts else _mask_of(draft.graph, node)
        made = meta.tensor(result)
        scale = kernels.dropout_scale(p, made.dtype, str(made.device))
        with draft.graph.inserting_after(last_of(node)):
            applied = draft.graph.call_function(kernels.dropout_apply, (x, mask, scale))
        meta.describe(applied, made, result)
        result.replace_all_uses_with(applied)
        draft.outputs = [applied if n is result else n for n in draft.outputs]
        draft.graph.erase_node(result)
        if made.device.type == "cpu":
            _as_on_cpu(draft.graph, node, mask, scale)
        else:
            meta.note_draw(applied, node)
            meta.describe(node, (None, meta.value(mask)), node)
        split += 1
    return {"dropouts": split}


def _as_on_cpu(graph: fx.Graph, dropout: fx.Node, mask: fx.Node, scale: float) -> None:
    """Eager's own kernels: the CPU has no fused dropout, and its emulation takes thrice the time."""
    with graph.inserting_before(dropout):
        draw = graph.call_function(kernels.dropout_mask, dropout.args[:2])
    meta.describe(draw, meta.value(mask), dropout)
    for user in list(mask.users):
        if user.target is not aten.native_dropout_backward.default:
            continue
        gradient = user.args[0]
        assert isinstance(gradient, fx.Node)
        user.args = (gradient, mask, scale)
        if meta.tensor(user).stride() == torch.empty_like(meta.tensor(gradient)).stride():
            user.target = kernels.dropout_apply
    mask.replace_all_uses_with(draw)
    graph.erase_node(mask)
    graph.erase_node(dropout)


def _mask_of(graph: fx.Graph, dropout: fx.Node) -> fx.Node:
    """The mask that nothing has asked for yet: no gradient passes here."""
    with graph.inserting_after(dropout):
        mask = graph.call_function(operator.getitem, (dropout, 1))
    meta.describe(mask, meta.value(dropout)[1], dropout)
    return mask
