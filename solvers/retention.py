"""Fixed order on any DAG: an integer program over candidate recomputations, and a search around its answers.

(docstring follows)
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

from solvers.emit import can_be_dropped
from solvers.greedy import greedy
from solvers.problem import Problem
from solvers.retention_bound import instants_bound, tight_instants
from solvers.retention_program import Candidate, RetentionProgram
from solvers.schedule import Schedule
from solvers.simulate import Timeline, simulate_steps
from solvers.solution import OPTIMAL_RTOL, Solution, solution_of

__all__ = ["solve"]

log = logging.getLogger(__name__)

# Candidates of the relaxation that prices them, of the first whole program, and of a neighbourhood.
WIDE_CANDIDATES = 6000
FIRST_CANDIDATES = 600
NEAR_CANDIDATES = 150.0
MIN_CANDIDATES = 30.0
# By what a neighbourhood grows when none, one or both of a round were solved to the end.
SIZE_STEPS = (0.7, 1.0, 1.3)
# Share of the plan's own recomputations outside a scattered neighbourhood that stay.
PINNED_SHARE = 0.7
# Shares of the time for the first program (and, beside it, the bound), of that for prices, and for a round.
FIRST_SHARE = 0.4
RELAXED_SHARE = 0.4
NEAR_SHARE = 0.06
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
    def rank(self) -> tuple[int, float, int]:
        """Lower is better: first the excess over the budget, then seconds, then the peak."""
        return self.excess_bytes, self.timeline.seconds, self.timeline.peak_bytes

    def stages(self) -> list[int]:
        """Per step, the op whose first run ends its stage."""
        steps = self.timeline.steps.tolist()
        seen: set[int] = set()
        pending = 0
        out = []
        for i in steps:
            out.append(pending)
            if i not in seen:
                seen.add(i)
                pending = i + 1
        return out

    def reruns(self) -> list[Candidate]:
        """The candidates it runs."""
        steps = self.timeline.steps.tolist()
        return sorted({(i, t) for i, t in zip(steps, self.stages(), strict=True) if i != t})


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    hint: Schedule | None = None,
) -> Solution:
    """The fastest schedule found within ``budget_bytes`` whose first executions keep the problem's order."""
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
        # Per op, the ops whose values it reads across a stretch where keeping everything is too much.
        self.first: dict[int, list[int]] = {}
        for v in range(len(problem.values)):
            if can_be_dropped(problem, v):
                uses = (problem.values[v].producer or 0, *problem.consumers[v])
                for a, b in pairwise(uses):
                    if before[b] > before[a + 1]:
                        self.first.setdefault(b, []).append(uses[0])

    def run(self) -> tuple[_Plan, float]:
        """The best plan found, and a bound on every plan's seconds."""
        total_s = self.left_s()
        if not self.first or not total_s:
            return self.plan, self.bound
        with ThreadPoolExecutor(2) as pool:
            share_s = min(LONGEST_S, FIRST_SHARE * total_s)
            bound = pool.submit(
                instants_bound,
                self.problem,
                self.budget,
                time_limit_s=share_s,
                seed=self.seed,
                good_enough_s=self._known_s,
            )
            self._first(share_s)
            self.bound = bound.result()
            idle = 0
            while idle < IDLE_ROUNDS and not self.done():
                idle += 1
                limit_s = min(max(2.0, NEAR_SHARE * total_s), self.left_s(), LONGEST_S)
                tries = [self._near() for _ in range(2)]
                both = [pool.submit(self._solved, *near, limit_s, better=True) for near in tries]
                settled = 0
                for plan, optimal in [future.result() for future in both]:
                    settled += optimal
                    if plan is not None and plan.rank < self.plan.rank:
                        log.debug("%s: %r", self.problem.name, plan.timeline)
                        self.plan, idle = plan, 0
                self.size = max(MIN_CANDIDATES, self.size * SIZE_STEPS[settled])
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
        by_depth = [{(i, t) for t in self.first for i in self._chain(t, depth)} for depth in (1, 2, 3)]
        wide = max((c for c in by_depth if len(c) <= WIDE_CANDIDATES), key=len, default=by_depth[0])
        self.price = {c: float(c not in by_depth[0]) for c in sorted(wide)}
        self._set_prices(limit_s * RELAXED_SHARE)
        few = sorted(wide, key=lambda c: (self.price[c], c))[:FIRST_CANDIDATES]
        plan, _ = self._solved({*few, *self.plan.reruns()}, set(), deadline - time.perf_counter())
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
        steps = _trimmed(problem, _steps(problem, program.chosen(answer.x)))
        return _Plan.of(problem, self.budget, steps), answer.optimal


def _steps(problem: Problem, candidates: Iterable[Candidate]) -> list[int]:
    """The sequence that runs ``candidates`` again, within a stage in the problem's order."""
    at: dict[int, list[int]] = {}
    for i, t in candidates:
        at.setdefault(t, []).append(i)
    return [i for t in range(len(problem)) for i in (*sorted(at.get(t, ())), t)]


def _trimmed(problem: Problem, steps: list[int]) -> list[int]:
    """``steps`` without the recomputations whose copies nothing reads."""
    while True:
        made: dict[int, int] = {}
        read = [False] * len(steps)
        seen: set[int] = set()
        for s, i in enumerate(steps):
            for v in problem.counted_inputs[i]:
                read[made[v]] = True
            for v in problem.ops[i].outputs:
                made[v] = s
            if i not in seen:
                seen.add(i)
                read[s] = True
        kept = [i for s, i in enumerate(steps) if read[s]]
        if len(kept) == len(steps):
            return steps
        steps = kept
