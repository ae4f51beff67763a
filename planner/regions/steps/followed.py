"""Which plan the step that runs is of.

Within a kind of steps the calls themselves tell: the step may be of every plan whose first calls are those
that came so far, first of one for just these sizes, else of one for larger ones.

A step that is of none *strays*.  What differs from a plan in sizes alone runs as that plan says where, by the
sizes of its calls, it would be within the budget so, else with next to nothing saved, whichever takes less.
Where a step takes another path, a call runs as one nearby of the same region is planned, as long as all of
the step saves no more than the plan does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.graph.training_graph import TrainingGraph
from planner.regions import record
from planner.regions.cut.region import Region, Variant
from planner.regions.kept import Kept, Own, Place
from planner.regions.steps.seen import Seen

__all__ = ["Coming", "Followed"]


@dataclass(frozen=True, eq=False)
class Coming:
    """A call that is about to run.

    ``number``   of the calls that came before it in the step; ``key``: the signature that it is called with.
    ``used``     its outputs that are to be differentiated, as far as is known; ``None``: all that can be.
    ``variant``  the region, captured at this signature for a backward of the given outputs.
    """

    number: int
    region: Region
    key: Any
    used: frozenset[int] | None
    variant: Callable[[frozenset[int] | None], Variant]


class Followed:
    """The plan that a step is of, or that it has strayed from.

    ``plans``     that it may be of, the first to be tried first.
    ``calls``     those that came, which whoever runs them adds to.
    ``lightest``  how a variant runs that saves next to nothing.

    ``strayed``         whether the step is of none of them.
    ``foreseen_bytes``  that a strayed step takes by the sizes of its calls; 0 where that is not foreseen.
    """

    def __init__(
        self, plans: Sequence[Kept], calls: Sequence[Seen], lightest: Callable[[Variant], Own]
    ) -> None:
        self._open = list(plans)
        self._calls, self._lightest = calls, lightest
        self.strayed = False
        self.foreseen_bytes = 0
        self._along: Kept | None = None  # the plan that the step has strayed from
        self._is_beside = False  # whether it differs from that in sizes alone

    @property
    def plan(self) -> Kept | None:
        """That the step is of so far."""
        return self._open[0] if self._open and not self.strayed else None

    @property
    def exact(self) -> list[Kept]:
        """The plans that the step may still be of, of just as many calls as came."""
        return [kept for kept in self._open if len(kept.places) == len(self._calls)]

    def place(self, call: Coming) -> Place | None:
        """What the call is to run; ``None``: what saves next to nothing."""
        if self.strayed:
            return self._astray(call)
        at = call.number
        near = [k for k in self._open if at < len(k.places) and k.places[at].region is call.region]
        exact = [kept for kept in near if kept.places[at].key == call.key]
        if exact:
            self._open = exact
            return exact[0].places[at]
        for kept in near:
            place = kept.places[at]
            if place.variant is None:
                self._open = near
                return replace(place, key=call.key)
            other = call.variant(place.used)
            if place.serves(other):
                self._open = [k for k in near if k.places[at].key == place.key]
                return replace(place, key=call.key, variant=other)
        self.strayed = True
        self._along = next(iter((*near, *self._open)), None)
        self._is_beside = bool(near)
        return self._astray(call)

    def larger_sizes(self) -> record.Sizes | None:
        """What the step holds, where it is over and differed from a plan in sizes alone; else ``None``."""
        along = self._along
        if along is None or along.foresight is None or not self._is_beside:
            return None
        if len(self._calls) != len(along.places):
            return None
        return along.foresight.sizes_at({along.planned[n]: graph for n, graph, _ in self._graphs()})

    # -- astray ------------------------------------------------------------------------------------

    def _astray(self, call: Coming) -> Place | None:
        along = self._along
        like = None if along is None else along.near(call.number, call.region)
        if along is None or like is None:
            self._is_beside = False
            return None
        self._is_beside &= along.places[call.number : call.number + 1] == (like,)
        if like.variant is None:
            return replace(like, key=call.key) if self._is_beside else None
        variant = call.variant(like.used) if like.used == call.used else None
        if variant is None or not like.variant.is_like(variant):
            self._is_beside = False
            return None
        steps, turn = self._within(along, call, like, variant)
        return replace(like, key=call.key, variant=variant, steps=tuple(steps), turn=turn, bounds=None)

    def _within(self, along: Kept, call: Coming, like: Place, variant: Variant) -> Own:
        """The schedule of ``like``, or the lightest where the step takes too much with that."""
        planned: Own = like.steps, like.turn
        if self._is_beside and along.foresight is not None:
            if like.serves(variant):
                return planned
            light = self._lightest(variant)
            peaks = [self._foreseen(along, call.number, variant, own) for own in (planned, light)]
            self.foreseen_bytes = min(peaks)
            return light if peaks[0] > along.foresight.budget_bytes and peaks[1] < peaks[0] else planned
        saved = sum(seen.variant.held_bytes(seen.steps, seen.turn) for seen in self._calls if seen.variant)
        is_less = saved + variant.held_bytes(*planned) <= along.saved_bytes
        return planned if is_less else self._lightest(variant)

    def _foreseen(self, along: Kept, number: int, variant: Variant, own: Own) -> int:
        """Bytes that a step takes whose calls so far differ from a plan in sizes alone, if the one that comes
        runs ``own``, and those behind it are as planned.
        """
        assert along.foresight is not None and variant.captured is not None
        calls: dict[int, tuple[TrainingGraph, Own]] = {
            along.planned[n]: (graph, (seen.steps, seen.turn)) for n, graph, seen in self._graphs()
        }
        calls[along.planned[number]] = variant.captured.graph, own
        return along.foresight.peak_of(calls)

    def _graphs(self) -> Iterator[tuple[int, TrainingGraph, Seen]]:
        """Of each call that is planned its number and its graph."""
        for n, seen in enumerate(self._calls):
            if seen.variant is not None and seen.variant.captured is not None:
                yield n, seen.variant.captured.graph, seen
