"""What a training step really takes: peak bytes, FLOPs and every bit it leaves behind.

Nothing here knows of plans.  On the CPU a peak is counted by :class:`~planner.measure.meter.StorageMeter`,
on CUDA by the caching allocator; FLOPs are counted while the step runs; two steps are compared bit
for bit.  A plan's promises are judged by these, and by nothing it computed itself.

All of them run the same step.  The loss is ``loss_fn(outputs)``, or the model's own
(:func:`loss_of`, as capture has it); without one every differentiable output gets a gradient of
ones.  Gradients must be None at the start; afterwards they are None again, and buffers and random
state are as they were.

Known limits: Python's and numpy's random states are not put back; FLOPs of elementwise work are not
counted.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from planner._compat import clear_cublas_workspaces
from planner.capture.outputs import LossFn
from planner.measure.meter import StorageMeter
from planner.measure.step import (
    Batch,
    backward,
    call,
    cuda_devices,
    device_of,
    forward,
    held,
    loss_of,
    tangents_for,
    tensors_in,
    undone,
)

__all__ = [
    "FLOP_FORMULAS",
    "Agreement",
    "Comparison",
    "CudaPeak",
    "StepRecord",
    "StorageMeter",
    "compare",
    "cuda_step_peak",
    "loss_of",
    "run_step",
    "step_flops",
    "step_peak",
    "tensors_in",
]

aten = torch.ops.aten


# -------------------------------------------------------------------------------------------- peaks


def step_peak(
    fn_or_module: nn.Module | Callable[..., Any],
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    include_resident: bool = True,
    hold_outputs: bool = True,
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
    """
    module = fn_or_module if isinstance(fn_or_module, nn.Module) else None
    where = device_of(module, inputs, device)
    if where.type == "cuda":
        peak = cuda_step_peak(
            fn_or_module, inputs, loss_fn=loss_fn, tangents=tangents, device=where, hold_outputs=hold_outputs
        )
        return peak.allocated_bytes - (0 if include_resident else peak.resident_bytes)
    meter = StorageMeter(where)
    meter.register(*held(module, inputs))
    resident_bytes = meter.live_bytes
    if module is None:
        with meter:
            call(fn_or_module, inputs)
        return meter.peak_bytes - (0 if include_resident else resident_bytes)
    with undone(module, inputs):
        with meter:
            passed = forward(module, inputs, loss_fn)
        if not hold_outputs:
            passed = passed._replace(outputs=None)
        given = tangents_for(passed, tangents)
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
    hold_outputs: bool = True,
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
    with undone(module, inputs):
        passed = forward(module, inputs, loss_fn)
        given = tangents_for(passed, tangents)
        backward(passed, given)
        del passed
    resident = _resident_bytes(where)
    with undone(module, inputs):
        backward(forward(module, inputs, loss_fn), given)
    with undone(module, inputs), _cuda_window(where, resident) as peak:
        passed = forward(module, inputs, loss_fn)
        if not hold_outputs:
            passed = passed._replace(outputs=None)
        backward(passed, given)
        return peak()


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


# -------------------------------------------------------------------------------------------- FLOPs


def _attention_flops(query: Any, key: Any, value: Any, products: tuple[int, int]) -> int:
    """``products``: matrix products over the key's depth, and over the value's."""
    batch, heads, rows, depth = query
    return 2 * batch * heads * rows * key[-2] * (products[0] * depth + products[1] * value[-1])


def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention_flops(query, key, value, (1, 1))  # QK', PV


def _backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention_flops(query, key, value, (3, 2))  # QK' again, dS K, dS'Q; dO V', P'dO


def _lstm_flops(x: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """Two products per step: with the weight of the input, and of the state."""
    return 2 * math.prod(x[:2]) * (math.prod(of_input) + math.prod(of_state))


def _lstm_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _lstm_flops(*args, **kwargs)


_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")

# torch's counter does not know the CPU's attention kernels and LSTM, which it would count as nothing, and
# that of torch 2.11 refuses fewer heads of keys than of queries.
FLOP_FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        aten.mkldnn_rnn_layer: _lstm_flops,
        aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    }
    | {
        getattr(aten, f"_scaled_dot_product_{kernel}{suffix}"): formula
        for kernel in _ATTENTION
        for suffix, formula in (("", _forward_flops), ("_backward", _backward_flops))
    }
)


