"""Fixed order on any DAG: an integer program over candidate recomputations, and a search around its answers.

(docstring follows)
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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

# Candidates of the first program, and of a neighbourhood besides the plan's own.
WIDE_CANDIDATES = 6000
FIRST_CANDIDATES = 600
NEAR_CANDIDATES = 150
RELAXED_ROUNDS = 12
RELAXED_SHARE = 0.4
# Shares of the time for the first program (and, beside it, the bound), and for one neighbourhood.
FIRST_SHARE = 0.35
NEAR_SHARE = 0.06
# Rounds of two neighbourhoods without a better plan after which the search ends.
IDLE_ROUNDS = 30
# How often one program is solved again with the rows its plan breaks.
REPAIRS = 6
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
    """The best plan so far, the memory rows that plans broke, and what to try next."""

    def __init__(self, problem: Problem, budget: int, plan: _Plan, deadline: float, seed: int) -> None:
        self.problem, self.budget, self.plan, self.deadline, self.seed = problem, budget, plan, deadline, seed
        self.rng = random.Random(seed)
        self.bound = problem.total_seconds
        self.tight: set[Candidate] = set()
        self.price: dict[Candidate, float] = {}
        self.size = float(NEAR_CANDIDATES)
        self.closures = tight_instants(problem, budget, CLOSURES)
        live = simulate_steps(problem, list(range(len(problem)))).live_bytes
        over = np.cumsum(np.concatenate([[0], live > budget]))
        # Per op, the ops whose values it reads across a stretch where keeping everything is too much.
        self.first: dict[int, list[int]] = {}
        for v in range(len(problem.values)):
            if can_be_dropped(problem, v):
                uses = (problem.values[v].producer or 0, *problem.consumers[v])
                for a, b in zip(uses, uses[1:], strict=False):
                    if over[b] > over[a + 1]:
                        self.first.setdefault(b, []).append(uses[0])
        self.over = np.flatnonzero(live > budget)

    def left_s(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())

    def _known_s(self) -> float:
        return math.inf if self.plan.excess_bytes else self.plan.timeline.seconds

    def done(self) -> bool:
        return self.left_s() < 0.05 or (
            not self.plan.excess_bytes
            and self.plan.timeline.seconds - self.bound <= OPTIMAL_RTOL * self.plan.timeline.seconds
        )

    def run(self) -> tuple[_Plan, float]:
        near_s = min(max(2.0, NEAR_SHARE * self.left_s()), LONGEST_S)
        with ThreadPoolExecutor(2) as pool:
            share_s = min(LONGEST_S, FIRST_SHARE * self.left_s())
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
                tries = [self._near() for _ in range(2)]
                limit_s = min(near_s, self.left_s())
                settled = 0
                for plan, tight, optimal in pool.map(lambda near: self._solved(*near, limit_s), tries):
                    self.tight |= tight
                    settled += optimal
                    if plan is not None and plan.rank < self.plan.rank:
                        log.debug("%s: %r", self.problem.name, plan.timeline)
                        self.plan, idle = plan, 0
                self.size *= (0.7, 1.0, 1.3)[settled]
        return self.plan, self.bound

    def _first(self, limit_s: float) -> None:
        """The relaxation of a wide program prices the candidates; the cheapest make the first whole one."""
        begun = time.perf_counter()
        wide: set[Candidate] = set()
        for depth in (1, 2, 3):
            more = {(i, t) for t in self.first for i in self._chain(t, depth)}
            if depth > 1 and len(more) > WIDE_CANDIDATES:
                break
            wide = more
        self._price(wide, limit_s * RELAXED_SHARE)
        few = sorted(wide, key=lambda c: (self.price[c], c))[:FIRST_CANDIDATES]
        plan, tight, _ = self._solved(
            {*few, *self.plan.reruns()}, set(), limit_s - (time.perf_counter() - begun)
        )
        self.tight |= tight
        if plan is not None and plan.rank < self.plan.rank:
            self.plan = plan

    def _price(self, candidates: set[Candidate], limit_s: float) -> None:
        """Solve the relaxation, with the memory rows that its points break; keep its reduced costs."""
        deadline = time.perf_counter() + limit_s
        program = RetentionProgram(self.problem, self.budget, candidates, closures=self.closures)
        for t in self.closures:
            program.limit_op(t)
        self.price = dict.fromkeys(candidates, 0.0)
        for _ in range(RELAXED_ROUNDS):
            answer = program.solve(time_limit_s=deadline - time.perf_counter(), relax=True)
            if answer.x is None or answer.reduced_costs is None:
                break
            costs = answer.reduced_costs
            self.price = {c: float(costs[column]) for c, column in program.rerun.items()}
            if not self._add_broken(program, answer.x, self.tight):
                break

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
        near: set[Candidate] = set()
        depth = rng.choice((1, 2, 2, 3))
        dearest = rng.choice((0.01, 0.1, 0.3, 1.0))
        seen = set()
        for t in stages:
            if len(near) >= self.size:
                break
            seen.add(t)
            near.update((i, t) for i in self._chain(t, depth) if self.price.get((i, t), 0.5) <= dearest)
        pinned = {(i, t) for i, t in plan if t not in seen and (i, t) not in near}
        if kind != "window":
            pinned = {c for c in sorted(pinned) if rng.random() < 0.7}
        return near.union(plan), pinned

    def _solved(
        self, candidates: set[Candidate], pinned: set[Candidate], limit_s: float
    ) -> tuple[_Plan | None, set[Candidate], bool]:
        """The best plan of one program, the rows it turned out to need, and whether nothing is better."""
        deadline = time.perf_counter() + limit_s
        problem, budget = self.problem, self.budget
        program = RetentionProgram(problem, budget, candidates, closures=self.closures)
        program.pin(pinned)
        if pinned:
            program.beat(self.plan.excess_bytes, self.plan.timeline.recompute_seconds)
        tight = set(self.tight)
        for t in self.closures:
            program.limit_op(t)
        for i, t in sorted(tight.union(self.plan.reruns())):
            program.limit_op(t) if i == t else program.limit_rerun(i, t)
        best: _Plan | None = None
        for _ in range(REPAIRS):
            left_s = deadline - time.perf_counter()
            if left_s < 0.02:
                break
            answer = program.solve(time_limit_s=left_s, seed=self.seed)
            if answer.x is None:
                return best, tight, answer.infeasible
            plan = _Plan.of(problem, budget, _trimmed(problem, _steps(problem, program.chosen(answer.x))))
            best = plan if best is None or plan.rank < best.rank else best
            added = self._add_broken(program, answer.x, tight)
            if plan.excess_bytes:
                steps = plan.timeline.steps
                for s, t in enumerate(plan.stages()):
                    if plan.timeline.live_bytes[s] > budget:
                        i = int(steps[s])
                        tight.add((i, t))
                        added |= program.limit_op(t) if i == t else program.limit_rerun(i, t)
            if not added:
                return best, tight, answer.optimal
        return best, tight, False

    def _add_broken(self, program: RetentionProgram, x: np.ndarray, tight: set[Candidate]) -> bool:
        use = program.use_bytes(x)
        broken = [t for t in np.argsort(-use, kind="stable").tolist() if use[t] > self.budget * (1 + 1e-6)]
        added = False
        for t in broken:
            tight.add((t, t))
            added |= program.limit_op(t)
        return added


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


_Try = Callable[[], tuple[_Plan | None, set[Candidate]]]
