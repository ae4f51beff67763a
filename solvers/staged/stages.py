"""The fixed backward order cut into stages, and what may be recomputed in each.

A value is *decided* when the forward pass makes it, it is not final and something reads it: whether
it is resident at a moment of the backward is a choice.  Every other value's life is fixed by the
order.  The backward ops are cut into contiguous stages.  A stage has a *template*: its backward ops,
each preceded by the forward ops that may have to run again for it, every one at most once, in the
order in which a just-in-time executor would meet them.  Any choice of recomputations runs as a
subsequence of the template, so the memory at each of its slots is known in advance as a function of
the choice (see :mod:`solvers.staged.program`).

Sources: ours.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from solvers.core.facts import Facts, spanned
from solvers.core.just_in_time import runs_again

__all__ = ["Stages", "cut_after_pressure", "cut_by_groups", "cut_evenly"]


def cut_by_groups(facts: Facts, shortest: int = 1) -> tuple[int, ...]:
    """First positions of the stages: where ``Op.group`` changes, runs under ``shortest`` ops merged.

    Without groups, or with one for the whole backward, the answer has a single stage.
    """
    ops = facts.problem.ops
    cuts = [facts.turn]
    for t in facts.backward:
        if t - cuts[-1] >= shortest and t > facts.turn and ops[t].group != ops[t - 1].group:
            cuts.append(t)
    if len(cuts) > 1 and len(facts.problem) - cuts[-1] < shortest:
        cuts.pop()
    return tuple(cuts)


def cut_evenly(facts: Facts, count: int) -> tuple[int, ...]:
    """First positions of about ``count`` stages of like length, each cut where few bytes are open."""
    n = len(facts.problem) - facts.turn
    length = max(1.0, n / max(1, count))
    cuts = [facts.turn]
    open_bytes = _open_bytes(facts)
    while len(facts.problem) - cuts[-1] > 1.5 * length:
        first = cuts[-1] + max(1, round(0.6 * length))
        last = min(cuts[-1] + max(1, round(1.4 * length)), len(facts.problem) - 1)
        window = open_bytes[first : last + 1]
        if not len(window):
            break
        cuts.append(first + int(window.argmin()))
    return tuple(cuts)


def _open_bytes(facts: Facts) -> np.ndarray:
    """Per op, bytes made by the backward before it and read there by it or later, not final; shape (n,)."""
    ops, values = facts.problem.ops, facts.problem.values
    made = ((p, v) for p in facts.backward for v in ops[p].outputs if not values[v].final)
    return spanned(len(ops), ((p + 1, facts.stays_until[v], values[v].bytes) for p, v in made))


def cut_after_pressure(facts: Facts, first: tuple[int, ...], length: int) -> tuple[tuple[int, ...], int]:
    """``first`` with one more cut, and which stage it begins: where the tightest place is over.

    The tightest place is where the bytes that no choice changes and what an op reads are most; within
    ``length`` ops after it, the cut is where the former are least.  For a language model that is the
    loss: next to it hardly anything can be saved, and right after it there is room to run it all again.
    """
    tightest = facts.turn + int(facts.pressure[facts.turn :].argmax())
    after = facts.entering[tightest + 1 : tightest + 1 + length]
    if not len(after):
        return first, len(first) - 1
    cut = tightest + 1 + int(after.argmin())
    cuts = tuple(sorted({*first, cut}))
    return cuts, cuts.index(cut)


class Stages:
    """One way to cut the backward, and the recomputations it allows.

    ``first``     first position of each stage, ascending.
    ``window``    an op may run again in a stage that reads its outputs, and up to ``window``
                  backward ops before one where something else needs it.
    ``wide``      stages in which any op may run again that a later one needs.
    ``allowed``   per stage, the ops that may run again.
    ``template``  per stage, op positions in the order of the template.
    ``slot``      per stage, op position -> index into the template.
    ``uses``      per decided value, stage -> ops that may read it there, in template order.
    """

    def __init__(self, facts: Facts, first: tuple[int, ...], window: int, wide: Collection[int] = ()) -> None:
        self.facts = facts
        self.first = first
        self.window = window
        self.wide = wide
        self.stage_of = np.zeros(len(facts.problem), dtype=int)
        for start in first[1:]:
            self.stage_of[start:] += 1
        starts = np.asarray(first)
        self._nearest = np.minimum(np.searchsorted(starts, starts - window), np.arange(len(first)))
        self.allowed = self._allowed()
        self.template = self._templates()
        self.slot = [{i: s for s, i in enumerate(row)} for row in self.template]
        self.uses: dict[int, dict[int, list[int]]] = {v: {} for v in facts.decided}
        for g, row in enumerate(self.template):
            for i in row:
                for v in facts.reads[i]:
                    self.uses[v].setdefault(g, []).append(i)

    def __len__(self) -> int:
        return len(self.first)

    def __repr__(self) -> str:
        return (
            f"Stages({len(self)} stages, window {self.window}, {sum(map(len, self.allowed))} recomputations)"
        )

    def _allowed(self) -> list[set[int]]:
        problem, turn = self.facts.problem, self.facts.turn
        allowed: list[set[int]] = [set() for _ in self.first]
        targets: list[set[int]] = [set() for _ in range(turn)]
        reach: list[set[int]] = [set() for _ in range(turn)]
        for i in range(turn - 1, -1, -1):
            direct: set[int] = set()
            later: set[int] = set()
            for v in problem.ops[i].outputs:
                if problem.values[v].final:
                    continue
                for c in problem.consumers[v]:
                    if c >= turn:
                        direct.add(int(self.stage_of[c]))
                    else:
                        reach[i] |= reach[c]
                        later |= targets[c]
            targets[i] = direct or later
            near = {g for s in targets[i] for g in range(self._nearest[s], s + 1)}
            near.update(g for g in self.wide if g <= max(targets[i], default=-1))
            reach[i] = (reach[i] | direct) & near if problem.ops[i].recomputable else set()
            for g in reach[i]:
                allowed[g].add(i)
        return allowed

    def _templates(self) -> list[list[int]]:
        problem, reads = self.facts.problem, self.facts.reads
        templates = []
        ends = (*self.first[1:], len(problem))
        for g, (start, end) in enumerate(zip(self.first, ends, strict=True)):
            row: list[int] = []
            made: set[int] = set()
            may_run = self.allowed[g].__contains__
            for t in range(start, end):
                for i in runs_again(problem, reads[t], made.__contains__, may_run, reads=reads):
                    row.append(i)
                    made.update(problem.ops[i].outputs)
                row.append(t)
            templates.append(row)
            self.allowed[g].intersection_update(row)
        return templates
