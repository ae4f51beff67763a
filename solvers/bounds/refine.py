"""Bounds by refinement: solve at a few instants, run the answer, add the instant where it overflows.

The answer of an :class:`InstantProgram` says what is resident at its instants and what runs again in
between.  Emitted just in time that is a schedule, and the simulator says where it breaks the budget: there
the next instants go.  If it breaks it nowhere, it is a plan whose time is the program's optimum, which no
schedule beats: an optimal one.  The bound of every round is valid, also of one that the clock cut, and each
round is told what those before it proved, so the bound never falls.

Works best where few instants decide.  On one core it proves optimal plans of U-Net (244 ops) at 50 % of its
memory in 1 s and at 40 % in 18 s, ResNet-50 at 50 % in 0.2 s and at 40 % in 4 s, GPT2-medium at 40 and 35 %
in 1 s.  Weakness: the program grows with the instants and every round starts cold, so on graphs of many like
layers near the floor the last point of the gap is not closed in a minute, and no plan may be met by then.

Sources: ours; adding what an answer violates is the cutting-plane method of Dantzig, Fulkerson
and Johnson (1954).
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from solvers.bounds.instants import InstantProgram
from solvers.core.facts import Facts
from solvers.core.just_in_time import first_runs, runs_again, trim
from solvers.core.linear import LinearAnswer
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import Timeline, simulate_steps
from solvers.core.solution import InfeasibleError, Solution, solution_of

__all__ = ["Refinement", "emitted", "pressure_instants", "refine", "solve"]

log = logging.getLogger(__name__)

# Values that together are this share of the budget count as free: what that costs is what this much more
# budget would save.
FREE_SHARE = 1e-4
# HiGHS may leave rows open by 1e-7 and integers by 1e-6, which only widens the program, and takes reduced
# costs within 1e-7 as right, which could lift a bound: it gives up ten times that.
SAFETY = 1e-6
# A round stops this close to its own bound, relative; once nothing overflows, at the finer one.
COARSE_GAP, FINE_GAP = 2e-3, 1e-7
# At most this share of the time left goes to one round.
ROUND_SHARE = 0.6
# New instants of one round: one and this share of those there are; few, for time grows steeply with them.
GROWTH = 0.125
# They are at least this many ops apart; where the answer exceeds the budget by more than this share of it,
# half as far as the instants are on average.
SPREAD = 4
FAR_OVER = 0.5

NOT_COUNTED = -(2**61)  # bytes around an op while which memory does not count


@dataclass
class Refinement:
    """What is known after some rounds.

    ``bound``      proved: extra seconds beyond one run of every op, or bytes if no budget was given.
    ``steps``      the best schedule that was met, op positions (``None``: none fits); extra seconds, or peak
                   bytes, are ``best``.
    ``lowest``     the schedule of lowest peak that was met, and its peak.
    ``instants``   the program's, ascending.
    ``tightest``   the op at whose first run, or for which, the last answer's schedule peaks.
    ``settled``    ``best`` is the optimum, to twice ``SAFETY``; ``bound`` then equals it.
    """

    bound: float = 0.0
    steps: list[int] | None = None
    best: float = math.inf
    lowest: tuple[list[int] | None, float] = (None, math.inf)
    instants: list[int] = field(default_factory=list)
    settled: bool = False
    rounds: int = 0
    tightest: int = 0

    def __repr__(self) -> str:
        return (
            f"Refinement(bound {self.bound:.6g}, best {self.best:.6g}, {len(self.instants)} instants, "
            f"{self.rounds} rounds{', settled' if self.settled else ''})"
        )


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 30.0,
    on_round: Callable[[Refinement], None] | None = None,
) -> Solution:
    """The best schedule that the rounds met, with their bound; if none fits, the one of lowest peak.

    That may be so below the time limit too, where no instant is left to add; ``auto`` searches on from there.
    Raises ``InfeasibleError`` if a round proves that no schedule fits.
    """
    started = time.perf_counter()
    found = refine(
        problem, budget_bytes, pressure_instants(problem, 1), time_limit_s=time_limit_s, on_round=on_round
    )
    if found.bound == math.inf:
        raise InfeasibleError(budget_bytes, budget_bytes + 1, problem.ops[found.tightest].name)
    steps = found.steps or found.lowest[0] or list(range(len(problem)))
    return solution_of(
        problem,
        Schedule.of(problem, steps),
        budget_bytes,
        solver="instants",
        bound_seconds=problem.total_seconds + min(found.bound, found.best),
        solve_seconds=time.perf_counter() - started,
    )


def pressure_instants(problem: Problem, count: int) -> list[int]:
    """At most ``count`` ops, ascending, spread over the run, around whose first run memory is tightest.

    With a turn they are backward ops and what counts is the bytes that no choice changes plus the op's
    own inputs; without one, the bytes when nothing is dropped.
    """
    n = len(problem)
    if not n:
        return []
    start = 0 if problem.turn is None or problem.turn >= n else problem.turn
    if not start:
        need = simulate_steps(problem, list(range(n))).live_bytes
    else:
        need = Facts.of_one_backward(problem).pressure
    edges = np.unique(np.linspace(start, n, count + 1).astype(int))
    return [int(a + need[a:b].argmax()) for a, b in pairwise(edges)]


def refine(
    problem: Problem,
    budget_bytes: int | None,
    instants: list[int],
    *,
    time_limit_s: float,
    enough: float = math.inf,
    close: float = 0.0,
    known: float = 0.0,
    most_bytes: int = 1,
    on_round: Callable[[Refinement], object] | None = None,
    counted: Collection[int] | None = None,
) -> Refinement:
    """Raise the bound on extra seconds within ``budget_bytes`` (``None``: on the peak) until time is up.

    The program and the bound are of ``problem.relaxed``; schedules are judged by what they truly take.

    Starts at ``instants`` and a bound ``known`` to hold.  Stops early once the bound is ``enough``, or a
    schedule is known that is off it by no more than ``close``, or where no instant or row is left to add.
    ``most_bytes`` is the peak of some schedule, where no budget is given.  ``on_round`` is told after every
    round, and ends the search by returning ``True``.  A bound of ``inf`` says that nothing fits the budget.
    ``counted``: ops while which memory counts, ``instants`` among them; default: all.
    """
    deadline = time.perf_counter() + time_limit_s
    search = _Search(problem, budget_bytes, instants, deadline, most_bytes, counted)
    found = search.found
    found.bound = known
    while problem.ops and search.left_s() > 0 and not found.settled and found.bound < enough:
        if found.best - found.bound <= close:
            break
        more = search.round()
        if (on_round is not None and on_round(found) is True) or not more:
            break
    return found


def emitted(program: InstantProgram, x: np.ndarray, *, ascending: bool = False) -> list[int]:
    """Steps of the schedule with the residents of ``x``: what is missing runs again when it is first read,
    or before the next instant if it is resident there; what nobody reads does not run again.

    Reruns between two first runs are in the order in which they are asked for, or ``ascending``.
    """
    facts, problem = program.facts, program.problem
    resident = [program.resident_at(x, n) for n in range(len(program.instants))] + [set()]
    steps = list(range(program.instants[0] if program.instants else len(problem)))
    for n, (start, end) in enumerate(zip(program.instants, program.ends, strict=True)):
        there = set(resident[n])
        for t in range(start, end):
            burst = _missing(facts, start, there, facts.reads[t])
            steps.extend(sorted(burst) if ascending else burst)
            steps.append(t)
        burst = _missing(facts, start, there, sorted(resident[n + 1]))
        steps.extend(sorted(burst) if ascending else burst)
    return trim(problem, steps)


def _missing(facts: Facts, start: int, there: set[int], wanted: Sequence[int]) -> list[int]:
    """Ops that make the ``wanted`` values that are past at ``start`` and not ``there`` (which then are),
    inputs first."""
    ops = facts.problem.ops

    def may_run(i: int) -> bool:
        return i < start and ops[i].recomputable

    burst = list(runs_again(facts.problem, wanted, there.__contains__, may_run, reads=facts.reads))
    there.update(v for i in burst for v in ops[i].outputs)
    return burst


def _is_in(ascending: Sequence[int], i: int) -> bool:
    at = bisect_left(ascending, i)
    return at < len(ascending) and ascending[at] == i


class _Search:
    def __init__(
        self,
        problem: Problem,
        budget: int | None,
        instants: list[int],
        deadline: float,
        most_bytes: int,
        counted: Collection[int] | None = None,
    ) -> None:
        self.problem, self.budget, self.deadline = problem, budget, deadline
        self.most_bytes = most_bytes
        share_of = most_bytes if budget is None else budget
        self.facts = Facts.of(problem, int(FREE_SHARE * share_of))
        self.counted = None if counted is None else sorted(counted)
        if self.counted is not None:
            around = np.full(len(problem), NOT_COUNTED)
            around[self.counted] = self.facts.around[self.counted]
            self.facts = replace(self.facts, around=around)
        self.found = Refinement(instants=sorted(set(instants)))
        self.bursts: set[int] = set()
        self.gap = COARSE_GAP

    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def round(self) -> bool:
        """One program; whether there is anything left to add."""
        found = self.found
        program = InstantProgram(
            self.facts,
            found.instants,
            self.budget,
            bursts=self.bursts,
            most_bytes=self.most_bytes,
        )
        unit = program.unit_bytes if self.budget is None else program.unit_s
        program.at_least(found.bound / unit)
        share = ROUND_SHARE if found.rounds and self.gap == COARSE_GAP else 1.0
        first = not found.rounds and self.budget is not None
        answer = program.lp.solve(time_limit_s=share * self.left_s(), relax=first, relative_gap=self.gap)
        found.rounds += 1
        if answer.infeasible:
            found.bound = math.inf
            return False
        if math.isfinite(answer.bound) and (answer.optimal or not first):
            found.bound = max(
                found.bound, (answer.bound * (1 - SAFETY) - (self.budget is None) * SAFETY) * unit
            )
        log.debug("%s: %r, %r", self.problem.name, program, answer)
        return answer.x is not None and (first or self._learn(program, answer))

    def _learn(self, program: InstantProgram, answer: LinearAnswer) -> bool:
        """Run the answer; add instants and rows where it overflows, or ask for a finer answer."""
        found, x = self.found, answer.x
        assert x is not None
        both = [emitted(program, x, ascending=order) for order in (False, True)]
        steps = min(both, key=lambda steps: simulate_steps(self.problem, steps).peak_bytes)
        line = self._judge(steps)
        where = first_runs(steps)
        found.tightest = min(where[line.peak_step], len(self.problem) - 1)
        limit = self.budget if self.budget is not None else int(found.bound * (1 + FINE_GAP)) + 1
        found.settled = found.best <= found.bound * (1 + 2 * SAFETY)
        if found.settled:
            found.bound = max(found.bound, found.best)
            return False
        if int(line.peak_bytes) > limit and self._add(program, steps, where, line.live_bytes - limit):
            return True
        if self.gap == FINE_GAP and answer.optimal:
            return False
        self.gap = FINE_GAP
        return True

    def _judge(self, steps: list[int]) -> Timeline:
        """Remember ``steps`` for what they truly take; their timeline as the program counts bytes."""
        found, line = self.found, simulate_steps(self.problem, steps)
        if line.peak_bytes < found.lowest[1]:
            found.lowest = steps, line.peak_bytes
        cost = float(line.peak_bytes) if self.budget is None else line.recompute_seconds
        if cost < found.best and (self.budget is None or line.peak_bytes <= self.budget):
            found.best, found.steps = cost, steps
        counted = self.facts.problem
        return line if counted is self.problem else simulate_steps(counted, steps)

    def _add(self, program: InstantProgram, steps: list[int], where: list[int], over: np.ndarray) -> bool:
        """New instants and burst rows at the steps that are ``over``, the worst first."""
        found, size = self.found, len(self.found.instants)
        order = [s for s in np.argsort(-over, kind="stable").tolist() if over[s] > 0]
        # An answer far above the budget is so nearly everywhere: what is worst there says little.
        span, apart = len(self.problem) - (self.problem.turn or 0), 0
        if over.max() > FAR_OVER * (self.budget or math.inf):
            apart = span // (2 * size + 2)
        new, bursts = self._chosen(order, steps, where, apart)
        if apart and not new:
            new, bursts = self._chosen(order, steps, where, 0)
        fresh = bursts - self.bursts
        self.bursts |= bursts
        found.instants = sorted({*found.instants, *new})
        return bool(new or fresh)

    def _chosen(
        self, order: list[int], steps: list[int], where: list[int], apart: int
    ) -> tuple[list[int], set[int]]:
        """Instants at the first of the steps ``order``, ``apart`` ops from those known, and burst rows."""
        known = self.found.instants
        new: list[int] = []
        bursts: set[int] = set()
        for s in order:
            if len(new) > len(known) * GROWTH:
                break
            t, i = where[s], steps[s]
            if i != t and (self.counted is None or _is_in(self.counted, i)):
                bursts.add(i)
            if self.counted is not None:
                at = min(bisect_left(self.counted, t), len(self.counted) - 1)
                t = self.counted[at]
            elif t in known or t >= len(self.problem):
                t = t - 1
            near = [abs(t - u) < SPREAD for u in new] + [abs(t - u) < apart for u in known]
            if t not in known and not any(near):
                new.append(t)
        return new, bursts
