"""Run a step with and without its plan, and compare everything that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensor, is_spread
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.capture.state.effects import attributes_kept
from planner.errors import PlannerError
from planner.measure.bits import Comparison, StepRecord, compare, run_step
from planner.measure.flops import step_flops
from planner.measure.peaks import step_peak
from planner.measure.step import dropping
from planner.measure.wide import Errors, against_float64, recorded_draws
from planner.plans.plan_data import PlanData
from planner.plans.within_budget import WithinBudget
from planner.runtime.apply import applied, as_written
from planner.runtime.forward import planned_forward_of
from planner.runtime.step import ExecutableStep

__all__ = ["Report", "verify"]

# Of a plan in regions from a file two steps are looked at before one runs as planned.
_FIRST_STEPS = 2


@dataclass(frozen=True)
class Report(WithinBudget):
    """What :meth:`planner.Plan.verify` found.  Bytes are of the whole step, measured apart from the plan.

    ``comparison``                  outputs, gradients, buffers and random state, bit for bit.
    ``eager_peak_bytes``            of the step without the plan; ``peak_bytes`` with it.
    ``predicted_peak_bytes``        what the plan said of forward and backward.
    ``held_outputs``                names of the outputs that were held to the end of both measured steps, as
                                    they were planned for; the others had gone when the backward began.
    ``kept_outputs``                of those, the ones of a step before that lay beside the forward.
    ``optimizer_state_bytes``       what the plan reserves for an optimizer and the measured step, which
                                    has none, does not hold; left out of both peaks.
    ``unread_outputs``              names of the outputs that the planned step does not make.
    ``errors``                      where the loss is in chunks, so that gradients are added up in another
                                    order: how far they are from float64, and how far eager's are; ``None``
                                    where every bit is the same or there is no such reference, with the reason
                                    in ``no_reference``.
    ``recompute_flops``             extra FLOPs counted while running; ``predicted_recompute_flops``.
    ``is_other_batch``              the batch has other sizes, or answers otherwise what the forward asks,
                                    than that of the plan, which the predictions are of.
    """

    comparison: Comparison
    budget_bytes: int
    eager_peak_bytes: int
    peak_bytes: int
    predicted_peak_bytes: int
    recompute_flops: int
    predicted_recompute_flops: int
    optimizer_state_bytes: int = 0
    held_outputs: tuple[str, ...] = ()
    kept_outputs: tuple[str, ...] = ()
    unread_outputs: tuple[str, ...] = ()
    errors: Errors | None = None
    no_reference: str = ""
    is_other_batch: bool = False

    @property
    def ok(self) -> bool:
        """Within the budget, and equal; with the loss in chunks, as near to float64 as eager or nearly so.

        That is: the errors of the loss and of each gradient are at most twice eager's own, or what rounding
        is expected to make (:mod:`planner.measure.wide`), and all else is bit-equal.
        """
        if self.errors is None:
            return super().ok
        c = self.comparison
        others = c.buffers.equal and c.rng.equal and c.same_output_type
        return self.within_budget and others and self.errors.rounding_alone

    @property
    def equal(self) -> bool:
        """Outputs, gradients, buffers and random state are bit-equal to the step without the plan."""
        return self.comparison.equal

    def __str__(self) -> str:
        mb = 1e6
        held = self.optimizer_state_bytes
        state = f" + {held / mb:.3f} of optimizer state" if held else ""
        outputs = ", ".join(self.held_outputs) or "none"
        if self.kept_outputs:
            outputs += f"; of the last call's, while this one runs: {', '.join(self.kept_outputs)}"
        whose = " for the batch of the plan, which is another" if self.is_other_batch else ""
        return (
            f"{'ok' if self.ok else 'NOT OK'}: {self.comparison}\n"
            f"peak {self.peak_bytes / mb:.3f} MB measured, "
            f"{self.predicted_peak_bytes / mb:.3f} predicted{whose}{state}; "
            f"budget {self.budget_bytes / mb:.3f}; {self.eager_peak_bytes / mb:.3f} without the plan\n"
            f"{self._chunks()}"
            f"outputs held to the end: {outputs}\n"
            f"extra FLOPs {self.recompute_flops:.4g} counted, "
            f"{self.predicted_recompute_flops:.4g} predicted{whose}"
        )

    def _chunks(self) -> str:
        lines = []
        if self.errors is not None:
            lines.append(f"the loss is in chunks, so sums are in another order: {self.errors}\n")
        elif self.no_reference:
            lines.append(f"the loss is in chunks, and float64 says nothing of it: {self.no_reference}\n")
        if self.unread_outputs:
            lines.append(f"outputs not made, since only the loss is read: {', '.join(self.unread_outputs)}\n")
        return "".join(lines)


def verify(
    plan: PlanData,
    step: ExecutableStep | Callable[[], object],
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Report:
    """Run ``model``'s step as it is and as ``step``, from the same seed.  The model is left as it was.

    ``step``  where it is in regions: what makes the model run so.

    Raises ``PlannerError`` if the plan knows no inputs and none are given, or if gradients are not None.
    """
    whole = step if isinstance(step, ExecutableStep) else None
    trial = _Trial.of(plan, whole, model, _batch(plan, model, inputs), loss_fn, seed)
    recorded: AbstractContextManager[list[Any]] = recorded_draws() if plan.chunked else nullcontext([])
    with attributes_kept(model), _parameters_kept(model), as_written(model):
        if whole is None:
            trial.settle()
        with recorded as draws:
            eager = trial.record()
        eager_peak, eager_flops = trial.peak_bytes(), trial.flops()
        if whole is not None:
            applied(model, whole)
        elif callable(step):
            step()
            for _ in range(_FIRST_STEPS):
                trial.record()
        ours = trial.record()
        peak, flops = trial.peak_bytes(), trial.flops()
        is_other = _is_other(plan, trial.inputs, model)
        comparison = compare(_read(eager, whole), ours)
        errors, why = None, ""
        if plan.chunked and not comparison.equal:
            terms = max(max(of.rows, of.columns) for of in plan.chunked)
            with as_written(model):
                errors, why = against_float64(
                    model, trial.inputs, (eager, ours), draws, terms, loss_fn=loss_fn, seed=seed
                )
    state = int(max(plan.timeline_by_kind.get("optimizer_state", ()), default=0))
    return Report(
        comparison,
        plan.budget_bytes,
        eager_peak,
        peak,
        int(max(plan.timeline, default=0)) - state,
        flops - eager_flops,
        plan.recompute_flops + (plan.step_flops - plan.whole_step_flops if plan.chunked else 0),
        state,
        trial.named(trial.held),
        trial.named(trial.beside),
        plan.unread,
        errors,
        why,
        is_other,
    )


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Values of parameters put back, which a forward may set (at its first call, from the data)."""
    plain = (p for p in model.parameters() if p.layout is torch.strided and not is_spread(type(p)))
    was = [(p, p.detach().to("cpu", copy=True)) for p in plain]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in was:
                if not torch.equal(parameter.cpu(), value):
                    parameter.copy_(value)


