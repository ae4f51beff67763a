"""The search for a plan whose execution fits a budget, where the solvers count storages only.

What an allocator hands out beyond them (:mod:`planner.memory.execution`) depends on the schedule, so it is
found after solving.  A schedule that is over the budget by it is solved for again, at a target lower by as
much, starting from the last one.  The proved bound is always the one for the budget itself: whatever an
allocator does, a schedule that fits with slack fits without.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from planner.errors import InfeasibleBudgetError
from planner.memory.execution import Execution
from planner.units import bytes_text
from solvers import InfeasibleError, Problem, Schedule, Solution, solve
from solvers import frontier as solve_frontier

if TYPE_CHECKING:
    from planner.plan import Plan

__all__ = ["LEAST", "fitted", "fitted_each", "infeasible_error"]

LEAST = "the least budget that has a plan"

ROUNDS = 4
EQUAL = 1 + 1e-9  # seconds that differ by less are the same sum, added up otherwise

Play = Callable[[Schedule], Execution]


def fitted(
    problem: Problem,
    budget_bytes: int,
    play: Play,
    *,
    solver: str,
    time_limit_s: float,
    progress: Callable[[Solution], object] | None = None,
    hint: Schedule | None = None,
) -> Solution | None:
    """The best schedule found whose execution fits; ``None`` where it is proved that none does.

    If none was found in ``ROUNDS``, the answer is "unsettled".  The first search may take
    ``time_limit_s``, all others together as much again.
    """
    try:
        first = solve(
            problem, budget_bytes, solver=solver, time_limit_s=time_limit_s, progress=progress, hint=hint
        )
    except InfeasibleError:
        return None
    if not first.fits:
        return first
    deadline = time.perf_counter() + time_limit_s
    found, target_bytes, slack_bytes = first, budget_bytes, 0
    for _ in range(ROUNDS):
        taken_bytes = play(found.schedule).peak_bytes
        if taken_bytes <= budget_bytes:
            return found if found is first else _within(found, first, taken_bytes)
        slack_bytes = max(slack_bytes, taken_bytes - found.peak_bytes)
        target_bytes = min(target_bytes - (taken_bytes - budget_bytes), budget_bytes - slack_bytes)
        if target_bytes <= 0:
            break
        left_s = max(deadline - time.perf_counter(), time_limit_s / 8)
        try:
            found = solve(problem, target_bytes, solver=solver, time_limit_s=left_s, hint=found.schedule)
        except InfeasibleError:
            break
        if not found.fits:
            break
    return dataclasses.replace(first, peak_bytes=budget_bytes + 1, status="unsettled")


def _within(found: Solution, first: Solution, taken_bytes: int) -> Solution:
    """``found``, solved at a lower target, as an answer for the budget ``first`` was solved at."""
    optimal = found.seconds <= first.bound_seconds * EQUAL
    return dataclasses.replace(
        found,
        peak_bytes=taken_bytes,
        budget_bytes=first.budget_bytes,
        bound_seconds=min(first.bound_seconds, found.seconds),
        status="optimal" if optimal else "feasible",
        solve_seconds=first.solve_seconds + found.solve_seconds,
    )


def fitted_each(
    problem: Problem,
    budgets: list[int],
    play: Play,
    *,
    solver: str,
    time_limit_s: float,
    progress: Callable[[Solution], object] | None = None,
    hint: Schedule | None = None,
) -> Mapping[int, Solution | None]:
    """An answer as of :func:`fitted` for each budget, solved together; ``time_limit_s`` is for each."""
    answers = solve_frontier(
        problem, budgets, solver=solver, time_limit_s=time_limit_s, progress=progress, hint=hint
    )
    first = {b: s for b, s in answers.items() if isinstance(s, Solution)}
    taken = {s.schedule: play(s.schedule).peak_bytes for s in first.values() if s.fits}
    over = {b: taken[s.schedule] - s.peak_bytes for b, s in first.items() if s.fits and taken[s.schedule] > b}
    if over:
        targets = [b - max(over.values()) for b in over]
        lower = solve_frontier(
            problem, [t for t in targets if t > 0], solver=solver, time_limit_s=time_limit_s, hint=hint
        )
        for s in lower.values():
            if isinstance(s, Solution) and s.fits:
                taken[s.schedule] = play(s.schedule).peak_bytes
                first.setdefault(s.budget_bytes, s)
    found: dict[int, Solution | None] = {}
    for b in budgets:
        own = first.get(b)
        if own is None or not own.fits or taken[own.schedule] <= b:
            found[b] = own
            continue
        fits = [s for s in first.values() if s.fits and taken[s.schedule] <= b]
        best = min(fits, key=lambda s: s.seconds, default=None)
        found[b] = (
            dataclasses.replace(own, peak_bytes=b + 1, status="unsettled")
            if best is None
            else _within(best, own, taken[best.schedule])
        )
    return found


def infeasible_error(
    least: Plan, budget_bytes: int, need_bytes: int, floor_bytes: int
) -> InfeasibleBudgetError:
    """For a budget that no plan fits: what ``least``, the plan of the lowest peak, needs, what fills it."""
    largest = sorted(least.breakdown.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{k.replace('_', ' ')} {bytes_text(b)}" for k, b in largest if b > need_bytes / 1000)
    decided = (
        f"it is proved that none needs less than {floor_bytes / 1e9:.4g} GB"
        if budget_bytes < floor_bytes
        else f"none was found between the proved floor of {floor_bytes / 1e9:.4g} GB and there"
    )
    enough_gb = math.ceil(need_bytes / 1e3) / 1e6  # rounded up: the number in the message works as a budget
    return InfeasibleBudgetError(
        f"no plan for {least.model_name} fits {budget_bytes / 1e9:.4g} GB. The least budget "
        f"with a plan is {enough_gb:.6f} GB, and {decided}. At that plan's peak: {parts}. Raise the "
        "budget, or make the batch smaller",
        budget_bytes=budget_bytes,
        minimum_bytes=need_bytes,
        floor_bytes=floor_bytes,
        breakdown=dict(least.breakdown),
    )
