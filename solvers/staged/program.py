"""The staged retention program: which values are resident when each stage starts, what runs again.

Columns, for decided value k, forward op i, stage g of a :class:`~solvers.staged.stages.Stages`:

    P[k, g]   k is resident when stage g starts; one column per stage in which k may be read or made,
              since between two of those nothing changes (P before the first: saved from the forward)
    R[i, g]   i runs again in stage g

Minimise sum again_s[i] R[i, g] subject to

    (1)  P[k, g'] <= P[k, g] + R[p(k), g]    g' the next stage after g that has a column
    (2)  R[i, g]  <= P[j, g] + R[p(j), g]    every decided input j of i
    (3)  1        <= P[k, g] + R[p(k), g]    every k that a backward op of g reads
    (4)  the closure over the whole backward, where E[i] says that i runs again in some stage, and S[k], the
         first column of k, that it was saved from the forward:
             E[i] <= sum of R[i, g] over g
             E[i] <= S[j] + E[p(j)]          every decided input j of i
             1    <= S[k] + E[p(k)]          every k that a backward op reads
    (5)  bytes at slot s <= budget           rows made on demand

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
``MemoryRows.add_violated`` finds them for a fractional or integral point in one vectorised pass.

Sources: rows (1) and (2) are those of Jain et al., "Checkmate" (https://arxiv.org/abs/1910.02653), with
stages in place of single ops; rows (3) to (5) and the template's slots are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.core.linear import LinearProgram
from solvers.core.memory_rows import MemoryRows
from solvers.staged.stages import Stages

__all__ = ["Choice", "StagedProgram"]


@dataclass(frozen=True)
class Choice:
    """``kept``: per stage, the values resident when it starts; ``again``: per stage, the ops run again."""

    kept: tuple[frozenset[int], ...]
    again: tuple[frozenset[int], ...]


class StagedProgram:
    """The program over ``stages``; ``budget_bytes`` leaves out ``Problem.resident_bytes``.

    ``again``     per stage, the column of R by op; the objective is in units of ``seconds_scale`` seconds.
    ``resident``  per value, the column of P by stage.
    ``offset``    first slot of the forward, of each stage, and one past the last, shape (stages + 2,).
    ``memory``    rows (5).
    """

    def __init__(self, stages: Stages, budget_bytes: float) -> None:
        self.stages = stages
        self.facts = stages.facts
        self.budget_bytes = budget_bytes
        self.lp = LinearProgram()
        self.seconds_scale = sum(op.again_s for op in self.facts.problem.ops[: self.facts.turn]) or 1.0
        sizes = [self.facts.turn, *map(len, stages.template)]
        self.offset = np.concatenate([[0], np.cumsum(sizes)])
        self.memory = MemoryRows(
            self.lp, self.offset.tolist(), budget_bytes, unit_bytes=max(1.0, float(budget_bytes))
        )
        self.again: list[dict[int, int]] = [{} for _ in range(len(stages))]
        self.resident: dict[int, dict[int, int]] = {}
        self._add_columns()
        self._add_logic()
        self._add_closure()
        self._lay_out()

    def __repr__(self) -> str:
        return f"StagedProgram({self.stages!r}, {self.lp!r}, {self.memory!r})"

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
        """Rows (1) to (3); of a sum that must be 1 and has P alone, its lower bound in place of the row."""
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
        """Rows (4), which every integral point satisfies and half-recomputations do not."""
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
        facts, resident = self.facts, self.facts.problem.resident_bytes
        scratch = np.array([op.workspace_bytes for op in facts.problem.ops], dtype=np.int64)
        live = (facts.staying + scratch - resident).tolist()
        before = (facts.entering - resident).tolist()
        for t in range(facts.turn):
            self.memory.always(t, t + 1, live[t])
        for g, row in enumerate(self.stages.template):
            at, upcoming = int(self.offset[g + 1]) + len(row), row[-1]
            for i in reversed(row):
                at -= 1
                upcoming = i if i >= facts.turn else upcoming
                self.memory.always(at, at + 1, live[i] if i >= facts.turn else before[upcoming])
        self._lay_out_values()
        self._lay_out_transients()

    def _lay_out_values(self) -> None:
        facts, problem = self.facts, self.facts.problem
        for v in facts.decided:
            size, p = problem.values[v].bytes, problem.values[v].producer
            after = 1 + max((c for c in problem.consumers[v] if c < facts.turn), default=p or 0)
            self.memory.always(p or 0, after, size)
            events = self.resident.get(v, {})
            stages_of_v = list(events)
            for n, g in enumerate(stages_of_v):
                begin = self.offset[g + 1]
                self.memory.put(after, begin, size, (events[g],))
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
            self.memory.put(begin, lo, size, (column,))
            start = (column, self.again[g][p])
        direct = max((s for s, i in users if i >= turn), default=None)
        if direct is not None:
            self.memory.always(lo, begin + direct + 1, size)
            lo = begin + direct + 1
            users = [(s, i) for s, i in users if s > direct]
        readers = [self.again[g][i] for _, i in users]
        carried = () if later is None else (later,)
        for n, (s, _) in enumerate(users):
            if n == 0 and direct is None:
                self.memory.put(lo, begin + s + 1, size, start)
            else:
                self.memory.put(lo, begin + s + 1, size, (*readers[n:], *carried), adds=False)
            lo = begin + s + 1
        if direct is None and not users:
            self.memory.put(lo, lo + 1, size, start)
            lo += 1
        self.memory.put(lo, end, size, carried)

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
                self.memory.put(at, at + 1, size, (column,))

    def retarget(self, budget_bytes: float) -> None:
        """Change the budget, in bytes as in ``__init__``, of the rows there are and of those to come."""
        self.budget_bytes = budget_bytes
        self.memory.retarget(budget_bytes)

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