class _NoModules:
    """In place of what counts FLOPs by module: its hooks refuse a gradient taken inside a forward."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def step_flops(
    fn_or_module: nn.Module | Callable[..., Any],
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
) -> int:
    """FLOPs of one step, forward, backward and any recomputation, counted while it runs.

    Matrix products, convolutions and attention, by torch's FlopCounterMode; elementwise work counts
    as nothing.  The step is that of :func:`step_peak`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS))
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        if isinstance(fn_or_module, nn.Module):
            with undone(fn_or_module, inputs):
                passed = forward(fn_or_module, inputs, loss_fn)
                backward(passed, tangents_for(passed, tangents))
        else:
            call(fn_or_module, inputs)
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------- bits


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Everything one step left behind, copied.

    ``outputs``    tensors of the model's output in order, named by position.
    ``gradients``  by parameter name (tied parameters once) and ``input <position>``.
    ``buffers``    by name, after the step.
    ``rng``        generator states after the step, by device.
    ``loss``       what was differentiated; ``None`` if it was the outputs.
    ``output_type``  the class of the model's output.
    """

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    loss: Tensor | None
    output_type: str

    def on_host(self) -> StepRecord:
        """The same in the host's memory."""
        return replace(
            self,
            outputs={name: t.cpu() for name, t in self.outputs.items()},
            gradients={name: t.cpu() for name, t in self.gradients.items()},
            buffers={name: t.cpu() for name, t in self.buffers.items()},
            loss=None if self.loss is None else self.loss.cpu(),
        )

    def __str__(self) -> str:
        loss = "outputs differentiated" if self.loss is None else f"loss {self.loss.item():.6g}"
        return (
            f"{self.output_type}: {loss}, {len(self.outputs)} outputs, "
            f"{len(self.gradients)} gradients, {len(self.buffers)} buffers"
        )


def run_step(
    model: nn.Module,
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> StepRecord:
    """One forward and backward from ``seed``; a copy of all it did, and then it is undone.

    Afterwards gradients are None and buffers and random state are what they were, so that two calls
    start equal.  Raises PlannerError if a gradient is not None at the start.
    """
    with undone(model, inputs):
        torch.manual_seed(seed)
        passed = forward(model, inputs, loss_fn)
        backward(passed, tangents_for(passed, tangents))
        sources = [
            *model.named_parameters(),
            *((f"input {i}", t) for i, t in enumerate(tensors_in(inputs)) if t.is_leaf),
        ]
        rng = {"cpu": torch.get_rng_state()}
        rng |= {str(d): torch.cuda.get_rng_state(d) for d in cuda_devices(held(model, inputs))}
        return StepRecord(
            outputs={str(i): t.detach().clone() for i, t in enumerate(tensors_in(passed.outputs))},
            gradients={name: t.grad.detach().clone() for name, t in sources if t.grad is not None},
            buffers={name: t.detach().clone() for name, t in model.named_buffers()},
            rng=rng,
            loss=None if passed.loss is None else passed.loss.detach().clone(),
            output_type=type(passed.outputs).__name__,
        )


@dataclass(frozen=True)
class Agreement:
    """How two sets of named tensors agree.

    ``differing``     names whose bits, shape or dtype differ, or that only one side has.
    ``max_relative``  the largest, over names, of max|a - b| / max|a|; infinite where shapes differ.
    ``max_absolute``  the largest |a - b|.
    """

    count: int
    differing: tuple[str, ...]
    max_relative: float
    max_absolute: float

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return not self.differing

    def __str__(self) -> str:
        if self.equal:
            return f"{self.count} bit-equal"
        return f"{len(self.differing)} of {self.count} differ, by up to {self.max_relative:.2e} (relative)"


@dataclass(frozen=True)
class Comparison:
    """Two records of a step, side by side; ``equal`` means every bit."""

    outputs: Agreement
    gradients: Agreement
    buffers: Agreement
    rng: Agreement
    same_output_type: bool

    @property
    def equal(self) -> bool:
        """Outputs, their type, gradients, buffers and random state: bit for bit."""
        parts = (self.outputs, self.gradients, self.buffers, self.rng)
        return self.same_output_type and all(part.equal for part in parts)

    def __str__(self) -> str:
        kinds = "" if self.same_output_type else "; the output's type differs"
        return (
            f"outputs {self.outputs}; gradients {self.gradients}; buffers {self.buffers}; "
            f"random state {self.rng}{kinds}"
        )


def compare(a: StepRecord, b: StepRecord) -> Comparison:
    """Compare bit for bit, ``a`` being the reference of relative differences."""
    return Comparison(
        outputs=_agree(a.outputs, b.outputs),
        gradients=_agree(a.gradients, b.gradients),
        buffers=_agree(a.buffers, b.buffers),
        rng=_agree(a.rng, b.rng),
        same_output_type=a.output_type == b.output_type,
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Agreement:
    names = [*a, *(name for name in b if name not in a)]
    differing: list[str] = []
    relative = absolute = 0.0
    for name in names:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            differing.append(name)
            relative = absolute = inf
        elif not torch.equal(_bits(x), _bits(y)):
            differing.append(name)
            apart, size = _distance(x, y)
            absolute = max(absolute, apart)
            if apart > 0:  # the bits of 0.0 and -0.0 differ, their values do not
                relative = max(relative, apart / size if size > 0 else inf)
    return Agreement(len(names), tuple(differing), relative, absolute)


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """max|a - b| and max|a|; a distance that is not a number is infinite."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to("cpu", wide), b.to("cpu", wide)
    apart, size = float((a - b).abs().max()), float(a.abs().max())
    return (inf, 0.0) if isnan(apart) or isnan(size) else (apart, size)
