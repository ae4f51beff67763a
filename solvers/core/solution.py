"""What a solver hands back: a schedule, what the simulator says of it, and what is proved about it.

A :class:`Solution` is only ever made by :func:`solution_of`, which runs the simulator and takes
seconds and peak from it, so no solver can report figures of its own.  Three words describe how
much is known:

``optimal``    it fits the budget, and its seconds equal the proved bound (1e-9 relative).
``feasible``   it fits the budget; something faster has not been ruled out.
``unsettled``  nothing found fits the budget, and nothing proves that nothing can.  The schedule is
               the one of lowest peak that was found; its ``peak_bytes`` exceed ``budget_bytes``.

A budget that no schedule can meet raises :class:`InfeasibleError` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import Timeline, simulate

__all__ = [
    "InfeasibleError",
    "Rank",
    "Solution",
    "Status",
    "fits_better",
    "rank",
    "solution_of",
    "with_floor",
]

Status = Literal["optimal", "feasible", "unsettled"]

OPTIMAL_RTOL = 1e-9
# Bounds come out of linear programs solved to about 1e-7; beyond this a bound is wrong, not rounded.
BOUND_RTOL = 1e-6


class InfeasibleError(ValueError):
    """No schedule of this order fits the budget.

    ``budget_bytes``  what was asked for.
    ``floor_bytes``   proved: every schedule whose first executions keep the order peaks at least here.
    ``op_name``       the op that needs them; where the floor is proved by search, the op at which the lowest
                      schedule found peaks.
    ``interrupted``   a listener or Ctrl-C ended the search meanwhile.
    """

    def __init__(self, budget_bytes: int, floor_bytes: int, op_name: str, interrupted: bool = False) -> None:
        super().__init__(
            f"no schedule fits {budget_bytes} bytes: whatever is recomputed, at least {floor_bytes} are "
            f"needed ({floor_bytes - budget_bytes} more); the tightest place is op {op_name!r}"
        )
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes
        self.op_name = op_name
        self.interrupted = interrupted

    def __reduce__(self) -> tuple[type[InfeasibleError], tuple[int, int, str, bool]]:
        return type(self), (self.budget_bytes, self.floor_bytes, self.op_name, self.interrupted)


@dataclass(frozen=True)
class Solution:
    """A schedule with its simulated cost and the proved bound on that cost.

    ``seconds``            total of the run, first executions included.
    ``recompute_seconds``  the part of it beyond every op's first execution.
    ``peak_bytes``         the most bytes resident at any step, ``Problem.resident_bytes`` included.
    ``bound_seconds``      no schedule within ``budget_bytes`` whose first executions keep the problem's
                           order takes fewer total seconds.
    ``status``             see the module's docstring.
    ``solver``             name of the method that found the schedule.
    ``solve_seconds``      wall clock spent on finding it.
    ``floor_bytes``        no schedule's peak is lower: the highest floor proved (0: none).
    ``interrupted``        a listener's return value or Ctrl-C ended the search, or kept it from being begun.
    """

    schedule: Schedule
    seconds: float
    recompute_seconds: float
    peak_bytes: int
    bound_seconds: float
    budget_bytes: int
    status: Status
    solver: str
    solve_seconds: float
    floor_bytes: int = 0
    interrupted: bool = False

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status is {self.status!r}, want one of {', '.join(get_args(Status))}")
        if (self.peak_bytes > self.budget_bytes) != (self.status == "unsettled"):
            raise ValueError(
                f"status {self.status!r} with a peak of {self.peak_bytes} of {self.budget_bytes} bytes"
            )

    @property
    def gap_seconds(self) -> float:
        """Seconds by which the schedule may exceed the best possible; 0 if it is optimal."""
        return 0.0 if self.status == "optimal" else max(0.0, self.seconds - self.bound_seconds)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def rank(self) -> Rank:
        """Lower is better, among answers to the same budget."""
        return Rank(max(0, self.peak_bytes - self.budget_bytes), self.seconds, self.peak_bytes)

    def __repr__(self) -> str:
        return (
            f"Solution({self.status} by {self.solver}: {self.seconds:.6g} s of which "
            f"{self.recompute_seconds:.6g} s recomputation, bound {self.bound_seconds:.6g} s, "
            f"peak {self.peak_bytes} of {self.budget_bytes} bytes, found in {self.solve_seconds:.2f} s)"
        )


def solution_of(
    problem: Problem,
    schedule: Schedule,
    budget_bytes: int,
    *,
    solver: str,
    bound_seconds: float | None = None,
    solve_seconds: float = 0.0,
    floor_bytes: int = 0,
    interrupted: bool = False,
) -> Solution:
    """Simulate ``schedule`` and say what it is worth.

    ``budget_bytes`` is what the peak, ``problem.resident_bytes`` included, is held against;
    ``bound_seconds`` is a lower bound on total seconds; it is never taken below
    ``problem.total_seconds``, which always holds (and is what ``None`` means).  ``floor_bytes`` is one on
    the peak of any schedule.

    Raises ``InvalidScheduleError`` if the schedule breaks a rule, and ``RuntimeError`` if a schedule
    within the budget beats the bound, or one peaks below the floor: then these are wrong.
    """
    timeline = simulate(problem, schedule)
    fits = timeline.peak_bytes <= budget_bytes
    bound = problem.total_seconds if bound_seconds is None else max(bound_seconds, problem.total_seconds)
    if fits and bound > timeline.seconds:
        if bound > timeline.seconds * (1 + BOUND_RTOL):
            raise RuntimeError(
                f"{problem.name}: {solver} claims a bound of {bound!r} s, "
                f"but its schedule takes {timeline.seconds!r} s"
            )
        bound = timeline.seconds
    status: Status = "unsettled"
    if fits:
        status = "optimal" if timeline.seconds - bound <= OPTIMAL_RTOL * timeline.seconds else "feasible"
    solution = Solution(
        schedule=schedule,
        seconds=timeline.seconds,
        recompute_seconds=timeline.recompute_seconds,
        peak_bytes=timeline.peak_bytes,
        bound_seconds=bound,
        budget_bytes=budget_bytes,
        status=status,
        solver=solver,
        solve_seconds=solve_seconds,
        interrupted=interrupted,
    )
    return with_floor(problem, solution, floor_bytes) if floor_bytes else solution


def with_floor(problem: Problem, solution: Solution, floor_bytes: int) -> Solution:
    """``solution`` with a floor on the peak of any schedule; ``RuntimeError`` if its own is lower."""
    if floor_bytes > solution.peak_bytes:
        raise RuntimeError(
            f"{problem.name}: it is claimed that no schedule peaks below {floor_bytes} bytes, "
            f"but that of {solution.solver} peaks at {solution.peak_bytes}"
        )
    return replace(solution, floor_bytes=floor_bytes)


class Rank(NamedTuple):
    """Which of two answers to one budget is better: the lower rank, for every method.

    ``over``        how far it is above the budget, 0 where it fits; bytes, or what measures them.
    ``seconds``     of the run, or of its recomputations.
    ``peak_bytes``  the most bytes at any step.
    """

    over: float
    seconds: float
    peak_bytes: int


def rank(timeline: Timeline, budget_bytes: int) -> Rank:
    """The rank of a schedule whose excess over ``budget_bytes`` is that of its peak, in bytes."""
    peak = timeline.peak_bytes
    return Rank(max(0, peak - budget_bytes), timeline.seconds, peak)


def fits_better(one: Solution, other: Solution) -> bool:
    """Whether ``one`` is the better answer: first to fit the budget, then fewer seconds, then a lower peak.

    Among solutions that do not fit, the lower peak wins.  Both are answers to the same budget.
    """
    return one.rank < other.rank
