"""A compiled step beside torch.compile's own without a budget.

Where the two differ by more than the last bits of float32, both are laid beside the same step in float64:
in half precision, and with sums in another order, rounding alone makes such differences, in torch's own
budgets too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from planner._compat import pytree
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.measure.bits import StepRecord, run_step
from planner.measure.peaks import allocated_peak
from planner.measure.step import backward, passed_on, tangents_for, undone
from planner.measure.wide import Errors, against_float64, recorded_draws
from planner.memory.static import StaticMemory
from planner.plans.plan_data import PlanData
from planner.plans.within_budget import WithinBudget
from planner.runtime.apply import as_written

if TYPE_CHECKING:
    from planner.plan import Plan

__all__ = ["CompiledReport", "added_terms", "verified"]

CLOSE = 1e-6


@dataclass(frozen=True)
class CompiledReport(WithinBudget):
    """What :meth:`planner.Plan.verify` found of a plan under inductor.

    ``difference``   of all gradients and the loss to those of ``torch.compile`` without a budget, the largest
                     of ``norm(ours - theirs) / norm(theirs)``; ``where``: the name of that one.
    ``peak_bytes``   of the step, measured at the allocator; ``compiled_peak_bytes`` of torch's own.
    ``errors``       where that is more than 1e-6: how far both are from the step in float64; ``None`` where
                     it is less, or there is no such reference, with the reason in ``no_reference``.
    """

    difference: float
    where: str
    budget_bytes: int
    peak_bytes: int
    predicted_peak_bytes: int
    compiled_peak_bytes: int
    optimizer_state_bytes: int = 0
    errors: Errors | None = None
    no_reference: str = ""

    @property
    def equal(self) -> bool:
        """Loss and gradients are torch.compile's own but for the last bits."""
        return self.difference <= CLOSE

    @property
    def ok(self) -> bool:
        """Within the budget, and equal, or as near to float64 as torch.compile's own step or nearly so.

        That is: the errors of the loss and of each gradient are at most twice its own, or what rounding is
        expected to make (:mod:`planner.measure.wide`).
        """
        near = self.errors is not None and self.errors.rounding_alone
        return self.within_budget and (self.equal or near)

    def __str__(self) -> str:
        mb = 1e6
        told = ""
        if self.errors is not None:
            told = f"\n{self.errors.beside('torch.compile')}"
        elif self.no_reference:
            told = f"\nthere is no step in float64 beside it: {self.no_reference}"
        return (
            f"{'ok' if self.ok else 'NOT OK'}: loss and gradients differ from torch.compile's without a "
            f"budget by {self.difference:.1e} of their norm at most ({self.where}){told}\n"
            f"peak {self.peak_bytes / mb:.3f} MB measured, {self.predicted_peak_bytes / mb:.3f} predicted; "
            f"budget {self.budget_bytes / mb:.3f}; {self.compiled_peak_bytes / mb:.3f} without the plan"
        )


def verified(
    plan: Plan,
    model: nn.Module,
    inputs: Inputs,
    loss_fn: LossFn | None,
    seed: int,
    memory: StaticMemory,
    terms: int,
) -> CompiledReport:
    """Run both steps from the same random state; ``terms``: see :func:`added_terms`.

    The model is left as it was.
    """
    with as_written(model):
        with _running(model, torch.compile(model.forward, dynamic=False)):
            theirs, theirs_bytes = _ran(model, inputs, loss_fn, seed)
        plan.apply(model)
        ours, ours_bytes = _ran(model, inputs, loss_fn, seed)
    difference, where = _apart(_numbers(theirs), _numbers(ours))
    errors, why = None, ""
    if CLOSE < difference < math.inf:
        with as_written(model):
            errors, why = _beside_float64(model, inputs, (theirs, ours), loss_fn, seed, terms)
    state = memory.resident.optimizer_state_bytes
    there = memory.total_bytes - state
    return CompiledReport(
        difference,
        where,
        plan.budget_bytes,
        there + ours_bytes,
        _predicted(plan) - state,
        there + theirs_bytes,
        state,
        errors,
        why,
    )


def added_terms(node: fx.Node, flops: int) -> int:
    """How many products or elements a call adds up at most into one number of what it makes.

    Of a library's call by its FLOPs, two for each; of what inductor writes, as many as it reads for each.
    """
    sizes = [x.numel() for x in _tensors(meta.value(node))]
    made = min([n for n in sizes if n > 1], default=1)
    read = max([x.numel() for n in node.all_input_nodes for x in _tensors(meta.value(n))], default=1)
    return max(flops // (2 * made), read // made if made <= read else 1, 1)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


@contextmanager
def _running(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``model`` runs ``forward``."""
    attributes = vars(model)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


def _predicted(plan: PlanData) -> int:
    return int(max(plan.timeline, default=0))


def _ran(model: nn.Module, inputs: Inputs, loss_fn: LossFn | None, seed: int) -> tuple[StepRecord, int]:
    """What a step computes, and the bytes that another of it takes beyond what was there."""

    def step() -> None:
        passed = passed_on(model(*inputs.args, **inputs.kwargs), loss_fn)
        backward(passed, tangents_for(passed, None))

    record = run_step(model, inputs, loss_fn=loss_fn, seed=seed)
    with undone(model, inputs):
        torch.manual_seed(seed)
        peak = allocated_peak(step)
    return record, peak


def _numbers(record: StepRecord) -> Mapping[str, Tensor]:
    return record.gradients if record.loss is None else {"the loss": record.loss, **record.gradients}


def _apart(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two alike, by the norm of theirs, and which it is."""
    worst, where = 0.0, "all equal"
    for name in [*theirs, *(n for n in ours if n not in theirs)]:
        apart = math.inf
        if name in theirs and name in ours:
            a, b = (side[name].to_dense().double() for side in (theirs, ours))
            apart = float((b - a).norm()) / max(float(a.norm()), 1e-30)
        if not apart <= worst:  # nan is no less than anything
            worst, where = (math.inf if math.isnan(apart) else apart), name
    return worst, where


def _beside_float64(
    model: nn.Module,
    inputs: Inputs,
    records: tuple[StepRecord, StepRecord],
    loss_fn: LossFn | None,
    seed: int,
    terms: int,
) -> tuple[Errors | None, str]:
    with recorded_draws() as draws:
        run_step(model, inputs, loss_fn=loss_fn, seed=seed)
    if any(drawn is not None for drawn in draws):
        return None, (
            "it draws random numbers, and compiled code draws others from the same seed; verify it in eval "
            "mode, or with its rates of dropout 0"
        )
    return against_float64(model, inputs, records, draws, terms, loss_fn=loss_fn, seed=seed)
