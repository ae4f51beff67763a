"""A compiled step beside torch.compile's own without a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.measure.peaks import allocated_peak
from planner.measure.step import backward, passed_on, tangents_for, undone
from planner.memory.static import StaticMemory
from planner.plans.plan_data import PlanData
from planner.plans.within_budget import WithinBudget
from planner.runtime.apply import as_written

if TYPE_CHECKING:
    from planner.plan import Plan

__all__ = ["CompiledReport", "verified"]

CLOSE = 1e-6


@dataclass(frozen=True)
class CompiledReport(WithinBudget):
    """What :meth:`planner.Plan.verify` found of a plan under inductor.

    ``difference``   of all gradients and the loss to those of ``torch.compile`` without a budget, the largest
                     of ``norm(ours - theirs) / norm(theirs)``; ``where``: the parameter.
    ``peak_bytes``   of the step, measured at the allocator; ``compiled_peak_bytes`` of torch's own.
    """

    difference: float
    where: str
    budget_bytes: int
    peak_bytes: int
    predicted_peak_bytes: int
    compiled_peak_bytes: int
    optimizer_state_bytes: int = 0

    @property
    def equal(self) -> bool:
        """Gradients are torch.compile's own but for the last bits."""
        return self.difference <= CLOSE

    def __str__(self) -> str:
        mb = 1e6
        return (
            f"{'ok' if self.ok else 'NOT OK'}: gradients differ from torch.compile's without a budget by "
            f"{self.difference:.1e} of their norm at most ({self.where})\n"
            f"peak {self.peak_bytes / mb:.3f} MB measured, {self.predicted_peak_bytes / mb:.3f} predicted; "
            f"budget {self.budget_bytes / mb:.3f}; {self.compiled_peak_bytes / mb:.3f} without the plan"
        )


def verified(
    plan: Plan, model: nn.Module, inputs: Inputs, loss_fn: LossFn | None, seed: int, memory: StaticMemory
) -> CompiledReport:
    """Run both steps from the same random state.  The model is left as it was."""
    with as_written(model):
        theirs = torch.compile(model.forward, dynamic=False)
        wanted, theirs_bytes = _gradients(theirs, model, inputs, loss_fn, seed)
        plan.apply(model)
        ours, ours_bytes = _gradients(model, model, inputs, loss_fn, seed)
    worst, where = 0.0, "all equal"
    for name, g in wanted.items():
        norm = max(float(g.norm()), 1e-30)
        apart = float((ours[name] - g).norm()) / norm if name in ours else float("inf")
        if apart > worst:
            worst, where = apart, name
    state = memory.resident.optimizer_state_bytes
    there = memory.total_bytes - state
    return CompiledReport(
        worst,
        where,
        plan.budget_bytes,
        there + ours_bytes,
        _predicted(plan) - state,
        there + theirs_bytes,
        state,
    )


def _predicted(plan: PlanData) -> int:
    return int(max(plan.timeline, default=0))


def _gradients(
    forward: object, model: nn.Module, inputs: Inputs, loss_fn: LossFn | None, seed: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a step, and the bytes that another of it takes beyond what was there."""

    def step() -> None:
        passed = passed_on(forward(*inputs.args, **inputs.kwargs), loss_fn)  # type: ignore[operator]
        backward(passed, tangents_for(passed, None))

    with undone(model, inputs):
        torch.manual_seed(seed)
        step()
        found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    with undone(model, inputs):
        torch.manual_seed(seed)
        peak = allocated_peak(step)
    return found, peak
