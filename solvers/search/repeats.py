"""Equal layers: where a graph repeats itself, and what a stretch of the run is called there.

A graph of many like layers is tight in each of them at once near the floor, and a search that opens one
window after the other has to find the same thing once per layer.  Here a stretch of first runs is laid over
every other stretch of the same ops: by a shift of positions in the backward, and by the shift in the forward
that what is read there implies.  What runs again before the first runs of the one may then run again,
shifted, before those of the other.  Any such sequence is a schedule, since first runs stay where they are;
what it is worth, the simulator says.

Sources: ours.  It is to schedules what orbits are to integer programs (Margot, "Symmetry in integer linear
programming", 2010).
Weakness: ops are alike if their own bytes and seconds are; layers that grow (DenseNet) repeat nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.core.just_in_time import first_runs
from solvers.core.problem import Problem

__all__ = ["Repeats", "Shift"]

# Of a stretch and one it is laid over, so many ops must be alike.
ALIKE = 0.75
# Most places that a stretch is laid over.
MOST_PLACES = 128


@dataclass(frozen=True)
class Shift:
    """Positions to add: to ops at or behind the turn, and to ops before it."""

    behind: int
    before: int


class Repeats:
    """Where a problem repeats itself."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.turn = problem.turn or 0
        number: dict[object, int] = {}
        values = problem.values
        self.kind = np.array(
            [
                number.setdefault(
                    (
                        op.seconds,
                        op.again_s,
                        op.workspace_bytes,
                        op.recomputable,
                        i < self.turn,
                        tuple((values[v].bytes, values[v].final) for v in op.outputs),
                        tuple(values[v].bytes for v in problem.counted_inputs[i]),
                    ),
                    len(number),
                )
                for i, op in enumerate(problem.ops)
            ],
            dtype=np.int64,
        )
        self.count = np.bincount(self.kind) if len(problem) else np.zeros(0, dtype=np.int64)

    def share(self, times: int) -> float:
        """The share of the backward's ops of which there are ``times`` alike or more."""
        behind = self.kind[self.turn :]
        return float((self.count[behind] >= times).mean()) if len(behind) else 0.0

    def shifts(self, begin: int, end: int) -> list[Shift]:
        """The places that first runs ``begin`` up to ``end`` may be laid over, nearest first."""
        kind, n = self.kind, len(self.problem)
        begin, end = max(begin, self.turn), min(end, n)
        if end <= begin:
            return []
        own = kind[begin:end]
        often = self.count[own]
        if not (often > 1).any():
            return []
        anchor = begin + int(np.where(often > 1, often, n + 1).argmin())
        found = []
        for at in np.flatnonzero(kind == kind[anchor]).tolist():
            by = at - anchor
            if not by or begin + by < self.turn or end + by > n:
                continue
            if (own == kind[begin + by : end + by]).mean() >= ALIKE:
                before = self._before(begin, end, by)
                if before is not None:
                    found.append(Shift(by, before))
        return sorted(found, key=lambda shift: abs(shift.behind))[:MOST_PLACES]

    def _before(self, begin: int, end: int, by: int) -> int | None:
        """The forward's shift that most of what the stretch reads agrees on."""
        reads, values = self.problem.counted_inputs, self.problem.values
        votes: Counter[int] = Counter()
        for t in range(begin, end):
            if self.kind[t] != self.kind[t + by]:
                continue
            for u, v in zip(reads[t], reads[t + by], strict=True):
                p, q = values[u].producer, values[v].producer
                if p is not None and q is not None and p < self.turn and q < self.turn and p != q:
                    votes[q - p] += self.kind[p] == self.kind[q]
        return votes.most_common(1)[0][0] if votes else None

    def moved(self, ops: Sequence[int], shift: Shift) -> list[int]:
        """``ops`` shifted; those without a like there stay, or are left out if they are behind the turn."""
        out = []
        for i in ops:
            j = i + (shift.before if i < self.turn else shift.behind)
            if (
                0 <= j < len(self.kind)
                and (j < self.turn) == (i < self.turn)
                and self.kind[j] == self.kind[i]
            ):
                out.append(j)
            elif i < self.turn:
                out.append(i)
        return out


def reruns(steps: Sequence[int]) -> list[list[int]]:
    """Per op, what runs again between the first run before its own and its own; a last entry for the end."""
    out: list[list[int]] = [[]]
    for i, first in zip(steps, first_runs(steps), strict=True):
        if i == first:
            out.append([])
        else:
            out[-1].append(i)
    return out


def flat(again: Sequence[Sequence[int]]) -> list[int]:
    """The schedule with ``again[t]`` before the first run of each op ``t``."""
    steps: list[int] = []
    for t, ops in enumerate(again):
        steps.extend(ops)
        if t < len(again) - 1:
            steps.append(t)
    return steps
