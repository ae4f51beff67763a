"""What the order of a problem alone says of memory: which values are a choice, which bytes none changes.

A value is there *whatever is decided* from the op that makes it to the first run of the last op that must
find it, if nothing but that run can bring it: it is final, or a pinned op made it, or what made it is taken
to run once.  These bytes, per op, stand in the rows of every program and in every floor.  Two readings:

*Of every schedule* (:meth:`Facts.of`), for bounds.  Final values stay to the end, those of pinned ops to the
first run of their last reader; all others may be made again at any moment.  Values of the fewest bytes, up
to a given sum, may be taken to be always at hand and to weigh nothing: every schedule stays one, no heavier
and no slower, so what holds of all of these holds of all of the problem's.  With a sum of 0 only values of
no bytes go, and nothing is lost.

*Of schedules whose backward runs once* (:meth:`Facts.of_one_backward`), for methods that decide what the
forward leaves.  A value is a choice where the forward makes it, it is not final and something reads it; the
life of every other follows from the order.

Sources: ours.  Weakness of free values: a rerun whose only use is one of them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from solvers.core.just_in_time import can_be_dropped
from solvers.core.problem import Problem

__all__ = ["Facts", "spanned"]


@dataclass(frozen=True, eq=False)
class Facts:
    """A problem's ops and values as programs see them; n ops, bytes as int64, ``resident_bytes`` included.

    ``counted``      per value, whether its residence is worth a decision.
    ``stays_until``  per value that is there whatever is decided, the last op at whose first run it must be
                     there; -1 for the others.
    ``reads``        per op, the counted values that it reads.
    ``staying``      bytes of the values that must be there while each op first runs, its own too, (n,).
    ``entering``     the part of ``staying`` that is there before the op runs, (n,).
    ``around``       bytes of each op's workspace and of those of its inputs and outputs that are not in
                     ``staying``, (n,).
    """

    problem: Problem
    counted: tuple[bool, ...]
    stays_until: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    staying: np.ndarray
    entering: np.ndarray
    around: np.ndarray

    def __repr__(self) -> str:
        return f"Facts({self.problem.name!r}: {sum(self.counted)} of {len(self.counted)} values counted)"

    @classmethod
    def of(cls, problem: Problem, free_bytes: int = 0) -> Facts:
        """What holds of every schedule of ``problem.relaxed``, hence of every one of ``problem``.

        The values taken to be free weigh at most ``free_bytes`` together.
        """
        problem = problem.relaxed
        made = problem.worked_out.get((cls, free_bytes))  # asked for by each floor and bound of one search
        if isinstance(made, Facts):
            return made
        stays_until = tuple(
            -1 if value.producer is None or can_be_dropped(problem, v) else _last_need(problem, v)
            for v, value in enumerate(problem.values)
        )
        made = cls._made(problem, _all_but_free(problem, free_bytes), stays_until)
        return problem.worked_out.setdefault((cls, free_bytes), made)

    @classmethod
    def of_one_backward(cls, problem: Problem) -> Facts:
        """What holds of every schedule that runs each backward op once; ``ValueError`` without a turn."""
        turn = problem.turn
        if turn is None:
            raise ValueError(f"{problem.name}: a staged program needs a turn from forward to backward")
        # A value that no backward op reads can still be an ancestor of a recomputation.
        chosen = tuple(
            value.producer is not None and value.producer < turn and not value.final and bool(readers)
            for value, readers in zip(problem.values, problem.consumers, strict=True)
        )
        stays_until = tuple(
            -1 if value.producer is None or chosen[v] else _last_need(problem, v)
            for v, value in enumerate(problem.values)
        )
        return cls._made(problem, chosen, stays_until)

    @classmethod
    def _made(cls, problem: Problem, counted: tuple[bool, ...], stays_until: tuple[int, ...]) -> Facts:
        n, values = len(problem), problem.values
        spans = [(values[v].producer or 0, last, values[v].bytes) for v, last in enumerate(stays_until)]
        spans = [span for span in spans if span[1] >= 0]
        around = [
            op.workspace_bytes
            + sum(values[v].bytes for v in (*problem.counted_inputs[i], *op.outputs) if stays_until[v] < 0)
            for i, op in enumerate(problem.ops)
        ]
        return cls(
            problem,
            counted,
            stays_until,
            tuple(tuple(v for v in row if counted[v]) for row in problem.counted_inputs),
            spanned(n, spans) + problem.resident_bytes,
            spanned(n, ((made + 1, last, size) for made, last, size in spans)) + problem.resident_bytes,
            np.array(around, dtype=np.int64),
        )

    def stays(self, v: int, t: int) -> bool:
        """Whether value ``v``, made before op ``t``, must be there when ``t`` first runs."""
        return self.stays_until[v] >= t

    @property
    def pressure(self) -> np.ndarray:
        """Bytes that are there while each op first runs, whatever is decided; shape (n,)."""
        return self.staying + self.around

    @property
    def decided(self) -> tuple[int, ...]:
        """The counted values, ascending."""
        return tuple(v for v, counts in enumerate(self.counted) if counts)

    @property
    def turn(self) -> int:
        """Number of forward ops; 0 without a turn."""
        return self.problem.turn or 0

    @property
    def backward(self) -> range:
        """Positions of the backward ops; all without a turn."""
        return range(self.turn, len(self.problem))


def spanned(n: int, spans: Iterable[tuple[int, int, int]]) -> np.ndarray:
    """Per op of ``n``, the bytes of the spans (first op, last op, bytes) it lies in; int64, shape (n,)."""
    change = np.zeros(n + 1, dtype=np.int64)
    for first, last, size in spans:
        change[first] += size
        change[last + 1] -= size
    return np.cumsum(change)[:n]


def _last_need(problem: Problem, v: int) -> int:
    """The last op at whose first run ``v``, which an op makes, must be there if it is made once."""
    if problem.values[v].final:
        return len(problem) - 1
    return (problem.values[v].producer or 0, *problem.consumers[v])[-1]


def _all_but_free(problem: Problem, free_bytes: int) -> tuple[bool, ...]:
    """All values but sources, final ones, and the smallest up to ``free_bytes`` in all."""
    counted = [value.producer is not None and not value.final for value in problem.values]
    for v in sorted(range(len(counted)), key=lambda v: problem.values[v].bytes):
        if counted[v]:
            free_bytes -= problem.values[v].bytes
            if free_bytes < 0:
                break
            counted[v] = False
    return tuple(counted)
