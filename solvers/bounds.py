"""Lower bounds: the least peak any schedule can reach, and the least time within a budget.

Both are proved for every schedule that first executes the ops in the problem's order and holds a
final value from the moment it is first made; recomputations may be any, in any number, anywhere.

*Peak.*  When op i first runs, its inputs, outputs and workspace are resident; so is every final value
made before, and every value that a pinned op made before and an op not yet executed reads.  The
largest of these sums over i is a floor.  Exact in practice where one op is the bottleneck (the loss
of a language model), weak where the inputs of a recomputation are.

*Time.*  A linear relaxation over a few instants of the run, in which the values resident at an instant
must account, with recomputations, for everything that is still to be read (:func:`time_bound`).  With
one instant it is the saved-set closure: its row of bytes apart, a minimum cut.

Sources: the program is this project's; its single-instant form is a knapsack over the closures of
Picard, "Maximal closure of a graph" (1976).  Weakness: it does not see the memory that a burst of
recomputation takes between two instants, so close to the floor it lies some points of step time below
the best plans known; on DAGs without a turn that recompute in many short bursts it is weak everywhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from solvers.linear import LinearProgram
from solvers.problem import Problem
from solvers.simulate import simulate_steps
from solvers.staged_stages import Facts

__all__ = ["PeakFloor", "closure_bound", "least_recompute", "peak_floor", "pressure_instants", "time_bound"]

# HiGHS solves to feasibility tolerances of 1e-7; bounds give up ten times that.
_SAFETY = 1e-6


@dataclass(frozen=True)
class PeakFloor:
    """No schedule's peak is below ``bytes`` (resident bytes included); ``op_name`` is why."""

    bytes: int
    op_name: str

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"bytes is {self.bytes}, want >= 0")

    def __str__(self) -> str:
        return f"no schedule peaks below {self.bytes} bytes, because of op {self.op_name!r}"


def peak_floor(problem: Problem) -> PeakFloor:
    """The largest sum of bytes that must be resident when some op first runs (see the module)."""
    n = len(problem)
    if not n:
        return PeakFloor(problem.resident_bytes, "")
    held = np.zeros(n + 1, dtype=np.int64)
    extra = np.zeros(n, dtype=np.int64)
    must_stay = [False] * len(problem.values)
    for v, value in enumerate(problem.values):
        p, readers = value.producer, problem.consumers[v]
        if p is None:
            continue
        must_stay[v] = value.final or not problem.ops[p].recomputable
        if must_stay[v]:
            held[p] += value.bytes
            held[(n if value.final else (readers[-1] if readers else p) + 1)] -= value.bytes
    for i, op in enumerate(problem.ops):
        around = (*problem.counted_inputs[i], *op.outputs)
        extra[i] = op.workspace_bytes + sum(problem.values[v].bytes for v in around if not must_stay[v])
    need = np.cumsum(held)[:n] + extra
    worst = int(need.argmax())
    return PeakFloor(problem.resident_bytes + int(need[worst]), problem.ops[worst].name)


def closure_bound(problem: Problem, budget_bytes: int, *, time_limit_s: float = 5.0) -> float:
    """:func:`time_bound` with a single instant: tens of milliseconds for thousands of ops."""
    if peak_floor(problem).bytes > budget_bytes:
        return float("inf")
    instants = pressure_instants(problem, 1)
    return problem.total_seconds + least_recompute(problem, budget_bytes, instants, time_limit_s=time_limit_s)


def time_bound(problem: Problem, budget_bytes: int, *, time_limit_s: float = 10.0) -> float:
    """Seconds that no schedule within ``budget_bytes`` goes below; ``inf`` if none can be within it.

    Take instants t_1 < ... < t_N, each the first run of an op, and call an op or value *past* at t_n if
    its first run is before t_n.  Of a schedule within the budget let P[k, n] say that past value k is
    resident when t_n runs, R[i, n] that past op i is run again between t_n and t_(n+1), S[i, n] that it
    is run again after t_n.  Then, p(k) being the op that makes k,

        P[k, n+1] <= P[k, n] + R[p(k), n]       what is there was there or was made
        R[i, n]   <= P[j, n] + R[p(j), n]       i reads j: so was what it read
        1         <= P[k, n] + R[p(k), n]       an op from t_n up to t_(n+1) reads k
        S[i, n]   <= R[i, n] + S[i, n+1]
        S[i, n]   <= P[j, n] + S[p(j), n]       i reads j
        1         <= P[k, n] + S[p(k), n]       an op from t_n on reads k
        P[k, n]   =  1                          t_n reads k
        bytes of P[., n] <= budget - outputs and workspace of t_n - final values made before it

    and the schedule takes at least sum again_s[i] R[i, n] beyond one run of every op.  So every schedule
    is a feasible point and the least of the linear relaxation is below them all.  More instants give a
    higher bound; they are added while time lasts, and a relaxation that is not solved to the end is
    not used.
    """
    if peak_floor(problem).bytes > budget_bytes:
        return float("inf")
    deadline = time.monotonic() + time_limit_s
    best = took_s = 0.0
    previous: list[int] = []
    for count in (1, 4, 12):
        instants = pressure_instants(problem, count)
        begun = time.monotonic()
        # Three to four times the instants take about four times as long.
        if begun + 4 * took_s >= deadline or len(instants) <= len(previous):
            break
        left_s = deadline - begun
        best = max(best, least_recompute(problem, budget_bytes, instants, time_limit_s=left_s))
        took_s = time.monotonic() - begun
        previous = instants
    return problem.total_seconds + best


