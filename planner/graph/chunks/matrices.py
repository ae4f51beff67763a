"""What is asked of nodes that are matrices: whether they are scores, are turned, or index one of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planner.capture import meta
from planner.graph.chunks.rows import shape_of

__all__ = [
    "PRODUCTS",
    "args_of",
    "is_one_of_each_row",
    "is_pointwise",
    "is_scores",
    "leads_to_turned",
    "turns",
]

aten = torch.ops.aten

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})


def args_of(node: fx.Node) -> Any:
    """Its arguments, without fx's union of their types."""
    return node.args


def turns(node: Any) -> bool:
    """Whether it turns a matrix."""
    if not isinstance(node, fx.Node) or not args_of(node) or not isinstance(args_of(node)[0], fx.Node):
        return False
    if not isinstance(meta.value(args_of(node)[0]), torch.Tensor) or len(shape_of(args_of(node)[0])) != 2:
        return False
    if node.target is aten.permute.default:
        return [d % 2 for d in args_of(node)[1]] == [1, 0]
    turns = node.target is aten.transpose.int and {d % 2 for d in args_of(node)[1:]} == {0, 1}
    return turns or node.target is aten.t.default


def is_scores(node: fx.Node) -> bool:
    """Whether it is a product of matrices, or what calls on matrices make of one."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.target in PRODUCTS:
            return True
        read = [n for n in node.all_input_nodes if _is_matrix(n) and n not in seen]
        seen.update(read)
        stack += read
    return False


def leads_to_turned(node: fx.Node) -> bool:
    """Whether it is pointwise, and pointwise calls lead to it from a matrix that was turned."""
    if not is_pointwise(node):
        return False
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if turns(node):
            return True
        if is_pointwise(node) and _is_matrix(node):
            read = [n for n in node.all_input_nodes if n not in seen]
            seen.update(read)
            stack += read
    return False


def _is_matrix(node: fx.Node) -> bool:
    value = meta.value(node)
    return isinstance(value, torch.Tensor) and value.dim() == 2 and 1 not in value.shape


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of what it makes is of the same element of what it reads."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in (aten._to_copy.default, aten.clone.default)


def is_one_of_each_row(where: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indices of a matrix are the numbers of its rows, in order, and as many of columns."""
    if len(where) != 2 or len(shape) != 2 or not all(isinstance(n, fx.Node) for n in where):
        return False
    rows, columns = where
    given = rows.args if rows.target is not aten.arange.default else (0, *rows.args)
    counts = rows.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
    every = counts and given in ((0, shape[0]), (0, shape[0], 1))
    return every and shape_of(columns) == (shape[0],) and not meta.tensor(columns).is_floating_point()
