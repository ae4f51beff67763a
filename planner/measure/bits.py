"""Every bit that a step leaves behind, and how two steps agree.

In: the step of :mod:`planner.measure.step`, from a seed.  Out: a ``StepRecord``, a copy of outputs,
gradients, buffers and random state; of two of them a ``Comparison``.  Raises ``PlannerError`` if gradients
are there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, isnan

import torch
from torch import Tensor, nn

from planner._compat import dense_parts
from planner.capture.as_eager.generators import global_states, seed_all
from planner.capture.outputs import LossFn
from planner.measure.step import (
    Batch,
    backward,
    cuda_devices,
    forward,
    held,
    own,
    tangents_for,
    tensors_in,
    undone,
)

__all__ = ["Agreement", "Comparison", "StepRecord", "compare", "distance", "run_step"]


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Everything one step left behind, copied.

    ``outputs``    tensors of the model's output in order, named by position.
    ``gradients``  by parameter name (tied parameters once) and ``input <position>``.
    ``buffers``    by name, after the step.
    ``rng``        states of the global generators after the step: torch's by device, Python's and numpy's.
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
    inputs = own(inputs)
    with undone(model, inputs):
        seed_all(seed)
        passed = forward(model, inputs, loss_fn)
        backward(passed, tangents_for(passed, tangents))
        sources = [
            *model.named_parameters(),
            *((f"input {i}", t) for i, t in enumerate(tensors_in(inputs)) if t.is_leaf),
        ]
        rng = {"cpu": torch.get_rng_state(), **global_states()}
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


def _bits(tensor: Tensor) -> list[Tensor]:
    parts = dense_parts(tensor.detach())
    return [part.cpu().contiguous().reshape(-1).view(torch.uint8) for part in parts]


def _same(a: Tensor, b: Tensor) -> bool:
    mine, its = _bits(a), _bits(b)
    return len(mine) == len(its) and all(map(torch.equal, mine, its))


def _agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Agreement:
    names = [*a, *(name for name in b if name not in a)]
    differing: list[str] = []
    relative = absolute = 0.0
    for name in names:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            differing.append(name)
            relative = absolute = inf
        elif not _same(x, y):
            differing.append(name)
            apart, size = _distance(x, y)
            absolute = max(absolute, apart)
            if apart > 0:  # the bits of 0.0 and -0.0 differ, their values do not
                relative = max(relative, apart / size if size > 0 else inf)
    return Agreement(len(names), tuple(differing), relative, absolute)


def distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| in float64; infinite where that is not a number."""
    return _distance(a, b)[0]


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """max|a - b| and max|a|; a distance that is not a number is infinite."""
    mine, its = dense_parts(a.detach()), dense_parts(b.detach())
    if [part.shape for part in mine] != [part.shape for part in its]:
        return inf, 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    pairs = [(x.to("cpu", wide), y.to("cpu", wide)) for x, y in zip(mine, its, strict=True) if x.numel()]
    apart = [float((x - y).abs().max()) for x, y in pairs]
    sizes = [float(x.abs().max()) for x, _ in pairs]
    return (inf, 0.0) if any(map(isnan, apart + sizes)) else (max(apart), max(sizes))
