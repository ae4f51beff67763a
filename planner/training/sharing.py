"""One budget for several calls of one module in one step.

A loss may call its model more than once before the backward (a pair of texts, a list of passages, negatives).
What each call saved waits while the later ones run, and the backward of a joint loss takes the calls in
reverse order.  So call ``p`` is at its peak while exactly the calls before it hold what they saved:

    peak of call p  <=  budget - held by the calls before it

and what is left must still do for the last call, whose least peak is ``need``.  What may be held is dealt out
evenly among the calls that are still to come but the last: :func:`most_held`.  A short call that takes less
leaves more for the next.  A plan that holds no more than so much is found by bisection on its budget.

Known weakness: calls are dealt with as they come, and a long one after short ones gets what they left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.errors import InfeasibleBudgetError
from planner.plan import Plan

__all__ = ["PROBES", "Make", "Room", "most_held", "plan_that_holds"]

Make = Callable[[int], Plan]  # from a budget in bytes; InfeasibleBudgetError where there is none

PROBES = 5

# A plan made for so much less room than there is now recomputes more than it must.
ENOUGH = 1.15


@dataclass(frozen=True)
class Room:
    """What one call may take.

    ``left_bytes``  at its peak: the budget less what the calls before it hold.
    ``most_bytes``  from its forward to its backward; ``None`` if no call comes after it.
    """

    left_bytes: int
    most_bytes: int | None

    def suits(self, plan: Plan, made_for: Room) -> bool:
        """Whether a plan made for another room fits this one, and was not made for much less."""
        most, then = self.most_bytes, made_for.most_bytes
        if plan.peak_bytes > self.left_bytes or (most is None) != (then is None):
            return False
        if most is not None and then is not None:
            if plan.held_bytes > most and most * ENOUGH < then:
                return False
            if plan.recompute_flops and most > ENOUGH * then:
                return False
        return not plan.recompute_flops or self.left_bytes <= ENOUGH * made_for.left_bytes


def most_held(left_bytes: int, need_bytes: int, calls: int, place: int) -> int | None:
    """What call ``place`` (from 1) of ``calls`` may hold; ``None`` for the last, which nobody waits for."""
    if place >= calls:
        return None
    return max(0, left_bytes - need_bytes) // (calls - place)


def plan_that_holds(most_bytes: int, low: int, high: int, make: Make) -> Plan:
    """The plan of the largest budget in ``low..high``, to a few probes, that holds at most ``most_bytes``.

    Where none does, the one that holds least: the calls after it may still find room.  A plan's peak is
    never below what is resident and what it holds, so ``low`` may be their sum.  Raises
    ``InfeasibleBudgetError`` if ``high`` is too low a budget.
    """
    best = make(high)
    if best.held_bytes <= most_bytes:
        return best
    budget = low = min(low, high)
    for _ in range(PROBES - 1):
        try:
            plan = make(budget)
        except InfeasibleBudgetError:
            low = budget
        else:
            fits = plan.held_bytes <= most_bytes
            if fits or plan.held_bytes < best.held_bytes:
                best = plan
            low, high = (budget, high) if fits else (low, budget)
        budget = (low + high) // 2
    return best
