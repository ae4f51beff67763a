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
FIRST_CANDIDATES = 1200
NEAR_CANDIDATES = 350
# Shares of the time for the first program (and, beside it, the bound), and for one neighbourhood.
FIRST_SHARE = 0.35
NEAR_SHARE = 0.12
# Rounds of two neighbourhoods without a better plan after which the search ends.
IDLE_ROUNDS = 12
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
                limit_s = min(LONGEST_S, max(1.0, NEAR_SHARE * self.left_s()), self.left_s())
                found = pool.map(lambda c: self._solved(c, limit_s), tries)
                for plan, tight in list(found):
                    self.tight |= tight
                    if plan is not None and plan.rank < self.plan.rank:
                        log.debug("%s: %r", self.problem.name, plan.timeline)
                        self.plan, idle = plan, 0
        return self.plan, self.bound

    def _first(self, limit_s: float) -> None:
        """Every gap that may matter, as deep as the candidates stay few."""
        candidates: set[Candidate] = set()
        for depth in (1, 2, 3):
            more = {(i, t) for t in self.first for i in self._chain(t, depth)}
            if depth > 1 and len(more) > FIRST_CANDIDATES:
                break
            candidates = more
        plan, tight = self._solved(candidates.union(self.plan.reruns()), limit_s, relaxed_rounds=8)
        self.tight |= tight
        if plan is not None and plan.rank < self.plan.rank:
            self.plan = plan

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

    def _near(self) -> set[Candidate]:
        """The plan's own candidates and a random choice of others."""
        rng, size = self.rng, NEAR_CANDIDATES
        kind = rng.choice(("window", "peak", "any"))
        stages = sorted(self.first)
        if kind == "window":
            centre = rng.choice(stages)
            stages.sort(key=lambda t: (abs(t - centre), t))
        else:
            rng.shuffle(stages)
            if kind == "peak":
                peak = int(rng.choice(self.over))
                stages = [t for t in stages if t >= peak]
        near = set(self.plan.reruns())
        goal = len(near) + size
        depth = rng.choice((1, 2, 3))
        for t in stages:
            near.update((i, t) for i in self._chain(t, depth))
            if len(near) >= goal:
                break
        return near

    def _solved(
        self, candidates: Iterable[Candidate], limit_s: float, *, relaxed_rounds: int = 0
    ) -> tuple[_Plan | None, set[Candidate]]:
        """The best plan of one program, and the rows it turned out to need."""
        deadline = time.perf_counter() + limit_s
        problem, budget = self.problem, self.budget
        program = RetentionProgram(problem, budget, candidates, closures=self.closures)
        tight = set(self.tight)
        for t in self.closures:
            program.limit_op(t)
        for i, t in sorted(tight):
            program.limit_op(t) if i == t else program.limit_rerun(i, t)
        for _ in range(relaxed_rounds):
            answer = program.solve(time_limit_s=deadline - time.perf_counter(), relax=True)
            if answer.x is None or not self._add_broken(program, answer.x, tight):
                break
        best: _Plan | None = None
        for _ in range(REPAIRS):
            left_s = deadline - time.perf_counter()
            if left_s < 0.02:
                break
            answer = program.solve(time_limit_s=left_s, seed=self.seed)
            if answer.x is None:
                break
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
                break
        return best, tight

    def _add_broken(self, program: RetentionProgram, x: np.ndarray, tight: set[Candidate]) -> bool:
        use = program.use_bytes(x)
        broken = [t for t in np.argsort(-use, kind="stable").tolist() if use[t] > self.budget * (1 + 1e-6)]
        added = False
        for t in broken[: max(20, len(broken) // 3)]:
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
