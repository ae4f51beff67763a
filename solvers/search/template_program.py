"""The cheapest schedule inside a template, as a mixed-integer program.

Columns, for slot s of a :class:`~solvers.search.template.Template` and value k:

    X[s]      the optional slot s is used: its op runs again there
    K[k, s]   k stays from slot s, which makes or reads it, until the next slot that makes or reads it

Minimise sum again_s X[s] subject to, where K[k, -] is the gap of k that ends at slot s,

    (1)  X[s]    <= K[k, -]          s reads k; 1 <= K[k, -] if s is required
    (2)  K[k, s] <= K[k, -]          s reads k
    (3)  K[k, s] <= K[k, -] + X[s]   s makes k
    (4)  bytes at slot s <= budget   made where a solution is over it
    (5)  closure rows, see below

The bytes at a slot are those of the gaps that span it, of what its op reads and makes and of its
workspace: linear in the columns, since a gap lies between two neighbouring touches.  A gap that every
schedule needs is a constant, one that no slot can use is left out.

The rows (5) hold for every integral point and cut off those that recompute half of everything.  For
slot q where a stage begins, E[i] says that op i, first run before q, runs again at q or later:

    E[i] <= sum of X[s], s >= q with op i
    E[i] <= K[j, q] + E[p(j)]        i reads j, made before q and resident at q or made again
    1    <= K[k, q] + E[p(k)]        a required slot from q on reads k

This is the program of Jain et al., "Checkmate" (MLSys 2020, https://arxiv.org/abs/1910.02653), on a sequence
given in advance, with gaps for its time steps, as in Bartan et al., "MOCCASIN" (ICML 2023,
https://arxiv.org/abs/2304.14463); rows (5) are ours.  Optimal within the template when solved to the end;
what the template leaves out is not seen.  Integral X forces integral K; K is declared integer all the same,
since HiGHS otherwise polishes incumbents with a second solve.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from enum import Enum

import numpy as np

from solvers.core.linear import LinearProgram
from solvers.core.memory_rows import MemoryRows
from solvers.search.template import Template

__all__ = ["TemplateProgram"]


class Sure(Enum):
    """Whether a value is there in a gap, where that is no choice."""

    NEVER = 0
    ALWAYS = 1


# Whether a value is there in a gap: a column, or what is sure.
Gap = int | Sure


class TemplateProgram:
    """The program over ``template``.

    ``limit_bytes``  what may be live at each slot, ``Problem.resident_bytes`` left out; shape (slots,) or one
                     for all.
    ``closures``     stages at whose start rows (5) are written.
    ``over``         slots that may exceed their limit: by how much at most is minimised, and seconds only
                     break ties.
    """

    def __init__(
        self,
        template: Template,
        limit_bytes: float | np.ndarray,
        *,
        closures: Iterable[int] = (),
        over: range | None = None,
    ) -> None:
        self.template, self.problem = template, template.problem
        self.lp = LinearProgram()
        ops = self.problem.ops
        self.seconds_scale = sum(op.again_s for op in ops) or 1.0
        self.over = None if over is None else self.lp.column(1.0, upper=np.inf)
        self.memory = MemoryRows(
            self.lp,
            (*template.starts, len(template)),
            limit_bytes,
            unit_bytes=max(1.0, float(np.min(limit_bytes))),
            excess=None if over is None or self.over is None else (self.over, over),
        )
        price = (1.0 if over is None else 1e-3) / self.seconds_scale
        self.use: list[int | None] = [
            None if required else self.lp.column(price * ops[i].again_s, integer=True)
            for i, required in zip(template.slots, template.required, strict=True)
        ]
        # Per value: the slots that begin its gaps, and the gaps.
        self._gaps: dict[int, tuple[list[int], list[Gap]]] = {}
        self._lay_out()
        for g in closures:
            self._add_closure(template.starts[g])

    def __repr__(self) -> str:
        return f"TemplateProgram({self.template!r}, {self.lp!r}, {self.memory!r})"

    def _put(self, lo: int, hi: int, size: float, gap: Gap) -> None:
        """``size`` bytes at slots ``lo`` up to ``hi`` where ``gap`` is there."""
        if gap is Sure.ALWAYS:
            self.memory.always(lo, hi, size)
        elif gap is not Sure.NEVER:
            self.memory.put(lo, hi, size, (gap,))

    def _lay_out(self) -> None:
        problem, slots = self.problem, self.template.slots
        touches: list[list[int]] = [[] for _ in problem.values]
        for s, i in enumerate(slots):
            for v in problem.counted_inputs[i]:
                touches[v].append(s)
            for v in problem.ops[i].outputs:
                touches[v].append(s)
            workspace, column = problem.ops[i].workspace_bytes, self.use[s]
            self._put(s, s + 1, workspace, Sure.ALWAYS if column is None else column)
        for v, value in enumerate(problem.values):
            if value.producer is None:
                continue
            if value.final:
                self._put(touches[v][0], len(slots), value.bytes, Sure.ALWAYS)
                for s in touches[v][1:]:
                    if slots[s] == value.producer:
                        column = self.use[s]
                        self._put(s, s + 1, value.bytes, Sure.ALWAYS if column is None else column)
            else:
                self._lay_out_value(v, touches[v])

    def _lay_out_value(self, v: int, touches: list[int]) -> None:
        """Gaps of value ``v``, which the slots ``touches`` make or read, rows (1) to (3), and its bytes."""
        size, producer = self.problem.values[v].bytes, self.problem.values[v].producer
        alone = producer is not None and len(self.problem.ops[producer].outputs) == 1
        makes = [self.template.slots[s] == producer for s in touches]
        # Up to where each gap's bytes count: a slot that makes the value anew counts it itself.
        stops = [t + (not made) for t, made in zip(touches[1:], makes[1:], strict=True)] + [touches[-1] + 1]
        gaps: list[Gap] = []
        before: Gap = Sure.NEVER
        for k, (forced, useful) in enumerate(self._asked(touches, makes)):
            s, run = touches[k], self.use[touches[k]]
            if makes[k]:
                after = self._after_making(run, before, forced=forced, useful=useful, alone=alone)
                self._put(s, s + 1, size, Sure.ALWAYS if run is None else self._either(run, after, alone))
            else:
                after = self._after_reading(run, before, forced=forced, useful=useful)
            self._put(s + 1, stops[k], size, after)
            gaps.append(after)
            before = after
        self._gaps[v] = touches, gaps

    def _asked(self, touches: list[int], makes: list[bool]) -> list[tuple[bool, bool]]:
        """Per touch of a value: whether the gap after it has to be there, and whether anything can use it."""
        asked: list[tuple[bool, bool]] = []
        forced = useful = False
        for s, made in zip(reversed(touches), reversed(makes), strict=True):
            asked.append((forced, useful))
            required = self.use[s] is None
            forced = not made and (forced or required)
            useful = not made or (useful and not required)
        return asked[::-1]

    def _after_reading(self, run: int | None, before: Gap, *, forced: bool, useful: bool) -> Gap:
        """The gap after a slot that reads the value, used if ``run``; ``before`` ends there."""
        if run is not None:
            self._at_most(run, before)  # (1)
        if forced:
            return Sure.ALWAYS
        if not useful or before is Sure.NEVER:
            return Sure.NEVER
        after = self.lp.column(integer=True)
        if isinstance(before, int):
            self.lp.covered(after, [before])  # (2)
        return after

    def _after_making(self, run: int | None, before: Gap, *, forced: bool, useful: bool, alone: bool) -> Gap:
        """The gap after a slot that makes the value; ``alone``: and nothing else, so it runs only for it."""
        missing = run is not None and before is not Sure.ALWAYS
        sources = [c for c in (run, before) if isinstance(c, int)]
        if forced:
            if missing:
                self.lp.one_of(sources)  # (3), the gap being needed
            return Sure.ALWAYS
        if not useful:
            return Sure.NEVER
        after = self.lp.column(integer=True)
        if missing:
            self.lp.covered(after, sources)  # (3)
        if run is not None and alone:
            self.lp.covered(run, [after])
        return after

    def _at_most(self, run: int, gap: Gap) -> None:
        """``run`` <= ``gap``."""
        if gap is Sure.NEVER:
            self.lp.upper[run] = 0.0
        elif gap is not Sure.ALWAYS:
            self.lp.covered(run, [gap])

    def _either(self, run: int, after: Gap, alone: bool) -> Gap:
        """Whether what a slot makes is there while it runs: used, or carried past it."""
        if after is Sure.NEVER:
            return run
        if after is Sure.ALWAYS or alone:
            return after
        column = self.lp.column()
        self.lp.covered(run, [column])
        self.lp.covered(after, [column])
        return column

    def gap_at(self, v: int, slot: int) -> Gap:
        """The gap of value ``v`` that spans the moment before ``slot``."""
        if v not in self._gaps:
            return Sure.NEVER
        begins, gaps = self._gaps[v]
        k = bisect_right(begins, slot - 1) - 1
        return gaps[k] if k >= 0 else Sure.NEVER

    def _add_closure(self, q: int) -> None:
        """Rows (5) for slot ``q``."""
        problem, lp, slots = self.problem, self.lp, self.template.slots
        runs: dict[int, list[int]] = {}
        reads: dict[int, None] = {}
        late: set[int] = set()  # ops first run at q or later
        for s in range(q, len(slots)):
            column = self.use[s]
            if column is not None:
                runs.setdefault(slots[s], []).append(column)
            else:
                late.add(slots[s])
                reads.update(dict.fromkeys(problem.counted_inputs[slots[s]]))
        ever = {
            i: columns[0] if len(columns) == 1 else lp.column()
            for i, columns in runs.items()
            if i not in late
        }
        for i, column in ever.items():
            if len(runs[i]) > 1:
                lp.covered(column, runs[i])

        def sources(v: int) -> list[int] | None:
            p, gap = problem.values[v].producer, self.gap_at(v, q)
            if p is None or p in late or problem.values[v].final or gap is Sure.ALWAYS:
                return None
            return [*_one(gap), *([ever[p]] if p in ever else [])]

        lp.closure(reads, sources)
        for i, column in ever.items():
            lp.closure(problem.counted_inputs[i], sources, of=column)

    def without(self, v: int, slots: range, again_s: float) -> int:
        """A column by which value ``v``, there all through ``slots``, is not there, at ``again_s`` seconds.

        To be called before any row of bytes is made.
        """
        column = self.lp.column(again_s / self.seconds_scale, integer=True)
        self.memory.put(slots.start, slots.stop, -self.problem.values[v].bytes, (column,))
        return column

    def below(self, recompute_s: float) -> None:
        """Ask for at most ``recompute_s`` of recomputation in all, that of required slots included."""
        ops = self.problem.ops
        pairs = zip(self.template.slots, self.use, strict=True)
        of_slots = math.fsum(ops[i].again_s for i, column in pairs if column is None)
        of_first_runs = math.fsum(op.again_s for op in ops)
        room_s = recompute_s - (of_slots - of_first_runs)
        priced = [c for c, cost in enumerate(self.lp.cost) if cost]
        self.lp.row(priced, [self.lp.cost[c] for c in priced], upper=room_s / self.seconds_scale)

    def over_below(self, most_bytes: float) -> None:
        """Ask for less than ``most_bytes`` above the limit."""
        if self.over is None:
            raise ValueError("no slot of this program may exceed its limit")
        self.lp.upper[self.over] = most_bytes / self.memory.unit_bytes

    def steps(self, x: np.ndarray) -> list[int]:
        """The schedule that an integral point describes."""
        return [i for i, runs in zip(self.template.slots, self.used(x), strict=True) if runs]

    def used(self, x: np.ndarray, threshold: float = 0.5) -> list[bool]:
        """Per slot, whether it runs."""
        return [column is None or bool(x[column] > threshold) for column in self.use]


def _one(gap: Gap) -> list[int]:
    return [gap] if isinstance(gap, int) else []
