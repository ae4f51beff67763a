"""The model as it is written: without wrappers that call it, and without what stands in for its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planner.errors import PlannerError

__all__ = ["original_forward", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that call its ``forward``; ``PlannerError`` for a compiled one."""
    if hasattr(model, "_orig_mod"):
        raise PlannerError(
            f"this {type(model._orig_mod).__name__} is compiled already: plan the model first and compile it "
            "then"
        )
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return unwrapped(model.module)
    return model


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, whatever plan or switch stands in for it."""
    forward: Callable[..., Any] = model.forward
    while (beneath := getattr(forward, "original", None)) is not None:
        forward = beneath
    return forward
