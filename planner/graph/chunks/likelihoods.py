"""``nll_loss`` of rows in chunks: each row's log-likelihood is picked, and eager's kernel sums them up.

Of every chunk only the picked numbers stay, one a row.  The loss is eager's kernel on those of all rows, as
log-likelihoods of one class, so that the same numbers are added up in the same order; where classes are
weighted, which the kernel then cannot look up, it is written out.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import fx

from planner.capture import meta

__all__ = ["NO_LABEL", "Likelihoods"]

aten = torch.ops.aten

NO_LABEL = -100  # in the labels that summed log-likelihoods get


class Writes(Protocol):
    """Whoever adds calls to the graph."""

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        """A further call, which does a part of what ``like`` does."""
        ...

    def part(self, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
        """One result of a call that has several."""
        ...

    def outside(self, node: fx.Node) -> fx.Node:
        """What is read of the rest of the step."""
        ...


class Likelihoods:
    """Those of the losses of one region of ``count`` rows.

    ``counted``  what is divided by for a mean -> the same, known before the loss is.
    """

    def __init__(self, writer: Writes, count: int) -> None:
        self.writer, self.count = writer, count
        self.counted: dict[fx.Node, fx.Node] = {}
        self._labels: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # loss -> labels, 0 if ignored; which are
        self._weights: dict[fx.Node, fx.Node] = {}  # loss -> weight of each row
        self._picked: dict[fx.Node, list[fx.Node]] = {}

    def read_labels(self, loss: fx.Node, *, count: bool) -> None:
        """Labels with 0 where they are ignored, and which those are; ``count``: also what the rows weigh."""
        _, target, weight, _, ignored = loss.args
        assert isinstance(target, fx.Node)
        call, target = self.writer.call, self.writer.outside(target)
        missing = call(aten.eq.Scalar, (target, ignored), {}, loss)
        labels = call(aten.masked_fill.Scalar, (target, missing, 0), {}, loss)
        self._labels[loss] = labels, missing
        total = next((n for n in loss.users if n.args[1] == 1), None)
        if isinstance(weight, fx.Node):
            each = call(aten.index_select.default, (self.writer.outside(weight), 0, labels), {}, loss)
            self._weights[loss] = call(aten.masked_fill.Scalar, (each, missing, 0), {}, loss)
        if total is None or not count:
            return
        if loss in self._weights:
            self.counted[total] = call(aten.sum.default, (self._weights[loss],), {}, loss)
            return
        like = meta.tensor(total)
        kwargs = {"dtype": like.dtype, "device": like.device}
        nothing = call(aten.zeros.default, ([self.count, 1],), kwargs, loss)
        self.counted[total] = self.writer.part(self._summed(loss, nothing), 1, loss)

    def pick(self, loss: fx.Node, logs: fx.Node, bounds: tuple[int, int]) -> None:
        """The log-likelihood at each label of the rows within ``bounds``, of which ``logs`` are."""
        call = self.writer.call
        rows = call(aten.slice.Tensor, (self._labels[loss][0], 0, *bounds), {}, loss)
        column = call(aten.unsqueeze.default, (rows, 1), {}, loss)
        picked = call(aten.gather.default, (logs, 1, column), {}, loss)
        self._picked.setdefault(loss, []).append(picked)

    def sums_of(self, loss: fx.Node) -> dict[fx.Node, fx.Node]:
        """Each result of the loss -> the same, of all that was picked."""
        call = self.writer.call
        picked = call(aten.cat.default, (self._picked.pop(loss),), {}, loss)
        parts: dict[int, fx.Node] = {user.args[1]: user for user in loss.users}  # type: ignore[misc]
        if loss not in self._weights:
            whole = self._summed(loss, picked)
            return {old: self.writer.part(whole, index, old) for index, old in parts.items()}
        weights, reduction = self._weights[loss], loss.args[3]
        flat = call(aten.view.default, (picked, [self.count]), {}, loss)
        each = call(aten.neg.default, (call(aten.mul.Tensor, (flat, weights), {}, loss),), {}, loss)
        total = self.counted.get(parts[1]) if 1 in parts else None
        total = total or call(aten.sum.default, (weights,), {}, loss)
        summed = each if reduction == 0 else call(aten.sum.default, (each,), {}, loss)
        if reduction == 1:
            summed = call(aten.div.Tensor, (summed, total), {}, loss)
        return {old: (summed, total)[index] for index, old in parts.items()}

    def _summed(self, loss: fx.Node, picked: fx.Node) -> fx.Node:
        """The kernel of ``loss`` on log-likelihoods of one class."""
        call, (like, missing) = self.writer.call, self._labels[loss]
        labels = call(aten.zeros_like.default, (like,), {}, loss)
        labels = call(aten.masked_fill.Scalar, (labels, missing, NO_LABEL), {}, loss)
        return call(loss.target, (picked, labels, None, loss.args[3], NO_LABEL), {}, loss)
