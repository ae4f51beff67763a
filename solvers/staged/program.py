"""The staged retention program: which values are resident when each stage starts, what runs again.

Columns, for decided value k, forward op i, stage g of a :class:`~solvers.staged.stages.Stages`:

    P[k, g]   k is resident when stage g starts; one column per stage in which k may be read or made,
              since between two of those nothing changes (P before the first: saved from the forward)
    R[i, g]   i runs again in stage g

Minimise sum again_s[i] R[i, g] subject to

    P[k, g'] <= P[k, g] + R[p(k), g]       g' the next stage after g that has a column
    R[i, g]  <= P[j, g] + R[p(j), g]       every decided input j of i
    1        <= P[k, g] + R[p(k), g]       every k that a backward op of g reads
    bytes at slot s <= budget              rows made on demand

A slot is a forward op or a position of a stage's template.  At slot s a value made again at slot r
of the stage and last read directly at slot d is resident

    with P[k, g]                     before r
    always                           from r to d
    with the larger of P[k, g'] and the R of its readers still to come      after d

so every slot's bytes are linear in the columns, with one extra column where a maximum has several
terms.  Integral R force integral P (each P is only ever pushed up to a difference of R's); P is declared
integer all the same, since HiGHS otherwise polishes each incumbent with a second solve that it announces
on standard output.

Peaks sit inside bursts of recomputation: of the thousands of slots a few dozen bind, and
``violated`` finds them for a fractional or integral point in one vectorised pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.core.linear import LinearProgram
from solvers.staged.stages import Stages

__all__ = ["Choice", "StagedProgram"]


@dataclass(frozen=True)
class Choice:
    """``kept``: per stage, the values resident when it starts; ``again``: per stage, the ops run again."""

    kept: tuple[frozenset[int], ...]
    again: tuple[frozenset[int], ...]


class StagedProgram:
    """The program over ``stages``; ``budget_bytes`` leaves out ``Problem.resident_bytes``."""

    def __init__(self, stages: Stages, budget_bytes: float) -> None:
        self.stages = stages
        self.facts = stages.facts
        self.budget_bytes = budget_bytes
        self.lp = LinearProgram()
        self.seconds_scale = sum(op.again_s for op in self.facts.problem.ops[: self.facts.turn]) or 1.0
        self._bytes_unit = max(1.0, float(budget_bytes))
        self._largest: dict[tuple[int, ...], int] = {}
        self._row_at: dict[int, int] = {}
        self.again: list[dict[int, int]] = [{} for _ in range(len(stages))]
        self.resident: dict[int, dict[int, int]] = {}
        self._add_columns()
        self._add_logic()
        self._add_closure()
        self._lay_out()

    def __repr__(self) -> str:
        return f"StagedProgram({self.stages!r}, {self.lp!r}, {len(self._row_at)} of {len(self.base)} slots)"

    def _add_columns(self) -> None:
        problem, stages, lp = self.facts.problem, self.stages, self.lp
        for g in range(len(stages)):
            for i in sorted(stages.allowed[g]):
                cost = problem.ops[i].again_s / self.seconds_scale
                self.again[g][i] = lp.column(cost, integer=True)
        made: dict[int, list[int]] = {}
        for g, row in enumerate(self.again):
            for i in row:
                made.setdefault(i, []).append(g)
        for v in self.facts.decided:
            uses = stages.uses[v]
            if not uses:
                continue
            last = max(uses)
            p = problem.values[v].producer
            again = made.get(p, ()) if p is not None else ()
            events = set(uses) | {g for g in again if g <= last}
            self.resident[v] = {g: lp.column(integer=True) for g in sorted(events)}

    def _add_logic(self) -> None:
        problem, lp, turn = self.facts.problem, self.lp, self.facts.turn
        for v, events in self.resident.items():
            p = problem.values[v].producer
            previous: list[int] = []
            for g, column in events.items():
                available = [column] + ([self.again[g][p]] if p in self.again[g] else [])
                if previous:
                    lp.covered(column, previous)
                users = self.stages.uses[v].get(g, ())
                if any(i >= turn for i in users):
                    if len(available) == 1:
                        lp.lower[column] = 1.0
                    else:
                        lp.one_of(available)
                for i in users:
                    if i < turn:
                        lp.covered(self.again[g][i], available)
                previous = available

    def _add_closure(self) -> None:
        """Rows every integral point satisfies and half-recomputations do not.

        S[i] says that i runs again in some stage.  S[i] <= sum of R[i, g]; what i reads was saved from
        the forward or runs again too; so it is with what the backward reads.
        """
        problem, lp, turn = self.facts.problem, self.lp, self.facts.turn
        saved = {v: next(iter(events.values())) for v, events in self.resident.items()}
        runs: dict[int, list[int]] = {}
        for row in self.again:
            for i, column in row.items():
                runs.setdefault(i, []).append(column)
        ever = {i: columns[0] if len(columns) == 1 else lp.column() for i, columns in runs.items()}

        def sources(v: int) -> list[int]:
            p = problem.values[v].producer
            return [saved[v], *([ever[p]] if p in ever else [])]

        for i, column in ever.items():
            if len(runs[i]) > 1:
                lp.covered(column, runs[i])
            lp.closure(self.facts.reads[i], sources, of=column)
        lp.closure((v for v in saved if problem.consumers[v][-1] >= turn), sources)

    def _lay_out(self) -> None:
        """Write the bytes at every slot as constants plus segments ``bytes * expression`` on intervals."""
        facts, stages = self.facts, self.stages
        sizes = [facts.turn, *map(len, stages.template)]
        self.offset = np.concatenate([[0], np.cumsum(sizes)])
        base = np.zeros(self.offset[-1] + 1)
        scratch = np.array([op.workspace_bytes for op in facts.problem.ops], dtype=np.int64)
        live = facts.staying + scratch - facts.problem.resident_bytes
        before = facts.entering - facts.problem.resident_bytes
        base[: facts.turn] = live[: facts.turn]
        for g, row in enumerate(stages.template):
            at, upcoming = self.offset[g + 1] + len(row), None
            for i in reversed(row):
                at -= 1
                upcoming = i if i >= facts.turn else upcoming
                base[at] = live[i] if i >= facts.turn else before[upcoming]
        self._constant = np.zeros_like(base)
        self._segment: list[tuple[int, int, float, bool, tuple[int, ...]]] = []
        self._lay_out_values()
        self._lay_out_transients()
        self.base = (base + np.cumsum(self._constant))[:-1]
        self.lo = np.array([s[0] for s in self._segment], dtype=np.int64)
        self.hi = np.array([s[1] for s in self._segment], dtype=np.int64)
        self.size = np.array([s[2] for s in self._segment], dtype=float)
        self._adds = np.array([s[3] for s in self._segment], dtype=bool)
        counts = np.array([len(s[4]) for s in self._segment], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
        self._terms = np.array([c for s in self._segment for c in s[4]], dtype=np.int64)

    def _put(self, lo: int, hi: int, size: float, columns: tuple[int, ...], adds: bool = True) -> None:
        if lo < hi and size and columns:
            self._segment.append((int(lo), int(hi), float(size), adds or len(columns) == 1, columns))

    def _lay_out_values(self) -> None:
        facts, problem = self.facts, self.facts.problem
        for v in facts.decided:
            size, p = problem.values[v].bytes, problem.values[v].producer
            after = 1 + max((c for c in problem.consumers[v] if c < facts.turn), default=p or 0)
            self._constant[p] += size
            self._constant[after] -= size
            events = self.resident.get(v, {})
            stages_of_v = list(events)
            for n, g in enumerate(stages_of_v):
                begin = self.offset[g + 1]
                self._put(after, begin, size, (events[g],))
                later = events[stages_of_v[n + 1]] if n + 1 < len(stages_of_v) else None
                self._lay_out_stage(v, g, events[g], later)
                after = begin + len(self.stages.template[g])

    def _lay_out_stage(self, v: int, g: int, column: int, later: int | None) -> None:
        """Residency of ``v`` inside stage ``g``, slot by slot; see the module's docstring."""
        problem, turn = self.facts.problem, self.facts.turn
        size, p = problem.values[v].bytes, problem.values[v].producer
        begin, slot = int(self.offset[g + 1]), self.stages.slot[g]
        end = begin + len(self.stages.template[g])
        users = sorted((slot[i], i) for i in self.stages.uses[v].get(g, ()))
        start: tuple[int, ...] = (column,)
        lo = begin
        if p in self.again[g]:
            lo = begin + slot[p]
            self._put(begin, lo, size, (column,))
            start = (column, self.again[g][p])
        direct = max((s for s, i in users if i >= turn), default=None)
        if direct is not None:
            self._constant[lo] += size
            lo = begin + direct + 1
            self._constant[lo] -= size
            users = [(s, i) for s, i in users if s > direct]
        readers = [self.again[g][i] for _, i in users]
        carried = () if later is None else (later,)
        for n, (s, _) in enumerate(users):
            if n == 0 and direct is None:
                self._put(lo, begin + s + 1, size, start)
            else:
                self._put(lo, begin + s + 1, size, (*readers[n:], *carried), adds=False)
            lo = begin + s + 1
        if direct is None and not users:
            self._put(lo, lo + 1, size, start)
            lo += 1
        self._put(lo, end, size, carried)

    def _lay_out_transients(self) -> None:
        """Workspace, and outputs that nothing later in the backward may read, while an op runs again."""
        problem, decided = self.facts.problem, self.facts.counted
        for g, row in enumerate(self.again):
            for i, column in row.items():
                at = self.offset[g + 1] + self.stages.slot[g][i]
                size = problem.ops[i].workspace_bytes
                for v in problem.ops[i].outputs:
                    read_later = decided[v] and g in self.resident.get(v, ())
                    if not read_later:  # a final value's second copy too
                        size += problem.values[v].bytes
                self._put(at, at + 1, size, (column,))

    def bytes_at(self, x: np.ndarray) -> np.ndarray:
        """Bytes at every slot for the columns' values ``x``, resident constant left out, (slots,)."""
        change = np.zeros(len(self.base) + 1)
        if len(self._terms):
            terms = x[self._terms]
            worth = self.size * np.where(
                self._adds,
                np.minimum(np.add.reduceat(terms, self._starts), 1.0),
                np.maximum.reduceat(terms, self._starts),
            )
            np.add.at(change, self.lo, worth)
            np.add.at(change, self.hi, -worth)
        return self.base + np.cumsum(change)[:-1]

    def add_memory_row(self, slot: int) -> bool:
        """Bound the bytes at ``slot``; ``False`` if that row is there already."""
        if slot in self._row_at:
            return False
        weight: dict[int, float] = {}
        for n in np.flatnonzero((self.lo <= slot) & (slot < self.hi)):
            _, _, size, adds, columns = self._segment[n]
            for column in columns if adds else (self._larger(columns),):
                weight[column] = weight.get(column, 0.0) + size / self._bytes_unit
        self._row_at[slot] = self.lp.row(list(weight), weight.values(), upper=self._room(slot))
        return True

    def _room(self, slot: int) -> float:
        return float(self.budget_bytes - self.base[slot]) / self._bytes_unit

    def retarget(self, budget_bytes: float) -> None:
        """Change the budget of the rows there are and of those to come."""
        self.budget_bytes = budget_bytes
        for slot, row in self._row_at.items():
            self.lp.row_upper[row] = self._room(slot)

    def _larger(self, columns: tuple[int, ...]) -> int:
        key = tuple(sorted(columns))
        if key not in self._largest:
            new = self.lp.column()
            for column in columns:
                self.lp.covered(column, [new])
            self._largest[key] = new
        return self._largest[key]

    def add_first_rows(self) -> None:
        """One row per stage, where the bytes that no choice changes peak, and one for the forward."""
        for a, b in zip(self.offset[:-1], self.offset[1:], strict=True):
            if b > a:
                self.add_memory_row(int(a + self.base[a:b].argmax()))

    def add_violated(self, x: np.ndarray, *, tolerance: float = 1e-6, per_stage: int = 2) -> int:
        """Add rows where ``x`` is over the budget, the worst ``per_stage`` of each; how many were new."""
        over = self.bytes_at(x) - self.budget_bytes
        added = 0
        for a, b in zip(self.offset[:-1], self.offset[1:], strict=True):
            worst = a + np.argsort(-over[a:b], kind="stable")[: 4 * per_stage]
            taken: list[int] = []
            for s in worst:
                apart = all(abs(int(s) - t) > 3 for t in taken)
                if over[s] > tolerance * self._bytes_unit and apart and len(taken) < per_stage:
                    taken.append(int(s))
                    added += self.add_memory_row(int(s))
        return added

    def choice(self, x: np.ndarray, threshold: float = 0.5) -> Choice:
        """Round the columns' values to a choice."""
        kept: list[set[int]] = [set() for _ in range(len(self.stages))]
        for v, events in self.resident.items():
            after = 0
            for g, column in events.items():
                if x[column] > threshold:
                    for h in range(after, g + 1):
                        kept[h].add(v)
                after = g + 1
        again = [frozenset(i for i, c in row.items() if x[c] > threshold) for row in self.again]
        return Choice(tuple(map(frozenset, kept)), tuple(again))
