"""Cuts for ``AnyOrder``: a stage whose reruns cannot run, in any order and however often, is cut off.

``AnyOrder`` counts of a stage what each rerun touches and what is carried through.  It does not see two
values that one stage makes and holds at the same time, so its answer may name reruns that fit one by one
and not together.  Whether they do is a small question: of stage t, the values A carried in, the ops R that
may run again, and the values O carried out, find the cheapest way from A to the first run of op t with O
there.  A shortest path over the sets of values alive answers it, for any order and any number of reruns.  Let
c be its seconds (infinite: there is none).  Fewer carried in, fewer ops and more carried out never make it
cheaper, so with

    d = sum of (1 - S[t+1, o] : o in O) + sum of (S[t, v] : v not in A) + sum of (R[t, i] : i not in R)

every schedule satisfies

    (1)  d >= 1                                              where there is no way
    (2)  sum of again_s[i] R[t, i] + E[t] >= c (1 - d)       where there is one

E[t] >= 0 being the seconds of stage t's second and later runs of an op, which the objective pays.  Before a
cut is written A and R are widened, and O is narrowed, one at a time, as long as it stays as strong.  An
answer that gets no cut has a way through every stage: together they are a schedule that no other beats.

Weakness: the questions are small where few sets of values fit, and are given up above ``MOST_STATES`` of
them; each round solves the whole program anew.

Sources: ours; a subproblem that answers with cuts of this form is the logic-based Benders decomposition of
Hooker and Ottosson (Mathematical Programming 96, 2003).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from solvers.exact.program import AnyOrder

__all__ = ["Bursts", "Cut"]

# A stage whose question has met so many sets of values is left as it is.
MOST_STATES = 4000
# Steps of widening and narrowing, at most; each asks the question once.
MOST_STEPS = 60
# Seconds apart by less than this share are the same.
SAME = 1e-9


@dataclass(frozen=True)
class Way:
    """Reruns of one stage, op positions, and their seconds; infinite, there is none."""

    seconds: float
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cut:
    """``sum(coefficient * column) >= lower``, with E of ``stage`` among the columns if it is ``priced``.

    A priced one is in seconds.
    """

    stage: int
    terms: tuple[tuple[int, float], ...]
    lower: float
    priced: bool


class Bursts:
    """The stages of ``program`` within ``budget_bytes``."""

    def __init__(self, program: AnyOrder, budget_bytes: int) -> None:
        self.program, self.problem, self.budget_bytes = program, program.problem, budget_bytes
        self.steps: list[int] | None = None

    def __repr__(self) -> str:
        return f"Bursts({self.program!r}, {self.budget_bytes} bytes)"

    def cuts(self, chosen: Sequence[bool]) -> Iterator[Cut]:
        """A cut for each stage in which ``chosen`` costs more than it says; none where that is too large.

        ``steps`` then are what it runs, op positions; ``None`` where some stage has no way that was found.
        """
        self.steps = []
        for t in range(len(self.problem)):
            carried = {v for (s, v), c in self.program.carried.items() if s == t and chosen[c]}
            again = {i for (s, i), c in self.program.rerun.items() if s == t and chosen[c]}
            out = {v for (s, v), c in self.program.carried.items() if s == t + 1 and chosen[c]}
            out.difference_update(self.problem.ops[t].outputs)
            way = self.cheapest(t, carried, again, out) if again else Way(0.0)
            if way is None or math.isinf(way.seconds):
                self.steps = None
            if way is None:
                continue
            if self.steps is not None:
                self.steps += [*way.steps, t]
            said_s = math.fsum(self.problem.ops[i].again_s for i in again)
            if way.seconds > said_s + SAME * self.problem.total_seconds:
                yield self._cut(t, carried, again, out, way.seconds)

    def cheapest(
        self, t: int, carried: Collection[int], again: Collection[int], out: Collection[int]
    ) -> Way | None:
        """The reruns of stage ``t`` that take least seconds; ``None`` if the question was too large."""
        return _Question(self.program, self.budget_bytes, t, again, out).cheapest(carried)

    def _cut(self, t: int, carried: set[int], again: set[int], out: set[int], least_s: float) -> Cut:
        """The cut of a stage, of as few columns as it takes."""
        carried, again, out = set(carried), set(again), set(out)
        all_in = {v for s, v in self.program.carried if s == t}
        all_again = {i for s, i in self.program.rerun if s == t}
        moves: list[tuple[set[int], int, bool]] = [
            *((again, i, True) for i in sorted(all_again - again)),
            *((carried, v, True) for v in sorted(all_in - carried)),
            *((out, v, False) for v in sorted(out)),
        ]
        for of, one, joins in moves[:MOST_STEPS]:
            (of.add if joins else of.remove)(one)
            way = self.cheapest(t, carried, again, out)
            if way is None or way.seconds < least_s * (1 - SAME):
                (of.remove if joins else of.add)(one)
        return self._row(t, all_in - carried, all_again - again, out, least_s)

    def _row(
        self, t: int, not_in: Iterable[int], not_again: Iterable[int], out: Collection[int], least_s: float
    ) -> Cut:
        priced = math.isfinite(least_s)
        weight = least_s if priced else 1.0
        terms: dict[int, float] = {}
        if priced:
            terms = {c: self.problem.ops[i].again_s for (s, i), c in self.program.rerun.items() if s == t}
        for c in (
            *(self.program.carried[t, v] for v in not_in),
            *(self.program.rerun[t, i] for i in not_again),
        ):
            terms[c] = terms.get(c, 0.0) + weight
        for v in out:
            c = self.program.carried[t + 1, v]
            terms[c] = terms.get(c, 0.0) - weight
        return Cut(t, tuple(terms.items()), weight * (1 - len(out)), priced)


class _Question:
    """From some values to the first run of op ``t``: sets of values are the bits of a number."""

    def __init__(
        self, program: AnyOrder, budget_bytes: int, t: int, again: Collection[int], out: Collection[int]
    ) -> None:
        problem = self.problem = program.problem
        self.room = budget_bytes - program.constant_bytes(t)
        self.runs = [
            (problem.ops[i].again_s, _bits(program.needed(i)), problem.ops[i].outputs, i)
            for i in sorted(again)
        ]
        self.goal = _bits((*program.needed(t), *out))
        op = problem.ops[t]
        self.last_bytes = op.workspace_bytes + sum(problem.values[v].bytes for v in op.outputs)
        self.of_use = self.goal
        for _, reads, _, _ in self.runs:
            self.of_use |= reads
        self.keeps = _bits(v for i in again for v in problem.ops[i].outputs if not program.kept_always(v))
        self._bytes = {0: 0}

    def bytes_of(self, some: int) -> int:
        if some not in self._bytes:
            size = self.problem.values[(some & -some).bit_length() - 1].bytes
            self._bytes[some] = size + self.bytes_of(some & (some - 1))
        return self._bytes[some]

    def cheapest(self, carried: Collection[int]) -> Way | None:
        """The cheapest way from ``carried``, as :meth:`Bursts.cheapest` has it."""
        if self.bytes_of(self.goal) + self.last_bytes > self.room:
            return Way(math.inf)
        start = _bits(carried) & self.of_use
        best: dict[int, float] = {start: 0.0}
        back: dict[int, tuple[int, int]] = {}
        heap = [(0.0, start)]
        while heap:
            spent_s, alive = heapq.heappop(heap)
            if spent_s > best[alive]:
                continue
            if not self.goal & ~alive:
                return Way(spent_s, _steps_to(alive, back))
            if len(best) > MOST_STATES:
                return None
            for now_s, after, i in self._moves(spent_s, alive):
                if now_s < best.get(after, math.inf):
                    best[after], back[after] = now_s, (alive, i)
                    heapq.heappush(heap, (now_s, after))
        return Way(math.inf)

    def _moves(self, spent_s: float, alive: int) -> Iterator[tuple[float, int, int]]:
        """Let one value go (op -1), or run an op for which there is room: seconds, what is alive then, op."""
        rest = alive
        while rest:
            yield spent_s, alive & ~(rest & -rest), -1
            rest &= rest - 1
        for again_s, reads, outputs, i in self.runs:
            made = _bits(outputs)
            held = self.bytes_of(alive & ~made) + sum(self.problem.values[v].bytes for v in outputs)
            if not reads & ~alive and held + self.problem.ops[i].workspace_bytes <= self.room:
                yield spent_s + again_s, alive | made & self.keeps & self.of_use, i


def _steps_to(alive: int, back: dict[int, tuple[int, int]]) -> tuple[int, ...]:
    """The ops on the way to ``alive``, by what came before each set of values."""
    steps = []
    while alive in back:
        alive, i = back[alive]
        steps.append(i)
    return tuple(i for i in reversed(steps) if i >= 0)


def _bits(positions: Iterable[int]) -> int:
    return sum({1 << v for v in positions})
