"""Finds the part of a step that works on the rows of its last product: logits, loss, and back to the product.

From a product of matrices on, every call that has a rule for rows (:mod:`planner.graph.chunks.rules`) belongs
to it: the logits' views, casts and caps, softmax and what is read off it, in the backward the same until the
two products that lead back, to the hidden states and to the weight.  What is as wide as the logits must stay
inside; what is narrow (a number per token) may leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.errors import PlannerError
from planner.graph.chunks.rows import InRows, Rows, lead_of
from planner.graph.chunks.rules import MARKS, in_padded_rows, in_rows, of_others
from planner.graph.draft import Draft
from planner.graph.nodes import is_mutation, is_random

__all__ = ["NotInRows", "Region", "regions_of", "rows_per_chunk"]

aten = torch.ops.aten

HEADS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
}  # product -> which argument carries the rows
MATTERS = 8  # products smaller than this part of the largest one stay whole


class NotInRows(PlannerError):
    """The loss of a step cannot be computed in chunks; names the call in the way.

    ``is_loss``  whether that call is behind scores that a loss reads, or is such a one.
    ``at``       the place of the product it is behind: a loss is behind the last.
    """

    is_loss = False
    at = 0


@dataclass(eq=False)
class Region:
    """What follows ``head``, a product of matrices, row by row.

    ``entry``    what of the product is worked on: itself, or its rows but for those that a slice leaves out,
                 as of a language model whose last token has nothing to predict.
    ``count``    rows that are worked on; ``total`` those of the product.
    ``calls``    its calls in order, and how each is made for some of the rows.
    ``carried``  how what they make carries rows.
    ``losses``   negative log-likelihoods of its rows, summed or not.
    ``is_made``  whether the model returns the product, or what is made of it, so that it is made whole.
    """

    head: fx.Node
    entry: fx.Node
    count: int
    total: int
    calls: dict[fx.Node, InRows] = field(default_factory=dict)
    carried: dict[fx.Node, Rows] = field(default_factory=dict)
    losses: list[fx.Node] = field(default_factory=list)
    is_made: bool = False

    @property
    def operand(self) -> fx.Node:
        """The factor of the product that has the rows."""
        x = self.head.args[HEADS[self.head.target]]
        assert isinstance(x, fx.Node)
        return x

    @property
    def width(self) -> int:
        """Columns of the product: the vocabulary."""
        return int(meta.tensor(self.head).shape[1])

    def is_wide(self, node: fx.Node) -> bool:
        """Whether what the node makes is about as large as the product."""
        value = meta.value(node)
        return isinstance(value, torch.Tensor) and 2 * value.numel() >= self.count * self.width

    def enter(self, node: fx.Node) -> None:
        """From here on its rows are those of ``node``."""
        rows = Rows() if node is self.head else Rows(len(meta.tensor(node).shape) - 1)
        self.entry, self.calls, self.carried = node, {node: InRows(rows, lambda n: node.args)}, {node: rows}

    def exits(self, held: set[fx.Node]) -> Iterator[fx.Node]:
        """What others read of it, and has to be there for all rows at once."""
        for node, call in self.calls.items():
            alone = all(user in self.calls or user in self.losses for user in node.users)
            if call.rows is None or call.is_end or not alone or node in held:
                yield node


def regions_of(draft: Draft) -> list[Region]:
    """The regions of a step, of its largest products that a softmax follows.

    Raises ``NotInRows`` where there is none.
    """
    tangents = set(draft.tangents.values())
    later: set[fx.Node] = set()
    for node in draft.graph.nodes:
        if node in tangents or any(n in later for n in node.all_input_nodes):
            later.add(node)
    order = {n: i for i, n in enumerate(draft.graph.nodes)}
    heads = [n for n in draft.graph.nodes if n.target in HEADS and n not in later]
    heads.sort(key=lambda n: -meta.tensor(n).numel())
    found: list[Region] = []
    why: list[NotInRows] = []
    for head in heads:
        if found and meta.tensor(head).numel() * MATTERS < meta.tensor(found[0].head).numel():
            break
        try:
            region = _region(draft, head)
        except NotInRows as error:
            error.at = order[head]
            why.append(error)
            continue
        if region is not None and not any(region.calls.keys() & other.calls.keys() for other in found):
            found.append(region)
    if not found and why:
        raise max(why, key=lambda error: (error.is_loss, error.at))
    if not found:
        raise NotInRows(
            "the step has no product of matrices that a softmax over its columns follows, so there is no "
            "loss to compute in chunks: plan with chunk_loss=False"
        )
    return found


def _region(draft: Draft, head: fx.Node) -> Region | None:
    """What follows ``head``; ``None`` where that is no loss.  Raises ``NotInRows``."""
    count = int(meta.tensor(head).shape[0])
    if count < 2 or not isinstance(head.args[HEADS[head.target]], fx.Node):
        return None
    if head.target is aten.addmm.default and meta.tensor(head.args[0]).dim() != 1:  # type: ignore[arg-type]
        return None
    region = Region(head, head, count, count)
    region.enter(head)
    blocked: NotInRows | None = None
    calls = list(draft.graph.nodes)
    for node in calls[calls.index(head) + 1 :]:
        read = [n for n in node.all_input_nodes if n in region.carried]
        if node.op != "call_function" or not read:
            continue
        if _leaves_out(node, region):
            continue
        if node.target is aten.nll_loss_forward.default and region.carried.get(node.args[0]) == Rows():
            region.losses.append(node)
            continue
        call = None if is_random(node) or is_mutation(node) else _call(node, region)
        if call is None:
            wide = [n for n in read if region.is_wide(n)]
            blocked = blocked or (_blocked(node, wide[0], region) if wide else None)
            continue
        region.calls[node] = call
        if call.rows is not None and not call.is_end:
            region.carried[node] = call.rows
    if blocked is not None:
        blocked.is_loss |= _is_loss(region)
        raise blocked
    if not _is_loss(region):
        return None
    _take_in(region)
    order = {n: i for i, n in enumerate(calls)}
    region.calls = dict(sorted(region.calls.items(), key=lambda item: order[item[0]]))
    _leaves_whole(draft, region)
    return region


def _is_loss(region: Region) -> bool:
    """Whether it has one of the calls that losses have; or their parts, as compilers write them."""
    called = {node.target for node in region.calls}
    return bool(called & MARKS) or {aten.exp.default, aten.log.default, aten.sum.dim_IntList} <= called


def _take_in(region: Region) -> None:
    """What is as wide as the logits and made for the region alone is made row by row too (soft labels)."""
    waiting = list(region.calls.items())
    while waiting:
        _, call = waiting.pop()
        for other, lead in call.sliced.items():
            wide = region.is_wide(other) and other.op == "call_function" and not call.padded
            if not wide or lead < 1 or other in region.calls or is_random(other):
                continue
            made = of_others(other, lead, region.count)
            if made is not None and made.rows is not None and _read_alone(other, made.rows, region):
                region.calls[other] = made
                region.carried[other] = made.rows
                waiting.append((other, made))


def _read_alone(node: fx.Node, rows: Rows, region: Region) -> bool:
    """Whether only the region reads ``node``, with what reads it beside: of each row its sum, say, which then
    belongs to the region.
    """
    beside: dict[fx.Node, InRows] = {}
    taken = {node: rows}
    waiting = [node]
    region.carried[node] = rows
    while waiting:
        for user in waiting.pop().users:
            if user in region.calls or user in beside:
                continue
            call = _call(user, region) if user.op == "call_function" and not is_random(user) else None
            if call is None or call.rows is None or call.is_end:
                for one in taken:
                    del region.carried[one]
                return False
            beside[user] = call
            region.carried[user] = taken[user] = call.rows
            if region.is_wide(user):
                waiting.append(user)
    region.calls.update(beside)
    return True


def _call(node: fx.Node, region: Region) -> InRows | None:
    """How ``node`` works on rows of ``region``."""
    carried, read = region.carried, [n for n in node.all_input_nodes if n in region.carried]
    if region.count < region.total:
        if node.target is aten.slice_backward.default and _is_of_entry(node, region):
            x = node.args[0]
            lead = lead_of(meta.tensor(node).shape, region.total)
            return lead and InRows(Rows(lead, padded=True), lambda n: (x,))  # type: ignore[return-value]
        if any(carried[n].padded for n in read):
            return in_padded_rows(node, carried.get, region.total)
    return in_rows(node, carried.get, region.count)


def _leaves_out(node: fx.Node, region: Region) -> bool:
    """Whether the node takes some rows of the product, which are then the region's: only they are read."""
    if node.target is not aten.slice.Tensor or region.entry is not region.head or region.losses:
        return False
    x, dim, *where = node.args
    own = region.carried[x]  # type: ignore[index]
    shape = tuple(meta.tensor(node).shape)
    key = _compat.storage_key(meta.tensor(region.head))
    views = all(_compat.storage_key(meta.tensor(n)) == key for n in region.calls)
    if not views or own.turned or not isinstance(dim, int) or dim % len(shape) >= own.lead:
        return False
    if own.lead != len(shape) - 1 or any(isinstance(w, fx.Node) for w in where):
        return False
    others = [u for n in region.calls for u in n.users if u not in region.calls and u is not node]
    if others:
        return False
    region.count = math.prod(shape[:-1])
    region.enter(node)
    return True


