"""What a measured step says of a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["WithinBudget"]


class WithinBudget(ABC):
    """What reports of measured steps have in common; bytes are of the whole step.

    ``optimizer_state_bytes``  what the plan reserves for an optimizer, and the measured step does not hold.
    """

    budget_bytes: int
    peak_bytes: int
    optimizer_state_bytes: int

    @property
    @abstractmethod
    def equal(self) -> bool:
        """It computes what the step without the plan computes."""

    @property
    def within_budget(self) -> bool:
        """The measured peak and the optimizer's state are no more than the budget."""
        return self.peak_bytes + self.optimizer_state_bytes <= self.budget_bytes

    @property
    def ok(self) -> bool:
        """Equal, and within the budget."""
        return self.equal and self.within_budget
