"""Large-neighbourhood search: a plan is pinned except around a few stages, and those are re-optimised.

A program with fine cuts holds better plans than one with coarse cuts, but its search finds none.  So
the best plan there is, whatever cut it came from, is read back into the columns of the fine program
(:func:`encode`); everything outside a stretch of stages is pinned to it; and HiGHS, left with a few
hundred free columns, solves the stretch in a fraction of a second.

Paper: Shaw, "Using constraint programming and local search methods" (1998), for the idea.
Weakness: a plan that recomputes an op where the program does not allow it is read back incompletely,
and a stretch whose pinned surroundings do not satisfy the program's rows is skipped.
"""

from __future__ import annotations

import numpy as np

from solvers.simulate import simulate_steps
from solvers.staged_program import StagedProgram

__all__ = ["encode", "pinned_outside"]


def encode(program: StagedProgram, steps: list[int]) -> np.ndarray:
    """The columns' values that describe the schedule ``steps``, shape (columns,).

    A recomputation that the program does not allow, in its stage, is left out.
    """
    stages, problem = program.stages, program.facts.problem
    line = simulate_steps(problem, steps)
    x = np.zeros(len(program.lp.cost))
    alive: set[int] = set()
    ran: set[int] = set()
    at_start: list[set[int]] = []
    for i, frees in zip(steps, line.frees, strict=True):
        g = len(at_start) - 1
        if i in ran and g >= 0 and i in program.again[g]:
            x[program.again[g][i]] = 1.0
        alive.update(problem.ops[i].outputs)
        alive.difference_update(frees)
        if i not in ran and g + 1 < len(stages) and i == stages.first[g + 1] - 1:
            at_start.append(set(alive))
        ran.add(i)
    for v, events in program.resident.items():
        for g, column in events.items():
            x[column] = float(v in at_start[g])
    return x


def pinned_outside(program: StagedProgram, x: np.ndarray, stretch: range) -> dict[int, float]:
    """The R columns of stages outside ``stretch``, at their values in ``x``; the P follow from them."""
    return {
        column: float(x[column])
        for g, row in enumerate(program.again)
        if g not in stretch
        for column in row.values()
    }
