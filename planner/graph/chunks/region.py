"""Finds the part of a step that works on the rows of its last product: logits, loss, and back to the product.

From a product of matrices on, every call that has a rule for rows (:mod:`planner.graph.chunks.rules`) belongs to
it: the logits' views, casts and caps, softmax and what is read off it, in the backward the same until the two
products that lead back, to the hidden states and to the weight.  What is as wide as the logits must stay
inside; what is narrow (a number per token) may leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.errors import PlannerError
from planner.graph.chunks.rules import SOFTMAXES, InRows, Rows, in_rows
from planner.graph.draft import Draft
from planner.graph.nodes import is_mutation, is_random

__all__ = ["NotInRows", "Region", "regions_of", "rows_per_chunk"]

aten = torch.ops.aten

HEADS = {aten.mm.default: 0, aten.addmm.default: 1}  # product -> which argument carries the rows
MATTERS = 8  # products smaller than this part of the largest one stay whole


class NotInRows(PlannerError):
    """The loss of a step cannot be computed in chunks; names the call in the way."""


@dataclass(eq=False)
class Region:
    """What follows ``head``, a product of ``count`` rows, row by row.

    ``calls``    its calls in order, and how each is made for some of the rows.
    ``carried``  how what they make carries rows.
    ``losses``   negative log-likelihoods of its rows, summed or not.
    ``is_made``  whether the model returns the product itself, so that it is made whole.
    """

    head: fx.Node
    count: int
    calls: dict[fx.Node, InRows] = field(default_factory=dict)
    carried: dict[fx.Node, Rows] = field(default_factory=dict)
    losses: list[fx.Node] = field(default_factory=list)
    is_made: bool = False

    @property
    def width(self) -> int:
        """Columns of the product: the vocabulary."""
        return int(meta.tensor(self.head).shape[1])

    def is_wide(self, node: fx.Node) -> bool:
        """Whether what the node makes is about as large as the product."""
        value = meta.value(node)
        return isinstance(value, torch.Tensor) and 2 * value.numel() >= self.count * self.width

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
            why.append(error)
            continue
        if region is not None and not any(region.calls.keys() & other.calls.keys() for other in found):
            found.append(region)
    if not found and why:
        raise why[0]
    if not found:
        raise NotInRows(
            "the step has no product of matrices that a softmax over its columns follows, so there is no loss to "
            "compute in chunks: plan with chunk_loss=False"
        )
    return found


def _region(draft: Draft, head: fx.Node) -> Region | None:
    """What follows ``head``; ``None`` where no softmax does.  Raises ``NotInRows``."""
    count = int(meta.tensor(head).shape[0])
    x = head.args[HEADS[head.target]]
    if count < 2 or not isinstance(x, fx.Node):
        return None
    if head.target is aten.addmm.default and meta.tensor(head.args[0]).dim() != 1:  # type: ignore[arg-type]
        return None
    region = Region(head, count)
    region.calls[head] = InRows(Rows(), lambda n: head.args, {x: 1})
    region.carried[head] = Rows()
    blocked: NotInRows | None = None
    softmax = False
    behind = False
    for node in draft.graph.nodes:
        behind = behind or node is head
        if node is head or not behind or node.op != "call_function":
            continue
        read = [n for n in node.all_input_nodes if n in region.carried]
        if not read:
            continue
        if node.target is aten.nll_loss_forward.default and region.carried.get(node.args[0]) == Rows():
            region.losses.append(node)
            continue
        call = None if is_random(node) or is_mutation(node) else in_rows(node, region.carried.get, count)
        if call is None:
            wide = [n for n in read if region.is_wide(n)]
            blocked = blocked or (_blocked(node, wide[0], region) if wide else None)
            continue
        softmax = softmax or node.target in SOFTMAXES
        region.calls[node] = call
        if call.rows is not None and not call.is_end:
            region.carried[node] = call.rows
    if not softmax:
        return None
    if blocked is not None:
        raise blocked
    _leaves_whole(draft, region)
    return region


def _leaves_whole(draft: Draft, region: Region) -> None:
    """What is as wide as the logits and leaves the region may only be the logits themselves."""
    held = {*draft.outputs, *draft.gradients.values(), *draft.mutations.values()}
    key = _compat.storage_key(meta.tensor(region.head))
    for node in region.exits(held):
        if node not in region.carried or not region.is_wide(node):
            continue
        if _compat.storage_key(meta.tensor(node)) != key:
            raise NotInRows(
                f"{node.name} ({node.target}), {_sizes(node)}, is read or returned whole, "
                f"not only by the loss: the model returns it, or a call reads it that is not row by row. Return the "
                "logits instead, or plan with chunk_loss=False"
            )
        region.is_made = True


def _blocked(node: fx.Node, wide: fx.Node, region: Region) -> NotInRows:
    where = meta.module(node) or "the model itself"
    return NotInRows(
        f"{node.name} ({node.target}) in {where} reads {wide.name}, {_sizes(wide)}, and does not work on each of its "
        f"{region.count} rows by itself, so the loss behind {region.head.name} cannot be computed in chunks. "
        "Write it with log_softmax, logsumexp, gather, cross_entropy and pointwise ops, or plan with chunk_loss=False"
    )


def _sizes(node: fx.Node) -> str:
    value = meta.tensor(node)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def rows_per_chunk(count: int, chunks: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each chunk: as many rows in each but perhaps the last."""
    size = math.ceil(count / chunks)
    return [(a, min(a + size, count)) for a in range(0, count, size)]
