"""What a program over instants need not look at: values too small to matter, and chains that are one op.

Two steps, each of which can only lower the least time and the least peak, so that bounds stay bounds.

*Free values.*  Values of the fewest bytes, up to a given sum, are taken to be always at hand and to weigh
nothing.  Every schedule stays a schedule, no heavier and no slower; a rerun whose only use was such a value
may be left out.  With a sum of 0 only values of no bytes go, and nothing is lost.

*Chains.*  Let op i make the value k alone, let op j be k's only reader and k be j's only input, none of
them pinned, none of their values final, and let j's outputs together weigh no more than k.  Then i and j
become one op of both costs that makes j's outputs, and k disappears.  A schedule of the old problem gives
one of the new that is no heavier and no slower: say that j's outputs are there when they are there or k
is, and that the new op runs again when i does.  A rerun of i once j has run serves only j, so j reruns
before i's next rerun (or i's is left out), and the new reruns cost no more than the old ones together; as
long as k is held in the place of j's outputs, at least their bytes are.  Longer chains follow by repetition.

Sources: this project's.  Weakness: a chain that branches, or grows on its way, is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import Problem

__all__ = ["Reduction"]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A problem's ops and values as the programs over instants see them.

    ``counted``      per value, whether its residence is worth a decision.
    ``stays_until``  per value that a pinned op makes or that is final, the last op at whose first run it
                     must be there; -1 for the others.
    ``inputs``       per op, the counted values that must be there when it runs again (of a chain: those of
                     its first op, told under its last).
    ``reads``        per op, the counted values that its first run reads.
    ``outputs``      per op, the counted values that it makes.
    ``again_s``      per op, seconds of a rerun; of a chain, under its last op, the sum.
    ``members``      per op, the ops that a rerun runs, ascending.
    ``staying``      per op, bytes while it first runs of the values that must be there whatever is decided,
                     its own among them, (n,).
    ``entering``     per op, the part of ``staying`` that is there before it runs, (n,).
    ``around``       per op, its workspace and those of its inputs and outputs that are not in ``staying``.
    """

    problem: Problem
    counted: tuple[bool, ...]
    stays_until: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    again_s: tuple[float, ...]
    members: tuple[tuple[int, ...], ...]
    staying: np.ndarray
    entering: np.ndarray
    around: np.ndarray

    def __repr__(self) -> str:
        chains = sum(len(m) > 1 for m in self.members)
        return f"Reduction({self.problem.name!r}: {sum(self.counted)} values counted, {chains} chains)"

    @classmethod
    def of(cls, problem: Problem, free_bytes: int = 0) -> Reduction:
        """Reduce ``problem``; the values taken to be free weigh at most ``free_bytes`` together."""
        n, ops, values = len(problem), problem.ops, problem.values
        stays_until = tuple(_stays_until(problem, v) for v in range(len(values)))
        counted = _counted(problem, free_bytes)
        reads = tuple(tuple(v for v in problem.counted_inputs[i] if counted[v]) for i in range(n))
        inputs, outputs = list(reads), [tuple(v for v in op.outputs if counted[v]) for op in ops]
        again_s, members = [op.again_s for op in ops], [(i,) for i in range(n)]
        for j in range(n):
            i = _chained(problem, inputs, outputs, j)
            if i is not None:
                counted[inputs[j][0]] = False
                inputs[j], outputs[i] = inputs[i], ()
                again_s[j] += again_s[i]
                members[j] = (*members[i], j)
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
            tuple(inputs),
            tuple(tuple(v for v in row if counted[v]) for row in reads),
            tuple(outputs),
            tuple(again_s),
            tuple(members),
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


def _chained(
    problem: Problem, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], j: int
) -> int | None:
    """The op that ``j`` makes a chain with (see the module), or ``None``."""
    ops, values = problem.ops, problem.values
    if len(inputs[j]) != 1:
        return None
    (k,) = inputs[j]
    i = values[k].producer
    if i is None or outputs[i] != (k,) or problem.consumers[k] != (j,):
        return None
    if not (ops[i].recomputable and ops[j].recomputable):
        return None
    if any(values[v].final for v in (*ops[i].outputs, *ops[j].outputs)):
        return None
    return i if sum(values[v].bytes for v in outputs[j]) <= values[k].bytes else None
