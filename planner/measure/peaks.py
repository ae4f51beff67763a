"""Peak bytes of a step: on the CPU counted by the meter, on CUDA by the caching allocator.

In: the step of :mod:`planner.measure.step`, or a callable that does its own backward.  Out: bytes.
Raises ``PlannerError`` if gradients are there already, ``ValueError`` where a CUDA device is wanted and
another is given.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner import _compat
from planner._compat import clear_cublas_workspaces
from planner.capture.outputs import LossFn
from planner.measure.meter import StorageMeter
from planner.measure.step import (
    Batch,
    backward,
    call,
    device_of,
    forward,
    held,
    let_go,
    own,
    passed_on,
    tangents_for,
    tensors_in,
    undone,
)

__all__ = ["CudaPeak", "allocated_peak", "cuda_step_peak", "step_peak"]


def allocated_peak(fn: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator had handed out while ``fn()`` ran, beyond those before it.

    For what is compiled: generated code allocates where :func:`step_peak`, which follows what PyTorch
    dispatches, does not look.  Run ``fn`` once before, or what it compiles is counted.
    """
    return _compat.allocated_peak(fn)


def step_peak(
    fn_or_module: nn.Module | Callable[..., Any],
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    include_resident: bool = True,
    hold_outputs: bool | Collection[int] = True,
    beside: Collection[int] = (),
) -> int:
    """Peak bytes of one training step, forward and backward, on one device.

    A module: parameters, buffers and inputs count as resident; the loss is found by :func:`loss_of`;
    without one, every differentiable output is given a gradient of ones (or ``tangents``), made
    beforehand and resident too.  Gradients must be
    None (PlannerError otherwise) and are None afterwards; buffers and random state are put back.
    A plain callable is run as it is, with ``inputs`` resident: it does its own backward.

    ``device``            default: where the parameters or inputs are.  On CUDA the answer is the
                          allocator's (:func:`cuda_step_peak`), on the CPU the meter's.
    ``include_resident``  ``False``: bytes above what was resident.
    ``hold_outputs``      ``False``: the outputs are dropped before the backward, as in
                          ``model(**batch).loss.backward()``; by default they are held to its end.
                          Numbers: only these of the output's tensors are held.
    ``beside``            numbers of those of the last step's that are still there until the forward has
                          returned, as under a name that is then assigned again.
    """
    module = fn_or_module if isinstance(fn_or_module, nn.Module) else None
    where = device_of(module, inputs, device)
    if where.type == "cuda":
        peak = cuda_step_peak(
            fn_or_module, inputs, loss_fn=loss_fn, tangents=tangents, device=where,
            hold_outputs=hold_outputs, beside=beside,
        )  # fmt: skip
        return peak.allocated_bytes - (0 if include_resident else peak.resident_bytes)
    inputs = inputs if module is None else own(inputs)
    meter = StorageMeter(where)
    meter.register(*held(module, inputs))
    resident_bytes = meter.live_bytes
    if module is None:
        with meter:
            call(fn_or_module, inputs)
        return meter.peak_bytes - (0 if include_resident else resident_bytes)
    with undone(module, inputs):
        old = _outputs_of_a_step(module, inputs, beside)
        meter.register(*old)
        with meter:
            returned = call(module, inputs)
            old.clear()
            passed = passed_on(returned, loss_fn)
            del returned
        given = tangents_for(passed, tangents)
        passed = let_go(passed, hold_outputs)
        before_bytes = meter.live_bytes
        meter.register(*given or ())
        resident_bytes += meter.live_bytes - before_bytes
        with meter:
            backward(passed, given)
    return meter.peak_bytes - (0 if include_resident else resident_bytes)


@dataclass(frozen=True)
class CudaPeak:
    """What the CUDA caching allocator saw during a step, for the whole process on one device.

    ``allocated_bytes``  most bytes in live blocks (each rounded up to 512).
    ``reserved_bytes``   most bytes taken from the driver, fragmentation included.
    ``resident_bytes``   allocated when the step began: parameters, buffers, inputs, tangents, and
                         anything else the process keeps there, but for the scratch of cuBLAS, which is
                         part of the step though it outlives it.
    ``slack_bytes``      how far most allocated bytes exceed most requested ones: blocks are rounded up,
                         and left whole where less than 1 MiB would remain (:mod:`planner.devices.allocator`).
    """

    allocated_bytes: int
    reserved_bytes: int
    resident_bytes: int
    slack_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"allocated {self.allocated_bytes / 1e9:.3f} GB, reserved {self.reserved_bytes / 1e9:.3f} GB, "
            f"resident {self.resident_bytes / 1e9:.3f} GB"
        )


def cuda_step_peak(
    fn_or_module: nn.Module | Callable[..., Any],
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    hold_outputs: bool | Collection[int] = True,
    beside: Collection[int] = (),
) -> CudaPeak:
    """Allocated and reserved peak bytes of one step on a CUDA device, by the caching allocator.

    Unmeasured steps before make the libraries' lasting workspaces and, for a module whose loss is
    outside, show the shapes of the tangents.  Otherwise as :func:`step_peak`.
    """
    module = fn_or_module if isinstance(fn_or_module, nn.Module) else None
    where = device_of(module, inputs, device)
    if where.type != "cuda":
        raise ValueError(f"cuda_step_peak measures CUDA devices, got {where}: use step_peak")
    if module is None:
        call(fn_or_module, inputs)
        resident = _resident_bytes(where)
        call(fn_or_module, inputs)
        with _cuda_window(where, resident) as peak:
            call(fn_or_module, inputs)
        return peak()
    inputs = own(inputs)
    with undone(module, inputs):
        passed = forward(module, inputs, loss_fn)
        given = tangents_for(passed, tangents)
        backward(passed, given)
        del passed
    resident = _resident_bytes(where)
    with undone(module, inputs):
        backward(forward(module, inputs, loss_fn), given)
    with undone(module, inputs), _cuda_window(where, resident) as peak:
        old = _outputs_of_a_step(module, inputs, beside)
        returned = call(module, inputs)
        old.clear()
        passed = let_go(passed_on(returned, loss_fn), hold_outputs)
        del returned
        backward(passed, given)
        return peak()


def _outputs_of_a_step(module: nn.Module, inputs: Batch, which: Collection[int]) -> list[Tensor]:
    """What a step before this one returned, of it the tensors numbered so, without their graph."""
    if not which:
        return []
    return [t.detach() for i, t in enumerate(tensors_in(call(module, inputs))) if i in which]


def _slack_bytes(device: torch.device) -> int:
    """Most allocated beyond most asked for; 0 where no allocator says so."""
    stats = torch.cuda.memory_stats(device)
    allocated, requested = (stats.get(f"{kind}_bytes.all.peak", 0) for kind in ("allocated", "requested"))
    return max(0, int(allocated - requested)) if requested else 0


def _resident_bytes(device: torch.device) -> int:
    """What is allocated between two steps; the scratch of cuBLAS is given back."""
    gc.collect()
    torch.cuda.synchronize(device)
    clear_cublas_workspaces()
    return torch.cuda.memory_allocated(device)


@contextmanager
def _cuda_window(device: torch.device, resident_bytes: int) -> Iterator[Callable[[], CudaPeak]]:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)

    def peak() -> CudaPeak:
        torch.cuda.synchronize(device)
        return CudaPeak(
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
            resident_bytes,
            _slack_bytes(device),
        )

    yield peak
