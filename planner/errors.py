"""What can go wrong, as types.  Every message names the thing, the numbers and the next step."""

from __future__ import annotations

import functools
from typing import Any

__all__ = [
    "InfeasibleBudgetError",
    "InvalidPlanFileError",
    "PlannerError",
    "StalePlanError",
    "TraceError",
]


class PlannerError(RuntimeError):
    """Base of every error this package raises on purpose, argument errors aside."""


class TraceError(PlannerError):
    """The training step could not be captured as one graph; names the place in the model's source."""


class StalePlanError(PlannerError):
    """The model or the inputs differ from those the plan was made for.

    ``setting``  what differs, where that is something that may change back: an attribute, a flag.
    """

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class InvalidPlanFileError(PlannerError):
    """The file is not a plan this version can read."""


class InfeasibleBudgetError(PlannerError):
    """No plan fits the budget.

    ``budget_bytes``   what was asked for.
    ``minimum_bytes``  the least peak for which a plan was found.
    ``floor_bytes``    the proved least peak of any plan; a budget between the two is undecided.
    ``breakdown``      bytes by kind at the minimum plan's peak.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        minimum_bytes: int,
        floor_bytes: int,
        breakdown: dict[str, int],
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.floor_bytes = floor_bytes
        self.breakdown = breakdown

    def saying(self, message: str) -> InfeasibleBudgetError:
        """The same refusal, with the same numbers, in other words."""
        return InfeasibleBudgetError(
            message,
            budget_bytes=self.budget_bytes,
            minimum_bytes=self.minimum_bytes,
            floor_bytes=self.floor_bytes,
            breakdown=self.breakdown,
        )

    def __reduce__(self) -> Any:
        return functools.partial(InfeasibleBudgetError, **vars(self)), self.args
