"""The search for a schedule whose execution fits a budget, where the solvers count storages only.

What an allocator hands out beyond them (:mod:`planner.memory.execution`) depends on the schedule, so it is
found after solving.  A schedule that is over the budget by it is solved for again, at a target lower by as
much, starting from the last one.  The proved bound is always the one for the budget itself: whatever an
allocator does, a schedule that fits with slack fits without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from planner.memory.execution import Execution
from planner.options import Search
from solvers import InfeasibleError, Problem, Schedule, Solution, solve
from solvers import frontier as solve_frontier

__all__ = ["Answer", "fitted", "fitted_each"]

# Targets that are tried; each is lower by the last one's slack, which hardly differs between like schedules.
ROUNDS = 4
EQUAL = 1 + 1e-9  # seconds that differ by less are the same sum, added up otherwise

Execute = Callable[[Schedule], Execution]


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found for one budget.

    ``execution``      of the schedule found, as it runs on the device; within ``budget_bytes``.  ``None``:
                       none was found.
    ``bound_seconds``  proved: no schedule within the budget takes less; ``inf``: none is within it.
    ``floor_bytes``    proved: no schedule has a lower peak.
    ``seconds``        of the schedule, recomputation included; ``inf`` without one.
    ``solve_seconds``  of search.
    ``interrupted``    whether a listener or Ctrl-C ended it.
    ``searched_on``    the day of the search (UTC, "2026-05-30"), where its answer is from the cache.

    Raises ``ValueError`` for an execution that exceeds the budget, and for one that is faster than its bound.
    """

    budget_bytes: int
    execution: Execution | None
    bound_seconds: float
    floor_bytes: int
    seconds: float = math.inf
    solver: str = ""
    solve_seconds: float = 0.0
    interrupted: bool = False
    searched_on: str = ""

    def __post_init__(self) -> None:
        if self.execution is None:
            return
        if self.execution.peak_bytes > self.budget_bytes:
            raise ValueError(
                f"an execution of {self.execution.peak_bytes} bytes is no answer for {self.budget_bytes}"
            )
        if self.seconds * EQUAL < self.bound_seconds:
            raise ValueError(
                f"a schedule of {self.seconds} s beats the proved bound of {self.bound_seconds} s"
            )

    @property
    def fits(self) -> bool:
        """Whether a schedule within the budget was found."""
        return self.execution is not None

    @property
    def peak_bytes(self) -> int:
        """Of the schedule found.  Raises ``ValueError`` where there is none."""
        if self.execution is None:
            raise ValueError(f"nothing was found within {self.budget_bytes} bytes")
        return self.execution.peak_bytes

    @property
    def is_optimal(self) -> bool:
        """Whether no schedule within the budget is faster."""
        return self.execution is not None and self.seconds <= self.bound_seconds * EQUAL

    @property
    def is_infeasible(self) -> bool:
        """Whether it is proved that nothing fits."""
        return math.isinf(self.bound_seconds)


def _answer(budget_bytes: int, found: Solution, first: Solution, execution: Execution | None) -> Answer:
    """``found`` as an answer for the budget that ``first`` was solved at."""
    spent_s = first.solve_seconds + (0.0 if found is first else found.solve_seconds)
    # The two are sums of the same numbers where a plan is optimal, added up in another order.
    bound_seconds = first.bound_seconds if execution is None else min(first.bound_seconds, found.seconds)
    return Answer(
        budget_bytes,
        execution,
        bound_seconds,
        first.floor_bytes,
        math.inf if execution is None else found.seconds,
        found.solver,
        spent_s,
        found.interrupted,
    )


def fitted(
    problem: Problem,
    budget_bytes: int,
    execute: Execute,
    search: Search,
    hint: Schedule | None = None,
) -> Answer:
    """The best schedule found whose execution fits, with what is proved for ``budget_bytes``.

    The first search may take ``search.time_limit_s``, all others together as much again.  A listener's stop
    and Ctrl-C end all of them.
    """
    tell = search.tell
    progress = tell.searching(problem.total_seconds)
    began = time.perf_counter()
    try:
        first = solve(
            problem,
            budget_bytes,
            solver=search.solver,
            time_limit_s=search.time_limit_s,
            progress=progress,
            hint=hint,
        )
    except InfeasibleError as error:
        tell.heed(error.interrupted)
        spent_s = time.perf_counter() - began
        return Answer(
            budget_bytes,
            None,
            math.inf,
            error.floor_bytes,
            solve_seconds=spent_s,
            interrupted=error.interrupted,
        )
    found = first
    deadline = time.perf_counter() + search.time_limit_s
    target_bytes, slack_bytes = budget_bytes, 0
    for _ in range(ROUNDS):
        tell.heed(found.interrupted)
        if not found.fits:
            break
        execution = execute(found.schedule)
        if execution.peak_bytes <= budget_bytes:
            return _answer(budget_bytes, found, first, execution)
        slack_bytes = max(slack_bytes, execution.peak_bytes - found.peak_bytes)
        target_bytes = min(target_bytes - (execution.peak_bytes - budget_bytes), budget_bytes - slack_bytes)
        if target_bytes <= 0 or tell.stopped:
            break
        left_s = max(deadline - time.perf_counter(), search.time_limit_s / 8)
        try:
            found = solve(
                problem,
                target_bytes,
                solver=search.solver,
                time_limit_s=left_s,
                progress=progress,
                hint=found.schedule,
            )
        except InfeasibleError:
            break
    return _answer(budget_bytes, first, first, None)


def fitted_each(
    problem: Problem,
    budgets: list[int],
    execute: Execute,
    search: Search,
    hint: Schedule | None = None,
) -> Mapping[int, Answer]:
    """An answer as of :func:`fitted` for each budget, solved together; ``time_limit_s`` is for each."""
    tell = search.tell

    def solved(targets: list[int]) -> Mapping[int, Solution | InfeasibleError]:
        answers = solve_frontier(
            problem,
            targets,
            solver=search.solver,
            time_limit_s=search.time_limit_s,
            progress=tell.searching(problem.total_seconds),
            hint=hint,
        )
        tell.heed(any(answer.interrupted for answer in answers.values()))
        return answers

    answers = solved(budgets)
    first = {b: s for b, s in answers.items() if isinstance(s, Solution)}
    candidates = [s for s in first.values() if s.fits]
    executions = {s.schedule: execute(s.schedule) for s in candidates}
    slack = {
        b: executions[s.schedule].peak_bytes - s.peak_bytes
        for b, s in first.items()
        if s.fits and executions[s.schedule].peak_bytes > b
    }
    if slack and not tell.stopped:
        lower = solved([b - max(slack.values()) for b in slack if b > max(slack.values())])
        more = [s for s in lower.values() if isinstance(s, Solution) and s.fits]
        executions |= {s.schedule: execute(s.schedule) for s in more}
        candidates += more
    found: dict[int, Answer] = {}
    for b in budgets:
        own = answers[b]
        if isinstance(own, InfeasibleError):
            found[b] = Answer(b, None, math.inf, own.floor_bytes)
            continue
        if own.fits and executions[own.schedule].peak_bytes <= b:
            found[b] = _answer(b, own, own, executions[own.schedule])
            continue
        fits = [s for s in candidates if executions[s.schedule].peak_bytes <= b] if own.fits else []
        best = min(fits, key=lambda s: s.seconds, default=None)
        found[b] = _answer(b, best or own, own, None if best is None else executions[best.schedule])
    return found