def _is_of_entry(node: fx.Node, region: Region) -> bool:
    """Whether ``node`` puts the rows of the entry's gradient back among those of the product."""
    put: tuple[Any, ...] = node.args  # not fx's union of arguments: mypy tries a slice of each three of them
    taken: tuple[Any, ...] = region.entry.args
    gradient, sizes, *where = put
    x, dim, *given = taken
    before = meta.tensor(x)
    if list(sizes) != list(before.shape) or region.carried[gradient] != region.carried[region.entry]:
        return False
    start, end, step = (*given, None, None, None)[:3]
    mine = slice(start, end, step).indices(before.shape[dim])
    its = slice(*where[1:]).indices(before.shape[dim])
    return bool(where[0] % before.dim() == dim % before.dim() and mine == its)


def _leaves_whole(draft: Draft, region: Region) -> None:
    """What is as wide as the logits may leave the region only as an output, which is then made whole."""
    outputs = set(draft.outputs)
    for node in region.exits({*outputs, *draft.gradients.values(), *draft.mutations.values()}):
        if node not in region.carried or not region.is_wide(node):
            continue
        if node not in outputs or any(u not in region.calls and u not in region.losses for u in node.users):
            raise NotInRows(
                f"{node.name} ({node.target}), {_sizes(node)}, is read whole by something else than the "
                "loss; its rows cannot be made one after the other. Plan with chunk_loss=False"
            )
        region.is_made = True
    key = _compat.storage_key(meta.tensor(region.head))
    if any(isinstance(v := meta.value(n), torch.Tensor) and _compat.storage_key(v) == key for n in outputs):
        region.is_made = True


def _blocked(node: fx.Node, wide: fx.Node, region: Region) -> NotInRows:
    where = meta.module(node) or "the model itself"
    error = NotInRows(
        f"{node.name} ({node.target}) in {where} reads {wide.name}, {_sizes(wide)}, and does not work on "
        f"each of its {region.count} rows by itself, so the loss behind {region.head.name} cannot be "
        "computed in chunks. "
        "Write it with log_softmax, logsumexp, gather, cross_entropy and pointwise ops, or plan with "
        "chunk_loss=False"
    )
    error.is_loss = node.target in MARKS
    return error


def _sizes(node: fx.Node) -> str:
    value = meta.tensor(node)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def rows_per_chunk(count: int, chunks: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each chunk: as many rows in each but perhaps the last."""
    size = math.ceil(count / chunks)
    return [(a, min(a + size, count)) for a in range(0, count, size)]
