"""From a budget in GB to what is left for activations: everything a step holds besides them.

Parameters, buffers, inputs and gradients are counted by distinct storage, so tied weights and views
count once; on CUDA each is rounded up as its allocator does.  Optimizer state: see
:mod:`planner.memory.optimizer_state`.  Workspace inside fused kernels is not seen.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from planner._compat import dense_parts, sharded_parameters, storage_key
from planner.alive import instances_of, kinds_of
from planner.devices.state import allocation_grain
from planner.measure.step import Batch, device_of, tensors_in
from planner.memory.optimizer_state import (
    OptimizerBytes,
    OptimizerLike,
    check_counts,
    on_device,
    optimizer_state_bytes,
)
from planner.units import rounded_up

__all__ = [
    "Resident",
    "bucket_bytes",
    "budget_bytes_of",
    "budgets_bytes_of",
    "resident_of",
]

GB = 10**9


def budget_bytes_of(budget_gb: float, name: str = "budget_gb") -> int:
    """Bytes of a budget in GB of 10**9 bytes; ``name``: of the option, in errors.

    Raises TypeError for anything but a real number (bool included), ValueError for zero, negative
    and non-finite ones.
    """
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, numbers.Real):
        raise TypeError(f"{name} must be a number of gigabytes such as 8 or 0.5, got {budget_gb!r}")
    if not math.isfinite(budget_gb):
        raise ValueError(f"{name} must be finite, got {budget_gb}: pass the gigabytes the step may take")
    if budget_gb <= 0:
        raise ValueError(f"{name} must be positive, got {budget_gb}: pass the gigabytes the step may take")
    found = round(float(budget_gb) * GB)
    if found == 0:
        raise ValueError(f"{name}={budget_gb} is less than a byte: it is in GB of 10**9 bytes")
    return found


def budgets_bytes_of(budgets_gb: Iterable[float] | None) -> list[int] | None:
    """The same of several, as the option ``budgets_gb`` has them; of ``None`` that."""
    if budgets_gb is None:
        return None
    if isinstance(budgets_gb, str | Mapping) or not isinstance(budgets_gb, Iterable):
        raise TypeError(f"budgets_gb must be numbers of gigabytes such as [4, 8], got {budgets_gb!r}")
    found = [budget_bytes_of(budget, f"budgets_gb[{i}]") for i, budget in enumerate(budgets_gb)]
    if not found:
        raise ValueError(
            "budgets_gb is empty: pass budgets such as [4, 8], or None for as many as points says, from the "
            "least up"
        )
    return found


@dataclass(frozen=True)
class Resident:
    """Bytes on one device that a step finds there and leaves there, by distinct storage.

    A storage that serves two purposes counts under the first, in the order of the fields.

    ``gradients_bytes``       ``.grad`` tensors that exist already, and the buckets of a
                              DistributedDataParallel around the model.
    ``optimizer_step_bytes``  the optimizer's temporaries: beside parameters, gradients and state in its
                              step, not beside activations, hence not in ``total_bytes``.
    """

    parameters_bytes: int
    buffers_bytes: int
    gradients_bytes: int
    inputs_bytes: int
    optimizer_state_bytes: int = 0
    optimizer_step_bytes: int = 0

    def __post_init__(self) -> None:
        check_counts(self)

    @property
    def total_bytes(self) -> int:
        """What is there all through forward and backward."""
        return (
            self.parameters_bytes
            + self.buffers_bytes
            + self.gradients_bytes
            + self.inputs_bytes
            + self.optimizer_state_bytes
        )

    def __str__(self) -> str:
        parts = [
            f"{f.name.removesuffix('_bytes').replace('_', ' ')} {getattr(self, f.name) / 1e6:.1f} MB"
            for f in fields(self)
        ]
        return f"resident {self.total_bytes / 1e6:.1f} MB: " + ", ".join(parts)


def resident_of(
    model: nn.Module,
    inputs: Batch = None,
    optimizer: OptimizerLike | None = None,
    *,
    device: torch.device | str | None = None,
    as_on: torch.device | str | None = None,
) -> Resident:
    """What stays on ``device`` (default: the model's) through a step of ``model`` on ``inputs``.

    ``inputs``     arguments of the model's forward, as a tuple or a dict.
    ``optimizer``  an instance, a class, a ``functools.partial`` of one, or the bytes of its state.
    ``as_on``      count as if what is on ``device`` were on this one: its rounding, and the optimizer's
                   way of stepping there.
    """
    where = device_of(model, inputs, device)
    grain = allocation_grain(where if as_on is None else torch.device(as_on))
    seen: set[int] = set()

    def count(tensors: Iterable[Tensor | None]) -> int:
        total = 0
        dense = (part for tensor in tensors if tensor is not None for part in dense_parts(tensor))
        for tensor in dense:
            if not on_device(tensor.device, where) or storage_key(tensor) in seen:
                continue
            seen.add(storage_key(tensor))
            total += rounded_up(int(tensor.untyped_storage().nbytes()), grain)
        return total

    taken = OptimizerBytes(0, 0)
    parameters = sharded_parameters(model)  # what is gathered for a while is seen to be
    if optimizer is not None:
        trainable = [p for p in parameters if p.requires_grad]
        taken = optimizer_state_bytes(optimizer, trainable, device=where, as_on=as_on)
    return Resident(
        parameters_bytes=count(parameters),
        buffers_bytes=count(model.buffers()),
        gradients_bytes=count(p.grad for p in parameters) + bucket_bytes(model),
        inputs_bytes=count(tensors_in(inputs)),
        optimizer_state_bytes=taken.state_bytes,
        optimizer_step_bytes=taken.step_transient_bytes,
    )


def bucket_bytes(model: nn.Module) -> int:
    """Bytes of the gradient buckets of every DistributedDataParallel that holds parameters of ``model``."""
    if not dist.is_available() or not dist.is_initialized():
        return 0
    mine = {id(p) for p in model.parameters()}
    found = instances_of(kinds_of(DistributedDataParallel))
    return sum(_bucket_bytes(ddp) for ddp in found if any(id(p) in mine for p in ddp.parameters()))


def _bucket_bytes(ddp: DistributedDataParallel) -> int:
    total = _gradient_bytes(ddp.module)
    if ddp.gradient_as_bucket_view:  # gradients that exist lie in the buckets
        total -= sum(p.grad.nbytes for p in ddp.parameters() if p.grad is not None)
    return max(0, total)


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)
