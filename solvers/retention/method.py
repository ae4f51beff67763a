"""Fixed order on any DAG: an integer program over candidate recomputations, and a search around its answers.

The method, for graphs without a turn, and for any other:

1. The candidates are the ops whose value an op reads across a stretch where keeping everything exceeds the
   budget, to run again right before that op; and what they read, one and two steps further up.
2. The linear relaxation of :mod:`solvers.retention.program` over up to ``WIDE_CANDIDATES`` of them, its
   memory rows added as its points break them, prices the candidates: their reduced costs.  The cheapest few
   hundred make a whole-number program.  Every answer is a plan: the recomputations in their stages, in the
   order of the problem, without those that nothing reads.
3. Large-neighbourhood search: two programs at a time, on two threads, each over the recomputations of the
   best plan and a random choice of others (of one stretch of the run, across one peak, or anywhere), most of
   the plan's other recomputations pinned, and only better answers allowed.  Neighbourhoods grow when all
   are solved to the end, and shrink when none is.

Beside this runs the bound, :mod:`solvers.retention.bound`; where the two meet, the status is ``optimal``.

On the layered DAGs of tests/benchmarks/layered.py, seconds added in %, plan / bound, at 90 and 80 % of what
keeping everything takes, on two cores of which others used half: 100 ops 1.55 / 1.55 and 4.56 / 4.56 (proved,
in 1 s); 250 ops 1.08 / 0.98 and 2.94 / 2.83 in 60 s (the bound needs 15 s of a core for 1.08 and 2.94); 500
ops 1.31 / 1.22 and 7.15 / 6.09 in 60 s; 1000 ops 0.97 / 0.85 and 4.72 / 3.48 in 90 and 150 s.  With 40 s of
a core the bound at 80 % is 6.33 and 3.73.  Greedy: 1.56 and 4.56; 1.12 and 3.72; 1.69 and none; 1.12 and
6.85.

Lost: MOCCASIN's solver, CP-SAT, on the same programs with two workers and 60 s had 3.00 where HiGHS
proved 2.94 in 3 s, and nothing at all from 500 ops on.  Burst rows on demand, one per candidate, left plans
5 % over the budget at 500 ops; as one row per stage from the start they cost 0.02 % and settle it.

Sources: Bartan et al., "MOCCASIN: Efficient Tensor Rematerialization for Neural Networks" (ICML 2023,
https://arxiv.org/abs/2304.14463); Jain et al., "Checkmate" (MLSys 2020, https://arxiv.org/abs/1910.02653);
Shaw, "Using constraint programming and local search methods" (1998), for large neighbourhoods.

Optimal: where the bound meets it.  Without a time limit the clock decides nothing, and a seed gives one
answer.  Weaknesses: an op runs again only right before an op that needs it or something made from it, at
most two steps up in one go; a burst may free nothing before its end; so near the floor other methods find
what this one does not.  Above ``WIDE_CANDIDATES`` gaps only those that relieve most per second are looked at.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from solvers.baselines.greedy import greedy
from solvers.core.just_in_time import can_be_dropped, first_runs, trim
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import Timeline, simulate_steps
from solvers.core.solution import OPTIMAL_RTOL, Rank, Solution, solution_of
from solvers.retention.bound import instants_bound, tight_instants
from solvers.retention.program import Candidate, RetentionProgram

__all__ = ["solve"]

log = logging.getLogger(__name__)

# Candidates of the relaxation that prices them, of the first whole program, and of a neighbourhood.
WIDE_CANDIDATES = 6000
FIRST_CANDIDATES = 600
NEAR_CANDIDATES = 150.0
MIN_CANDIDATES = 30.0
# By what neighbourhoods change when all, or none, of a round were solved to the end.
GROW, SHRINK = 1.3, 0.7
# Share of the plan's own recomputations outside a scattered neighbourhood that stay.
PINNED_SHARE = 0.7
# Shares of the time for the bound, beside the rest; for the first program, of that for prices; for a round.
BOUND_SHARE = 0.8
FIRST_SHARE = 0.4
RELAXED_SHARE = 0.4
NEAR_SHARE = 0.06
# Share of what is left that the first whole program gets once more if its plan did not fit.
AGAIN_SHARE = 0.7
# Rounds of two neighbourhoods without a better plan after which the search ends.
IDLE_ROUNDS = 30
# Stages with closure rows.
CLOSURES = 6
# HiGHS takes no infinite limit.
LONGEST_S = 1e6


@dataclass(frozen=True, eq=False)
class _Plan:
    """A sequence and what the simulator says of it."""

    timeline: Timeline
    excess_bytes: int

    @classmethod
    def of(cls, problem: Problem, budget_bytes: int, steps: list[int]) -> _Plan:
        line = simulate_steps(problem, steps)
        return cls(line, max(0, line.peak_bytes - budget_bytes))

    @property
    def rank(self) -> Rank:
        """Lower is better."""
        return Rank(self.excess_bytes, self.timeline.seconds, self.timeline.peak_bytes)

    def reruns(self) -> list[Candidate]:
        """The candidates it runs."""
        steps = self.timeline.steps.tolist()
        return sorted({(i, t) for i, t in zip(steps, first_runs(steps), strict=True) if i != t})


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    hint: Schedule | None = None,
) -> Solution:
    """The fastest schedule found within ``budget_bytes`` whose first executions keep the problem's order.

    ``hint`` is where the search starts (default: the greedy schedule); the answer is never worse.  If nothing
    fits, it is ``unsettled`` and its schedule the one of lowest peak that was found.
    """
    started = time.perf_counter()
    plan = _Plan.of(problem, budget_bytes, list(range(len(problem))))
    bound = problem.total_seconds
    if plan.excess_bytes:
        start = greedy(problem, budget_bytes) if hint is None else hint
        plan = min(plan, _Plan.of(problem, budget_bytes, start.steps(problem)), key=lambda p: p.rank)
        search = _Search(problem, budget_bytes, plan, started + time_limit_s, seed)
        plan, bound = search.run()
    steps = plan.timeline.steps.tolist()
    return solution_of(
        problem,
        Schedule.of(problem, steps),
        budget_bytes,
        solver="retention",
        bound_seconds=bound,
        solve_seconds=time.perf_counter() - started,
    )


class _Search:
    """The best plan so far, what the candidates are worth, and what to try next."""

    def __init__(self, problem: Problem, budget: int, plan: _Plan, deadline: float, seed: int) -> None:
        self.problem, self.budget, self.plan, self.deadline, self.seed = problem, budget, plan, deadline, seed
        self.rng = random.Random(seed)
        self.bound = problem.total_seconds
        self.price: dict[Candidate, float] = {}
        self.size = NEAR_CANDIDATES
        self.closures = tight_instants(problem, budget, CLOSURES)
        live = simulate_steps(problem, list(range(len(problem)))).live_bytes
        self.over = np.flatnonzero(live > budget)
        before = np.cumsum([0, *(live > budget)])
        # Per op, the ops whose values it reads across a stretch where keeping everything is too much, and
        # what dropping them there relieves, in bytes times ops per second of recomputation.
        self.first: dict[int, list[int]] = {}
        self.relief: dict[Candidate, float] = {}
        for v, value in enumerate(problem.values):
            if value.producer is not None and can_be_dropped(problem, v):
                for a, b in pairwise((value.producer, *problem.consumers[v])):
                    spanned = int(before[b] - before[a + 1])
                    if spanned:
                        self.first.setdefault(b, []).append(value.producer)
                        relief = value.bytes * spanned / (problem.ops[value.producer].again_s + 1e-12)
                        self.relief[value.producer, b] = self.relief.get((value.producer, b), 0.0) + relief

    def run(self) -> tuple[_Plan, float]:
        """The best plan found, and a bound on every plan's seconds."""
        total_s = self.left_s()
        if not self.first or not total_s:
            return self.plan, self.bound
        with ThreadPoolExecutor(2) as pool:
            bound = pool.submit(
                instants_bound,
                self.problem,
                self.budget,
                time_limit_s=min(LONGEST_S, BOUND_SHARE * total_s),
                seed=self.seed,
                good_enough_s=self._known_s,
            )
            self._first(min(LONGEST_S, FIRST_SHARE * total_s))
            if self.plan.excess_bytes:
                self._whole(min(LONGEST_S, AGAIN_SHARE * self.left_s()))
            idle = 0
            while idle < IDLE_ROUNDS and not self.done():
                if bound.done() or math.isinf(total_s):
                    self.bound = bound.result()
                idle += 1
                limit_s = min(max(2.0, NEAR_SHARE * total_s), self.left_s(), LONGEST_S)
                tries = [self._near() for _ in range(2 if bound.done() else 1)]
                running = [pool.submit(self._solved, *near, limit_s, better=True) for near in tries]
                settled = 0
                for plan, optimal in [future.result() for future in running]:
                    settled += optimal
                    if plan is not None and plan.rank < self.plan.rank:
                        log.debug("%s: %r", self.problem.name, plan.timeline)
                        self.plan, idle = plan, 0
                self.size *= SHRINK if not settled else GROW if settled == len(tries) else 1.0
                self.size = max(MIN_CANDIDATES, self.size)
            self.bound = bound.result()
        return self.plan, self.bound

    def left_s(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())

    def done(self) -> bool:
        """Whether time is up or the plan proved optimal."""
        return self.left_s() < 0.05 or self._known_s() - self.bound <= OPTIMAL_RTOL * self.bound

    def _known_s(self) -> float:
        return math.inf if self.plan.excess_bytes else self.plan.timeline.seconds

    def _first(self, limit_s: float) -> None:
        """The relaxation of a wide program prices the candidates; the cheapest make the first whole one."""
        deadline = time.perf_counter() + limit_s
        wide = near = {(i, t) for t in self.first for i in self.first[t]}
        if len(near) > WIDE_CANDIDATES:
            wide = set(sorted(near, key=lambda c: (-self.relief[c], c))[:WIDE_CANDIDATES])
        else:
            for depth in (2, 3):
                more = {(i, t) for t in self.first for i in self._chain(t, depth)}
                if len(more) > WIDE_CANDIDATES:
                    break
                wide = more
        self.price = {c: float(c not in near) for c in sorted(wide)}
        self._set_prices(limit_s * RELAXED_SHARE)
        self._whole(deadline - time.perf_counter())

    def _whole(self, limit_s: float) -> None:
        """The whole-number program over the cheapest candidates."""
        few = sorted(self.price, key=lambda c: (self.price[c], c))[:FIRST_CANDIDATES]
        plan, _ = self._solved({*few, *self.plan.reruns()}, set(), limit_s)
        if plan is not None and plan.rank < self.plan.rank:
            self.plan = plan

    def _set_prices(self, limit_s: float) -> None:
        """Solve the relaxation, with the memory rows that its points break; keep its reduced costs."""
        deadline = time.perf_counter() + limit_s
        program = RetentionProgram(self.problem, self.budget, self.price, closures=self.closures)
        rows = self.closures
        while rows:
            for t in rows:
                program.limit_op(t)
            answer = program.solve(time_limit_s=deadline - time.perf_counter(), relax=True)
            if answer.x is None or answer.reduced_costs is None:
                return
            costs = answer.reduced_costs
            self.price = {c: float(costs[column]) for c, column in program.rerun.items()}
            rows = np.flatnonzero(program.use_bytes(answer.x) > self.budget * (1 + 1e-6)).tolist()
            rows = [t for t in rows if not program.limits(t)]

    def _chain(self, t: int, depth: int) -> set[int]:
        """Ops that may run again in stage ``t``: producers of what it reads, and ``depth - 1`` steps up."""
        found = set(self.first.get(t, ()))
        front = found
        for _ in range(depth - 1):
            front = {
                self.problem.values[u].producer or 0
                for i in front
                for u in self.problem.counted_inputs[i]
                if can_be_dropped(self.problem, u)
            } - found
            found = found | front
        return found

    def _near(self) -> tuple[set[Candidate], set[Candidate]]:
        """A random choice of candidates, those of the plan included, and which of the plan's stay chosen."""
        rng = self.rng
        kind = rng.choice(("window", "peak", "any"))
        stages = sorted(self.first)
        plan = self.plan.reruns()
        if kind == "window":
            centre = rng.choice([t for _, t in plan] or stages)
            stages.sort(key=lambda t: (abs(t - centre), t))
        else:
            rng.shuffle(stages)
            if kind == "peak":
                peak = int(rng.choice(self.over))
                stages = [t for t in stages if t >= peak]
        depth = rng.choice((1, 2, 2, 3))
        dearest = rng.choice((0.01, 0.1, 0.3, 1.0))
        near: set[Candidate] = set()
        freed: set[int] = set()
        for t in stages:
            if len(near) >= self.size:
                break
            freed.add(t)
            near.update((i, t) for i in self._chain(t, depth) if self.price.get((i, t), 0.5) <= dearest)
        pinned = {c for c in plan if c[1] not in freed and (kind == "window" or rng.random() < PINNED_SHARE)}
        return near.union(plan), pinned

    def _solved(
        self, candidates: set[Candidate], pinned: set[Candidate], limit_s: float, *, better: bool = False
    ) -> tuple[_Plan | None, bool]:
        """The plan of one program (a better one, or none), and whether the program was solved to the end."""
        deadline = time.perf_counter() + limit_s
        problem = self.problem
        program = RetentionProgram(problem, self.budget, candidates, closures=self.closures)
        program.limit_all()
        program.pin(pinned)
        if better:
            program.beat(self.plan.excess_bytes, self.plan.timeline.recompute_seconds)
        answer = program.solve(time_limit_s=deadline - time.perf_counter(), seed=self.seed)
        if answer.x is None:
            return None, answer.infeasible
        steps = trim(problem, _steps(problem, program.chosen(answer.x)))
        return _Plan.of(problem, self.budget, steps), answer.optimal


def _steps(problem: Problem, candidates: Iterable[Candidate]) -> list[int]:
    """The sequence that runs ``candidates`` again, within a stage in the problem's order."""
    at: dict[int, list[int]] = {}
    for i, t in candidates:
        at.setdefault(t, []).append(i)
    return [i for t in range(len(problem)) for i in (*sorted(at.get(t, ())), t)]
