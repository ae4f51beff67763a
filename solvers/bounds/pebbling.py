"""A floor of the peak from all that may happen in a short window of the run.

Take first runs ``begin`` up to ``end`` and a few *tracked* values, made before.  Which of them are resident
is a set, and all that any schedule does in the window moves from set to set: a rerun adds what it makes and
needs what it reads, a first run needs what it reads, and anything may be let go.  The peak of a path of moves
is the most bytes on it, so the least peak over all paths is a shortest path with ``max`` in place of ``+``,
and with K tracked values it is exact after a few sweeps over 2^K sets.  No schedule peaks below it:

1. *Before the window* anything may have happened: every set is where a path may begin, if only it fits.
2. *Values not tracked* are taken to be at hand and to weigh nothing, but while an op runs that touches them.
3. *What must stay* (final values, and those of pinned ops until their last reader's first run) is there
   whatever is decided, and counts at every move.

This sees what sums over one first run cannot: that what an op reads must have been made in the same memory
before, beside gradients that are large already.  It rises with the values that are tracked; those nearest to
the op around which least is free come first.

Source: the game of Sethi, "Complete register allocation problems" (SIAM Journal on Computing 1975), with
pebbles paid for by weight; the window, what stays in it and the sweeps over sets are ours.
Exact where the window holds the bottleneck and every value that matters is tracked.  On training graphs of
ResNet-50, T5 and ConvNeXt it is 13, 13 and 7 % above the largest sum of one first run.
Weakness: 2^K sets; a bottleneck that spans many layers needs more values than can be tracked.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from solvers.core.facts import Facts
from solvers.core.problem import Problem

__all__ = ["WindowFloor", "raised_floors", "window_floor"]

log = logging.getLogger(__name__)

# Values tracked in the windows that are looked at first, and in the best of them.
TRACKED = (10, 14)
# Windows around an op: so many first runs before and after it.
AROUND = ((2, 8), (4, 16), (8, 8), (8, 24), (16, 4), (16, 16), (24, 8), (32, 32))
# Ops that are looked at: around which this share of the highest floor stays or is touched, at most so many.
TIGHT, MOST_TIGHT = 0.85, 12
# And the tightest of so many that follow the turn: the loss, whose gradients meet what made it.
AFTER_TURN = 16
# Windows that are looked at again with more values.
BEST = 6
# Values of a smaller share of what is there at the tightest op are not tracked.
SMALL = 2e-3


@dataclass(frozen=True)
class WindowFloor:
    """No schedule peaks below ``bytes``, because of first runs ``begin`` up to ``end``.

    ``bytes``    ``Problem.resident_bytes`` included.
    ``op``       the op of the window around whose first run most bytes are there whatever is decided.
    ``tracked``  number of values that were tracked.
    """

    bytes: int
    op: int
    begin: int
    end: int
    tracked: int


def window_floor(problem: Problem, facts: Facts, begin: int, end: int, most: int) -> WindowFloor:
    """The least peak of first runs ``begin`` up to ``end`` over all paths of sets of ``most`` values."""
    problem = facts.problem
    need = facts.pressure[begin:end]
    tight = begin + int(need.argmax())
    tracked = _nearest(problem, facts, begin, end, tight, most)
    game = _Game(problem, facts, tracked)
    least = game.start(begin)
    for t in range(begin, end):
        least = game.ran(t, game.rerun(t, least))
    return WindowFloor(int(least[0]), tight, begin, end, len(tracked))


def raised_floors(problem: Problem, *, deadline: float = math.inf) -> Iterator[WindowFloor]:
    """Ever higher floors, from windows around the tightest ops, first with few values, then with more.

    ``deadline``  of ``time.perf_counter()``; it is looked at between windows, which take up to 0.3 s.
    """
    facts = Facts.of(problem)
    windows = list(_windows(problem, facts))
    highest = 0
    for most in TRACKED:
        found: list[WindowFloor] = []
        for begin, end in windows:
            if time.perf_counter() > deadline:
                return
            floor = window_floor(problem, facts, begin, end, most)
            found.append(floor)
            if floor.bytes > highest:
                highest = floor.bytes
                log.debug("%s: %r", problem.name, floor)
                yield floor
        # A window in which fewer values than allowed matter says all it can.
        more = [floor for floor in found if floor.tracked == most]
        more.sort(key=lambda floor: -floor.bytes)
        windows = [(floor.begin, floor.end) for floor in more[:BEST]]


def _windows(problem: Problem, facts: Facts) -> Iterator[tuple[int, int]]:
    n = len(problem)
    need = facts.pressure
    tight = [t for t in np.argsort(-need, kind="stable").tolist() if need[t] >= TIGHT * need.max()]
    del tight[MOST_TIGHT:]
    if problem.turn is not None and problem.turn < n:
        tight.insert(0, problem.turn + int(need[problem.turn :][:AFTER_TURN].argmax()))
    windows = ((max(0, t - a), min(n, t + b)) for t in tight for a, b in AROUND)
    return iter(dict.fromkeys(windows))


def _nearest(problem: Problem, facts: Facts, begin: int, end: int, tight: int, most: int) -> list[int]:
    """Values made before ``begin`` that the window may need, those read nearest to ``tight`` first, then
    what these are made of."""
    values, reads = problem.values, problem.counted_inputs
    there = int(facts.staying[tight] + facts.around[tight]) - problem.resident_bytes
    readers = sorted(range(begin, end), key=lambda t: abs(t - tight))
    wave = [v for t in readers for v in reads[t] if (values[v].producer or 0) < begin]
    chosen: list[int] = []
    seen: set[int] = set()
    while wave and len(chosen) < most:
        following: list[int] = []
        for v in wave:
            if v in seen or facts.stays_until[v] >= 0:
                continue
            seen.add(v)
            if values[v].bytes > SMALL * there:
                chosen.append(v)
            following.extend(reads[values[v].producer or 0])
        wave = following
    return chosen[:most]


class _Game:
    """Sets of ``tracked`` values as bits of an index, and for each the least peak on the way to it."""

    def __init__(self, problem: Problem, facts: Facts, tracked: list[int]) -> None:
        self.problem, self.facts = problem, facts
        self.bit = {v: 1 << k for k, v in enumerate(tracked)}
        self.bytes = np.zeros(1, dtype=np.int64)
        for v in tracked:
            self.bytes = np.concatenate((self.bytes, self.bytes + problem.values[v].bytes))
        self.sets = np.arange(len(self.bytes), dtype=np.int32)
        # Per rerun: the sets it starts from, those it leads to, and the bytes there while it runs.
        self.moves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for i in sorted({problem.values[v].producer or 0 for v in tracked}):
            op, inputs = problem.ops[i], problem.counted_inputs[i]
            reads, makes = self._mask(inputs), self._mask(op.outputs)
            start = self.sets[((self.sets & reads) == reads) & ((self.sets & makes) == 0)]
            beside = op.workspace_bytes + sum(
                problem.values[v].bytes
                for v in (*inputs, *op.outputs)
                if v not in self.bit and facts.stays_until[v] < 0
            )
            self.moves.append((start, start | makes, self.bytes[start | makes] + beside))

    def _mask(self, values: tuple[int, ...]) -> int:
        return sum(self.bit[v] for v in values if v in self.bit)

    def start(self, t: int) -> np.ndarray:
        """Any set may be there before op ``t`` first runs."""
        return self._let_go(self.facts.entering[t] + self.bytes)

    def rerun(self, t: int, least: np.ndarray) -> np.ndarray:
        """After any reruns before op ``t`` first runs."""
        while True:
            before = least.copy()
            for start, to, there in self.moves:
                peak = np.maximum(least[start], there + self.facts.entering[t])
                least[to] = np.minimum(least[to], peak)
            least = self._let_go(least)
            if np.array_equal(before, least):
                return least

    def ran(self, t: int, least: np.ndarray) -> np.ndarray:
        """After op ``t`` first ran."""
        reads = self._mask(self.problem.counted_inputs[t])
        read_bytes = int(self.bytes[reads])
        there = self.facts.staying[t] + self.facts.around[t] + self.bytes - read_bytes
        never = np.iinfo(np.int64).max
        can = (self.sets & reads) == reads
        return self._let_go(np.where(can, np.maximum(least, there), never))

    def _let_go(self, least: np.ndarray) -> np.ndarray:
        """A set is reached where one that holds it is."""
        for bit in self.bit.values():
            pairs = least.reshape(-1, 2, bit)
            np.minimum(pairs[:, 0], pairs[:, 1], out=pairs[:, 0])
        return least
