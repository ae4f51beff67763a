"""What can go wrong, as types.  Every message names the thing, the numbers and the next step."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = [
    "TESTED_TORCH",
    "InfeasibleBudgetError",
    "InvalidPlanFileError",
    "PlannerError",
    "StalePlanError",
    "TraceError",
    "of_unknown_torch",
]

TESTED_TORCH = "2.11", "2.13", "2.14", "2.15"  # what the tests ran with


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


_DOOR = str(Path(__file__).parent / "_compat") + os.sep  # the folder that uses what is private in torch
_LOOKS_UP = "__getattr__", "import_module"


def of_unknown_torch(error: BaseException) -> PlannerError | None:
    """What to raise for an error that says that something private in torch is not there, or takes other
    arguments; ``None`` for every other error.

    That is one that a line of the folder raises which uses it, at a name or at a call: what is raised below
    that line, or by a model that it runs, is not about the name.
    """
    if not isinstance(error, (AttributeError, ImportError, TypeError)) or "torch" not in sys.modules:
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while frames and not isinstance(error, TypeError) and _looks_up(frames[-1]):
        frames.pop()
    if not frames or not frames[-1].f_code.co_filename.startswith(_DOOR):
        return None
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "torch":
        return None
    version = getattr(sys.modules["torch"], "__version__", "")
    return PlannerError(
        f"torch {version} is none that this planner works with: {type(error).__name__}, {error}. It runs on "
        f"private parts of torch, and is tested with {', '.join(TESTED_TORCH[:-1])} and {TESTED_TORCH[-1]}: "
        f"install one of these (pip install 'torch=={TESTED_TORCH[-1]}.*'), or a planner that knows this one"
    )


def _looks_up(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in _LOOKS_UP or code.co_filename.startswith("<frozen importlib")
