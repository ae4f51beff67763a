"""A planned step beside the eager one: memory, bits, FLOPs, seconds, and some steps of real training.

The demo and the CUDA check put every plan through the same trial.  The planned step is judged by
what :mod:`planner.measure` sees, never by the plan's own figures; seconds are compared only within
one run, eager and planned steps taking turns, because a machine's speed drifts.

Bytes are those of the whole step.  What is resident (parameters, buffers, inputs) is counted once
from the model itself; what a step adds is measured, on the CPU by counting storages and on CUDA by
the caching allocator, which may hold other things beside this model.

Known weakness: medians of a few steps carry some percent of noise on a busy machine.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from planner.capture.outputs import LossFn
from planner.checks.zoo import Example
from planner.costs.target import CostSource
from planner.measure.bits import Comparison, StepRecord, compare, run_step
from planner.measure.flops import step_flops
from planner.measure.peaks import step_peak
from planner.measure.step import Batch, backward, forward
from planner.plan import Plan
from planner.solving.priced import PricedStep, prepare

__all__ = [
    "Clock",
    "Eager",
    "Race",
    "Trial",
    "eager_step",
    "planned_copies",
    "prepare_example",
    "race",
    "seconds_of",
    "trial",
]

Clock = Callable[[Callable[[], None], torch.device], float]


@dataclass(frozen=True, eq=False)
class Eager:
    """The step without a plan: the reference of every trial of one model.

    ``above_bytes``     peak above what is resident; ``resident_bytes``: parameters, buffers, inputs.
    """

    record: StepRecord
    above_bytes: int
    resident_bytes: int
    flops: int

    @property
    def peak_bytes(self) -> int:
        """Of the whole step."""
        return self.resident_bytes + self.above_bytes

    def budget_bytes(self, fraction: float) -> int:
        """What is resident, and ``fraction`` of what the eager step adds at its peak."""
        return self.resident_bytes + int(fraction * self.above_bytes)


@dataclass(frozen=True)
class Trial:
    """One planned step, measured.

    ``comparison``       everything the step left behind, against the eager step from the same seed.
    ``peak_bytes``       measured peak of the whole step.
    ``recompute_flops``  FLOPs counted beyond those of the eager step; ``flops`` those of the eager step.
    """

    comparison: Comparison
    peak_bytes: int
    recompute_flops: int
    flops: int


@dataclass(frozen=True)
class Race:
    """Steps of training taken in turns: by runner its losses and the median seconds of a step.

    ``ratios``  of each runner but the first, of its seconds to the first one's.
    """

    losses: tuple[tuple[float, ...], ...]
    step_s: tuple[float, ...]
    ratios: tuple[float, ...]


def prepare_example(example: Example, costs: CostSource = "auto") -> PricedStep:
    """Capture and price the step of a zoo model."""
    return prepare(example.model, dict(example.inputs), loss_fn=example.loss_fn, costs=costs)


def eager_step(example: Example, prepared: PricedStep, *, seed: int = 0) -> Eager:
    """Measure the step as the model itself takes it."""
    record, flops = _counted_step(example, seed)
    above_bytes = step_peak(example.model, example.inputs, loss_fn=example.loss_fn, include_resident=False)
    return Eager(record, above_bytes, prepared.resident.total_bytes, flops)


def trial(plan: Plan, example: Example, eager: Eager, *, seed: int = 0) -> Trial:
    """Apply ``plan``, take the same step from the same seed, measure it, and restore the model."""
    plan.apply(example.model)
    try:
        record, flops = _counted_step(example, seed)
        above_bytes = step_peak(
            example.model, example.inputs, loss_fn=example.loss_fn, include_resident=False
        )
    finally:
        plan.restore(example.model)
    return Trial(
        compare(eager.record, record), eager.resident_bytes + above_bytes, flops - eager.flops, eager.flops
    )


def _counted_step(example: Example, seed: int) -> tuple[StepRecord, int]:
    """One step's record and, of another, its FLOPs: the counter takes kernels apart and so rounds anew."""
    record = run_step(example.model, example.inputs, loss_fn=example.loss_fn, seed=seed)
    return record, step_flops(example.model, example.inputs, loss_fn=example.loss_fn)


def planned_copies(model: nn.Module, plans: Sequence[Plan]) -> list[nn.Module]:
    """A copy of the model as it is, then one for each plan with that plan applied."""
    runners = [copy.deepcopy(model) for _ in range(len(plans) + 1)]
    for plan, runner in zip(plans, runners[1:], strict=True):
        plan.apply(runner)
    return runners


def race(
    runners: Sequence[nn.Module],
    inputs: Batch,
    loss_fn: LossFn | None = None,
    *,
    steps: int,
    lr: float = 0.01,
    seed: int = 0,
    clock: Clock | None = None,
) -> Race:
    """Train all ``runners`` by SGD for ``steps`` steps on one batch, taking turns; they keep what they learn.

    All draw the same random numbers, so that from equal weights losses can be compared bit for bit.
    A step's seconds are those of forward and backward, by ``clock`` (default :func:`seconds_of`); the
    first step of each, which fills caches, is left out.  ``ratios`` are medians over turns of a
    runner's seconds over the first runner's, one per further runner.
    """
    device = next(runners[0].parameters()).device
    clock = clock or seconds_of
    optimizers = [torch.optim.SGD(runner.parameters(), lr=lr) for runner in runners]
    losses: list[list[float]] = [[] for _ in runners]
    seconds: list[list[float]] = [[] for _ in runners]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for turn in range(steps):
            for k in _rotated(len(runners), turn):
                torch.manual_seed(seed + turn)
                optimizers[k].zero_grad()
                work = _TimedStep(runners[k], inputs, loss_fn)
                seconds[k].append(clock(work, device))
                optimizers[k].step()
                losses[k].append(float(work.loss))
    timed = [s[1:] or s for s in seconds]
    ratios = [statistics.median(b / a for a, b in zip(timed[0], mine, strict=True)) for mine in timed[1:]]
    medians = [statistics.median(s) for s in timed]
    return Race(tuple(map(tuple, losses)), tuple(medians), tuple(ratios))


def _rotated(count: int, turn: int) -> list[int]:
    """0..count-1 from another start each turn, so that nobody always runs on another's warm caches."""
    return [(turn + k) % count for k in range(count)]


class _TimedStep:
    """Forward and backward, to be called once; then ``loss`` is there."""

    def __init__(self, model: nn.Module, inputs: Batch, loss_fn: LossFn | None) -> None:
        self.model, self.inputs, self.loss_fn = model, inputs, loss_fn
        self.loss = torch.tensor(float("nan"))

    def __call__(self) -> None:
        passed = forward(self.model, self.inputs, self.loss_fn)
        backward(passed)
        self.loss = passed.roots[0].detach()


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds ``work`` takes: by events on CUDA, by the wall clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # the current device may be another
    torch.cuda.synchronize(device)
    begin.record(stream)
    work()
    end.record(stream)
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3
