"""The model as it is written: without wrappers that call it, and without what stands in for its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planner.errors import PlannerError

__all__ = ["home_of", "original_forward", "unwrapped"]


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


def home_of(model: nn.Module, leaves: Iterable[Any]) -> torch.device:
    """Where a step of ``model`` runs: with its parameters; one that has none, with what it is given."""
    given = (x for x in leaves if isinstance(x, torch.Tensor))
    first = next(chain(model.parameters(), model.buffers(), given), None)
    return torch.device("cpu") if first is None else first.device
