"""A lower bound on seconds for any DAG in its order: an integer program over a few instants of the run.

Take instants t_1 < ... < t_N, each the first run of an op, and call an op or value *past* at t_n if its first
run is before t_n.  Of a schedule within the budget whose first executions keep the order let K[v, n] say that
past value v is resident while t_n first runs, R[i, n] that past op i runs again between the first runs of t_n
and t_(n+1), S[i, n] that it runs again after that of t_n.  Then, p(v) being the op that makes v,

    (1)  S[i, n]   <= R[i, n] + S[i, n+1]
    (2)  R[i, n]   <= K[u, n] + R[p(u), n]    i reads u: what it read was there or was made
    (3)  1         <= K[v, n] + R[p(v), n]    an op from t_n up to t_(n+1) reads v
    (4)  S[i, n]   <= K[u, n] + S[p(u), n]    i reads u
    (5)  1         <= K[v, n] + S[p(v), n]    an op from t_n on reads v
    (6)  K[v, n+1] <= K[v, n] + R[p(v), n]    what is there was there or was made
    (7)  K[v, n]    = 1                       t_n reads v
    (8)  bytes of K[., n] <= budget - outputs and workspace of t_n - what stays whatever is decided

and the schedule takes at least sum again_s[i] R[i, n] beyond one run of every op.

Every schedule within the budget is a feasible point of the integer program, so its optimum, or any bound that
branch and bound has on it when time is up, is below every schedule's seconds.  Rows (1), (4) and (5) follow
from the others in whole numbers, and are what makes the linear relaxation strong.

The relaxation is that of :func:`solvers.bounds.lower_bounds.time_bound`; what is new is where the instants
are (spread over the ops at which keeping everything exceeds the budget, at the highest of each part) and
the whole numbers.  On the layered DAGs of 100 and 250 ops at 90 and 80 % of the memory, 4 to 12 instants
prove the optimum or come within 0.01 % of the run in 0.1 to 17 s, where the relaxation is up to 1.5 % below.

Beside :mod:`solvers.bounds.refine`, whose program has these rows and more, started at ``tight_instants`` on
those DAGs, % of the run proved within 30 s on a busy core: both 1.56 and 4.56 (100 ops, refine in half the
time); 250 ops 1.08 against 1.01 from one instant and 1.08 from four, and 2.83 against 2.93 and 2.83; 500 ops
1.22 against 1.19 and 1.19, and 6.09 against 6.29 and 6.11.  Neither is always the higher: refine gains where
memory is tight, this one where it is not and the time is short.

Sources: ours.
Weakness: blind to what bursts of recomputation hold between instants, so weak near the floor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from solvers.core.just_in_time import can_be_dropped
from solvers.core.linear import LinearProgram
from solvers.core.problem import Problem
from solvers.core.simulate import simulate_steps

__all__ = ["instants_bound", "tight_instants"]

# HiGHS solves to tolerances of 1e-6 of a row; the bound is of a budget larger by that much, less this share.
_ROW_TOLERANCE = 1e-6
_SAFETY = 1e-6
# Numbers of instants that are tried in turn, and the share of the time that their relaxations may take.
_COUNTS = (1, 4, 8, 16, 32)
_RELAXED_SHARE = 0.3
# More instants are kept only where they raise the relaxation by this share of it.
_WORTH_IT = 0.02


def instants_bound(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    good_enough_s: Callable[[], float] | None = None,
) -> float:
    """Total seconds that no schedule within ``budget_bytes`` in the problem's order goes below.

    Stops early once the bound reaches ``good_enough_s()``, the seconds of the best plan known by then.
    """
    problem = problem.relaxed
    deadline = time.perf_counter() + time_limit_s
    best, chosen = 0.0, 0
    relaxed_until = time.perf_counter() + _RELAXED_SHARE * time_limit_s
    took_s = 0.0
    counts = [k for k in _COUNTS if k == 1 or k <= len(problem)]
    for count in counts:
        begun = time.perf_counter()
        if begun + 4 * took_s >= relaxed_until:
            break
        found = _bound(problem, budget_bytes, count, relaxed_until - begun, seed, relax=True)
        took_s = time.perf_counter() - begun
        if found <= best * (1 + _WORTH_IT) and chosen:
            break
        best, chosen = found, count
    for count in [k for k in counts if k >= chosen]:
        left_s = deadline - time.perf_counter()
        enough_s = math.inf if good_enough_s is None else good_enough_s()
        if problem.total_seconds + best >= enough_s * (1 - 1e-9) or left_s < took_s:
            break
        best = max(best, _bound(problem, budget_bytes, count, left_s, seed, relax=False))
    return problem.total_seconds + best


def tight_instants(problem: Problem, budget_bytes: int, count: int) -> list[int]:
    """At most ``count`` ops, ascending, spread over those at which keeping everything exceeds the budget."""
    live = simulate_steps(problem, list(range(len(problem)))).live_bytes
    over = np.flatnonzero(live > budget_bytes)
    parts = np.array_split(over, min(count, len(over))) if len(over) else []
    return [int(part[live[part].argmax()]) for part in parts]


def _bound(
    problem: Problem, budget_bytes: int, count: int, time_limit_s: float, seed: int, *, relax: bool
) -> float:
    """Bound on the seconds of recomputation with ``count`` instants; 0 if nothing is proved in time."""
    instants = tight_instants(problem, budget_bytes, count)
    if not instants:
        return 0.0
    unit_s = max((op.again_s for op in problem.ops), default=0.0) or 1.0
    linear = LinearProgram()
    later: _Instant | None = None
    reruns: list[dict[int, int]] = []
    for t, end in zip(reversed(instants), reversed((*instants[1:], len(problem))), strict=True):
        now = _Instant.of(problem, linear, t, unit_s)
        now.link(linear, end, later)
        now.limit(linear, budget_bytes)
        reruns.append(now.between)
        later = now
    answer = linear.solve(time_limit_s=time_limit_s, relax=relax, relative_gap=0.0, seed=seed)
    if answer.infeasible:
        return float("inf")
    if relax:
        return max(0.0, answer.objective * (1 - _SAFETY)) * unit_s if answer.optimal else 0.0
    if answer.optimal and answer.x is not None:
        # Between bound and point lies HiGHS's tolerance; plans are as far apart as the seconds of ops.
        runs = (ops.items() for ops in reruns)
        return math.fsum(problem.ops[i].again_s for op in runs for i, c in op if answer.x[c] > 0.5)
    return max(0.0, answer.bound * (1 - _SAFETY)) * unit_s


@dataclass(frozen=True)
class _Instant:
    """Columns of one instant ``t``: K by value (``kept``), R and S by op (``between``, ``ever``)."""

    problem: Problem
    t: int
    kept: dict[int, int]
    between: dict[int, int]
    ever: dict[int, int]

    @classmethod
    def of(cls, problem: Problem, linear: LinearProgram, t: int, unit_s: float) -> _Instant:
        """Columns for what has run before ``t`` and may be needed from ``t`` on."""
        kept: dict[int, int] = {}
        again: set[int] = set()
        stack = list(range(t, len(problem)))
        while stack:
            for v in problem.counted_inputs[stack.pop()]:
                p = problem.values[v].producer
                if p is not None and p < t and v not in kept and can_be_dropped(problem, v):
                    needed = v in problem.counted_inputs[t]
                    kept[v] = linear.column(lower=float(needed), integer=True)
                    if p not in again:
                        again.add(p)
                        stack.append(p)
        between = {i: linear.column(problem.ops[i].again_s / unit_s, integer=True) for i in sorted(again)}
        return cls(problem, t, kept, between, {i: linear.column() for i in between})

    def link(self, linear: LinearProgram, end: int, later: _Instant | None) -> None:
        """Rows (1) to (6); ``end`` is the ``later`` instant's op, or one past the last."""
        for i, column in self.ever.items():
            after = [later.ever[i]] if later is not None and i in later.ever else []
            linear.covered(column, [self.between[i], *after])
        for runs, stop in ((self.between, end), (self.ever, len(self.problem))):

            def sources(v: int, runs: dict[int, int] = runs) -> list[int] | None:
                return self._sources(v, runs) if v in self.kept else None

            for i, column in runs.items():
                linear.closure(self.problem.counted_inputs[i], sources, of=column)
            read = {v for t in range(self.t, stop) for v in self.problem.counted_inputs[t] if v in self.kept}
            linear.closure(sorted(read), sources)
        if later is not None:
            for v, column in later.kept.items():
                if v in self.kept:
                    linear.covered(column, self._sources(v, self.between))

    def _sources(self, v: int, runs: dict[int, int]) -> list[int]:
        return [self.kept[v], runs[self.problem.values[v].producer or 0]]

    def limit(self, linear: LinearProgram, budget_bytes: int) -> None:
        """Row (8): what is resident while op ``t`` first runs fits the budget."""
        problem, op = self.problem, self.problem.ops[self.t]
        fixed = problem.resident_bytes + op.workspace_bytes + sum(problem.values[v].bytes for v in op.outputs)
        for v, value in enumerate(problem.values):
            if value.producer is None or value.producer >= self.t or v in self.kept:
                continue
            if value.final or (problem.consumers[v] and problem.consumers[v][-1] >= self.t):
                fixed += value.bytes
        scale = 1.0 / max(1, budget_bytes)
        linear.row(
            list(self.kept.values()),
            [problem.values[v].bytes * scale for v in self.kept],
            upper=(budget_bytes - fixed) * scale + _ROW_TOLERANCE,
        )
