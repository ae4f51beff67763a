"""The integer program of :mod:`solvers.retention.method`: which values stay between their uses, which ops
run again.

Stage t ends with the first run of op t; before it, in the problem's order, ops may run again.  A
*candidate* (i, t) says that op i may run again in stage t; only candidates get a column ``R[i, t]``.  The
events of a value are the stages that read it or make it again, and ``K[v, k]`` says that it is kept from
its event k to the next.  A value that no candidate makes again is kept until its last use in the order and
needs no column there.  Rows:

    (1)  K[v, k]  <= K[v, k-1] + R[p(v), t]     t is event k of v: what is kept was kept or made
    (2)  1        <= K[v, k-1] + R[p(v), t]     op t reads v
    (3)  R[i, t]  <= K[u, .] + R[p(u), t]       i reads u
    (4)  sum of bytes kept past op t  <=  budget - what t touches - what stays whatever is decided

and two kinds more.  (5) A *closure* at stage s: ``S[i]``, op i runs again from s on, at most
the sum of its R there; what is read from s on is kept into s or has S = 1, and so has what such an op reads.
They follow from the rows above in whole numbers, and raise the relaxation from 4.9 to 6.9 % (of step time,
at an optimum near 7.5) on a layered DAG of 500 ops.  (6) A *burst* row holds what is kept into stage t and
all that runs again there within the budget, as if nothing were freed before op t.  That is more than need be;
exact rows (one per candidate, and columns for what is still wanted) lowered the relaxation by 0.02 % of the
time on the same graph, and took twice the nonzeros.

One column, the *excess*, lets every memory row exceed the budget by the same bytes at a price that outweighs
any recomputation; so there always is an answer.

Sources: the intervals are those of Bartan et al., "MOCCASIN" (ICML 2023, https://arxiv.org/abs/2304.14463),
without their limit on how often an op runs again; rows (1) to (3) as in Jain et al., "Checkmate" (MLSys 2020,
https://arxiv.org/abs/1910.02653), on the events alone; closures and bursts are ours.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from solvers.core.facts import spanned
from solvers.core.just_in_time import can_be_dropped
from solvers.core.linear import LinearAnswer, LinearProgram
from solvers.core.problem import Problem

__all__ = ["Candidate", "RetentionProgram"]

Candidate = tuple[int, int]

# Instead of a column: the value is surely there.
_SURE = -1
# What exceeding the budget by all of it costs, in steps' seconds.
_EXCESS_PRICE = 100.0


class RetentionProgram:
    """Columns and rows for one set of candidates.

    ``closures``  stages that get closure rows.
    Memory rows are not there at first: ``limit_all`` adds all, ``limit_op`` the one of an op's first run.
    """

    def __init__(
        self,
        problem: Problem,
        budget_bytes: int,
        candidates: Iterable[Candidate],
        *,
        closures: Sequence[int] = (),
    ) -> None:
        self.problem, self.budget = problem, budget_bytes
        self.unit_s = max((op.again_s for op in problem.ops), default=0.0) or 1.0
        self.linear = LinearProgram()
        self.rerun: dict[Candidate, int] = {
            (i, t): self.linear.column(problem.ops[i].again_s / self.unit_s, integer=True)
            for i, t in sorted(candidates)
        }
        self.excess = self.linear.column(_EXCESS_PRICE * problem.total_seconds / self.unit_s, upper=math.inf)
        self._reruns_of: dict[int, list[int]] = defaultdict(list)
        for i, t in self.rerun:
            self._reruns_of[i].append(t)
        self._events: dict[int, list[int]] = {}
        self._kept: dict[int, list[int]] = {}
        self._limited: set[int] = set()
        self._make_columns()
        self._link()
        self.fixed_bytes = self._fixed_bytes()
        self._spans = self._column_spans()
        for stage in closures:
            self._close(stage)

    def __repr__(self) -> str:
        return f"RetentionProgram({self.problem.name!r}, {len(self.rerun)} candidates: {self.linear!r})"

    def _make_columns(self) -> None:
        """The events of every value that has a choice, and a column from each to the next."""
        problem = self.problem
        extra: dict[int, set[int]] = defaultdict(set)
        for i, t in self.rerun:
            for v in problem.ops[i].outputs:
                if can_be_dropped(problem, v):
                    extra[v].add(t)
            for u in problem.counted_inputs[i]:
                if can_be_dropped(problem, u):
                    extra[u].add(t)
        for v in sorted(extra):
            producer = problem.values[v].producer
            assert producer is not None
            uses, again = problem.consumers[v], self._reruns_of.get(producer, [])
            sure = self._sure_until(v)
            reads = {*uses, *(t for j in uses for t in self._reruns_of.get(j, ()))}
            last = max(reads, default=producer)
            events = sorted({e for e in {*uses, *again, *extra[v]} if sure < e <= last})
            if events:
                self._events[v] = [sure, *events]
                self._kept[v] = [self.linear.column(integer=True) for _ in events]

    def _sure_until(self, v: int) -> int:
        """The last op that makes or reads ``v`` before it can have been made again."""
        producer = self.problem.values[v].producer
        assert producer is not None
        again = self._reruns_of.get(producer)
        uses = (producer, *self.problem.consumers[v])
        return uses[bisect_left(uses, again[0]) - 1] if again else uses[-1]

    def kept_into(self, v: int, stage: int) -> int | None:
        """The column of ``v`` being there when ``stage`` starts, ``_SURE``, or ``None`` if it cannot be."""
        events = self._events.get(v)
        if events is None:
            return _SURE if stage <= self._sure_until(v) else None
        if stage <= events[0]:
            return _SURE
        k = bisect_left(events, stage) - 1
        return self._kept[v][k] if k < len(self._kept[v]) else None

    def _sources(self, v: int, stage: int, again: int | None) -> list[int] | None:
        """Columns by which ``v`` is at hand in ``stage``, ``again`` among them; ``None`` if it surely is."""
        if not can_be_dropped(self.problem, v):
            return None
        kept = self.kept_into(v, stage)
        return None if kept == _SURE else [column for column in (kept, again) if column is not None]

    def _sources_in(self, stage: int) -> Callable[[int], list[int] | None]:
        """``_sources`` by what runs again in ``stage`` itself."""
        values = self.problem.values
        return lambda v: self._sources(v, stage, self.rerun.get((values[v].producer or 0, stage)))

    def _link(self) -> None:
        """Rows (1) to (3)."""
        problem, linear = self.problem, self.linear
        for v, columns in self._kept.items():
            producer, events = problem.values[v].producer or 0, self._events[v]
            for k in range(1, len(columns)):
                again = self.rerun.get((producer, events[k]))
                linear.covered(columns[k], [columns[k - 1], *([] if again is None else [again])])
            for b in problem.consumers[v]:
                if b > events[0]:
                    linear.closure([v], self._sources_in(b))
        for (i, t), column in self.rerun.items():
            linear.closure(problem.counted_inputs[i], self._sources_in(t), of=column)

    def _fixed_bytes(self) -> np.ndarray:
        """Per op, what is resident while it first runs whatever is decided; shape (n,)."""
        problem, n = self.problem, len(self.problem)
        spans: list[tuple[int, int, int]] = []
        for v, value in enumerate(problem.values):
            if value.producer is None:
                continue
            end = (value.producer, *problem.consumers[v])[-1]
            if v in self._events:
                end = self._events[v][0]
                spans += [(b, b, value.bytes) for b in problem.consumers[v] if b > end]
            spans.append((value.producer, n - 1 if value.final else end, value.bytes))
        workspace = np.array([op.workspace_bytes for op in problem.ops], dtype=float)
        return problem.resident_bytes + spanned(n, spans) + workspace

    def _column_spans(self) -> np.ndarray:
        """Rows ``(first op, one past the last, column, bytes)``: where a kept value counts, op by op."""
        spans = []
        for v, columns in self._kept.items():
            touched = {self.problem.values[v].producer, *self.problem.consumers[v]}
            events, size = self._events[v], self.problem.values[v].bytes
            for k, column in enumerate(columns):
                first = events[k] + (events[k] in touched)
                if first < events[k + 1] and size:
                    spans.append((first, events[k + 1], column, size))
        return np.array(spans, dtype=np.int64).reshape(-1, 4)

    def use_bytes(self, x: np.ndarray) -> np.ndarray:
        """Bytes at each op's first run under the point ``x``; shape (n,)."""
        change = np.zeros(len(self.problem) + 1)
        bytes_kept = x[self._spans[:, 2]] * self._spans[:, 3]
        np.add.at(change, self._spans[:, 0], bytes_kept)
        np.add.at(change, self._spans[:, 1], -bytes_kept)
        return np.cumsum(change)[:-1] + self.fixed_bytes

    def limit_all(self) -> None:
        """Add the memory rows of all ops and bursts that the columns could break."""
        most = self.use_bytes(np.ones(len(self.linear.cost)))
        for t in np.flatnonzero(most > self.budget).tolist():
            self.limit_op(t)
        for t in sorted({t for _, t in self.rerun}):
            self.limit_burst(t)

    def limit_op(self, t: int) -> None:
        """Add row (4) of op ``t``, once."""
        if t in self._limited:
            return
        self._limited.add(t)
        here = self._spans[(self._spans[:, 0] <= t) & (t < self._spans[:, 1])]
        self._limit(dict(zip(here[:, 2].tolist(), here[:, 3].tolist(), strict=True)), self.fixed_bytes[t])

    def limits(self, t: int) -> bool:
        """Whether the memory row of op ``t`` is there."""
        return t in self._limited

    def limit_burst(self, t: int) -> None:
        """Add row (6), for all that runs again in stage ``t`` as if none of it could free anything."""
        problem = self.problem
        constant = float(problem.resident_bytes)
        terms: dict[int, int] = defaultdict(int)
        for v, value in enumerate(problem.values):
            if value.producer is None or value.producer >= t:
                continue
            if can_be_dropped(problem, v):
                column = self.kept_into(v, t)
                again = self.rerun.get((value.producer, t))
                if again is not None and column != _SURE:
                    terms[again] += value.bytes
            else:
                column = _SURE if value.final or t <= (value.producer, *problem.consumers[v])[-1] else None
            if column == _SURE:
                constant += value.bytes
            elif column is not None:
                terms[column] += value.bytes
        if constant + sum(terms.values()) > self.budget:
            self._limit(terms, constant)

    def _limit(self, terms: dict[int, int], constant: float) -> None:
        scale = 1.0 / max(1, self.budget)
        columns = [*terms, self.excess]
        self.linear.row(
            columns, [*(b * scale for b in terms.values()), -1.0], upper=(self.budget - constant) * scale
        )

    def _close(self, stage: int) -> None:
        """Rows (5) of the closure at ``stage``."""
        problem = self.problem
        later: dict[int, list[int]] = defaultdict(list)
        for (i, t), column in self.rerun.items():
            if i < stage <= t:
                later[i].append(column)
        ever = {i: self.linear.column() for i in later}
        for i, column in ever.items():
            self.linear.covered(column, later[i])

        def sources(v: int) -> list[int] | None:
            return self._sources(v, stage, ever.get(problem.values[v].producer or 0))

        for i, column in ever.items():
            self.linear.closure(problem.counted_inputs[i], sources, of=column)
            read = (v for v in problem.ops[i].outputs if (i, *problem.consumers[v])[-1] >= stage)
            self.linear.closure(read, sources)

    def solve(self, *, time_limit_s: float, relax: bool = False, seed: int = 0) -> LinearAnswer:
        """Hand it to HiGHS; objective and bound in units of ``unit_s``."""
        return self.linear.solve(time_limit_s=time_limit_s, relax=relax, relative_gap=1e-4, seed=seed)

    def pin(self, candidates: Iterable[Candidate]) -> None:
        """``candidates`` run."""
        for candidate in candidates:
            self.linear.lower[self.rerun[candidate]] = 1.0

    def beat(self, excess_bytes: int, recompute_s: float) -> None:
        """Only answers of no more excess than this and, if that is none, of fewer seconds."""
        self.linear.upper[self.excess] = excess_bytes / max(1, self.budget)
        if not excess_bytes:
            costs = [self.linear.cost[column] for column in self.rerun.values()]
            self.linear.row(list(self.rerun.values()), costs, upper=recompute_s / self.unit_s * (1 - 1e-4))

    def chosen(self, x: np.ndarray) -> list[Candidate]:
        """The candidates that the point ``x`` runs."""
        return [candidate for candidate, column in self.rerun.items() if x[column] > 0.5]
