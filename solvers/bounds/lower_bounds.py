"""Lower bounds: the least peak any schedule can reach, and the least time within a budget.

Both are proved for every schedule that first executes the ops in the problem's order and holds a
final value from the moment it is first made; recomputations may be any, in any number, anywhere.
All is proved of ``Problem.relaxed``, in which a schedule takes no more than it truly does.

*Peak.*  When op i first runs, its inputs, outputs and workspace are resident; so is every final value
made before, and every value that a pinned op made before and an op not yet executed reads.  The
largest of these sums over i is a floor.  Exact in practice where one op is the bottleneck (the loss
of a language model), weak where the inputs of a recomputation are: there :mod:`solvers.bounds.pebbling`
looks at all that may happen in a short window around the bottleneck.

*Time.*  A mixed-integer program over a few instants of the run, in which the values resident at an instant
must account, with recomputations, for everything that is still to be read; its rows and the proof are in
:mod:`solvers.bounds.instants`, the choice of instants in :mod:`solvers.bounds.refine`.  The same program
with the budget as its unknown gives a higher floor than the sums above (:func:`proved_floor`).

Sources and weaknesses: of the programs, see there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from solvers.bounds.pebbling import raised_floors
from solvers.bounds.refine import Refinement, pressure_instants, refine
from solvers.core.facts import Facts
from solvers.core.problem import Problem
from solvers.core.simulate import simulate_steps

__all__ = [
    "PeakFloor",
    "peak_floor",
    "pressure_instants",
    "proved_floor",
    "time_bound",
]

# No more is asked of a bound once a plan is known that is slower by less than this share of a step.
CLOSE = 2e-4
# Share of the time for a floor that goes to windows of a few values.
WINDOWS_SHARE = 0.5


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
    if not problem.ops:
        return PeakFloor(problem.resident_bytes, "")
    need = Facts.of(problem).pressure
    worst = int(need.argmax())
    return PeakFloor(int(need[worst]), problem.ops[worst].name)


def proved_floor(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    least_bytes: int | None = None,
    on_round: Callable[[PeakFloor, list[int] | None], object] | None = None,
) -> PeakFloor:
    """A higher floor than :func:`peak_floor`'s: by :mod:`solvers.bounds.pebbling`, then by
    :mod:`solvers.bounds.instants`.

    ``least_bytes``  the peak of some schedule, where the search stops; default: that of keeping everything.
    ``on_round``     called with the floor so far and the schedule of lowest peak met, if any; ends the search
                     by returning ``True``.

    Anytime.
    """
    started = time.perf_counter()
    problem = problem.relaxed
    floor = peak_floor(problem)
    top = least_bytes or int(simulate_steps(problem, list(range(len(problem)))).peak_bytes)
    for found in raised_floors(problem, deadline=started + WINDOWS_SHARE * time_limit_s):
        if floor.bytes >= top:
            break
        if found.bytes > floor.bytes:
            floor = PeakFloor(found.bytes, problem.ops[found.op].name)
            if on_round is not None and on_round(floor, None) is True:
                return floor

    def tell(found: Refinement) -> bool:
        nonlocal floor
        least = math.ceil(found.bound)
        if least > floor.bytes:
            floor = PeakFloor(least, problem.ops[found.tightest].name)
        return on_round is not None and on_round(floor, found.lowest[0]) is True

    left_s = started + time_limit_s - time.perf_counter()
    if floor.bytes < top and left_s > 0:
        refine(
            problem,
            None,
            [problem.index(floor.op_name)],
            time_limit_s=left_s,
            enough=top,
            known=floor.bytes,
            most_bytes=top,
            on_round=tell,
        )
    return floor


def time_bound(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 10.0,
    enough_seconds: float = math.inf,
    counted: Collection[int] | None = None,
) -> float:
    """Seconds that no schedule within ``budget_bytes`` goes below; ``inf`` if none can be within it.

    Anytime: higher the more time there is, and never past ``time_limit_s``.  Stops early where it cannot
    rise by more than ``CLOSE`` of a step, or has reached ``enough_seconds`` (total; those of a plan at hand).

    ``counted``  op positions: only while these run must memory be within the budget.  Default: all.
    """
    total = problem.total_seconds
    if counted is None:
        if peak_floor(problem).bytes > budget_bytes:
            return math.inf
        instants = pressure_instants(problem, 1)
    else:
        need = Facts.of(problem).pressure
        instants = [max(counted, key=lambda i: int(need[i]))] if counted else []
        if not instants:
            return total
        if need[instants[0]] > budget_bytes:
            return math.inf
    found = refine(
        problem,
        budget_bytes,
        instants,
        time_limit_s=time_limit_s,
        enough=enough_seconds - total,
        close=CLOSE * total,
        counted=counted,
    )
    return total + found.bound
