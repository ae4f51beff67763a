"""Plan, run the planned step once, and plan again until what was measured fits the budget.

A prediction knows storages, what the allocator hands out beyond them, and the scratch that was measured
or estimated.  Fragmentation (what the allocator has reserved but cannot use) is predicted too, but not
planned for, and the scratch of kernels that were never run is not known.  So the rewritten step is run by
itself, the model left as it is; what it takes beyond its prediction becomes a margin, a kind of its own in
``Plan.breakdown``, and the budget that is left is planned for again.

On CUDA a step fits if the allocator's reserved bytes do, which are never less than the allocated ones;
elsewhere live storages are counted.  What the process held before and the step has no part in is left
out.  Each round's margin is larger than the last one's, since the plan fitted by prediction and not by
measurement; where ``rounds`` of them are not enough, the error has their numbers.

Known weaknesses: fragmentation differs from step to step, and is measured on the second one; the
optimizer's own step is predicted, not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from planner._compat import FakeTensor, is_out_of_memory
from planner.devices.state import memory_of
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.measure.peaks import cuda_step_peak, step_peak, tensors_in
from planner.measure.step import undone
from planner.progress import Reporter
from planner.units import bytes_text

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.solving.prepared import Prepared

__all__ = ["Calibration", "Meter", "Round", "StepBytes", "calibrated", "measured_bytes"]

ROUNDS = 5


class StepBytes(NamedTuple):
    """What one step took on its device; ``reserved_bytes`` is ``None`` where nothing reserves."""

    allocated_bytes: int
    reserved_bytes: int | None


# (rewritten module, batch, loss_fn, bytes known to be resident) -> what its step takes
Meter = Callable[[nn.Module, Any, Any, int], StepBytes]


@dataclass(frozen=True)
class Round:
    """One planned step.  Bytes are of the whole step, the optimizer's state included.

    ``margin_bytes``     set aside when it was planned; ``predicted_bytes`` its peak without them.
    ``allocated_bytes``  measured, ``reserved_bytes`` too, or ``None``.
    """

    margin_bytes: int
    predicted_bytes: int
    allocated_bytes: int
    reserved_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            count = getattr(self, field.name)
            optional = field.name == "reserved_bytes" and count is None
            if not optional and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ValueError(f"{field.name} must be a count of bytes, 0 or more, got {count!r}")

    @property
    def taken_bytes(self) -> int:
        """What has to fit the budget."""
        return max(self.allocated_bytes, self.reserved_bytes or 0)

    def __str__(self) -> str:
        reserved = "" if self.reserved_bytes is None else f", reserved {bytes_text(self.reserved_bytes)}"
        margin = f", {bytes_text(self.margin_bytes)} set aside" if self.margin_bytes else ""
        return (
            f"predicted {bytes_text(self.predicted_bytes)}{margin}; "
            f"allocated {bytes_text(self.allocated_bytes)}{reserved}"
        )


@dataclass(frozen=True)
class Calibration:
    """The rounds a plan went through; the last one is the plan's own."""

    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise ValueError("a calibration has at least one round")

    @property
    def last(self) -> Round:
        """What the plan's own step was measured to take."""
        return self.rounds[-1]

    def __str__(self) -> str:
        return "\n".join(f"round {k}: {r}" for k, r in enumerate(self.rounds, 1))


def measured_bytes(module: nn.Module, batch: Any, loss_fn: Any, resident_bytes: int) -> StepBytes:
    """One step by the device's own meter: CUDA's caching allocator, or the count of live storages.

    What the process holds on a CUDA device beyond ``resident_bytes`` when the step begins is left out.
    """
    device = next(p.device for p in module.parameters())
    if device.type != "cuda":
        return StepBytes(step_peak(module, batch, loss_fn=loss_fn), None)
    peak = cuda_step_peak(module, batch, loss_fn=loss_fn)
    others = max(0, peak.resident_bytes - resident_bytes)
    return StepBytes(peak.allocated_bytes - others, peak.reserved_bytes - others)


