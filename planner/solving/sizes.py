"""The last size at which something holds, with few looks: memory is nearly a line in a batch's size.

And the last one with a plan.  Where none is found, the schedule of lowest peak that was met is played at
smaller sizes: the last one that it fits is certain, and some above it are searched, each from the nearest
plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from planner.errors import InfeasibleBudgetError
from planner.options import Search
from planner.plan import Plan
from planner.solving.budgeted import BudgetedStep

__all__ = ["PlannedSizes", "last_within"]

_GROWTH = 8  # at most so many times what is known to hold: a batch of that size is made
_STRIDES = 64  # the first step above what is known to fit is such a part of it
_SLOW = 3  # looks in a row that left more than half of what was open


def last_within(
    value_of: Callable[[int], float], limit: float, low: int, high: int, known: Mapping[int, float]
) -> int:
    """The largest of ``low`` to ``high`` with a value within ``limit``; ``low - 1`` if not even that has one.

    ``known``  values that were seen before, by size.

    Values are taken never to fall with the size: what was not looked at below the answer is taken to hold,
    above it not to.
    """
    seen = {n: v for n, v in known.items() if low <= n <= high}
    slow = 0
    while True:
        holds = max((n for n, v in seen.items() if v <= limit), default=low - 1)
        fails = min((n for n, v in seen.items() if v > limit and n > holds), default=high + 1)
        open_before = fails - holds
        if open_before <= 1:
            return holds
        middle = (holds + fails) // 2 if fails <= high else max(2 * holds, low)
        guess = middle if slow >= _SLOW else _on_the_line(seen, limit, holds, fails) or middle
        most = fails - 1 if fails <= high else max(_GROWTH * holds, low)
        guess = min(max(guess, holds + 1), fails - 1, most)
        seen[guess] = value_of(guess)
        left = fails - guess if seen[guess] <= limit else guess - holds
        slow = slow + 1 if slow < _SLOW and 2 * left > open_before else 0


def _on_the_line(seen: Mapping[int, float], limit: float, holds: int, fails: int) -> int | None:
    """Where the line through the two sizes nearest to the limit meets it; ``None`` without two.

    From some size on values may be lower, as where a loss goes into chunks; those before say nothing then.
    """
    finite = [n for n, value in seen.items() if math.isfinite(value)]
    rising = [n for n in finite if all(seen[m] >= seen[n] for m in finite if m > n)]
    if len(rising) < 2:
        return None
    a, b = sorted(sorted(rising, key=lambda n: (abs(seen[n] - limit), n))[:2])
    slope = (seen[b] - seen[a]) / (b - a)
    if slope <= 0:
        return None
    at = a + int((limit - seen[a]) // slope)
    return at + 1 if at == holds and fails - holds > 1 else at


class PlannedSizes:
    """Plans within one budget for steps of one model at several sizes.

    ``step_at``  the step at a size, the same object each time it is asked for.
    ``low``      the smallest size.
    """

    def __init__(
        self, step_at: Callable[[int], BudgetedStep], budget_bytes: int, search: Search, low: int = 1
    ) -> None:
        self.step_at, self.budget_bytes, self.search, self.low = step_at, budget_bytes, search, low
        self.plans: dict[int, Plan] = {}
        self.least: Plan | None = None  # the schedule of lowest peak that was met
        self.refused: dict[int, InfeasibleBudgetError] = {}

    def has_plan(self, size: int) -> bool:
        """Whether one is found within the budget.

        It begins with that of the next larger size, which does here too, or else with the least that was met.
        """
        if size in self.plans or size in self.refused:
            return size in self.plans
        larger = min((n for n in self.plans if n > size), default=None)
        hint = self.least if larger is None else self.plans[larger]
        try:
            self.plans[size] = self.step_at(size).plan_bytes(self.budget_bytes, self.search, hint=hint)
        except InfeasibleBudgetError as error:
            self.refused[size] = error
        return size in self.plans

    def largest(self, last: int) -> int:
        """The largest of up to ``last``, beyond which the floor is above the budget, that has a plan;
        ``low - 1`` where not even the smallest has one.
        """
        if self.has_plan(last):
            return last
        sure = self._sure_below(last)
        if sure is None:
            return self.low - 1
        fails, stride = last, max(1, sure // _STRIDES)
        while fails - sure > 1:  # that schedule is nearly the least, so plans end soon above it
            reach = min(sure + stride, (sure + fails) // 2)
            sure, fails = (reach, fails) if self.has_plan(reach) else (sure, reach)
            stride *= 2
        return sure

    def _sure_below(self, size: int) -> int | None:
        """A smaller size with a plan, which is made; ``None`` where not even the smallest has one."""
        least = self.least = self.step_at(size).lightest.least_plan()

        def peak_at(n: int) -> float:
            step = self.step_at(n).lightest
            schedule = step.schedule_of(least)
            return math.inf if schedule is None else step.peak_of(step.steps_of(schedule))

        half = max(self.low, size // 2)
        known = {size: least.peak_bytes, half: peak_at(half)}
        found = min(size - 1, last_within(peak_at, self.budget_bytes, self.low, size, known))
        while found >= self.low and not self.has_plan(found):
            found = (self.low + found) // 2 if found > self.low else self.low - 1
        if found >= self.low:
            return found
        return self.low if self.has_plan(self.low) else None
