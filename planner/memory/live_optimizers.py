"""The optimizers that hold a model's parameters, found without being told.

A trainer makes its optimizer before the first batch, and the model never hears of it; but a budget for the
whole step must count its state.  So the live objects are looked through, once per plan: 80 ms
among half a million.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from planner._compat import sharded_parameters
from planner.alive import instances_of, kinds_of
from planner.errors import PlannerError
from planner.measure.step import Batch
from planner.memory.optimizer_state import OptimizerBytes, OptimizerLike, optimizer_state_bytes
from planner.memory.resident import Resident, resident_of

__all__ = [
    "bytes_of_each",
    "found_optimizer_bytes",
    "optimizers_holding",
    "optimizers_of",
    "resident_in_training",
]

log = logging.getLogger(__name__)


def optimizers_of(model: nn.Module) -> list[Optimizer]:
    """Live optimizers with a parameter of ``model``; of wrappers such as accelerate's, what they wrap."""
    return optimizers_holding({id(p) for p in sharded_parameters(model)})


def optimizers_holding(parameters: Collection[int]) -> list[Optimizer]:
    """The same of parameters by their ids."""
    found = _holding(parameters)
    if len(found) > 1:  # perhaps one of an earlier run that only waits to be collected
        del found
        gc.collect()
        found = _holding(parameters)
    return found


def _holding(parameters: Collection[int]) -> list[Optimizer]:
    alive = [o for o in instances_of(kinds_of(Optimizer)) if hasattr(o, "param_groups")]
    inner = {id(o): o for o in alive if not isinstance(getattr(o, "optimizer", None), Optimizer)}
    return [
        o
        for o in inner.values()
        if any(id(p) in parameters for group in o.param_groups for p in group["params"])
    ]


def found_optimizer_bytes(model: nn.Module, device: torch.device) -> OptimizerBytes:
    """State of all of :func:`optimizers_of`, and the most that one of their steps takes beside it.

    One whose step cannot be foreseen counts with the state it has by now.
    """
    taken = bytes_of_each(optimizers_of(model), device)
    return OptimizerBytes(
        sum(of.state_bytes for of in taken), max((of.step_transient_bytes for of in taken), default=0)
    )


def bytes_of_each(
    optimizers: Sequence[Optimizer], device: torch.device, as_on: torch.device | None = None
) -> list[OptimizerBytes]:
    """What each takes on ``device``; those of one parameter each, of a kind and size, are run once.

    ``as_on``  count as if they were on this device.
    """
    known: dict[Any, OptimizerBytes] = {}
    out = []
    for optimizer in optimizers:
        key = _kind(optimizer)
        if key is None or key not in known:
            known[key] = _bytes_of(optimizer, device, as_on)
        out.append(known[key])
    return out


def _bytes_of(optimizer: Optimizer, device: torch.device, as_on: torch.device | None) -> OptimizerBytes:
    try:
        return optimizer_state_bytes(optimizer, (), device=device, as_on=as_on)
    except PlannerError as error:
        log.warning("%s counts with the state it has now: %s", type(optimizer).__name__, error)
        return OptimizerBytes(_present_bytes(optimizer, device), 0)


def _kind(optimizer: Optimizer) -> Any:
    """Equal for optimizers of one parameter each that take the same; ``None`` of others."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(params) != 1 or len(optimizer.param_groups) != 1:
        return None
    (p,), (group,) = params, optimizer.param_groups
    settings = sorted((name, repr(value)) for name, value in group.items() if name != "params")
    layout = tuple(p.shape), p.stride(), p.dtype, p.device, type(p)
    return type(optimizer), layout, str(settings)


def _present_bytes(optimizer: Optimizer, device: torch.device) -> int:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.device == device)


def resident_in_training(
    model: nn.Module,
    inputs: Batch,
    optimizer: OptimizerLike | Literal["find"] | None,
    device: torch.device,
) -> Resident:
    """What a step of ``model`` finds and leaves; "find": with the state of all of :func:`optimizers_of`."""
    if optimizer != "find":
        return resident_of(model, inputs, optimizer, device=device)
    taken = found_optimizer_bytes(model, device)
    return replace(
        resident_of(model, inputs, device=device),
        optimizer_state_bytes=taken.state_bytes,
        optimizer_step_bytes=taken.step_transient_bytes,
    )
