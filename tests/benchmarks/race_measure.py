"""What one cell of the race measures: peaks, seconds, gradients of a step, on CUDA or a CPU.

A step is a forward and a backward from empty gradients, its outputs held to the end; gradients, buffers
and random state are put back after it.  On CUDA peaks are the caching allocator's, for the whole process,
after its cache has been emptied, and seconds lie between two events on the step's stream, so that the
host may run ahead as it does in training.  On a CPU peaks are live storages counted op by op, or, for
compiled code whose allocations no op shows, the CPU allocator's own events; seconds are the wall clock's.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.capture.outputs import LossFn
from planner.measure import StorageMeter
from planner.measure.step import backward, forward, held, undone

__all__ = ["Peak", "Step", "gradient_error", "gradients", "peak_of", "seconds_of_steps", "settle"]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of ``model``, taken by calling ``run`` in its place."""

    model: nn.Module
    run: nn.Module
    inputs: dict[str, Tensor]
    loss_fn: LossFn | None
    device: torch.device

    def __call__(self) -> None:
        """Forward and backward; gradients stay."""
        backward(forward(self.run, self.inputs, self.loss_fn))

    def undone(self) -> None:
        """Forward and backward, as if they had not been."""
        with undone(self.model, self.inputs):
            self()


@dataclass(frozen=True)
class Peak:
    """Most bytes of a step; ``reserved_bytes`` where there is a caching allocator."""

    allocated_bytes: int
    reserved_bytes: int | None
    meter: str


def settle(device: torch.device) -> None:
    """Nothing running, nothing cached, nothing that waits for the garbage collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak_of(step: Step, *, compiled: bool = False) -> Peak:
    """Peak of the second of two steps: the first makes the libraries' lasting workspaces."""
    step.undone()
    settle(step.device)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step.undone()
        torch.cuda.synchronize(step.device)
        return Peak(
            torch.cuda.max_memory_allocated(step.device),
            torch.cuda.max_memory_reserved(step.device),
            "caching allocator",
        )
    if compiled:
        return Peak(_resident_bytes(step) + _allocator_peak(step.undone), None, "allocator events")
    meter = StorageMeter(step.device)
    meter.register(*held(step.model, step.inputs))
    with undone(step.model, step.inputs), meter:
        step()
    return Peak(meter.peak_bytes, None, "live storages")


def _resident_bytes(step: Step) -> int:
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held(step.model, step.inputs)
    }
    return sum(storages.values())


def _allocator_peak(work: Callable[[], None]) -> int:
    """Most bytes that ``work`` holds above what was there, from the profiler's memory events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    events: Any = seen.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def seconds_of_steps(step: Step, count: int) -> list[float]:
    """Seconds of each of ``count`` steps; gradients are dropped between them, outside the clock."""
    parameters = list(step.model.parameters())
    cuda = step.device.type == "cuda"
    stream = torch.cuda.current_stream(step.device) if cuda else None
    marks: list[Any] = []
    torch.manual_seed(0)
    for _ in range(count):
        if stream is None:
            began = time.perf_counter()
            step()
            marks.append(time.perf_counter() - began)
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            step()
            end.record(stream)
            marks.append((begin, end))
        for parameter in parameters:
            parameter.grad = None
    if stream is None:
        return marks
    torch.cuda.synchronize(step.device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def timed(step: Step, *, steps: int, warm_up: int) -> float:
    """Median seconds of ``steps`` steps after ``warm_up`` unmeasured ones; buffers and state put back."""
    with undone(step.model, step.inputs):
        seconds_of_steps(step, warm_up)
        return statistics.median(seconds_of_steps(step, steps))


def gradients(step: Step, *, seed: int = 0) -> dict[str, Tensor | None]:
    """Copies, on the CPU, of the parameters' gradients of one step from ``seed``, by name."""
    with undone(step.model, step.inputs):
        torch.manual_seed(seed)
        step()
        return {
            name: None if p.grad is None else p.grad.detach().to("cpu", copy=True)
            for name, p in step.model.named_parameters()
        }


def gradient_error(step: Step, reference: dict[str, Tensor | None], *, seed: int = 0) -> float:
    """Largest, over parameters, of max|a - b| / max|a|, ``a`` being ``reference``; compared on the device.

    Infinite where one side has no gradient or is not a number.
    """
    apart: list[Tensor] = []
    with undone(step.model, step.inputs):
        torch.manual_seed(seed)
        step()
        for name, parameter in step.model.named_parameters():
            wanted, found = reference[name], parameter.grad
            if (wanted is None) != (found is None):
                return math.inf
            if wanted is not None and found is not None:
                here = wanted.to(found.device).float()
                off = (found.detach().float() - here).abs_().max()
                apart.append(torch.where(off > 0, off / here.abs().max(), off))
        worst = torch.stack(apart).nan_to_num(nan=math.inf).max().item() if apart else 0.0
    return float(worst)
