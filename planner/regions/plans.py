"""What is planned for which kinds of steps, and which of them are to be recorded again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.regions import record
from planner.regions.kept import ANY, Kept, Kind

__all__ = ["Plans"]

log = logging.getLogger(__name__)

MOST_PLANS = 16  # of one kind
MOST_KINDS = 64  # for which plans are kept
MOST_RECORDS = 24  # of one structure: beyond that its steps differ from one to the next
LONGEST_KNOWN = 16  # steps for which the longest of them is waited for, to be planned
ONCE_KNOWN = 2  # likewise where all that came since are alike: it did what is done but once
REMEMBERED = 32  # steps after which a plan that none was of is forgotten


@dataclass(frozen=True)
class _Longest:
    """The longest step of a structure: how many calls got gradients, and how many in the steps since."""

    calls: int = 0
    since: tuple[int, ...] = ()

    def then(self, calls: int) -> _Longest:
        """After a step of so many calls."""
        since = *self.since, calls
        known = ONCE_KNOWN if len(set(since)) == 1 else LONGEST_KNOWN
        if calls >= self.calls or len(since) > known:
            return _Longest(max(since) if calls < self.calls else calls)
        return _Longest(self.calls, since)


class Plans:
    """The plans of one model, by kind of step.

    ``name``   of the model's class, for words.
    ``sizes``  of recorded steps, by kind and shape.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sizes: dict[Kind, dict[Any, record.Sizes]] = {}
        self._of: dict[Kind, list[Kept]] = {}
        self._wanted: set[Kind] = set()  # to be recorded again
        self._outgrown: set[Kind] = set()  # of which a larger step has come
        self._closed: set[Kind] = set()  # for which no further plan is made
        self._too_long: dict[Kind, int] = {}  # calls of a step that no plan fits
        self._records: Counter[Hashable] = Counter()  # by structure
        self._longest: dict[Hashable, _Longest] = {}  # likewise

    def __bool__(self) -> bool:
        """Whether steps of any kind are planned."""
        return bool(self._of)

    def __contains__(self, kind: Kind) -> bool:
        """Whether steps of this kind are planned, be it for other sizes or calls than came."""
        return bool(self._of.get(kind))

    def serving(self, kind: Kind) -> list[Kept]:
        """Those that a step of this kind may be of, the longest first."""
        larger = sorted((of for of in self._of if kind.is_within(of)), key=lambda of: sum(of.sizes))
        kept = [k for of in dict.fromkeys((kind, *larger, ANY)) for k in self._of.get(of, ())]
        # a step with fewer calls is within what one with more of them was planned to
        serves = self._serves_longest(kind, kept)
        return sorted(kept, key=lambda plan: -len(plan.places)) if serves else []

    def wants(self, kind: Kind) -> bool:
        """Whether the next step, one of this kind, is to be recorded."""
        larger = [of for of in self._of if of in (kind, ANY) or kind.is_within(of)]
        known = larger and self._serves_longest(kind, (k for of in larger for k in self._of[of]))
        return kind in self._wanted or (not known and self._records[kind.structure] < MOST_RECORDS)

    def are_for(self, kind: Kind, calls: Sequence[tuple[Any, Any, Any]]) -> bool:
        """Whether one is for just these calls: region, key, outputs used."""
        plans = self._of.get(kind, ()) if kind not in self._outgrown else ()
        return any([(p.region, p.key, p.used) for p in kept.places] == list(calls) for kept in plans)

    def is_hopeless(self, kind: Kind, trained: int) -> bool:
        """Whether it is known that no plan fits a step, of which so many calls get gradients."""
        return kind in self._closed or trained >= self._too_long.get(kind, trained + 1)

    def _serves_longest(self, kind: Kind, kept: Iterable[Kept]) -> bool:
        """Whether one of these plans is for as many calls as a step of this structure is known to make."""
        longest = self.longest(kind)
        return self.is_hopeless(kind, longest) or longest <= max((plan.trained for plan in kept), default=0)

    def longest(self, kind: Kind) -> int:
        """How many calls that get gradients a step of this structure is known to make."""
        return self._longest.get(kind.structure, _Longest()).calls

    # -- what steps show ---------------------------------------------------------------------------

    def ran(self, kind: Kind, trained: int) -> None:
        """A step of so many calls that got gradients.  Where paths differ, none can tell at its beginning how
        long it will be, so that it is planned as the longest is.
        """
        of = kind.structure
        self._longest[of] = self._longest.get(of, _Longest()).then(trained)

    def served(self, kind: Kind, by: Sequence[Kept]) -> None:
        """A step that these were for.  What none was of for long is forgotten."""
        for kept in self._of.get(kind, ()):
            kept.idle = 0 if kept in by else kept.idle + 1
        if kind in self._of:
            self._of[kind] = [k for k in self._of[kind] if k.idle <= REMEMBERED]

    def outgrew(self, kind: Kind, sizes: record.Sizes) -> None:
        """A step that differed from a plan in sizes alone: the next plan is for these too."""
        known = self.sizes.get(kind, {}).get(sizes.shape)
        self.remember(kind, sizes if known is None else known.then(sizes))
        self._outgrown.add(kind)

    def want(self, kind: Kind, trained: int) -> None:
        """Record a step of this kind once more, unless that leads nowhere."""
        if self.is_hopeless(kind, trained):
            return
        if self._records[kind.structure] < MOST_RECORDS:
            self._wanted.add(kind)
        elif self._records[kind.structure] == MOST_RECORDS:
            self._records[kind.structure] += 1
            log.warning(
                "steps of %s differ from one to the next in what they call, or in sizes: %d of them were "
                "planned; what none of these serves runs with next to nothing saved",
                self.name,
                MOST_RECORDS,
            )

    # -- what comes of it --------------------------------------------------------------------------

    def add(self, kind: Kind, made: Kept) -> None:
        """One more, in the place of those whose steps it serves too."""
        others = [kept for kept in self._of.pop(kind, []) if not made.covers(kept)]
        self._of[kind] = [made, *others][:MOST_PLANS]
        while len(self._of) > MOST_KINDS:
            del self._of[next(iter(self._of))]
        self._wanted.discard(kind)
        self._outgrown.discard(kind)

    def remember(self, kind: Kind, sizes: record.Sizes) -> None:
        """What steps such as the recorded one were seen to hold."""
        self.sizes.setdefault(kind, {})[sizes.shape] = sizes
        while len(self.sizes) > MOST_KINDS:
            del self.sizes[next(iter(self.sizes))]

    def found(self, kind: Kind) -> None:
        """The recorded step has a plan already."""
        self.tried(kind)
        self._wanted.discard(kind)

    def tried(self, kind: Kind) -> None:
        """A step was recorded, or was to be and ran nothing that can be planned."""
        self._records[kind.structure] += 1

    def give_up(self, kind: Kind) -> None:
        """Record no step of this kind again."""
        self._records[kind.structure] = MOST_RECORDS + 1
        self._wanted.discard(kind)

    def give_up_longer(self, kind: Kind, trained: int) -> None:
        """No plan fits a step that does more than those planned, or is larger: none is looked for any more
        for its like, and it strays from one of these.
        """
        if trained > max((kept.trained for kept in self._of.get(kind, ())), default=0):
            self._too_long[kind] = min(trained, self._too_long.get(kind, trained))
        else:
            self._closed.add(kind)
        self._wanted.discard(kind)

    def forget(self) -> None:
        """Every plan."""
        self._of.clear()
