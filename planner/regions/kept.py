"""What is planned for steps of one kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from planner.graph.training_graph import TrainingGraph
from planner.regions import record
from planner.regions.cut.region import Region, Variant

__all__ = ["ANY", "Foresight", "Kept", "Kind", "Own", "Parts", "Place"]

# What each call of a recorded step is to run: steps in its own graph, and how many are the forward's.
Own: TypeAlias = tuple[Sequence[int], int]
Parts: TypeAlias = Sequence[Own]


class Kind(NamedTuple):
    """What tells steps apart that need plans of their own, as far as their first call shows it.

    ``sizes``  elements of each tensor that comes in: a plan for larger ones may serve.
    """

    structure: Hashable = None
    sizes: tuple[int, ...] = ()

    def is_within(self, larger: Kind) -> bool:
        """Whether ``larger`` is for the same step, at sizes that are no smaller."""
        return self.structure == larger.structure and all(
            a <= b for a, b in zip(self.sizes, larger.sizes, strict=True)
        )


ANY = Kind()  # that of a step where nobody tells kinds apart


@dataclass(frozen=True, eq=False)
class Place:
    """What one call of a step is planned to run.

    ``variant``  of the region, ``None`` where eager runs it; ``key``: the signature that it is called with.
    ``used``     its outputs that get gradients, ``None``: all that can; where none does, eager runs it.
    ``bounds``   bytes of its values that it was planned for, ``None``: its variant's.
    """

    region: Region
    key: Any
    used: frozenset[int] | None
    variant: Variant | None = None
    steps: tuple[int, ...] = ()
    turn: int = 0
    bounds: tuple[int, ...] | None = None

    def serves(self, other: Variant) -> bool:
        """Whether ``other``, the region at other sizes, can run as this is planned to, and takes no more."""
        return self.variant is not None and self.variant.serves(other, self.bounds)


@dataclass(frozen=True, eq=False)
class Foresight:
    """What is known of steps that are as a plan's, but for their sizes.

    ``peak_of``       bytes of one whose calls, by their number among the planned, have these graphs and run
                      so.
    ``sizes_at``      what such a step holds.
    ``bounds``        per planned call, bytes of each value for which the plan was made.
    ``budget_bytes``  that the plan is for.
    """

    peak_of: Callable[[dict[int, tuple[TrainingGraph, Own]]], int]
    sizes_at: Callable[[dict[int, TrainingGraph]], record.Sizes]
    bounds: Sequence[tuple[int, ...]]
    budget_bytes: int


@dataclass(eq=False)
class Kept:
    """A plan for steps of one kind.

    ``places``  what its calls run; ``of``: what whoever made it wants to know again.
    ``trained`` how many of these get gradients.
    ``idle``    steps of its kind since one was of it.
    """

    places: tuple[Place, ...]
    of: Any = None
    trained: int = 0
    idle: int = 0
    foresight: Foresight | None = None

    def covers(self, other: Kept) -> bool:
        """Whether all steps that ``other`` is for can run as this says."""
        mine, its = ([(p.region, p.variant is None) for p in kept.places] for kept in (self, other))
        pairs = zip(self.places, other.places, strict=False)
        return mine == its and all(
            a.key == b.key or (a.used == b.used and (b.variant is None or a.serves(b.variant)))
            for a, b in pairs
        )

    @cached_property
    def saved_bytes(self) -> int:
        """What its calls hold between their forwards and backwards."""
        return sum(p.variant.held_bytes(p.steps, p.turn) for p in self.places if p.variant is not None)

    @cached_property
    def planned(self) -> dict[int, int]:
        """The number of each call that is planned, among those that are."""
        return {n: k for k, n in enumerate(n for n, p in enumerate(self.places) if p.variant is not None)}

    def near(self, number: int, region: Region) -> Place | None:
        """How a call of ``region`` is planned, the one at ``number`` or next to it."""
        found = [n for n, p in enumerate(self.places) if p.region is region]
        return self.places[min(found, key=lambda n: abs(n - number))] if found else None
