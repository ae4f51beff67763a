"""A problem as the programs over instants see it: which values count, and what must stay.

*Free values.*  Values of the fewest bytes, up to a given sum, are taken to be always at hand and to weigh
nothing.  Every schedule stays one, no heavier and no slower, so what holds of all of these holds of all of
the problem's.  With a sum of 0 only values of no bytes go, and nothing is lost.

*Staying.*  A value that a pinned op makes must stay until its last reader's first run, a final one to the
end; what they weigh is no choice.

Sources: this project's.  Weakness: a rerun whose only use is a free value costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.core.problem import Problem

__all__ = ["Reduction"]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A problem's ops and values as the programs over instants see them.

    ``counted``      per value, whether its residence is worth a decision.
    ``stays_until``  per value that a pinned op makes or that is final, the last op at whose first run it
                     must be there; -1 for the others.
    ``reads``        per op, the counted values that it reads.
    ``staying``      per op, bytes while it first runs of the values that must be there whatever is decided,
                     its own among them, (n,).
    ``entering``     per op, the part of ``staying`` that is there before it runs, (n,).
    ``around``       per op, its workspace and those of its inputs and outputs that are not in ``staying``.
    """

    problem: Problem
    counted: tuple[bool, ...]
    stays_until: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    staying: np.ndarray
    entering: np.ndarray
    around: np.ndarray

    def __repr__(self) -> str:
        return f"Reduction({self.problem.name!r}: {sum(self.counted)} of {len(self.counted)} values counted)"

    @classmethod
    def of(cls, problem: Problem, free_bytes: int = 0) -> Reduction:
        """Reduce ``problem.relaxed``; the values taken to be free weigh at most ``free_bytes`` together."""
        problem = problem.relaxed
        n, ops, values = len(problem), problem.ops, problem.values
        stays_until = tuple(_stays_until(problem, v) for v in range(len(values)))
        counted = _counted(problem, free_bytes)
        alive, entering = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
        for v, last in enumerate(stays_until):
            if last >= 0:
                made = values[v].producer or 0
                alive[made] += values[v].bytes
                alive[last + 1] -= values[v].bytes
                entering[made + 1] += values[v].bytes
                entering[last + 1] -= values[v].bytes
        around = [
            op.workspace_bytes
            + sum(values[v].bytes for v in (*problem.counted_inputs[i], *op.outputs) if stays_until[v] < 0)
            for i, op in enumerate(ops)
        ]
        return cls(
            problem,
            tuple(counted),
            stays_until,
            tuple(tuple(v for v in row if counted[v]) for row in problem.counted_inputs),
            np.cumsum(alive)[:n] + problem.resident_bytes,
            np.cumsum(entering)[:n] + problem.resident_bytes,
            np.array(around, dtype=np.int64),
        )

    def stays(self, v: int, t: int) -> bool:
        """Whether value ``v``, made before op ``t``, must be there when ``t`` first runs."""
        return self.stays_until[v] >= t


def _stays_until(problem: Problem, v: int) -> int:
    value, readers = problem.values[v], problem.consumers[v]
    if value.producer is None or (problem.ops[value.producer].recomputable and not value.final):
        return -1
    return len(problem) - 1 if value.final else max(readers, default=value.producer)


def _counted(problem: Problem, free_bytes: int) -> list[bool]:
    """All values but sources, final ones, and the smallest up to ``free_bytes`` in all."""
    counted = [value.producer is not None and not value.final for value in problem.values]
    for v in sorted(range(len(counted)), key=lambda v: problem.values[v].bytes):
        if counted[v]:
            free_bytes -= problem.values[v].bytes
            if free_bytes < 0:
                break
            counted[v] = False
    return counted
