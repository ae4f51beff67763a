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
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from planner._compat import is_out_of_memory
from planner.costs.target import Target
from planner.devices.state import memory_of
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.graph.consumed import taken_of
from planner.measure.peaks import cuda_step_peak, step_peak
from planner.measure.step import device_of, dropping, tensors_in, undone
from planner.options import Search
from planner.plan import Plan
from planner.plans.plan_data import Calibration, Round
from planner.regions.observe import without_memory
from planner.solving.priced import PricedStep
from planner.units import bytes_text

__all__ = ["Meter", "StepBytes", "calibrated", "measured_bytes", "refuse_unreal"]

ROUNDS = 5


class StepBytes(NamedTuple):
    """What one step took on its device; ``reserved_bytes`` is ``None`` where nothing reserves."""

    allocated_bytes: int
    reserved_bytes: int | None


# (rewritten module, batch, loss_fn, bytes known to be resident) -> what its step takes
Meter = Callable[[nn.Module, Any, Any, int], StepBytes]


def measured_bytes(
    module: nn.Module,
    batch: Any,
    loss_fn: Any,
    resident_bytes: int,
    *,
    hold_outputs: bool | Collection[int] = True,
    beside: Collection[int] = (),
) -> StepBytes:
    """One step by the device's own meter: CUDA's caching allocator, or the count of live storages.

    ``hold_outputs`` and ``beside`` as for :func:`planner.measure.step_peak`.
    What the process holds on a CUDA device beyond ``resident_bytes`` when the step begins is left out.
    """
    device = device_of(module, batch, None)
    if device.type != "cuda":
        taken = step_peak(module, batch, loss_fn=loss_fn, hold_outputs=hold_outputs, beside=beside)
        return StepBytes(taken, None)
    peak = cuda_step_peak(module, batch, loss_fn=loss_fn, hold_outputs=hold_outputs, beside=beside)
    others = max(0, peak.resident_bytes - resident_bytes)
    return StepBytes(peak.allocated_bytes - others, peak.reserved_bytes - others)


def calibrated(
    step: PricedStep,
    budget_bytes: int,
    search: Search | None = None,
    *,
    meter: Meter | None = None,
    rounds: int = ROUNDS,
) -> Plan:
    """The plan for ``budget_bytes`` whose step was run and measured to fit it; ``Plan.calibration`` tells.

    The model's state, gradients, buffers and random state are afterwards what they were, and no plan is
    applied.  ``meter``: by default :func:`measured_bytes`, with outputs held as they are planned for.

    Raises as :meth:`PricedStep.plan_bytes`; ``InfeasibleBudgetError`` also where the margin leaves too
    little; ``PlannerError`` where the step cannot be run, does not fit after ``rounds`` rounds, or does
    not fit when the search was stopped.
    """
    search = search or Search()
    tell = search.tell
    refuse_unreal(step.model, step.joint.inputs.tensors(), step.target)
    found: list[Round] = []
    while True:
        try:
            plan = step.plan_bytes(budget_bytes, search)
        except InfeasibleBudgetError as error:
            raise _with_rounds(error, found) from None
        tell.phase("calibrate", f"round {len(found) + 1}")
        states = list(enumerate(plan.outputs.values()))
        held = frozenset(i for i, state in states if state != "released")
        kept = frozenset(i for i, state in states if state == "kept")
        found.append(_round(step, plan, meter or partial(measured_bytes, hold_outputs=held, beside=kept)))
        last = found[-1]
        if last.taken_bytes <= budget_bytes:
            return dataclasses.replace(plan, calibration=Calibration(tuple(found)))
        if len(found) == rounds or tell.stopped:
            ended = f"after {rounds} rounds" if len(found) == rounds else "when it was stopped, in the midst"
            raise PlannerError(
                f"the planned step of {plan.model_name} takes more than the budget of "
                f"{bytes_text(budget_bytes)} {ended} of measuring and planning again:\n"
                f"{Calibration(tuple(found))}\nRaise the budget; with a fragmented allocator, "
                "PYTORCH_ALLOC_CONF=expandable_segments:True may help"
            )
        step = step.with_margin(last.taken_bytes - last.predicted_bytes)


def refuse_unreal(model: nn.Module, inputs: Iterable[torch.Tensor], target: Target) -> None:
    """``PlannerError`` where no step of ``model`` can be measured here."""
    if target.elsewhere:
        raise PlannerError(
            f"calibrate=True measures a step on {target.here}, and the plan is for the {target.name}: "
            "calibrate where that is"
        )
    hollow = without_memory(model, inputs)
    if hollow:
        raise PlannerError(
            f"calibrate=True runs a step of {type(model).__name__}, for which {hollow}: give it real "
            "tensors, or plan without calibrating"
        )


def _with_rounds(error: InfeasibleBudgetError, found: list[Round]) -> InfeasibleBudgetError:
    if not found:
        return error
    return error.saying(
        f"{error}. A step planned for this budget was measured to take {bytes_text(found[-1].taken_bytes)}:\n"
        f"{Calibration(tuple(found))}"
    )


def _round(step: PricedStep, plan: Plan, meter: Meter) -> Round:
    """Run the step of ``plan`` by itself and measure it."""
    model, batch, resident = step.model, step.joint.inputs, step.resident
    state_bytes = resident.optimizer_state_bytes
    margin_bytes = step.memory.margin_bytes
    predicted_bytes = int(plan.timeline.max(initial=0)) - margin_bytes
    gone = dropping(model, taken_of(step.graph))
    with _gradients_set_aside(model, batch), undone(model, batch), gone:
        try:
            taken = meter(plan.rewrite(model), batch, step.loss_fn, step.memory.seen_bytes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PlannerError(_exhausted(step, plan, str(error).split("\n")[0])) from None
    if step.graph.device.type != "cuda":  # a meter of storages sees only what the step touches
        state_bytes += resident.gradients_bytes
    reserved = None if taken.reserved_bytes is None else taken.reserved_bytes + state_bytes
    return Round(margin_bytes, predicted_bytes, taken.allocated_bytes + state_bytes, reserved)


def _exhausted(step: PricedStep, plan: Plan, what: str) -> str:
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
