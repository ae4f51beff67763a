"""Writes a region's calls once for each chunk of rows, as ordinary calls of aten.

A loss's gradient is linear in the gradient that the loss gets.  So where that is one number, each chunk's
gradient can be computed for the number one right behind its loss, in the forward, and multiplied later;
nothing as wide as the vocabulary crosses to the backward and no product runs twice, which is the idea of
Liger Kernel's fused linear cross entropy (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).  That is the
form *ahead*.  It is not taken where the gradient is float16, which a small unscaled gradient underflows,
where several gradients come or none is known to be one number, and where the backward reads a sum over all
rows that only the last chunk completes.  Then the chunks' backward is written *behind*, where it was, and
what it reads of a chunk is kept or computed again as a plan decides, as in Cut Your Losses (Wijmans et al.
2024, https://arxiv.org/abs/2411.09009).

Ordinary calls and not one call with scratch: a solver then sees each chunk's bytes and seconds, may keep some
of them, and what is generated can be read.  The weight's gradient is added up by ``addmm`` in its own
storage, where nobody reads the sum before (``GraphOp.reuses``); that of a weight of half precision in
float32, since eager rounds once and a sum of rounded parts would as often as there are chunks.

Where rows are read with numbers of all rows, as scores with those of their columns, the rows are gone through
once more, from the product on: ahead that is one product again, and behind what a plan recomputes.

The loss is summed by the kernel that eager calls (:mod:`~planner.graph.chunks.likelihoods`); sums over rows
that lead to gradients are made in another order than eager's, and are the only numbers that differ for that.

Known limits: sizes are fixed; where the model returns its logits they are made whole, and read in chunks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.chunks.chunked import Chunked, Form
from planner.graph.chunks.columns import by_rows, made_whole
from planner.graph.chunks.likelihoods import Likelihoods
from planner.graph.chunks.ordering import reorder
from planner.graph.chunks.passes import Pass, passes_of
from planner.graph.chunks.products import of_matrices
from planner.graph.chunks.region import NotInRows, Region, regions_of, rows_per_chunk
from planner.graph.chunks.rows import ROWS_LAST, Rows
from planner.graph.chunks.rules import averages, factory_of
from planner.graph.chunks.turned import turned_back
from planner.graph.draft import Did, Draft
from planner.graph.nodes import is_mutation, is_random

__all__ = ["chunk_loss"]

aten = torch.ops.aten


class _Barrier(Exception):
    """The backward cannot run chunk by chunk in the forward."""


def chunk_loss(draft: Draft, chunks: int) -> Did:
    """Compute the draft's loss in so many chunks of rows, and note in it what was done.

    Raises :class:`~planner.graph.chunks.region.NotInRows` where that cannot be.
    """
    if draft.sizes:
        raise NotInRows(
            "sizes that vary cannot be cut into chunks that are known beforehand: plan with dynamic=False, "
            "or with chunk_loss=False"
        )
    of_matrices(draft)
    turned_back(draft)
    by_rows(draft)
    calls, feeds = 0, _feeds(draft)
    for region in regions_of(draft):
        if chunks > region.count:
            raise NotInRows(
                f"chunk_loss={chunks} is more than the {region.count} rows behind {region.head.name}: "
                f"{region.count} chunks are the most there can be"
            )
        calls += _written(draft, region, chunks, feeds)
    made_whole(draft)
    return {"losses": len(draft.chunked), "calls": calls}


def _feeds(draft: Draft) -> tuple[tuple[int, int], ...]:
    found = []
    for i, output in enumerate(draft.outputs):
        behind = _needing(draft.graph, {output}) - {output}
        found += [(i, j) for j, other in enumerate(draft.outputs) if other in behind]
    return tuple(found)


def _written(draft: Draft, region: Region, chunks: int, feeds: tuple[tuple[int, int], ...]) -> int:
    later = _needing(draft.graph, set(draft.tangents.values()))
    ahead = not any(_is_half(n) for n in region.exits(set()) if n in later)
    written = _Writer(draft, region, chunks, later, ahead=ahead)
    try:
        written.run()
    except _Barrier:
        written.undo()
        written = _Writer(draft, region, chunks, later, ahead=False)
        written.run()
    head = meta.module(region.head) or ""
    form: Form = "ahead" if written.ahead else "behind"
    made = Chunked(head, region.count, region.width, len(written.bounds), form, region.is_made, feeds)
    draft.chunked.append(made)
    return written.finish()


def _is_narrow(node: fx.Node) -> bool:
    """Whether a sum of many such would lose what eager's one product does not: it is added up in float32."""
    return meta.tensor(node).dtype in (torch.float16, torch.bfloat16)