def pressure_instants(problem: Problem, count: int) -> list[int]:
    """At most ``count`` ops, ascending, spread over the run, around whose first run memory is tightest.

    With a turn they are backward ops and what counts is the bytes that no choice changes plus the op's
    own inputs; without one, the bytes when nothing is dropped.
    """
    n, start = len(problem), problem.turn or 0
    if start >= n:
        return []
    if problem.turn is None:
        need = simulate_steps(problem, list(range(n))).live_bytes
    else:
        facts = Facts.of(problem)
        need = facts.fixed_live.copy()
        for t in facts.backward:
            need[t] += sum(problem.values[v].bytes for v in problem.counted_inputs[t] if facts.is_decided[v])
    edges = np.unique(np.linspace(start, n, count + 1).astype(int))
    return [int(a + need[a:b].argmax()) for a, b in pairwise(edges)]


def least_recompute(
    problem: Problem, budget_bytes: int, instants: list[int], *, time_limit_s: float
) -> float:
    """Optimum, in seconds, of the relaxation at ``instants``; 0 if it was not solved to the end."""
    scale = sum(op.again_s for op in problem.ops) or 1.0
    lp = LinearProgram()
    later: _Instant | None = None
    ends = (*instants[1:], len(problem))
    for t, end in zip(reversed(instants), reversed(ends), strict=True):
        now = _Instant.of(problem, lp, t, scale)
        now.link(lp, end, later)
        now.bound_bytes(lp, budget_bytes)
        later = now
    answer = lp.solve(time_limit_s=time_limit_s, relax=True)
    if answer.infeasible:
        return float("inf")
    return max(0.0, answer.objective * (1 - _SAFETY)) * scale if answer.optimal else 0.0


@dataclass(frozen=True)
class _Instant:
    """Columns of one instant: P by value, R and S by op (see ``time_bound``)."""

    problem: Problem
    t: int
    resident: dict[int, int]
    between: dict[int, int]
    ever: dict[int, int]

    @classmethod
    def of(cls, problem: Problem, lp: LinearProgram, t: int, scale: float) -> _Instant:
        """Columns for the past values and ops that what is still to run may need."""
        resident: dict[int, int] = {}
        again: set[int] = set()
        stack = list(range(t, len(problem)))
        while stack:
            for v in problem.counted_inputs[stack.pop()]:
                p = problem.values[v].producer
                if p is not None and p < t and v not in resident and not problem.values[v].final:
                    resident[v] = lp.column()
                    if problem.ops[p].recomputable and p not in again:
                        again.add(p)
                        stack.append(p)
        between = {i: lp.column(problem.ops[i].again_s / scale) for i in sorted(again)}
        return cls(problem, t, resident, between, {i: lp.column() for i in between})

    def link(self, lp: LinearProgram, end: int, later: _Instant | None) -> None:
        """All rows but the bytes'; ``end`` is the ``later`` instant's op, or one past the last."""
        problem, resident = self.problem, self.resident
        for i, column in self.ever.items():
            after = [later.ever[i]] if later is not None and i in later.ever else []
            _covered(lp, column, [self.between[i], *after])
        for runs, stop in ((self.between, end), (self.ever, len(problem))):
            for i, column in runs.items():
                for v in problem.counted_inputs[i]:
                    if v in resident:
                        _covered(lp, column, self._sources(v, runs))
            read = {v for t in range(self.t, stop) for v in problem.counted_inputs[t] if v in resident}
            for v in sorted(read):
                sources = self._sources(v, runs)
                lp.row(sources, [1.0] * len(sources), lower=1.0)
        if later is not None:
            for v, column in later.resident.items():
                if v in resident:
                    _covered(lp, column, self._sources(v, self.between))
        for v in problem.counted_inputs[self.t]:
            if v in resident:
                lp.lower[resident[v]] = 1.0

    def _sources(self, v: int, runs: dict[int, int]) -> list[int]:
        p = self.problem.values[v].producer
        return [self.resident[v], *([runs[p]] if p in runs else [])]

    def bound_bytes(self, lp: LinearProgram, budget_bytes: int) -> None:
        """What is resident at this instant fits the budget."""
        problem, unit = self.problem, float(max(1, budget_bytes))
        op = problem.ops[self.t]
        fixed = problem.resident_bytes + op.workspace_bytes + sum(problem.values[v].bytes for v in op.outputs)
        for value in problem.values:
            if value.final and value.producer is not None and value.producer < self.t:
                fixed += value.bytes
        sizes = [problem.values[v].bytes / unit for v in self.resident]
        lp.row(list(self.resident.values()), sizes, upper=(budget_bytes - fixed) / unit)


def _covered(lp: LinearProgram, column: int, by: list[int]) -> None:
    lp.row([column, *by], [1.0] + [-1.0] * len(by), upper=0.0)
