"""Where generated code runs: without autograd and autocast, and with its errors explained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from planner import _compat
from planner.errors import PlannerError
from planner.graph import kernels
from planner.rewrite.program import Segment
from planner.runtime.step import ExecutableStep

__all__ = ["memory_explained", "ran", "refuse_capture", "without_autocast"]


def ran(step: ExecutableStep, segment: Segment, boxed: list[Any]) -> list[Any]:
    """Run a segment of the backward of ``step``; ``boxed``: its arguments, of which it lets go."""
    with torch.no_grad(), without_autocast(step.device), memory_explained(step, "backward"):
        results: list[Any] = segment.module.forward(boxed)
    return results


def refuse_capture(step: ExecutableStep) -> None:
    """Under CUDA graph capture a generator's state is a place in that graph, and means nothing in another.

    A backward captured apart from its forward would draw other numbers, without an error.
    """
    if step.program.replays and kernels.is_capturing(step.device):
        raise PlannerError(
            "a CUDA graph is being captured, and this plan draws random numbers again from a generator's "
            "state, which a captured graph cannot go back to. Plan with a budget at which masks are kept, "
            "train without dropout, or call plan.restore(model) before capturing"
        )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The graph holds its casts; autocast must not add others."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def memory_explained(step: ExecutableStep, phase: str) -> Iterator[None]:
    """Out of memory, by its own type and message, and what it means for the plan.

    Trainers look at both, to try again with a smaller batch.
    """
    try:
        yield
    except RuntimeError as error:
        if len(error.args) == 1 and _compat.is_out_of_memory(error):
            error.args = (
                f"{error.args[0]}\nThis was in the {phase} of a step planned to "
                f"{step.budget_bytes / 1e9:.4g} GB. What the budget does not know of (other models and "
                "processes, layers outside the planned module, fragmentation) leaves less than that: lower "
                "budget_gb by as much. The model can go on: gradients that had arrived are in .grad, as "
                "after any backward that breaks off",
            )
        raise