def _is_half(node: fx.Node) -> bool:
    return meta.tensor(node).dtype == torch.float16


def _needing(graph: fx.Graph, given: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are computed from ``given``, themselves included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in given or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


@dataclass(eq=False)
class _Block:
    """Calls that were added together, in this order."""

    nodes: list[fx.Node] = field(default_factory=list)


class _Writer:
    """Adds the chunks' calls to the end of the graph; :meth:`finish` puts them where they belong."""

    def __init__(
        self, draft: Draft, region: Region, chunks: int, later: set[fx.Node], *, ahead: bool
    ) -> None:
        self.draft, self.graph, self.region = draft, draft.graph, region
        self.later, self.ahead = later, ahead
        self.bounds = rows_per_chunk(region.count, chunks)
        self.written, self.early = list(draft.graph.nodes), len(draft.early)
        self.blocks: list[_Block] = []
        self.here = _Block()
        held = {*draft.outputs, *draft.gradients.values(), *draft.mutations.values()}
        whole = {n for n in region.carried if region.is_wide(n)} - later  # made beside, if they are outputs
        self.exits = dict.fromkeys(n for n in region.exits(held) if n not in whole)  # in order
        self.whole: dict[fx.Node, fx.Node] = {}  # of exits, what is there for all rows
        self.pieces: dict[fx.Node, list[fx.Node]] = {}
        self.rows: dict[tuple[fx.Node, int], fx.Node] = {}  # operand from outside, chunk
        self.flat: dict[fx.Node, fx.Node] = {}
        self.hoisted: dict[fx.Node, fx.Node] = {}
        self.env: list[dict[fx.Node, fx.Node]] = [{} for _ in self.bounds]
        self.scaled: dict[fx.Node, fx.Node] = {}  # exit of the backward -> after the loss's gradient came
        self.tops: dict[fx.Node, fx.Node] = {}  # sums below the largest of a column -> that, so far
        self.likelihoods = Likelihoods(self, region.count)
        self.tangent: fx.Node | None = None
        self.numbers: fx.Node | None = None  # of the rows that are worked on, where some are not

    # -- calls -----------------------------------------------------------------------------------

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        """A further call, which does a part of what ``like`` does."""
        name = getattr(target, "__name__", str(target)).split(".")[0].strip("_")
        node = self.graph.create_node("call_function", target, args, kwargs, name=f"{name}_in_chunks")
        values, named = fx.map_arg((args, kwargs), meta.value)
        with _compat.fake_mode_of(meta.tensor(self.region.head)), torch.no_grad():
            meta.describe(node, target(*values, **named), like)
        self.here.nodes.append(node)
        return node

    def part(self, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
        """One result of a call that has several."""
        part = self.graph.create_node(
            "call_function", operator.getitem, (node, index), name=f"{node.name}_{index}"
        )
        meta.describe(part, meta.value(node)[index], like)
        self.here.nodes.append(part)
        return part

    def outside(self, node: fx.Node) -> fx.Node:
        """What is read of the rest of the step; ahead, of its backward, for a loss's gradient of one."""
        node = self.likelihoods.counted.get(node, node)
        if node in self.region.calls and node in self.whole:  # an earlier pass's
            return self.whole[node]
        if not self.ahead or node not in self.later:
            return node
        if node in self.region.calls or node in self.region.losses or is_random(node) or is_mutation(node):
            raise _Barrier
        if node not in self.hoisted:
            if node.op == "placeholder":
                self.hoisted[node] = self._one(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.outside)
                self.hoisted[node] = self.call(node.target, args, kwargs, node)
        return self.hoisted[node]

    def _one(self, tangent: fx.Node) -> fx.Node:
        value = meta.tensor(tangent)
        if value.numel() != 1 or self.tangent not in (None, tangent):
            raise _Barrier
        self.tangent = tangent
        kwargs = {"dtype": value.dtype, "device": value.device}
        return self.call(aten.full.default, (list(value.shape), 1.0), kwargs, tangent)

    def sliced(self, node: fx.Node, lead: int, chunk: int, like: fx.Node) -> fx.Node:
        """The rows of a chunk of an operand from outside."""
        key = node, chunk
        if key not in self.rows:
            a, b = self.bounds[chunk]
            if lead == ROWS_LAST:
                self.rows[key] = self.call(aten.slice.Tensor, (self.outside(node), 1, a, b), {}, like)
            elif (args := factory_of(node, b - a, lead)) is not None:
                args, kwargs = fx.map_arg((args, node.kwargs), self.outside)
                self.rows[key] = self.call(node.target, args, kwargs, node)
            else:
                self.rows[key] = self.call(aten.slice.Tensor, (self._flat(node, lead), 0, a, b), {}, like)
        return self.rows[key]

    def _flat(self, node: fx.Node, lead: int) -> fx.Node:
        """An operand from outside with its rows in one dim."""
        if lead == 1:
            return self.outside(node)
        if node not in self.flat:
            value = meta.tensor(node)
            sizes = [self.region.count, *value.shape[lead:]]
            target = aten.view.default if _is_viewable(value, sizes) else aten.reshape.default
            self.flat[node] = self.call(target, (self.outside(node), sizes), {}, node)
        return self.flat[node]

    def picked(self, node: fx.Node, lead: int, chunk: int, like: fx.Node) -> fx.Node:
        """The same of an operand that has the product's rows, of which some may not be worked on."""
        if self.region.count == self.region.total:
            return self.sliced(node, lead, chunk, like)
        key = node, chunk
        if key not in self.rows:
            a, b = self.bounds[chunk]
            rows = self.call(aten.slice.Tensor, (self._numbers(), 0, a, b), {}, like)
            args = (self.outside(node), 1 if lead == ROWS_LAST else 0, rows)
            self.rows[key] = self.call(aten.index_select.default, args, {}, like)
        return self.rows[key]

    def _numbers(self) -> fx.Node:
        """Which rows of the product are worked on."""
        if self.numbers is None:
            entry = self.region.entry
            x, *where = entry.args
            device = meta.tensor(entry).device
            every = self.call(aten.arange.default, (self.region.total,), {"device": device}, entry)
            sizes = list(meta.tensor(x).shape[:-1])  # type: ignore[arg-type]
            every = self.call(aten.view.default, (every, sizes), {}, entry)
            some = self.call(aten.slice.Tensor, (every, *where), {}, entry)
            self.numbers = self.call(aten.reshape.default, (some, [self.region.count]), {}, entry)
        return self.numbers

    def _product(self, chunk: int) -> fx.Node:
        """The rows of a chunk of the product."""
        head = self.region.head
        if self.region.is_made:
            return self.picked(head, 1, chunk, head)
        rows = self.picked(self.region.operand, 1, chunk, head)
        args, kwargs = fx.map_arg(
            (head.args, head.kwargs), lambda n: rows if n is self.region.operand else self.outside(n)
        )
        return self.call(head.target, args, kwargs, head)

    def _padded(self, node: fx.Node) -> Rows | None:
        own = self.region.calls[node].rows
        return own if own is not None and own.padded and not self.region.calls[node].padded else None

    # -- chunks ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Add all calls: ahead chunk by chunk, behind all chunks of the forward and then of the backward."""
        for loss in self.region.losses:
            self.likelihoods.read_labels(loss, count=self.ahead)
        if self.ahead and not any(n in self.later for n in self.exits):
            raise _Barrier
        for part in passes_of(self.region, self.exits, self.later, self.ahead):
            self._forget(part)
            losses = [n for n in self.region.losses if part.forward and n.args[0] in part.calls]
            for chunk in range(len(self.bounds)):
                for node in part.calls:
                    self._row_call(node, chunk, node in part.wanted)
                    for loss in losses:
                        if loss.args[0] is node:  # now, so that nothing keeps the logarithms for it
                            self.likelihoods.pick(loss, self.env[chunk][node], self.bounds[chunk])
            for loss in losses:
                self.whole.update(self.likelihoods.sums_of(loss))
            for node in part.calls:
                if node in part.wanted:
                    self._join(node)
            self._close()
        if self.ahead:
            self._scale()

    def _forget(self, part: Pass) -> None:
        """What the pass makes from the product on: nothing of a chunk is kept from one to the next."""
        if part.anew:
            self.rows.clear()
            for env in self.env:
                for node in part.calls:
                    env.pop(node, None)

    def _close(self) -> None:
        self.blocks.append(self.here)
        self.here = _Block()

    def _row_call(self, node: fx.Node, chunk: int, is_wanted: bool) -> None:
        region, env = self.region, self.env[chunk]
        if node is region.entry:
            env[node] = self._product(chunk)
            return
        if node.target is aten.slice_backward.default and region.calls[node].rows == self._padded(node):
            env[node] = env[node.args[0]]  # type: ignore[index]
            return
        how, (a, b) = region.calls[node], self.bounds[chunk]
        args = how.args(b - a)
        first = args[0] if args else None
        if isinstance(first, fx.Node) and first in env and _is_same(node, env[first], args):
            env[node] = env[first]
            return

        def operand(n: fx.Node) -> fx.Node:
            if n in env:
                return env[n]
            if n in how.sliced and how.padded:
                return self.picked(n, how.sliced[n], chunk, node)
            if n in how.sliced:
                return self.sliced(n, how.sliced[n], chunk, node)
            if n in how.single:
                rest = list(meta.tensor(n).shape)[-how.single[n] :] if how.single[n] else []
                return self.call(aten.view.default, (self.outside(n), [1, *rest]), {}, node)
            return self.outside(n)

        args, kwargs = fx.map_arg((args, node.kwargs), operand)
        if how.rows is not None:
            env[node] = self.call(node.target, args, kwargs, node)
            if is_wanted:
                self.pieces.setdefault(node, []).append(env[node])
            return
        total = self.whole.get(node)
        if node.target in (aten.amax.default, kernels.log_sum_below):
            self._of_columns(node, args)
            return
        if node.target is aten.mm.default and total is not None and not _is_narrow(node):
            self.whole[node] = self.call(aten.addmm.default, (total, *args), kwargs, node)
            return
        target = node.target
        if target is aten.mean.default:  # made of the sum at the end; in float32, as the kernel adds it up
            target = aten.sum.default
            kwargs = {"dtype": torch.promote_types(meta.tensor(node).dtype, torch.float32), **kwargs}
        part = self.call(target, args, kwargs, node)
        if total is not None:
            self.whole[node] = self.call(kernels.sum_with, (total, part), {}, node)
        elif _is_narrow(node):
            self.whole[node] = self.call(aten._to_copy.default, (part,), {"dtype": torch.float32}, node)
        else:
            self.whole[node] = part

    def _of_columns(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """The largest so far of each column, or the sum below that, for which an earlier sum is rescaled."""
        if node.target is aten.amax.default:
            top = self.call(node.target, args, {}, node)
            before = self.whole.get(node)
            self.whole[node] = (
                top if before is None else self.call(aten.maximum.default, (before, top), {}, node)
            )
            return
        lowest = node.args[1]  # of the largest scores, those that are none
        assert isinstance(lowest, fx.Node)
        top = self.call(lowest.target, (self.whole[lowest.args[0]], *lowest.args[1:]), {}, node)  # type: ignore
        below = self.call(aten.sub.Tensor, (args[0], top), {}, node)
        part = self.call(
            aten.sum.dim_IntList, (self.call(aten.exp.default, (below,), {}, node), [0]), {}, node
        )
        if node in self.whole:
            fallen = self.call(aten.sub.Tensor, (self.tops[node], top), {}, node)
            total = self.call(aten.exp.default, (fallen,), {}, node)
            total = self.call(aten.mul.Tensor, (self.whole[node], total), {}, node)
            part = self.call(kernels.sum_with, (total, part), {}, node)
        self.whole[node], self.tops[node] = part, top

    def _join(self, node: fx.Node) -> None:
        """What is there of an exit in pieces, as one; laid out as the exit was."""
        if node in self.pieces:
            self.whole[node] = self.call(aten.cat.default, (self.pieces.pop(node),), {}, node)
            if self.region.calls[node].padded and self.region.count < self.region.total:
                self.whole[node] = self._among_zeros(node)
        elif node.target is kernels.log_sum_below:
            self.whole[node] = self.call(aten.log.default, (self.whole[node],), {}, node)
        elif averages(node):
            count = meta.tensor(node.args[0]).numel()  # type: ignore[arg-type]
            mean = self.call(aten.div.Tensor, (self.whole[node], count), {}, node)
            same = meta.tensor(mean).dtype == meta.tensor(node).dtype
            kwargs = {"dtype": meta.tensor(node).dtype}
            self.whole[node] = mean if same else self.call(aten._to_copy.default, (mean,), kwargs, node)
        elif _is_narrow(node) and node.target is not aten.amax.default:
            kwargs = {"dtype": meta.tensor(node).dtype}
            self.whole[node] = self.call(aten._to_copy.default, (self.whole[node],), kwargs, node)
        sizes = list(meta.tensor(node).shape)
        if list(meta.tensor(self.whole[node]).shape) != sizes:
            self.whole[node] = self.call(aten.view.default, (self.whole[node], sizes), {}, node)

    def _among_zeros(self, node: fx.Node) -> fx.Node:
        """What there is of some of the product's rows, with zeros for the others."""
        made = meta.tensor(self.whole[node])
        kwargs = {"dtype": made.dtype, "device": made.device}
        sizes = [self.region.total, *made.shape[1:]]
        zeros = self.call(aten.zeros.default, (sizes,), kwargs, node)
        return self.call(aten.index_copy.default, (zeros, 0, self._numbers(), self.whole[node]), {}, node)

    def _scale(self) -> None:
        """Multiply what was made for a gradient of one by the one that comes."""
        if self.tangent is None:
            raise _Barrier
        for node in self.exits:
            if node in self.later:
                self.draft.early.append(self.whole[node])
                args = (self.whole[node], self.tangent)
                self.scaled[node] = self.call(kernels.gradient_scaled, args, {}, node)

    # -- into its place --------------------------------------------------------------------------

    def undo(self) -> None:
        """Take out what was added."""
        before = set(self.written)
        for node in reversed([n for n in self.graph.nodes if n not in before]):
            self.graph.erase_node(node)
        del self.draft.early[self.early :]

    def finish(self) -> int:
        """Put the calls where they belong, and let the rest of the step read them; how many there are."""
        place: dict[fx.Node, tuple[float, ...]] = {n: (i, 0) for i, n in enumerate(self.written)}
        for block in self.blocks:
            at = _behind(block.nodes, place)
            place.update((node, (at, 1 + i)) for i, node in enumerate(block.nodes))
        for old, new in self.scaled.items():
            place[new] = (place[old][0], 1)
        for old, new in {**self.whole, **self.scaled}.items():
            self.draft.replace(old, new)
        if not reorder(self.graph, place):
            raise NotInRows(
                f"something that the loss behind {self.region.head.name} reads is computed from all of its "
                f"rows: it "
                "cannot be computed in chunks. Plan with chunk_loss=False"
            )
        self.draft.sweep()
        return sum(len(block.nodes) for block in self.blocks)


def _behind(nodes: Iterable[fx.Node], place: dict[fx.Node, tuple[float, ...]]) -> float:
    """The place behind all that ``nodes`` read and that was there before."""
    return max(place[n][0] for node in nodes for n in node.all_input_nodes if n in place)


def _is_viewable(tensor: torch.Tensor, sizes: list[int]) -> bool:
    try:
        tensor.view(sizes)
    except (RuntimeError, ValueError):
        return False
    return True


def _is_same(node: fx.Node, chunk: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether a view of some rows is what it is a view of."""
    if node.target not in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return False
    return list(meta.tensor(chunk).shape) == list(args[1])