def _batch(plan: PlanData, model: nn.Module, inputs: object) -> Inputs:
    """The batch to run: ``inputs``, or those that the plan was made for.

    Raises ``PlannerError`` where it has none with data.
    """
    if inputs is not None:
        return Inputs.of(model, inputs)
    known = plan.inputs
    if isinstance(known, Inputs) and not any(isinstance(t, FakeTensor) for t in known.tensors()):
        return known
    raise PlannerError(
        "this plan knows only the sizes of its inputs (it is from a file, from another process, "
        "or made in the middle of training); pass verify(model, inputs)"
    )


@dataclass(frozen=True)
class _Trial:
    """A step that is run several times: the same batch, the same seed, outputs and gradients held as planned.

    ``names``     of the model's outputs; of a step in regions none are known, and all are held.
    ``held``      which outputs are held to the end of a step, ``beside``: beside the next forward.
    ``consumed``  bytes by parameter, of those whose gradient is used up in the backward.
    """

    model: nn.Module
    inputs: Inputs
    loss_fn: LossFn | None
    seed: int
    names: tuple[str, ...] | None
    held: list[int]
    beside: list[int]
    consumed: Mapping[str, int]

    @classmethod
    def of(
        cls,
        plan: PlanData,
        step: ExecutableStep | None,
        model: nn.Module,
        inputs: Inputs,
        loss_fn: LossFn | None,
        seed: int,
    ) -> _Trial:
        """As ``plan`` counts it; ``step`` where it is one graph."""
        if step is None:
            return cls(model, inputs, loss_fn, seed, None, [], [], {})
        names = tuple(leaf.name for leaf in step.template.leaves)
        held = [i for i, name in enumerate(names) if name not in plan.released]
        beside = [i for i, name in enumerate(names) if name in plan.kept]
        consumed = dict.fromkeys(step.program.consumed, 0) | plan.steps_in_backward
        return cls(model, inputs, loss_fn, seed, names, held, beside, consumed)

    def named(self, outputs: list[int]) -> tuple[str, ...]:
        """The names of these outputs."""
        return tuple(self.names[i] for i in outputs) if self.names else ()

    def settle(self) -> None:
        """Run it once: what a model does at its first call only is not planned."""
        run_step(self.model, self.inputs, loss_fn=self.loss_fn, seed=self.seed)
        for parameter in self.model.parameters():  # of which that call may have made some
            parameter.grad = None

    def record(self) -> StepRecord:
        """Run it; what it computes.  Each run finds the model as the others do."""
        with attributes_kept(self.model):
            return run_step(self.model, self.inputs, loss_fn=self.loss_fn, seed=self.seed)

    def peak_bytes(self) -> int:
        """Run it; what it takes."""
        held: bool | list[int] = True if self.names is None else self.held
        with attributes_kept(self.model), dropping(self.model, self.consumed):
            return step_peak(
                self.model, self.inputs, loss_fn=self.loss_fn, hold_outputs=held, beside=self.beside
            )

    def flops(self) -> int:
        """Run it; what it computes with."""
        with attributes_kept(self.model):
            return step_flops(self.model, self.inputs, loss_fn=self.loss_fn)


def _is_other(plan: PlanData, given: Inputs, model: nn.Module) -> bool:
    """Whether the batch that ran is of other sizes than the plan's, or answered otherwise what was asked."""
    known = plan.inputs if isinstance(plan.inputs, Inputs) else given
    forward = planned_forward_of(model)
    return _sizes(given) != _sizes(known) or bool(forward and forward.turns)


def _sizes(inputs: Inputs) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in inputs.tensors()]


def _read(eager: StepRecord, step: ExecutableStep | None) -> StepRecord:
    """A record without the outputs that ``step`` does not make, numbered as that numbers them."""
    if step is None or not step.unread:
        return eager
    kept = [t for i, t in enumerate(eager.outputs.values()) if i not in step.unread]
    return replace(eager, outputs={str(i): t for i, t in enumerate(kept)})
