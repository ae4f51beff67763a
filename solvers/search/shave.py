"""Lower a schedule to the budget, one value or one burst at a time.

Plans of the chain program and rounded relaxations are often a few per mille above the budget, at a step or
two, and faster than any that fits.  While a schedule is above it, three kinds of moves are tried there:

*drop*   a value that waits across the step, last touched before it and next read at b after it, is made
         again just before b, with whatever is needed for that and is not at hand at b;
*early*  recomputations that do not fit run earlier, before what is in their way is made: a pinned gradient,
         say, that is as large as what they make.  They run up to where little is held, which waits instead,
         or as far as one small value, and then again from there.
*hold*   or they do not run, and what they lead to waits since it was made last; also where that takes the
         place of something else that waits for them, which is then dropped.

What a drop does to the bytes of every step is known without running it, so the drops that lower the excess
most per second of recomputation are found one after the other and made together, where none takes away what
another relies on; the others are tried one by one, where no drop helps.  The simulator judges both.

Sources: making again what waits at the peak is the eviction of Kirisame et al., "Dynamic Tensor
Rematerialization" (ICLR 2021, https://arxiv.org/abs/2006.09616), here on a whole schedule with its future
known; the moves are ours.
Optimal: never proved; on Llama 7B at 2 % above its floor it ends 0.3 points above the bound.
Weakness: each move must lower the excess by itself.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import can_be_dropped, first_runs, runs_again, trim
from solvers.core.simulate import Timeline, simulate_steps

__all__ = ["Places", "shave"]

log = logging.getLogger(__name__)

# Drops are made together up to this many, each of the best this many by bytes freed per second.
TOGETHER, LOOKED_AT = 16, 48
# Moves are looked for at the worst steps, so many, and across so many first runs; what waits there instead is
# the smallest of what a recomputation leads to, or what is held after the emptiest of the next steps.
MOVED, EARLIER, SMALLEST, CUTS = 2, 4, 6, 4
# One that takes away so much of what the worst step adds to the excess, for no more than this share of the
# time, is made without a look at the others.
GOOD_FALL, SMALL_COST = 0.5, 2e-3
# What would take more ops than this to make again is not dropped; than the first, not while anything helps.
FEW_AGAIN, MOST_AGAIN = 200, 1000
# A second that costs nothing, as a share of the step.
NO_TIME = 1e-9


def shave(run: Incumbent, steps: Sequence[int], *, deadline: float) -> None:
    """Offer ``run`` what moves make of ``steps``, until that fits, nothing helps, or it is no longer better.

    ``deadline``  of ``time.perf_counter()``.
    """
    problem = run.problem
    now, line = list(steps), simulate_steps(problem, list(steps))
    while run.over_of(line) > 0 and not run.done and time.perf_counter() < deadline:
        if run.fits and line.recompute_seconds >= run.recompute_s:
            return
        places = Places(run, now, line)
        better = _dropped(places, TOGETHER) or _dropped(places, 1) or _moved(places)
        better = better or _dropped(places, 1, MOST_AGAIN)
        if better is None:
            break
        now, line = better
    log.debug("%s: shaved to %d of %d, %r", problem.name, line.peak_bytes, run.budget_bytes, run)
    run.offer(now, "shave")


@dataclass(frozen=True)
class _Drop:
    """Value ``v`` is not there after step ``a``, and made again by ``ops`` before step ``b``, from ``reads``.

    ``burst``  bytes that are there while each of ``ops`` runs, but for what was there before ``b``.
    """

    v: int
    size: int
    a: int
    b: int
    ops: tuple[int, ...]
    reads: frozenset[int]
    again_s: float
    burst: np.ndarray

    def agrees(self, other: _Drop) -> bool:
        """Whether neither takes away what the other relies on."""
        if self.v == other.v or self.b == other.b:
            return False
        return not (
            (self.a < other.b <= self.b and self.v in other.reads)
            or (other.a < self.b <= other.b and other.v in self.reads)
        )


def _dropped(places: Places, most: int, again: int = FEW_AGAIN) -> tuple[list[int], Timeline] | None:
    """The schedule after up to ``most`` drops, each the one that lowers the excess most per second.

    ``again``  ops that make again what is dropped, at most.
    """
    run, line = places.run, places.line
    live = line.live_bytes.astype(np.float64)
    before = np.concatenate(([run.problem.resident_bytes], line.kept_bytes[:-1])).astype(np.float64)
    least_s = NO_TIME * run.total_s
    chosen: list[_Drop] = []
    drops = places.drops(again)

    def gain(drop: _Drop) -> float:
        waits = live[drop.a + 1 : drop.b]
        fall = run.excess(waits) - run.excess(waits - drop.size)
        return (fall - run.excess(before[drop.b] - drop.size + drop.burst)) / (drop.again_s + least_s)

    while drops and len(chosen) < most:
        best = max(drops[:LOOKED_AT], key=gain)
        if gain(best) <= 0:
            break
        chosen.append(best)
        live[best.a + 1 : best.b] -= best.size
        before[best.a + 1 : best.b + 1] -= best.size
        drops = [drop for drop in drops if drop.agrees(best)]
        if not (live > run.budget_bytes).any():
            break
    if not chosen:
        return None
    steps: list[int] = []
    done = 0
    for drop in sorted(chosen, key=lambda drop: drop.b):
        steps += [*places.steps[done : drop.b], *drop.ops]
        done = drop.b
    return places.judged([*steps, *places.steps[done:]])


def _moved(places: Places) -> tuple[list[int], Timeline] | None:
    """The schedule after the move that lowers the excess most per second."""
    run, line = places.run, places.line
    best, most = None, 0.0
    worst = run.excess(line.live_bytes.max())
    for steps in places.moved():
        found = places.judged(steps)
        if found is not None:
            fall = run.over_of(line) - run.over_of(found[1])
            more_s = found[1].recompute_seconds - line.recompute_seconds
            gain = fall / max(NO_TIME * run.total_s, more_s)
            best, most = (found, gain) if gain > most else (best, most)
            if fall > GOOD_FALL * worst and more_s <= SMALL_COST * run.total_s:
                break
    return best


class Places:
    """Where each value of a schedule is made and read, and which steps are above the budget."""

    def __init__(self, run: Incumbent, steps: list[int], line: Timeline) -> None:
        self.run, self.problem, self.steps, self.line = run, run.problem, steps, line
        self.excess = np.maximum(line.live_bytes - run.budget_bytes, 0)
        self.at: dict[int, list[int]] = {}
        self.made: dict[int, list[bool]] = {}
        self.first = [i == first for i, first in zip(steps, first_runs(steps), strict=True)]
        counted, ops = self.problem.counted_inputs, self.problem.ops
        for s, i in enumerate(steps):
            for values, makes in ((counted[i], False), (ops[i].outputs, True)):
                for v in values:
                    self.at.setdefault(v, []).append(s)
                    self.made.setdefault(v, []).append(makes)

    def judged(self, steps: list[int]) -> tuple[list[int], Timeline] | None:
        """``steps`` without what nobody reads, and their timeline, if they are less above the budget."""
        steps = trim(self.problem, steps)
        line = simulate_steps(self.problem, steps)
        return (steps, line) if self.run.over_of(line) < self.run.over_of(self.line) else None

    def is_there(self, v: int, s: int) -> bool:
        """Whether ``v`` was made before step ``s`` and is read there or later before it is made again."""
        k = bisect_left(self.at[v], s)
        if self.problem.values[v].final:
            return k > 0
        return 0 < k < len(self.at[v]) and not self.made[v][k]

    def to_make(self, wanted: Iterable[int], s: int, most: int = FEW_AGAIN) -> list[int] | None:
        """Ops that make ``wanted`` before step ``s`` of what is there, inputs first.

        ``None`` if they are more than ``most``, or rest on what was made once and is gone.
        """
        targets = frozenset(wanted)

        def at_hand(v: int) -> bool:
            return v not in targets and self.is_there(v, s)

        ops = sorted(runs_again(self.problem, targets, at_hand, most=most + 1))
        makes_it = len(ops) <= most and all(self.problem.ops[i].recomputable for i in ops)
        return ops if makes_it else None

    def drops(self, again: int = FEW_AGAIN) -> list[_Drop]:
        """Values that wait across steps above the budget, most bytes there per second first."""
        problem = self.problem
        least_s = NO_TIME * problem.total_seconds
        above = np.concatenate(([0], np.cumsum(self.excess > 0)))
        found: list[tuple[float, _Drop]] = []
        for v, at in self.at.items():
            size = problem.values[v].bytes
            if not size or not can_be_dropped(problem, v):
                continue
            for a, b, makes in zip(at, at[1:], self.made[v][1:], strict=False):
                if makes or b - a < 2 or above[b] == above[a + 1]:
                    continue
                ops = self.to_make([v], b, again)
                if ops is not None:
                    drop = self._drop(v, a, b, ops)
                    relief = float(np.minimum(self.excess[a + 1 : b], size).sum())
                    found.append((relief / (drop.again_s + least_s), drop))
        found.sort(key=lambda one: (-one[0], one[1].v, one[1].b))
        return [drop for _, drop in found]

    def _drop(self, v: int, a: int, b: int, ops: list[int]) -> _Drop:
        problem = self.problem
        size = [value.bytes for value in (problem.values[u] for i in ops for u in problem.ops[i].outputs)]
        reads = {u for i in ops for u in problem.counted_inputs[i]}
        last = {u: k for k, i in enumerate(ops) for u in problem.counted_inputs[i]}
        last[v] = len(ops)
        burst, now, made = [], 0, iter(size)
        fresh: dict[int, int] = {}
        for k, i in enumerate(ops):
            fresh.update((u, next(made)) for u in problem.ops[i].outputs)
            now = sum(fresh.values())
            burst.append(now + problem.ops[i].workspace_bytes)
            fresh = {u: bytes_ for u, bytes_ in fresh.items() if last.get(u, -1) > k}
        again_s = sum(problem.ops[i].again_s for i in ops)
        outputs = {u for i in ops for u in problem.ops[i].outputs}
        return _Drop(
            v, problem.values[v].bytes, a, b, tuple(ops), frozenset(reads - outputs), again_s, np.array(burst)
        )

    def moved(self) -> Iterator[list[int]]:
        """Schedules in which what is furthest above the budget, or leads on from there, is elsewhere."""
        worst = [int(s) for s in np.argsort(-self.excess, kind="stable") if self.excess[s] > 0]
        for s in worst[:MOVED]:
            yield from self._held_and_dropped(s)
        for s in [s for s in worst if not self.first[s]][:MOVED]:
            yield from self._held_or_early(s)
            yield from self._begun_early(s)

    def _held_or_early(self, s: int) -> Iterator[list[int]]:
        """Schedules in which what recomputation ``s`` leads to, if it is small, waits.

        Since it was made last, or since it is made again before what came in between.
        """
        ops, values = self.problem.ops, self.problem.values
        makes = {q: sum(values[v].bytes for v in ops[self.steps[q]].outputs) for q in range(s, self._ends(s))}
        small = sorted(makes, key=lambda q: (makes[q], q))[:SMALLEST]
        for q in (s, *small):
            yield [*self.steps[:q], *self.steps[q + 1 :]]
        for place in self._earlier(s):
            for q in small:
                again = self.to_make(ops[self.steps[q]].outputs, place)
                if again and self._ran(again, place):
                    yield [*self.steps[:place], *again, *self.steps[place:q], *self.steps[q + 1 :]]

    def _held_and_dropped(self, s: int) -> Iterator[list[int]]:
        """Schedules without a recomputation for which something waits across ``s``, and without that wait.

        What it made waits instead since it was made last.
        """
        for v, at in self.at.items():
            k = bisect_left(at, s)
            if not 0 < k < len(at) - 1 or at[k] == s or not can_be_dropped(self.problem, v):
                continue
            b, c = at[k : k + 2]
            if not (self.first[b] or self.made[v][k] or self.made[v][k + 1]):
                again = self.to_make([v], c)
                if again is not None:
                    yield [*self.steps[:b], *self.steps[b + 1 : c], *again, *self.steps[c:]]

    def _begun_early(self, s: int) -> Iterator[list[int]]:
        """Schedules that run the recomputations around ``s`` earlier, up to where little is held."""
        begin, held = self._begins(s), self.line.kept_bytes
        cuts = sorted(range(s + 1, self._ends(s) + 1), key=lambda cut: (int(held[cut - 1]), cut))[:CUTS]
        for place in self._earlier(s):
            for cut in sorted(cuts):
                prefix = self.steps[begin:cut]
                made = {v for i in prefix for v in self.problem.ops[i].outputs}
                wanted = {v for i in prefix for v in self.problem.counted_inputs[i]} - made
                again = self.to_make([v for v in wanted if not self.is_there(v, place)], place)
                if again is not None and self._ran(prefix, place):
                    rest = [*self.steps[place:begin], *self.steps[cut:]]
                    yield [*self.steps[:place], *again, *prefix, *rest]

    def _earlier(self, s: int) -> Iterator[int]:
        """Before each of the first runs that precede recomputation ``s``, and before what led to them."""
        at = self._begins(s)
        for _ in range(EARLIER):
            if at <= 1:
                return
            first, at = at - 1, self._begins(at - 1)
            yield from dict.fromkeys((first, at))

    def _ran(self, ops: Iterable[int], s: int) -> bool:
        """Whether each of ``ops`` ran before step ``s``."""
        return all(self.at[v][0] < s for i in ops for v in self.problem.ops[i].outputs)

    def _begins(self, s: int) -> int:
        """The first of the recomputations that step ``s`` is among or follows."""
        while s > 0 and not self.first[s - 1]:
            s -= 1
        return s

    def _ends(self, s: int) -> int:
        """The first run that follows recomputation ``s``."""
        while s < len(self.steps) and not self.first[s]:
            s += 1
        return s