def calibrated(
    step: Prepared,
    budget_bytes: int,
    *,
    solver: str = "auto",
    time_limit_s: float = 30.0,
    progress: Reporter | None = None,
    meter: Meter = measured_bytes,
    rounds: int = ROUNDS,
) -> Plan:
    """The plan for ``budget_bytes`` whose step was run and measured to fit it; ``Plan.calibration`` tells.

    The model's state, gradients, buffers and random state are afterwards what they were, and no plan is
    applied.  Raises as :meth:`Prepared.plan_bytes`; ``InfeasibleBudgetError`` also where the margin leaves
    too little; ``PlannerError`` where the step cannot be run, or does not fit after ``rounds`` rounds.
    """
    tell = progress or Reporter()
    _refuse_unreal(step)
    found: list[Round] = []
    while True:
        try:
            plan = step.plan_bytes(budget_bytes, solver=solver, time_limit_s=time_limit_s, progress=tell)
        except InfeasibleBudgetError as error:
            raise _with_rounds(error, found) from None
        tell.phase("calibrate", f"round {len(found) + 1}")
        found.append(_round(step, plan, meter))
        last = found[-1]
        if last.taken_bytes <= budget_bytes:
            return dataclasses.replace(plan, calibration=Calibration(tuple(found)))
        if len(found) == rounds:
            raise PlannerError(
                f"the planned step of {plan.model_name} takes more than the budget of "
                f"{bytes_text(budget_bytes)} after {rounds} rounds of measuring and planning again:\n"
                f"{Calibration(tuple(found))}\nRaise the budget; with a fragmented allocator, "
                "PYTORCH_ALLOC_CONF=expandable_segments:True may help"
            )
        step = dataclasses.replace(step, margin_bytes=last.taken_bytes - last.predicted_bytes)


def _refuse_unreal(step: Prepared) -> None:
    name = type(step.model).__name__
    if step.target.elsewhere:
        raise PlannerError(
            f"calibrate=True measures a step on {step.target.here}, and the plan is for the "
            f"{step.target.name}: calibrate where that is"
        )
    tensors = [*step.model.parameters(), *step.model.buffers(), *step.joint.inputs.tensors()]
    if any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors):
        raise PlannerError(
            f"calibrate=True runs a step of {name}, but the model or its inputs have no memory (they are "
            "fake tensors); give it real ones, or plan without calibrating"
        )


def _with_rounds(error: InfeasibleBudgetError, found: list[Round]) -> InfeasibleBudgetError:
    if not found:
        return error
    return error.saying(
        f"{error}. A step planned for this budget was measured to take {bytes_text(found[-1].taken_bytes)}:\n"
        f"{Calibration(tuple(found))}"
    )


def _round(step: Prepared, plan: Plan, meter: Meter) -> Round:
    """Run the step of ``plan`` by itself and measure it."""
    model, inputs, resident = step.model, step.joint.inputs, step.resident
    batch: Any = inputs.kwargs if inputs.kwargs and not inputs.args else inputs.args
    state_bytes = resident.optimizer_state_bytes
    there_bytes = resident.total_bytes - state_bytes + step.tangent_bytes + step.constant_bytes
    there_bytes += step.resident_slack_bytes
    predicted_bytes = int(plan.timeline.max(initial=0)) - step.margin_bytes
    with _gradients_set_aside(model, batch), undone(model, batch):
        try:
            taken = meter(plan.rewrite(model), batch, step.loss_fn, there_bytes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PlannerError(_exhausted(step, plan, str(error).split("\n")[0])) from None
    if step.graph.device.type != "cuda":  # a meter of storages sees only what the step touches
        state_bytes += resident.gradients_bytes
    reserved = None if taken.reserved_bytes is None else taken.reserved_bytes + state_bytes
    return Round(step.margin_bytes, predicted_bytes, taken.allocated_bytes + state_bytes, reserved)


def _exhausted(step: Prepared, plan: Plan, what: str) -> str:
    memory = memory_of(step.graph.device)
    there = (
        ""
        if memory is None
        else f" {memory.name} has {bytes_text(memory.total_bytes)}, of which {bytes_text(memory.free_bytes)} "
        f"are free now and {bytes_text(memory.others_bytes)} held by other processes and CUDA contexts."
    )
    return (
        f"memory ran out while the planned step of {plan.model_name} was measured: it was predicted to take "
        f"{bytes_text(plan.peak_bytes)} of the budget of {bytes_text(plan.budget_bytes)}.{there} ({what})"
    )


@contextmanager
def _gradients_set_aside(model: nn.Module, batch: Any) -> Iterator[None]:
    """No ``.grad`` while the context is open, and afterwards those of before; their memory stays taken."""
    leaves = [t for t in (*model.parameters(), *tensors_in(batch)) if t.is_leaf]
    before: list[tuple[torch.Tensor, torch.Tensor | None]] = [(leaf, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient
