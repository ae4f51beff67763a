"""Lower bounds: the least peak any schedule can reach, and the least time within a budget.

Both are proved for every schedule that first executes the ops in the problem's order and holds a
final value from the moment it is first made; recomputations may be any, in any number, anywhere.

*Peak.*  When op i first runs, its inputs, outputs and workspace are resident; so is every final value
made before, and every value that a pinned op made before and an op not yet executed reads.  The
largest of these sums over i is a floor.  Exact in practice where one op is the bottleneck (the loss
of a language model), weak where the inputs of a recomputation are.

*Time.*  A mixed-integer program over a few instants of the run, in which the values resident at an instant
must account, with recomputations, for everything that is still to be read; its rows and the proof are in
:mod:`solvers.instants`, the choice of instants in :mod:`solvers.refine`.  The same program with the budget
as its unknown gives a higher floor than the sums above (:func:`proved_floor`).

Sources and weaknesses: of the programs, see there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.instants import InstantProgram
from solvers.problem import Problem
from solvers.reduction import Reduction
from solvers.refine import SAFETY, pressure_instants, refine
from solvers.simulate import simulate_steps

__all__ = [
    "PeakFloor",
    "least_recompute",
    "peak_floor",
    "pressure_instants",
    "proved_floor",
    "time_bound",
]

# No more is asked of a bound once a plan is known that is slower by less than this share of a step.
CLOSE = 2e-4


@dataclass(frozen=True)
class PeakFloor:
    """No schedule's peak is below ``bytes`` (resident bytes included); ``op_name`` is why."""

    bytes: int
    op_name: str

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"bytes is {self.bytes}, want >= 0")

    def __str__(self) -> str:
        return f"no schedule peaks below {self.bytes} bytes, because of op {self.op_name!r}"


def peak_floor(problem: Problem) -> PeakFloor:
    """The largest sum of bytes that must be resident when some op first runs (see the module)."""
    n = len(problem)
    if not n:
        return PeakFloor(problem.resident_bytes, "")
    held = np.zeros(n + 1, dtype=np.int64)
    extra = np.zeros(n, dtype=np.int64)
    must_stay = [False] * len(problem.values)
    for v, value in enumerate(problem.values):
        p, readers = value.producer, problem.consumers[v]
        if p is None:
            continue
        must_stay[v] = value.final or not problem.ops[p].recomputable
        if must_stay[v]:
            held[p] += value.bytes
            held[(n if value.final else (readers[-1] if readers else p) + 1)] -= value.bytes
    for i, op in enumerate(problem.ops):
        around = (*problem.counted_inputs[i], *op.outputs)
        extra[i] = op.workspace_bytes + sum(problem.values[v].bytes for v in around if not must_stay[v])
    need = np.cumsum(held)[:n] + extra
    worst = int(need.argmax())
    return PeakFloor(problem.resident_bytes + int(need[worst]), problem.ops[worst].name)


def proved_floor(problem: Problem, *, time_limit_s: float = 10.0) -> PeakFloor:
    """A higher floor than :func:`peak_floor`'s, by the program of :mod:`solvers.instants` with a free budget.

    Anytime; stops early where a schedule is known that peaks at the floor.
    """
    floor = peak_floor(problem)
    top = int(simulate_steps(problem, list(range(len(problem)))).peak_bytes)
    if top == floor.bytes:
        return floor
    instants = [problem.index(floor.op_name)]
    found = refine(
        problem, None, instants, time_limit_s=time_limit_s, enough=top, known=floor.bytes, most_bytes=top
    )
    least = math.ceil(found.bound)
    return PeakFloor(least, problem.ops[found.tightest].name) if least > floor.bytes else floor


def time_bound(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 10.0,
    enough_seconds: float = math.inf,
) -> float:
    """Seconds that no schedule within ``budget_bytes`` goes below; ``inf`` if none can be within it.

    Anytime: higher the more time there is, and never past ``time_limit_s``.  Stops early where it cannot
    rise by more than ``CLOSE`` of a step, or has reached ``enough_seconds`` (total; those of a plan at hand).
    """
    if peak_floor(problem).bytes > budget_bytes:
        return math.inf
    total = problem.total_seconds
    instants = pressure_instants(problem, 1)
    found = refine(
        problem,
        budget_bytes,
        instants,
        time_limit_s=time_limit_s,
        enough=enough_seconds - total,
        close=CLOSE * total,
    )
    return total + found.bound


def least_recompute(
    problem: Problem, budget_bytes: int, instants: list[int], *, time_limit_s: float
) -> float:
    """Optimum, in seconds, of the linear relaxation at ``instants``; 0 if it was not solved to the end."""
    program = InstantProgram(Reduction.of(problem), instants, budget_bytes)
    answer = program.lp.solve(time_limit_s=time_limit_s, relax=True)
    if answer.infeasible:
        return math.inf
    return max(0.0, answer.objective * (1 - SAFETY)) * program.unit_s if answer.optimal else 0.0
