"""How often the rows of a region are gone through, and what each pass makes.

A softmax along columns needs numbers of all rows (:mod:`~planner.graph.chunks.columns`), so the rows are gone
through once for these and once more for what reads them, each time from the product on.  Which calls are made
again is read off the graph: those that lead to what is wanted of the pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from planner.graph import kernels
from planner.graph.chunks.region import Region

__all__ = ["Pass", "passes_of"]


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over all rows, chunk by chunk.

    ``calls``    what is made of each chunk, in order; ``wanted``: what is there for all rows afterwards.
    ``anew``     whether it makes them from the product on, even what an earlier pass has made.
    ``forward``  whether it is of the forward, with the losses of its rows.
    """

    calls: tuple[fx.Node, ...]
    wanted: frozenset[fx.Node]
    anew: bool
    forward: bool


def passes_of(region: Region, wanted: Iterable[fx.Node], later: set[fx.Node], ahead: bool) -> list[Pass]:
    """The passes of a region, whose ``wanted`` calls are read outside of it; ``later``: of the backward.

    ``ahead``  the backward's calls are made with the forward's.
    """
    wanted, before = list(wanted), _read_by_rows(region)
    first = {n for loss in region.losses for n in loss.all_input_nodes if n in region.calls}
    if not before:
        return _one_each(region, frozenset(wanted), later, ahead)
    if ahead:
        return _staged(region, {*wanted}, before, first, forward=True)
    made = {n for n in wanted if n not in later}
    passes = _staged(region, made, before - later, first, forward=True)
    there = set(passes[-1].calls)
    return passes + _staged(region, {*wanted} - made, before & later, set(), forward=False, there=there)


def _one_each(region: Region, wanted: frozenset[fx.Node], later: set[fx.Node], ahead: bool) -> list[Pass]:
    if ahead:
        return [Pass(tuple(region.calls), wanted, False, True)]
    calls = [tuple(n for n in region.calls if (n in later) == back) for back in (False, True)]
    return [Pass(part, wanted.intersection(part), False, not i) for i, part in enumerate(calls)]


def _sums(region: Region) -> set[fx.Node]:
    return {n for n, call in region.calls.items() if call.rows is None}


def _depths(region: Region, sums: set[fx.Node]) -> dict[fx.Node, int]:
    """How many of ``sums`` lie, one behind the other, between a node of the graph and its rows."""
    depths: dict[fx.Node, int] = {}
    for node in region.head.graph.nodes:
        read = node.all_input_nodes
        if node.target is kernels.log_sum_below:  # the largest so far will do
            read = read[:1]
        depths[node] = max((depths[n] + (n in sums) for n in read), default=0)
    return depths


def _read_by_rows(region: Region) -> set[fx.Node]:
    """Sums over all rows that lead back to calls on each row, where a softmax along columns is among them."""
    if not any(n.target is kernels.log_sum_below for n in region.calls):
        return set()
    leads: set[fx.Node] = set()
    for node in reversed(region.head.graph.nodes):
        if any(user in region.calls or user in leads for user in node.users):
            leads.add(node)
    return _sums(region) & leads


def _staged(
    region: Region,
    wanted: set[fx.Node],
    before: set[fx.Node],
    first: set[fx.Node],
    *,
    forward: bool,
    there: set[fx.Node] | None = None,
) -> list[Pass]:
    """A pass for each depth, of which the last makes all that is wanted and was not needed before.

    ``first``  rows that the losses read; ``there``: what an earlier pass has made.
    """
    depths, wanted = _depths(region, before), wanted | before
    last = max((depths[n] for n in _leading_to(region, wanted | first, there or set())), default=0)
    passes, done = [], set[fx.Node]()
    for depth in range(last + 1):
        ends = {n for n in before if depths[n] == depth} if depth < last else wanted - done
        done |= ends
        leading = _leading_to(region, ends | (first if depth == last else set()), there or set())
        calls = tuple(n for n in region.calls if n in leading)
        passes.append(Pass(calls, frozenset(ends), depth > 0, forward))
    return passes


def _leading_to(region: Region, ends: set[fx.Node], there: set[fx.Node]) -> set[fx.Node]:
    """The calls on rows that are needed for ``ends``, these included."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in found or node in there:
            continue
        found.add(node)
        rows = (n for n in node.all_input_nodes if n in region.calls and region.calls[n].rows is not None)
        stack.extend(rows)
    return found
