"""Softmaxes along the columns of scores, as of in-batch losses in both directions, restated on their rows.

CLIP's loss (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3) reads one matrix of scores along
its rows and along its columns: ``cross_entropy(scores.T, labels)``.  Of a column, a softmax needs two numbers
of all rows: the largest score and the sum of the exponentials below it.  With these every call along columns
is one on each row by itself::

    log_softmax(scores.T)      scores - top - log_sum, a number of each column taken off each row
    its negative likelihoods   of the score at a column's label, which a mask by row and column picks
    its gradient               g - exp(log_softmax) * sums of g along the columns

So what is read of turned scores is written on the scores as they are, until it is turned back.  The two
numbers, the largest score and :func:`~planner.graph.kernels.log_sum_below`, are what
:mod:`~planner.graph.chunks.write` makes chunk by chunk, as running ones (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867, algorithm 3).  ``top`` is exact in whatever order; what differs from eager's
is the order of the sum below it, of which every term is positive.  Of ``n`` rows in ``c`` chunks either sum
has at most ``n`` roundings on the way of a term, ours four more a chunk, where it is rescaled; a logarithm
makes an absolute error of that.  Neither ``top - score`` nor ``log_sum`` is negative, so neither is larger
than their sum, the loss.  With ``u`` half the distance from 1 to the next number, two losses differ by at
most ``u (2 n + 8 c + 4 loss)``, whatever the scores.

Whatever has no such form stays as it was, and is then in the way of chunks.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.chunks.likelihoods import NO_LABEL
from planner.graph.chunks.matrices import (
    PRODUCTS,
    args_of,
    is_one_of_each_row,
    is_pointwise,
    is_scores,
    leads_to_turned,
    turns,
)
from planner.graph.chunks.rows import shape_of
from planner.graph.draft import Draft

__all__ = ["by_rows", "made_whole"]

aten = torch.ops.aten

_LINEAR = frozenset({aten.add.Tensor, aten.sub.Tensor})


def by_rows(draft: Draft) -> None:
    """Restate softmaxes along columns of ``draft``, and what is read of them."""
    writer = _Writer(draft)
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and isinstance(meta.value(node), (torch.Tensor, tuple, list)):
            writer.visit(node)
    draft.sweep()


def made_whole(draft: Draft) -> None:
    """What was restated and is of no loss in chunks: :func:`~planner.graph.kernels.log_sum_below` by aten."""
    for node in [n for n in draft.graph.nodes if n.target is kernels.log_sum_below]:
        writer = _Writer(draft)
        writer.here = node
        below = writer.call(aten.sub.Tensor, *args_of(node))
        total = writer.call(aten.sum.dim_IntList, writer.call(aten.exp.default, below), [0])
        draft.replace(node, writer.call(aten.log.default, total))
        draft.graph.erase_node(node)


class _Writer:
    """``known``: node of ``(columns, rows)`` -> the same as ``(rows, columns)``.

    ``parts``: a log-softmax along columns, as rows -> the scores, their largest and the sum below it.
    ``shares``: softmaxes along columns, as rows.
    ``sums``: of a node as rows, its sums along columns, as one row.
    ``picks``: labels of columns, and which label is ignored -> where a row is not a column's label.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft, self.graph = draft, draft.graph
        self.known: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
        self.shares: set[fx.Node] = set()
        self.sums: dict[fx.Node, fx.Node] = {}
        self.numbers: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
        self.picks: dict[tuple[Any, ...], tuple[fx.Node, fx.Node]] = {}
        self.here: fx.Node | None = None
        self.shapes = {shape_of(n) for n in self.graph.nodes if n.target in PRODUCTS}

    def visit(self, node: fx.Node) -> None:
        self.here = node
        rule = _RULES.get(node.target)
        if rule is not None and rule(self, node):
            return
        first = args_of(node)[0] if args_of(node) else None
        if turns(node) and first in self.known:
            self.draft.replace(node, self.known[first])
        elif (
            node not in self.known and is_pointwise(node) and any(map(self._is_turned, node.all_input_nodes))
        ):
            self._pointwise(node)

    def _is_turned(self, node: fx.Node) -> bool:
        """Whether it is restated, or are scores whose columns are read, turned."""
        return node in self.known or (turns(node) and args_of(node)[0] in self.numbers)

    # -- scores ----------------------------------------------------------------------------------

    def back(self, node: Any) -> fx.Node | None:
        """What is turned, as rows; ``None`` where it is no such thing."""
        if node in self.known:
            return self.known[node]
        if isinstance(node, fx.Node) and leads_to_turned(node):  # casts and caps of what was turned
            for n in node.all_input_nodes:
                self.back(n)
            self._pointwise(node)
            return self.known.get(node)
        return args_of(node)[0] if turns(node) else None

    def _along_columns(self, node: fx.Node, dim: Any) -> fx.Node | None:
        """The scores along whose columns a reduction of ``node`` over ``dim`` goes."""
        x = args_of(node)[0]
        if not isinstance(dim, int) or len(shape_of(x)) != 2:
            return None
        scores = self.back(x) if dim % 2 == 1 else x
        return scores if isinstance(scores, fx.Node) and is_scores(scores) else None

    def _numbers(self, scores: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Scores, in float32 at least; of each column the largest, and the logarithm of the sum below it.

        A column that is masked out has ``-inf`` there, below which nothing is: the lowest number is.
        """
        if scores not in self.numbers:
            dtype = torch.promote_types(meta.tensor(scores).dtype, torch.float32)
            same = meta.tensor(scores).dtype == dtype
            wide = scores if same else self.call(aten._to_copy.default, scores, dtype=dtype)
            top = self.call(aten.amax.default, wide, [0])
            top = self.call(aten.clamp_min.default, top, torch.finfo(dtype).min)
            self.numbers[scores] = wide, top, self.call(kernels.log_sum_below, wide, top)
        return self.numbers[scores]

    def log_softmax(self, node: fx.Node) -> bool:
        dim = args_of(node)[1]
        scores = self._along_columns(node, dim)
        if scores is None:
            return False
        parts = self._numbers(scores)
        made = self._as(self._below(*parts), node)
        self.parts[made] = parts
        if dim % 2 == 1:
            self.known[node] = made
        else:
            self.draft.replace(node, made)
        return True

    def _below(self, scores: fx.Node, top: fx.Node, log_sum: fx.Node) -> fx.Node:
        """In the order of eager's kernel, which takes off first the one and then the other."""
        return self.call(aten.sub.Tensor, self.call(aten.sub.Tensor, scores, top), log_sum)

    def logsumexp(self, node: fx.Node) -> bool:
        dims = args_of(node)[1]
        scores = self._along_columns(node, dims[0]) if len(dims) == 1 else None
        if scores is None:
            return False
        _, top, log_sum = self._numbers(scores)
        made = self._as(self.call(aten.add.Tensor, top, log_sum), node)
        self.draft.replace(node, self._shaped(made, node))
        return True

    def log_softmax_backward(self, node: fx.Node) -> bool:
        gradient, logs, dim = args_of(node)[:3]
        turned = isinstance(dim, int) and dim % 2 == 1
        logs = self.known.get(logs) if turned else logs
        if logs not in self.parts:
            return False
        gradient = self._turned(gradient) if turned else gradient
        if gradient is None:
            return False
        if gradient not in self.sums:
            self.sums[gradient] = self.call(aten.sum.dim_IntList, gradient, [0], True)
        share = self.call(aten.mul.Tensor, self.call(aten.exp.default, logs), self.sums[gradient])
        made = self._as(self.call(aten.sub.Tensor, gradient, share), node)
        if turned:
            self.known[node] = made
        else:
            self.draft.replace(node, made)
        return True

    def softmax(self, node: fx.Node) -> bool:
        dim = args_of(node)[1]
        scores = self._along_columns(node, dim)
        if scores is None:
            return False
        made = self._as(self.call(aten.exp.default, self._below(*self._numbers(scores))), node)
        self.shares.add(made)
        if dim % 2 == 1:
            self.known[node] = made
        else:
            self.draft.replace(node, made)
        return True

    def softmax_backward(self, node: fx.Node) -> bool:
        gradient, made, dim = args_of(node)[:3]
        turned = isinstance(dim, int) and dim % 2 == 1
        made = self.known.get(made) if turned else made
        gradient = self._turned(gradient) if turned else gradient
        if made not in self.shares or gradient is None:
            return False
        each = self.call(aten.mul.Tensor, gradient, made)
        share = self.call(aten.mul.Tensor, made, self.call(aten.sum.dim_IntList, each, [0], True))
        result = self._as(self.call(aten.sub.Tensor, each, share), node)
        if turned:
            self.known[node] = result
        else:
            self.draft.replace(node, result)
        return True

    # -- labels of columns -----------------------------------------------------------------------

    def _pick(self, labels: Any, ignored: Any, shape: tuple[int, ...]) -> tuple[fx.Node, fx.Node]:
        """Where a row is not its column's label; and, of each column, 0, or that it has no label.

        Labels that are no row are found by who looks them up, as eager's kernel finds them.
        """
        key = labels, ignored, shape
        if key not in self.picks:
            like = meta.tensor(labels)
            rows = self.call(aten.arange.default, shape[0], dtype=like.dtype, device=like.device)
            missing = self.call(aten.eq.Scalar, labels, ignored)
            at = self.call(aten.masked_fill.Scalar, labels, missing, 0)
            at = self.call(aten.index_select.default, rows, 0, at)
            row, column = (
                self.call(aten.view.default, rows, [-1, 1]),
                self.call(aten.view.default, at, [1, -1]),
            )
            zeros = self.call(aten.zeros_like.default, labels)
            none = self.call(aten.masked_fill.Scalar, zeros, missing, NO_LABEL)
            self.picks[key] = self.call(aten.ne.Tensor, row, column), none
        return self.picks[key]

    def _picked(self, logs: fx.Node, elsewhere: fx.Node) -> fx.Node:
        """The logarithm at each column's label: of the score there, so that it needs no second look."""
        scores, top, log_sum = self.parts[logs]
        there = self.call(aten.masked_fill.Scalar, scores, elsewhere, 0)
        there = self.call(aten.sum.dim_IntList, there, [0])
        made = self._below(there, top, log_sum)
        return self._as(made, logs)

    def likelihoods(self, node: fx.Node) -> bool:
        x, labels, weight, reduction, ignored = args_of(node)
        logs = self.known.get(x)
        if logs not in self.parts or not isinstance(labels, fx.Node):
            return False
        elsewhere, none = self._pick(labels, ignored, shape_of(logs))
        for user in list(node.users):
            if user.args[1] == 1 and weight is None:  # how many have labels: nobody needs the scores for it
                picked = self._nothing(logs)
            else:
                picked = self._picked(logs, elsewhere)
            made = self._likelihoods_of(picked, none, self._weights(weight, labels, ignored), reduction)
            self.draft.replace(user, made[int(args_of(user)[1])])
        return True

    def _likelihoods_of(self, picked: fx.Node, none: fx.Node, weights: Any, reduction: Any) -> list[fx.Node]:
        """``nll_loss`` of what was picked: by its own kernel, but for weights: it wants one a class."""
        if weights is None:
            column = self.call(aten.view.default, picked, [-1, 1])
            made = self.call(aten.nll_loss_forward.default, column, none, None, reduction, NO_LABEL)
            return [self.call(operator.getitem, made, i) for i in (0, 1)]
        each = self.call(aten.neg.default, self.call(aten.mul.Tensor, picked, weights))
        total = self.call(aten.sum.default, weights)
        if reduction == 0:
            return [each, total]
        summed = self.call(aten.sum.default, each)
        return [summed if reduction == 2 else self.call(aten.div.Tensor, summed, total), total]

    def _weights(self, weight: Any, labels: fx.Node, ignored: Any) -> fx.Node | None:
        """What each column weighs: as its label does, and nothing where that is ignored."""
        if not isinstance(weight, fx.Node):
            return None
        missing = self.call(aten.eq.Scalar, labels, ignored)
        at = self.call(aten.masked_fill.Scalar, labels, missing, 0)
        each = self.call(aten.index_select.default, weight, 0, at)
        return self.call(aten.masked_fill.Scalar, each, missing, 0)

    def _nothing(self, logs: fx.Node) -> fx.Node:
        value = meta.tensor(logs)
        return self.call(aten.zeros.default, [value.shape[1]], dtype=value.dtype, device=value.device)

    def likelihoods_backward(self, node: fx.Node) -> bool:
        gradient, x, labels, weight, reduction, ignored, total = args_of(node)
        logs = self.known.get(x)
        if logs not in self.parts or not isinstance(labels, fx.Node):
            return False
        elsewhere, none = self._pick(labels, ignored, shape_of(logs))
        weights = self._weights(weight, labels, ignored)
        if weights is None or reduction != 1:
            column = self.call(aten.view.default, self._nothing(logs), [-1, 1])
            each = self.call(
                aten.nll_loss_backward.default, gradient, column, none, None, reduction, NO_LABEL, total
            )
            each = self.call(aten.view.default, each, [1, -1])
        else:
            each = self.call(aten.neg.default, self.call(aten.div.Tensor, gradient, total))
        if weights is not None:
            each = self.call(aten.mul.Tensor, each, self.call(aten.view.default, weights, [1, -1]))
        self.known[node] = self._at(each, elsewhere)
        return True

    def _at(self, each: fx.Node, elsewhere: fx.Node) -> fx.Node:
        """Zeros, and a number of each column at its label."""
        spread = self.call(aten.expand.default, each, list(shape_of(elsewhere)))
        made = self.call(aten.masked_fill.Scalar, spread, elsewhere, 0)
        self.sums[made] = each
        return made

    # -- the diagonal, which is where both ways meet ----------------------------------------------

    def _off_diagonal(self, like: Any) -> fx.Node | None:
        shape = shape_of(like)
        if len(shape) != 2 or shape[0] != shape[1]:
            return None
        key = (None, shape)
        if key not in self.picks:
            rows = self.call(aten.arange.default, shape[0], device=meta.tensor(like).device)
            row, column = (self.call(aten.view.default, rows, sizes) for sizes in ([-1, 1], [1, -1]))
            self.picks[key] = self.call(aten.ne.Tensor, row, column), rows
        return self.picks[key][0]

    def diagonal(self, node: fx.Node) -> bool:
        x = args_of(node)[0]
        if args_of(node)[1:] not in ((), (0,), (0, 0, 1)) or not (x in self.known or is_scores(x)):
            return False
        x = self.known.get(x, x)
        elsewhere = self._off_diagonal(x)
        if elsewhere is None:
            return False
        if x in self.parts:
            made = self._picked(x, elsewhere)
        else:
            made = self.call(aten.masked_fill.Scalar, x, elsewhere, 0)
            made = self.call(aten.sum.dim_IntList, made, [0])
        self.draft.replace(node, made)
        return True

    def diagonal_backward(self, node: fx.Node) -> bool:
        if args_of(node)[2:] != (0, 0, 1) or (None, shape_of(node)) not in self.picks:
            return False
        elsewhere = self._off_diagonal(node)
        assert elsewhere is not None
        self.draft.replace(node, self._at(self.call(aten.view.default, args_of(node)[0], [1, -1]), elsewhere))
        return True

    def indexed(self, node: fx.Node) -> bool:
        """One of each row, by a number for every row beside their own: what ``gather`` takes."""
        x, where = args_of(node)[:2]
        if not isinstance(x, fx.Node) or not is_one_of_each_row(where, shape_of(x)) or not is_scores(x):
            return False
        column = self.call(aten.unsqueeze.default, where[1], 1)
        self.draft.replace(node, self.call(aten.squeeze.dim, self.call(aten.gather.default, x, 1, column), 1))
        return True

    def index_put(self, node: fx.Node) -> bool:
        """Its gradient, or a number written over one of each row."""
        x, where, values, *adds = args_of(node)
        if not is_one_of_each_row(where, shape_of(node)) or shape_of(node) not in self.shapes:
            return False
        column = self.call(aten.unsqueeze.default, where[1], 1)
        each = values if shape_of(values) else self.call(aten.expand.default, values, [shape_of(node)[0]])
        each = self.call(aten.unsqueeze.default, each, 1)
        target = aten.scatter_add.default if adds and adds[0] else aten.scatter.src
        self.draft.replace(node, self.call(target, x, 1, column, each))
        return True

    def eye(self, node: fx.Node) -> bool:
        """As large as scores, which it is for: where rows meet columns, so that it is made row by row."""
        shape = shape_of(node)
        if shape not in self.shapes or (elsewhere := self._off_diagonal(node)) is None:
            return False
        ones = self.call(aten.logical_not.default, elsewhere)
        self.draft.replace(node, self.call(aten._to_copy.default, ones, dtype=meta.tensor(node).dtype))
        return True

    # -- other calls -----------------------------------------------------------------------------

    def summed(self, node: fx.Node) -> bool:
        """Along columns, or of all."""
        logs = self.known.get(args_of(node)[0])
        if logs is not None and node.target is aten.sum.default:
            self.draft.replace(node, self.call(node.target, logs, **node.kwargs))
            return True
        if logs is None or [d % 2 for d in args_of(node)[1]] != [1]:
            return False
        self.draft.replace(node, self._shaped(self.call(aten.sum.dim_IntList, logs, [0]), node))
        return True

    def _turned(self, node: Any) -> fx.Node | None:
        """An operand, as rows; from outside it is turned, and its sums may be known."""
        if not isinstance(node, fx.Node):
            return None
        if (made := self.back(node)) is not None:
            return made
        if node.target is aten.expand.default and shape_of(args_of(node)[0]) == (shape_of(node)[0], 1):
            each = self.call(aten.t.default, args_of(node)[0])
            made = self.call(aten.expand.default, each, list(reversed(shape_of(node))))
            self.sums[made] = self.call(aten.mul.Tensor, each, shape_of(node)[1])
            return made
        return self.call(aten.t.default, node) if len(shape_of(node)) == 2 else None

    def _pointwise(self, node: fx.Node) -> None:
        made: dict[fx.Node, fx.Node] = {}
        for n in node.all_input_nodes:
            turned = n if not shape_of(n) else self._turned(n)
            if turned is None:
                return
            made[n] = turned
        args, kwargs = fx.map_arg((args_of(node), node.kwargs), made.__getitem__)
        new = self.known[node] = self.call(node.target, *args, **kwargs)
        if node.target in _LINEAR and not node.kwargs and all(n in self.sums for n in made.values()):
            self.sums[new] = self.call(node.target, *(self.sums[made[n]] for n in args_of(node)))

    # -- calls -----------------------------------------------------------------------------------

    def _as(self, made: fx.Node, like: fx.Node) -> fx.Node:
        """In the type of ``like``."""
        dtype = meta.tensor(like).dtype
        same = meta.tensor(made).dtype == dtype
        return made if same else self.call(aten._to_copy.default, made, dtype=dtype)

    def _shaped(self, made: fx.Node, like: fx.Node) -> fx.Node:
        """In the sizes of ``like``."""
        sizes = shape_of(like)
        return made if shape_of(made) == sizes else self.call(aten.view.default, made, list(sizes))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A further call, before the one that is looked at, which does a part of its work."""
        assert self.here is not None
        name = getattr(target, "__name__", str(target)).split(".")[0].strip("_")
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node("call_function", target, args, kwargs, name=f"{name}_by_columns")
        values, named = fx.map_arg((args, kwargs), meta.value)
        fake = meta.value(next(iter(node.all_input_nodes), self.here))
        fake = fake[0] if isinstance(fake, (tuple, list)) else fake
        with _compat.fake_mode_of(fake), torch.no_grad():
            meta.describe(node, target(*values, **named), self.here)
        return node


_RULES: Mapping[Any, Any] = MappingProxyType(
    {
        aten._log_softmax.default: _Writer.log_softmax,
        aten.logsumexp.default: _Writer.logsumexp,
        aten._softmax.default: _Writer.softmax,
        aten._softmax_backward_data.default: _Writer.softmax_backward,
        aten._log_softmax_backward_data.default: _Writer.log_softmax_backward,
        aten.nll_loss_forward.default: _Writer.likelihoods,
        aten.nll_loss_backward.default: _Writer.likelihoods_backward,
        aten.diagonal.default: _Writer.diagonal,
        aten.diagonal_copy.default: _Writer.diagonal,
        aten.diagonal_backward.default: _Writer.diagonal_backward,
        aten.eye.default: _Writer.eye,
        aten.index.Tensor: _Writer.indexed,
        aten.index_put.default: _Writer.index_put,
        aten.sum.default: _Writer.summed,
        aten.sum.dim_IntList: _Writer.summed,
    }
)
