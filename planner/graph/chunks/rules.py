"""What a call does with rows, op by op: each row by itself, a sum over rows, or neither.

:func:`in_rows` asks the rule of the call's op how the call is made for some of the rows
(:mod:`~planner.graph.chunks.rows`); pointwise ops share one.  What has no rule is not split.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from planner.capture import meta
from planner.graph import kernels
from planner.graph.chunks.rows import (
    ROWS_LAST,
    Carried,
    InRows,
    Rows,
    aligned,
    first_of,
    lead_of,
    met,
    shape_of,
)
from planner.graph.nodes import argument

__all__ = [
    "FACTORIES",
    "MARKS",
    "SOFTMAXES",
    "averages",
    "factory_of",
    "in_padded_rows",
    "in_rows",
    "of_others",
]

aten = torch.ops.aten


def in_rows(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """How ``node``, of whose operands some carry ``count`` rows, works on some of them; ``None``: not so."""
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    if rule is None or not isinstance(meta.value(node), (torch.Tensor, tuple)):
        return None
    return rule(node, carried, count)


def of_others(node: fx.Node, lead: int, count: int) -> InRows | None:
    """How ``node``, which reads nothing of a region but has its rows in ``lead`` dims, works on some."""
    if node.target in FACTORIES:
        return InRows(Rows(lead), lambda n: factory_of(node, n, lead) or node.args)
    if not isinstance(meta.value(node), torch.Tensor) or node.kwargs.keys() - _KWARGS:
        return None
    made = shape_of(node)
    nodes = node.all_input_nodes
    if node.target is aten.expand.default:
        args: Callable[[int], tuple[Any, ...]] = lambda n: (node.args[0], (n, *made[lead:]))  # noqa: E731
    elif node.target in _BY_INDEX and isinstance(dim := node.args[1], int) and dim % len(made) >= lead:
        moved = dim % len(made) - lead + 1
        args = lambda n: (node.args[0], moved, *node.args[2:])  # noqa: E731
    elif node.target is aten._to_copy.default or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        args = lambda n: node.args  # noqa: E731
    else:
        return _of_another_product(node, lead, count)
    found = met(nodes, made, lead)
    return None if found is None else InRows(Rows(lead), args, *found)


def _of_another_product(node: fx.Node, lead: int, count: int) -> InRows | None:
    """The same of what a loss reads of other logits, a teacher's: their softmax, views, and the product."""
    if node.target in (aten.mm.default, aten.addmm.default):
        *bias, rows, _ = node.args
        assert isinstance(rows, fx.Node)
        every = not bias or (isinstance(bias[0], fx.Node) and len(shape_of(bias[0])) == 1)
        return InRows(Rows(), lambda n: node.args, {rows: 1}) if lead == 1 and every else None
    if not all(isinstance(meta.value(n), torch.Tensor) for n in node.all_input_nodes):
        return None  # one result of several
    size = math.prod(shape_of(node))
    wide = {
        n: k
        for n in node.all_input_nodes
        if math.prod(shape_of(n)) >= size and (k := lead_of(shape_of(n), count))
    }
    found = in_rows(node, lambda n: Rows(wide[n]) if n in wide else None, count) if wide else None
    if found is None or found.is_end or found.rows != Rows(lead):
        return None
    return replace(found, sliced={**found.sliced, **wide})


def in_padded_rows(node: fx.Node, carried: Carried, total: int) -> InRows | None:
    """:func:`in_rows` of a call on a padded tensor of ``total`` rows, where zeros stay zeros."""
    if node.target not in _KEEP_ZEROS:
        return None

    def plain(n: fx.Node) -> Rows | None:
        own = carried(n)
        return own if own is None else replace(own, padded=False)

    if any((own := carried(n)) is not None and not own.padded for n in node.all_input_nodes):
        return None
    made = in_rows(node, plain, total)
    if made is None:
        return None
    return replace(made, rows=made.rows and replace(made.rows, padded=True), padded=True)


