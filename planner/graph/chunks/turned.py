"""Losses over the second dim, as ``cross_entropy(scores.transpose(1, 2), labels)``, restated over the last.

torch wants the classes of ``(batch, classes, length)`` in the second dim, so scores that a linear layer made
as ``(batch, length, classes)`` are turned for it, and their rows are no rows any more.  From there on, by
a softmax over the second dim, until it is turned back, each call is restated on the tensor as it was: the
softmax over the last dim, ``nll_loss2d`` as ``nll_loss`` of rows in the same order, pointwise calls as they
are.  The numbers are the same; sums along the vocabulary may be taken in another order.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph.chunks.rules import SOFTMAXES
from planner.graph.draft import Draft

__all__ = ["turned_back"]

aten = torch.ops.aten

_COPIES = frozenset({aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default})
_BACKWARDS = frozenset({aten._log_softmax_backward_data.default, aten._softmax_backward_data.default})


def turned_back(draft: Draft) -> None:
    """Restate such losses of ``draft``; where one has a call that cannot be, that part stays as it was."""
    writer = _Writer(draft)
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and not isinstance(node.target, str):
            writer.visit(node)
    if writer.known:
        draft.sweep()


def _turns(node: Any) -> bool:
    """Whether it swaps the last two dims of three."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is aten.permute.default:
        return [d % 3 for d in node.args[1]] == [0, 2, 1]  # type: ignore[operator, union-attr]
    if node.target is not aten.transpose.int or meta.tensor(node).dim() != 3:
        return False
    return {d % 3 for d in node.args[1:] if isinstance(d, int)} == {1, 2}


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in _COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _comes_from_turned(node: Any) -> bool:
    """Whether pointwise calls of one operand lead back to what was turned."""
    while isinstance(node, fx.Node) and not _turns(node):
        if node.op != "call_function" or not _is_pointwise(node) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node)


class _Writer:
    """``known``: node of ``(batch, classes, length)`` -> the same as ``(batch, length, classes)``.

    ``flat``: the same of nodes with a dim of one between classes and length, as ``nll_loss2d`` wants it.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft, self.graph = draft, draft.graph
        self.known: dict[fx.Node, fx.Node] = {}
        self.flat: dict[fx.Node, fx.Node] = {}
        self.here: fx.Node | None = None

    def visit(self, node: fx.Node) -> None:
        self.here = node
        first = node.args[0] if node.args else None
        if node.target in SOFTMAXES and _is_second(node.args[1]) and _comes_from_turned(first):
            self._lead_up_to(first)  # type: ignore[arg-type]
            self.known[node] = self._call(node.target, self._back(first), 2, *node.args[2:])  # type: ignore
        elif not any(n in self.known or n in self.flat for n in node.all_input_nodes):
            return
        elif _turns(node):
            self.draft.replace(node, self.known[node.args[0]])  # type: ignore[index]
        elif node.target is aten.view.default:
            self._view(node)
        elif node.target is aten.nll_loss2d_forward.default:
            self._loss(node)
        elif node.target is aten.nll_loss2d_backward.default:
            self._loss_backward(node)
        elif node.target in _BACKWARDS and _is_second(node.args[2]):
            made = (self._back(n) for n in node.args[:2])  # type: ignore[arg-type]
            self.known[node] = self._call(node.target, *made, 2, *node.args[3:])
        elif node.target is aten.sum.dim_IntList and first in self.known and node.args[1:] == ([1],):
            self.draft.replace(node, self._call(node.target, self.known[first], [2]))  # type: ignore[index]
        elif _is_pointwise(node):
            self._pointwise(node)

    def _lead_up_to(self, node: fx.Node) -> None:
        """Restate the pointwise calls between what was turned and ``node``, it included."""
        if not _turns(node) and node not in self.known:
            self._lead_up_to(node.all_input_nodes[0])
            self._pointwise(node)

    def _back(self, node: fx.Node) -> fx.Node:
        if node in self.known:
            return self.known[node]
        return node.args[0] if _turns(node) else self._call(aten.transpose.int, node, 1, 2)  # type: ignore

    def _view(self, node: fx.Node) -> None:
        x, shape = node.args[0], tuple(meta.tensor(node).shape)
        own = self.known.get(x) or self.flat.get(x)  # type: ignore[arg-type]
        if own is None:
            return
        batch, length, classes = meta.tensor(own).shape
        if shape == (batch, classes, 1, length):
            self.flat[node] = own
        elif shape == (batch, classes, length):
            self.known[node] = own

    def _rows(self, node: fx.Node) -> fx.Node:
        batch, length, classes = meta.tensor(self.flat[node]).shape
        return self._call(aten.reshape.default, self.flat[node], [batch * length, classes])

    def _labels(self, node: Any) -> fx.Node:
        return self._call(aten.reshape.default, node, [meta.tensor(node).numel()])

    def _loss(self, node: fx.Node) -> None:
        x, target, *others = node.args
        if x not in self.flat:
            return
        made = self._call(aten.nll_loss_forward.default, self._rows(x), self._labels(target), *others)  # type: ignore
        for user in list(node.users):
            part = self._call(operator.getitem, made, user.args[1])
            if meta.tensor(part).shape != meta.tensor(user).shape:  # each row's own
                part = self._call(aten.view.default, part, list(meta.tensor(user).shape))
            self.draft.replace(user, part)

    def _loss_backward(self, node: fx.Node) -> None:
        gradient, x, target, *others = node.args
        if x not in self.flat:
            return
        if meta.tensor(gradient).dim():  # type: ignore[arg-type]
            gradient = self._labels(gradient)
        rows = self._rows(x)  # type: ignore[arg-type]
        made = self._call(aten.nll_loss_backward.default, gradient, rows, self._labels(target), *others)
        shape = list(meta.tensor(self.flat[x]).shape)  # type: ignore[index]
        self.flat[node] = self._call(aten.view.default, made, shape)

    def _pointwise(self, node: fx.Node) -> None:
        shape = meta.tensor(node).shape
        sizes = {n: meta.tensor(n).shape for n in node.all_input_nodes}
        if len(shape) != 3 or any(size not in (shape, ()) for size in sizes.values()):
            return
        back = {n: self._back(n) if sizes[n] else n for n in sizes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), back.__getitem__)
        self.known[node] = self._call(node.target, *args, **kwargs)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        assert self.here is not None
        name = getattr(target, "__name__", str(target)).split(".")[0].strip("_")
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node("call_function", target, args, kwargs, name=f"{name}_by_rows")
        values, named = fx.map_arg((args, kwargs), meta.value)
        like = self.here
        first = next(n for n in node.all_input_nodes)
        fake = meta.value(first)
        fake = fake[0] if isinstance(fake, tuple) else fake
        with _compat.fake_mode_of(fake), torch.no_grad():
            meta.describe(node, target(*values, **named), like)
        return node


def _is_second(dim: Any) -> bool:
    return isinstance(dim, int) and dim % 3 == 1
