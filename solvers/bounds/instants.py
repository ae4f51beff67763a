"""A mixed-integer program over a few instants of the run, below every schedule.

Take instants t_1 < ... < t_N, each the first run of an op; interval n is the time from the moment t_n runs
to the moment t_(n+1) runs, the last one ends with the run; a *window* is one or several intervals in a row.
An op or value is *past* at t_n if its first run is before t_n.  Of a schedule within the budget B whose
first executions keep the problem's order let

    P[k, n] = 1   past value k is resident when t_n runs
    R[i, w] = 1   op i, past at the start of window w, runs again in w
    C[k, n] = 1   past value k is resident through all of interval n and not made again in it

and 0 otherwise.  Let p(k) be the op that makes k, n the first interval of w, e the instant that ends w.  Then

    1.  R[i, w]  <= P[j, n] + R[p(j), w]    i reads j: when i first runs again in w, j is there from the
                                            start or was made again
    2.  1        <= P[k, n] + R[p(k), w]    the first run of an op of w reads k
    3.  P[k, e]  <= P[k, n] + R[p(k), w]    what is there was there or was made again
    4.  P[k, e]  <= C[k, n] + R[p(k), n]    the same, of one interval
    5.  R[i, w]  <= R[i, v] + R[i, u]       w is v and then its last interval u, or its first, u, and then v
    6.  P[k, n]   = 1                       t_n reads k; or k must stay until later (pinned)
    7.  *start*: when t_n runs, there fit B: what must stay, what t_n touches, and P[., n]
    8.  *inside*: when an op t of interval n first runs, t_n < t, there fit B: what must stay, what t
        touches, C[k, n], and 1 - R[p(k), n] of every k past at t_n that the first run of an op of
        interval n after t reads: not made again, k lies in memory from t_n to that reader
    9.  *burst*: while op i runs again in interval n, there fit B: what i touches, what must stay at any
        moment of the interval, and C[., n]; where i does not run again, the rest does

and the schedule takes at least the sum of again_s[i] R[i, n] over all single intervals n beyond one run of
every op.  So every schedule gives a point, the least of the program is below them all, and so is what a
solver has proved of it when it is cut.  What a
:class:`~solvers.core.facts.Facts` leaves out only lowers the least.

Windows of several intervals say nothing new of integral points.  Without them, half a rerun in each of many
intervals makes the linear relaxation weaker with every instant; with all of them a search takes a tenth of
the time (U-Net at 40 % of its memory, 7 instants: 0.8 s instead of 7.9).

With a column for B in place of a given budget, and no price on reruns, the least B is a floor of the peak.

Exact where the instants and rows suffice: a point whose schedule fits the budget is an optimal schedule.
Weakness: it does not see two values that one burst makes and holds at the same time.

Sources: ours.  With one instant it is the saved-set closure: its row of bytes apart, a minimum
cut (Picard, "Maximal closure of a graph", 1976); with one at every op it is of the kind of Jain et al.,
"Checkmate" (MLSys 2020, https://arxiv.org/abs/1910.02653), for reruns in any order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import numpy as np

from solvers.core.facts import Facts
from solvers.core.linear import LinearProgram

__all__ = ["InstantProgram"]

# HiGHS drops coefficients below 1e-9; values that are a smaller share of memory than this leave the rows
# in which they count as negative (rows 8), which weakens them.
_SMALLEST_SHARE = 1e-8
# Windows that do not reach to the end of the run are added while the program has fewer columns than this.
_MOST_COLUMNS = 12_000
# Rows 8 of an interval, at most; they are dense.
_INSIDE_ROWS = 12


class InstantProgram:
    """Columns and rows for ``instants`` (ascending op positions) over ``facts``.

    ``budget_bytes``   B; ``None`` makes it a column, in units of ``most_bytes`` bytes, and what is minimised.
    ``inside``         whether there are rows 8.
    ``bursts``         ops that get rows 9.
    ``unit_s``         seconds that are 1 in the objective.
    ``resident``, ``again``, ``carried``   columns of P by value, R by op and C by value, per instant.
    """

    def __init__(
        self,
        facts: Facts,
        instants: Sequence[int],
        budget_bytes: int | None,
        *,
        inside: bool = True,
        bursts: Collection[int] = (),
        most_bytes: int = 1,
    ) -> None:
        self.facts = facts
        self.problem = facts.problem
        self.instants = list(instants)
        self.ends = [*self.instants[1:], len(self.problem)][: len(self.instants)]
        self.budget_bytes = budget_bytes
        self.lp = LinearProgram()
        self.unit_s = (sum(op.again_s for op in self.problem.ops) or 1.0) / 100
        self.unit_bytes = float(max(1, most_bytes if budget_bytes is None else budget_bytes))
        self._budget = self.lp.column(1.0) if budget_bytes is None else -1
        self.resident: list[dict[int, int]] = []
        self.again: list[dict[int, int]] = []
        self.carried: list[dict[int, int]] = []
        self._reads: list[list[set[int]]] = []
        for t in self.instants:
            self._add_columns(t)
        for n in range(len(self.instants)):
            self._add_flow(n)
            self._add_start(n)
            for t in self._tightest_inside(n) if inside else ():
                self._add_inside(n, t)
            for i in sorted(self.again[n].keys() & set(bursts)):
                self._add_burst(n, i)
        if budget_bytes is not None:
            self._add_windows()

    def __repr__(self) -> str:
        return f"InstantProgram({len(self.instants)} instants, {self.lp!r})"

    def at_least(self, objective: float) -> None:
        """Add what is proved already: the objective (in units of ``unit_s``) is not below this."""
        priced = [c for c, cost in enumerate(self.lp.cost) if cost]
        if priced:
            self.lp.row(priced, [self.lp.cost[c] for c in priced], lower=objective)

    def resident_at(self, x: np.ndarray, n: int) -> set[int]:
        """Values resident at instant ``n`` at the point ``x``."""
        return {v for v, c in self.resident[n].items() if x[c] > 0.5}

    def _add_columns(self, t: int) -> None:
        """P and R for the past values and ops that what is still to run may need."""
        facts, values = self.facts, self.problem.values
        needed: set[int] = set()
        again: set[int] = set()
        stack = [v for u in range(t, len(self.problem)) for v in facts.reads[u]]
        while stack:
            v = stack.pop()
            p = values[v].producer
            if p is not None and p < t and v not in needed:
                needed.add(v)
                if self.problem.ops[p].recomputable and p not in again:
                    again.add(p)
                    stack.extend(facts.reads[p])
        priced = self.budget_bytes is not None
        stays = {v for v in needed if facts.stays(v, t)} | needed.intersection(facts.reads[t])
        resident = {v: self.lp.column(lower=float(v in stays), integer=True) for v in sorted(needed)}
        self.resident.append(resident)
        self.again.append(
            {
                i: self.lp.column(self.problem.ops[i].again_s / self.unit_s if priced else 0.0, integer=True)
                for i in sorted(again)
            }
        )
        # _reads[n][t - t_n]: the past values that the first runs from t to the end of the interval read.
        end = self.ends[len(self.resident) - 1]
        reads: list[set[int]] = [set()]
        for u in range(end - 1, t - 1, -1):
            reads.append(reads[-1] | {v for v in facts.reads[u] if v in resident})
        self._reads.append(reads[::-1])

    def _sources(self, n: int, v: int, runs: dict[int, int]) -> list[int]:
        p = self.problem.values[v].producer
        return [self.resident[n][v], *([runs[p]] if p in runs else [])]

    def _add_closure(self, n: int, runs: dict[int, int], read: Iterable[int]) -> None:
        """Rows 1 and 2 for the columns ``runs`` and the values ``read``."""

        def sources(v: int) -> list[int] | None:
            return self._sources(n, v, runs) if v in self.resident[n] else None

        for i, column in runs.items():
            self.lp.closure(self.facts.reads[i], sources, of=column)
        for v in sorted(read):
            by = self._sources(n, v, runs)
            if len(by) == 1:
                self.lp.lower[by[0]] = 1.0
            else:
                self.lp.one_of(by)

    def _add_flow(self, n: int) -> None:
        """Rows 1 to 4 of a single interval, and the columns of C."""
        again = self.again[n]
        self._add_closure(n, again, self._reads[n][0])
        carried: dict[int, int] = {}
        for v, there in self.resident[n + 1].items() if n + 1 < len(self.instants) else ():
            if v in self.resident[n]:
                sources = self._sources(n, v, again)
                self.lp.covered(there, sources)
                carried[v] = there if len(sources) == 1 else self.lp.column(integer=True)
                if len(sources) > 1:
                    self.lp.covered(there, [carried[v], sources[1]])
        self.carried.append(carried)

    def _add_windows(self) -> None:
        """Rows 1 to 3 and 5 of windows of several intervals: those to the end of the run, then short ones."""
        count = len(self.instants)
        read = [{v for u in range(a, b) for v in self.facts.reads[u]} for a, b in self._intervals()]
        columns = {(n, n + 1): runs for n, runs in enumerate(self.again)}
        windows = [(n, count) for n in reversed(range(count - 1))]
        windows += [(n, n + size) for size in range(2, count) for n in range(count - size)]
        for n, e in windows:
            if e < count and len(self.lp.cost) + len(self.again[n]) > _MOST_COLUMNS:
                break
            window = columns[n, e] = {i: self.lp.column(integer=True) for i in self.again[n]}
            for longer, single in (((n, e - 1), (e - 1, e)), ((n + 1, e), (n, n + 1))):
                if longer in columns:
                    parts = (columns[longer], columns[single])
                    for i, column in window.items():
                        self.lp.covered(column, [part[i] for part in parts if i in part])
            self._add_closure(n, window, set().union(*read[n:e]) & self.resident[n].keys())
            for v, there in self.resident[e].items() if e < count else ():
                if v in self.resident[n]:
                    self.lp.covered(there, self._sources(n, v, window))

    def _intervals(self) -> Iterable[tuple[int, int]]:
        return zip(self.instants, self.ends, strict=True)

    def _bytes(self, v: int) -> int:
        return self.problem.values[v].bytes

    def _fits(self, terms: dict[int, int], fixed_bytes: int) -> None:
        """``fixed_bytes`` and ``bytes * column`` over ``terms`` fit the budget."""
        unit = self.unit_bytes
        columns, shares = list(terms), [size / unit for size in terms.values()]
        if self.budget_bytes is None:
            self.lp.row([*columns, self._budget], [*shares, -1.0], upper=-fixed_bytes / unit)
        elif fixed_bytes + sum(size for size in terms.values() if size > 0) > self.budget_bytes:
            self.lp.row(columns, shares, upper=(self.budget_bytes - fixed_bytes) / unit)

    def _add_start(self, n: int) -> None:
        """Row 7 of instant ``n``."""
        t, facts = self.instants[n], self.facts
        touched = set(facts.reads[t])
        terms = {
            c: self._bytes(v)
            for v, c in self.resident[n].items()
            if v not in touched and not facts.stays(v, t)
        }
        self._fits(terms, int(facts.staying[t] + facts.around[t]))

    def _tightest_inside(self, n: int) -> list[int]:
        """Per stretch of the interval, the op around which most bytes are there whatever is decided."""
        facts = self.facts
        edges = np.linspace(self.instants[n] + 1, self.ends[n], _INSIDE_ROWS + 1).astype(int).tolist()
        need = facts.pressure
        return [a + int(need[a:b].argmax()) for a, b in pairwise(edges) if a < b]

    def _add_inside(self, n: int, t: int) -> None:
        """Row 8 of op ``t`` of interval ``n``."""
        facts, again = self.facts, self.again[n]
        fixed = int(facts.staying[t] + facts.around[t])
        touched = set(facts.reads[t])
        later = self._reads[n][t + 1 - self.instants[n]]
        terms: dict[int, int] = {}
        for v in sorted(later | self.carried[n].keys()):
            p, size = self.problem.values[v].producer or 0, self._bytes(v)
            if v in touched or facts.stays(v, t):
                continue
            if v not in later:
                terms[self.carried[n][v]] = size
            elif p in again and size > _SMALLEST_SHARE * self.unit_bytes:
                fixed += size
                terms[again[p]] = terms.get(again[p], 0) - size
        self._fits(terms, fixed)

    def _add_burst(self, n: int, i: int) -> None:
        """Row 9 of op ``i`` in interval ``n``."""
        facts, problem = self.facts, self.problem
        op = problem.ops[i]
        touched = {*problem.counted_inputs[i], *op.outputs}
        moments = range(self.instants[n] + 1, min(self.ends[n], len(problem) - 1) + 1)
        fixed = min((int(facts.entering[t]) for t in moments), default=problem.resident_bytes)
        own = op.workspace_bytes + sum(self._bytes(v) for v in touched if facts.stays_until[v] < 0)
        terms = {
            c: self._bytes(v)
            for v, c in self.carried[n].items()
            if v not in touched and facts.stays_until[v] < 0
        }
        terms[self.again[n][i]] = own
        self._fits(terms, fixed)