# Arguments by name that say nothing of sizes.
_KWARGS = frozenset({"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "alpha"})


# -- views ----------------------------------------------------------------------------------------


def _view(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    x, lead = first_of(node), lead_of(shape_of(node), count)
    own = carried(x)
    if own is None or own.turned or lead is None:
        return None
    rest = shape_of(node)[lead:]
    return InRows(Rows(lead), lambda n: (x, (n, *rest)))


def _turn(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    x = first_of(node)
    own = carried(x)
    if own is None or own.lead != 1 or len(shape_of(x)) != 2 or shape_of(node) != shape_of(x)[::-1]:
        return None
    return InRows(Rows(1, not own.turned), lambda n: node.args)


def _expand(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    x, made = first_of(node), shape_of(node)
    own = carried(x)
    if (
        own is None
        or own.turned
        or len(made) != len(shape_of(x))
        or made[: own.lead] != shape_of(x)[: own.lead]
    ):
        return None
    return InRows(own, lambda n: (x, (n, *made[own.lead :])))


def _along(node: fx.Node, carried: Carried, at: int, default: Any = None) -> InRows | None:
    """Of a call whose argument ``at`` is a dim, or several, that are all behind the rows."""
    x = first_of(node)
    own = carried(x)
    given = node.args[at] if len(node.args) > at else default
    if own is None or own.turned or given is None:
        return None
    dims: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    size = len(shape_of(x)) + (node.target is aten.unsqueeze.default)
    if not dims or not all(isinstance(d, int) for d in dims):
        return None
    dims = [d % size for d in dims]
    if min(dims) < own.lead:
        return None
    moved = [d - own.lead + 1 for d in dims]
    new = moved if isinstance(given, (list, tuple)) else moved[0]
    return InRows(own, lambda n: (x, *node.args[1:at], new, *node.args[at + 1 :]))


def _of_one_dim(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """Ops whose second argument is a dim, or several, behind the rows: views, softmax, reductions."""
    return _along(node, carried, 1)


def _of_third(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """The same of the third argument; ``topk`` is along the last dim where none is given."""
    return _along(node, carried, 2, -1 if node.target is aten.topk.default else None)


# -- pointwise ------------------------------------------------------------------------------------


def _pointwise(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """Operands are aligned from the right: rows must meet rows."""
    made, operands = shape_of(node), node.all_input_nodes
    own = [r for n in operands if (r := carried(n)) is not None]
    lead = own[0].lead
    if any(r.turned or r.lead != lead for r in own):
        return None
    inside = [n for n in operands if carried(n) is not None]
    if any(len(shape_of(n)) != len(made) or shape_of(n)[:lead] != made[:lead] for n in inside):
        return None
    found = met([n for n in operands if carried(n) is None], made, lead)
    return None if found is None else InRows(Rows(lead), lambda n: node.args, *found)


def _like(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    own = carried(first_of(node))
    return None if own is None or own.turned else InRows(own, lambda n: node.args)


def _new(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """``x.new_zeros(sizes)``: of ``x`` only the type is read."""
    lead = lead_of(shape_of(node), count)
    if lead is None:
        return None
    rest = shape_of(node)[lead:]
    return InRows(Rows(lead), lambda n: (node.args[0], (n, *rest), *node.args[2:]))


def _logsigmoid(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """With what its backward reads, which CUDA's kernel leaves empty."""
    own = carried(first_of(node))
    return None if own is None or own.turned else InRows(own, lambda n: node.args)


def _part(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    own = carried(first_of(node))
    return None if own is None else InRows(own, lambda n: node.args)


def _logsigmoid_backward(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    found = aligned(carried, node.args[:2])
    if found is None or carried(node.args[2]) is None:  # type: ignore[arg-type]
        return None
    return InRows(found[0], lambda n: node.args, found[1])


# -- along the vocabulary -------------------------------------------------------------------------


def _by_index(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """``gather`` and ``scatter``: ``(x, dim, index, ...)`` along a dim behind the rows."""
    found = aligned(carried, [node.args[0], *node.args[2:]])
    dim = node.args[1]
    if found is None or not isinstance(dim, int):
        return None
    own, sliced = found
    moved = dim % len(shape_of(first_of(node))) - own.lead + 1
    if moved < 1:
        return None
    return InRows(own, lambda n: (node.args[0], moved, *node.args[2:]), sliced)


def _cat(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """Side by side, what each row has."""
    parts, *given = node.args
    found = aligned(carried, parts)  # type: ignore[arg-type]
    dim = given[0] if given else 0
    if found is None or not isinstance(dim, int):
        return None
    own, sliced = found
    moved = dim % len(shape_of(node)) - own.lead + 1
    return InRows(own, lambda n: (parts, moved), sliced) if moved > 0 else None


def _put_back(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """The gradient of a part of what each row has: ``(gradient, sizes, dim, ...)``."""
    x, made, dim = first_of(node), shape_of(node), node.args[2]
    own = carried(x)
    if own is None or own.turned or not isinstance(dim, int):
        return None
    dim %= len(made)
    if dim < own.lead:
        return None
    new = dim - own.lead + 1
    return InRows(own, lambda n: (x, (n, *made[own.lead :]), new, *node.args[3:]))


def _softmax_backward(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    found = aligned(carried, node.args[:2])
    dim = node.args[2]
    if found is None or not isinstance(dim, int):
        return None
    own, sliced = found
    moved = dim % len(shape_of(node)) - own.lead + 1
    if moved < 1:
        return None
    return InRows(own, lambda n: (*node.args[:2], moved, *node.args[3:]), sliced)


def _nll_backward(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    gradient, logs, target = node.args[:3]
    if not isinstance(gradient, fx.Node) or len(shape_of(node)) != 2:
        return None
    each = [gradient] if shape_of(gradient) == (count,) and argument(node, "reduction") == 0 else []
    if not isinstance(logs, fx.Node) or carried(logs) != Rows(1):
        return None
    found = aligned(carried, [logs, target, *each])
    return None if found is None else InRows(Rows(1), lambda n: node.args, found[1])


# -- products and sums ----------------------------------------------------------------------------


def _product(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    left, right = carried(a), carried(b)
    if left == Rows(1) and right is None:
        return InRows(Rows(1), lambda n: (a, b), is_end=True)
    if left == Rows(1, True) and (right == Rows(1) or (right is None and shape_of(b)[0] == count)):
        return InRows(None, lambda n: (a, b), {b: 1} if right is None else {})
    if left is None and right == Rows(1) and shape_of(a)[1] == count:
        return InRows(None, lambda n: (a, b), {a: ROWS_LAST})
    return None


def _sum(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """Along what a row has, or over the rows themselves."""
    inside = _of_one_dim(node, carried, count)
    if inside is not None:
        return inside
    x = first_of(node)
    own, dims = carried(x), node.args[1] if len(node.args) > 1 else None
    if own is None or own.turned or not isinstance(dims, (list, tuple)):
        return None
    rest = len(shape_of(x)) - own.lead
    over = sorted(int(d) % (own.lead + rest) for d in dims)
    if not rest or over not in (list(range(own.lead)), list(range(own.lead + rest))):
        return None
    new = list(range(1 + len(over) - own.lead))
    return InRows(None, lambda n: (x, new, *node.args[2:]))


def _largest(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """Along what a row has, or of each column the largest."""
    return _of_one_dim(node, carried, count) or _of_columns(node, carried)


def _of_columns(node: fx.Node, carried: Carried, count: int = 0) -> InRows | None:
    """A number of each column of a matrix."""
    x = first_of(node)
    columns = carried(x) == Rows() and len(shape_of(x)) == 2 and len(shape_of(node)) == 1
    return InRows(None, lambda n: node.args) if columns else None


def _binary(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    """``binary_cross_entropy_with_logits``: of each score, or their sum: a mean is made of it last."""
    made, own = shape_of(first_of(node)), carried(first_of(node))
    others = [n for n in node.all_input_nodes if carried(n) is None]
    if own is None or own.turned or any(carried(n) not in (own, None) for n in node.all_input_nodes):
        return None
    found = met(others, made, own.lead)
    if found is None:
        return None
    if argument(node, "reduction") == 0:
        return InRows(own, lambda n: node.args, *found)
    given = [*node.args, None, None][:4]
    return InRows(None, lambda n: (*given, 2), *found)


def _sum_of_all(node: fx.Node, carried: Carried, count: int) -> InRows | None:
    own = carried(first_of(node))
    wide = own is not None and len(shape_of(first_of(node))) > own.lead
    return InRows(None, lambda n: node.args) if wide else None


_OF_ONE_DIM = (
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.slice.Tensor,
    aten._log_softmax.default, aten._softmax.default, aten.logsumexp.default,
    aten.amin.default, aten.mean.dim, aten.argmax.default,
)  # fmt: skip
_BY_INDEX = (
    aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default
)  # fmt: skip
_LIKE = (
    aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
)  # fmt: skip

_RULES: Mapping[Any, Callable[[fx.Node, Carried, int], InRows | None]] = MappingProxyType(
    {
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.reshape.default: _view,
        aten.t.default: _turn,
        aten.transpose.int: _turn,
        aten.permute.default: _turn,
        aten.expand.default: _expand,
        aten.masked_fill.Tensor: _pointwise,
        aten.new_zeros.default: _new,
        aten.new_full.default: _new,
        aten.cat.default: _cat,
        aten.select_backward.default: _put_back,
        aten.slice_backward.default: _put_back,
        aten._log_softmax_backward_data.default: _softmax_backward,
        aten._softmax_backward_data.default: _softmax_backward,
        aten.nll_loss_backward.default: _nll_backward,
        aten.mm.default: _product,
        aten.sum.dim_IntList: _sum,
        aten.sum.default: _sum_of_all,
        aten.mean.default: _sum_of_all,
        aten.binary_cross_entropy_with_logits.default: _binary,
        aten.max.dim: _of_one_dim,
        aten.min.dim: _of_one_dim,
        aten.topk.default: _of_third,
        aten.linalg_vector_norm.default: _of_third,
        aten.amax.default: _largest,
        aten.log_sigmoid_forward.default: _logsigmoid,
        aten.log_sigmoid_backward.default: _logsigmoid_backward,
        operator.getitem: _part,
        kernels.log_sum_below: _of_columns,
        **dict.fromkeys(_OF_ONE_DIM, _of_one_dim),
        **dict.fromkeys(_BY_INDEX, _by_index),
        **dict.fromkeys(_LIKE, _like),
    }
)

# What makes zeros of zeros, row by row, or sums over rows.
_KEEP_ZEROS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.t.default,
        aten.transpose.int,
        aten._to_copy.default,
        aten.clone.default,
        aten.mm.default,
        aten.sum.dim_IntList,
    }
)

SOFTMAXES = frozenset({aten._log_softmax.default, aten._softmax.default, aten.logsumexp.default})

# A loss over scores has one of these; without, nothing is gained by rows.
MARKS = SOFTMAXES | {
    aten.log_sigmoid_forward.default,
    aten.binary_cross_entropy_with_logits.default,
    kernels.log_sum_below,
}

# Ops that make a tensor of given sizes out of nothing, and where those stand among their arguments.
FACTORIES: Mapping[Any, int] = MappingProxyType(
    {
        aten.zeros.default: 0,
        aten.ones.default: 0,
        aten.full.default: 0,
        aten.new_zeros.default: 1,
        aten.new_full.default: 1,
    }
)


def averages(node: fx.Node) -> bool:
    """Whether it is a mean over all rows, of which rows by themselves make the sum."""
    if node.target is aten.binary_cross_entropy_with_logits.default:
        return argument(node, "reduction") == 1
    return node.target is aten.mean.default


def factory_of(node: fx.Node, rows: int, lead: int) -> tuple[Any, ...] | None:
    """Arguments that make ``rows`` rows of what ``node`` makes out of nothing; ``None`` where it does not."""
    at = FACTORIES.get(node.target)
    if at is None:
        return None
    args = list(node.args)
    args[at] = (rows, *shape_of(node)[lead:])
    return tuple(args)
