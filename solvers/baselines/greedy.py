"""Greedy by bytes per recomputed second, judged by the simulator after every few drops.

Each round looks at the step where memory peaks, ranks the values that merely wait there by the bytes
they would free per second of recomputation added (a value whose ancestors are recomputed in the same
stage anyway adds only its own op), drops the best of them, and emits and simulates again.  When the
peak fits, drops are taken back, dearest first, where the peak still fits without them.

Sources: ours; bytes per second of recomputation, neighbours included, is also what Kirisame et al., "Dynamic
Tensor Rematerialization" (ICLR 2021, https://arxiv.org/abs/2006.09616) evict by, there without the future.
Optimal: never proved.  Weak where several values must go together before anything is freed, and near
the floor, where the peaks lie inside the recomputation itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from solvers.core.just_in_time import Gap, can_be_dropped, first_runs, just_in_time_steps, runs_of_groups
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import Timeline, simulate_steps
from solvers.core.solution import Rank, rank

__all__ = ["greedy"]

# Steps emitted and simulated per call, over all rounds and all stagings (about 2 us a step).
WORK_STEPS = 1_500_000
# Ops looked at when one value's recomputation is priced.
CHAIN_OPS = 200


@dataclass(frozen=True)
class _Plan:
    dropped: frozenset[Gap]
    timeline: Timeline

    def rank(self, budget_bytes: int) -> Rank:
        return rank(self.timeline, budget_bytes)


def greedy(problem: Problem, budget_bytes: int) -> Schedule:
    """The fastest schedule found within ``budget_bytes``; if none fits, the one of lowest peak found.

    Tries stages by ``Op.group`` (or about sqrt(n) equal ones) and stages of one op, keeps the better.
    """
    stagings: list[Sequence[int]] = [range(len(problem))]
    if any(op.group is not None for op in problem.ops):
        stagings.insert(0, runs_of_groups(problem))
    else:
        length = max(1, math.isqrt(len(problem)))
        stagings.insert(0, [i // length for i in range(len(problem))])
    plans = [
        _Search(problem, budget_bytes, stage_of, WORK_STEPS // len(stagings)).best() for stage_of in stagings
    ]
    best = min(plans, key=lambda plan: plan.rank(budget_bytes))
    return Schedule.of(problem, best.timeline.steps.tolist())


class _Search:
    """One staging: drop until it fits, then take back."""

    def __init__(self, problem: Problem, budget_bytes: int, stage_of: Sequence[int], work: int) -> None:
        self.problem = problem
        self.budget = budget_bytes
        self.stage_of = (*stage_of, stage_of[-1] + 1) if len(stage_of) else (0,)
        self.work = work
        self.uses = [(*readers, len(problem)) for readers in problem.consumers]

    def evaluate(self, dropped: set[Gap] | frozenset[Gap]) -> _Plan:
        steps = just_in_time_steps(self.problem, dropped, stage_of=self.stage_of[:-1])
        self.work -= len(steps)
        return _Plan(frozenset(dropped), simulate_steps(self.problem, steps))

    def best(self) -> _Plan:
        best = plan = self.evaluate(frozenset())
        while plan.timeline.peak_bytes > self.budget and self.work > 0:
            drops = self.drops(plan)
            if not drops:
                break
            plan = self.evaluate(plan.dropped.union(drops))
            best = min(best, plan, key=lambda p: p.rank(self.budget))
        return self.taken_back(best) if best.timeline.peak_bytes <= self.budget else best

    def drops(self, plan: _Plan) -> list[Gap]:
        """The next gaps to drop: the best at the peak, up to a share of what must go."""
        state = _AtPeak(self, plan)
        ranked = sorted(state.candidates(), key=lambda c: (-c[0], c[2]))
        excess = plan.timeline.peak_bytes - self.budget
        share = excess if len(self.problem) < 100 else excess // 6
        chosen: list[Gap] = []
        for _, relief, gap in ranked:
            chosen.append(gap)
            share -= relief
            if share <= 0 or len(self.problem) < 100:
                break
        return chosen

    def taken_back(self, plan: _Plan) -> _Plan:
        """``plan`` without the drops it can do without, dearest first; as many tries as the work allows."""
        again = [op.again_s for op in self.problem.ops]
        order = sorted(plan.dropped, key=lambda gap: (-again[self.problem.values[gap[0]].producer or 0], gap))
        for gap in order:
            if self.work <= 0:
                break
            trial = self.evaluate(plan.dropped - {gap})
            if trial.rank(self.budget) < plan.rank(self.budget):
                plan = trial
        return plan


class _AtPeak:
    """What waits in memory at the peak step of a plan, and what dropping it would cost."""

    def __init__(self, search: _Search, plan: _Plan) -> None:
        self.problem, self.uses, self.stage_of = search.problem, search.uses, search.stage_of
        self.dropped = plan.dropped
        line = plan.timeline
        steps = line.steps.tolist()
        self.peak = line.peak_step
        self.again: set[tuple[int, int]] = set()
        self.reads_after: dict[int, set[int]] = {}
        at = first_runs(steps)
        for s, (i, first) in enumerate(zip(steps, at, strict=True)):
            if i != first:
                self.again.add((i, self.stage_of[first]))
            if s > self.peak:
                for v in self.problem.counted_inputs[i]:
                    self.reads_after.setdefault(v, set()).add(self.stage_of[first])
        self.op = steps[self.peak]
        self.now = at[self.peak]
        live: set[int] = set()
        for s in range(self.peak + 1):
            live.update(self.problem.ops[steps[s]].outputs)
            if s < self.peak:
                live.difference_update(line.frees[s])
        self.live = live

    def missing(self, v: int, now: int) -> bool:
        ends = self.uses[v]
        return (v, ends[bisect_left(ends, now)]) in self.dropped

    def candidates(self) -> list[tuple[float, int, Gap]]:
        """``(bytes per second, bytes freed, gap)`` of every gap that spans the peak and can be dropped."""
        problem, out = self.problem, []
        busy = {*problem.ops[self.op].inputs, *problem.ops[self.op].outputs}
        for v in self.live - busy:
            value = problem.values[v]
            if not value.bytes or value.producer is None or not can_be_dropped(problem, v):
                continue
            k = bisect_left(self.uses[v], self.now)
            end = self.uses[v][k]
            start = self.uses[v][k - 1] if k else value.producer
            if (v, end) in self.dropped or self.stage_of[start] == self.stage_of[end]:
                continue
            stages = {self.stage_of[end]} if end < len(problem) else set()
            stages |= {g for g in self.reads_after.get(v, ()) if g < self.stage_of[end]}
            # What is read again in the stage at hand cannot be dropped across this step.
            if self.stage_of[self.now] in stages and self.stage_of[start] == self.stage_of[self.now]:
                continue
            seconds, held = 0.0, 0
            for stage in sorted(stages):
                s, h = self.price(v, min(end, self.first_op(stage)), stage)
                seconds, held = seconds + s, max(held, h)
            relief = value.bytes - held
            score = relief / (seconds + 1e-12) if relief > 0 else value.bytes / (seconds + 1e-12) * 1e-6
            out.append((score, max(relief, 1), (v, end)))
        return out

    def made_before(self, v: int) -> bool:
        """Whether ``v`` was first made before the peak."""
        producer = self.problem.values[v].producer
        return producer is not None and producer < self.now

    def first_op(self, stage: int) -> int:
        return bisect_left(self.stage_of, stage)

    def price(self, v: int, now: int, stage: int) -> tuple[float, int]:
        """Seconds that making ``v`` again in ``stage`` adds, and bytes it holds across the peak for that."""
        problem = self.problem
        seconds, held = 0.0, 0
        seen: set[int] = set()
        stack = [v]
        while stack and len(seen) < CHAIN_OPS:
            i = problem.values[stack.pop()].producer
            if i is None or i in seen or (i, stage) in self.again:
                continue
            seen.add(i)
            seconds += problem.ops[i].again_s
            for u in problem.counted_inputs[i]:
                if self.missing(u, now):
                    stack.append(u)
                elif u not in self.live and self.made_before(u):
                    held += problem.values[u].bytes
        return seconds, held
