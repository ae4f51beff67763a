"""Run a step with and without its plan, and compare everything that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from planner._compat import FakeTensor
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.errors import PlannerError
from planner.measure.bits import Comparison, compare, run_step
from planner.measure.flops import step_flops
from planner.measure.peaks import step_peak
from planner.measure.step import dropping
from planner.plans.plan_data import PlanData
from planner.plans.within_budget import WithinBudget
from planner.runtime.apply import applied, as_written
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
    ``recompute_flops``             extra FLOPs counted while running; ``predicted_recompute_flops``.
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
        return (
            f"{'ok' if self.ok else 'NOT OK'}: {self.comparison}\n"
            f"peak {self.peak_bytes / mb:.3f} MB measured, {self.predicted_peak_bytes / mb:.3f} predicted"
            f"{state}; budget {self.budget_bytes / mb:.3f}; "
            f"{self.eager_peak_bytes / mb:.3f} without the plan\n"
            f"outputs held to the end: {outputs}\n"
            f"extra FLOPs {self.recompute_flops:.4g} counted, "
            f"{self.predicted_recompute_flops:.4g} predicted"
        )


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
    leaves = [] if whole is None else [leaf.name for leaf in whole.template.leaves]
    consumed = frozenset() if whole is None else whole.program.consumed
    kept = [i for i, name in enumerate(leaves) if name not in plan.released]
    held: bool | list[int] = True if whole is None else kept
    beside = [i for i, name in enumerate(leaves) if name in plan.kept]
    if inputs is not None:
        given = Inputs.of(model, inputs)
    elif isinstance(plan.inputs, Inputs) and not any(
        isinstance(t, FakeTensor) for t in plan.inputs.tensors()
    ):
        given = plan.inputs
    else:
        raise PlannerError(
            "this plan knows only the sizes of its inputs (it is from a file, from another process, "
            "or made in the middle of training); pass verify(model, inputs)"
        )
    with as_written(model):
        eager = run_step(model, given, loss_fn=loss_fn, seed=seed)
        with dropping(model, consumed):
            eager_peak = step_peak(model, given, loss_fn=loss_fn, hold_outputs=held, beside=beside)
        eager_flops = step_flops(model, given, loss_fn=loss_fn)
        if whole is not None:
            applied(model, whole)
        elif callable(step):
            step()
            for _ in range(_FIRST_STEPS):
                run_step(model, given, loss_fn=loss_fn, seed=seed)
        ours = run_step(model, given, loss_fn=loss_fn, seed=seed)
        with dropping(model, consumed):
            peak = step_peak(model, given, loss_fn=loss_fn, hold_outputs=held, beside=beside)
        flops = step_flops(model, given, loss_fn=loss_fn)
    state = int(max(plan.timeline_by_kind.get("optimizer_state", ()), default=0))
    return Report(
        compare(eager, ours),
        plan.budget_bytes,
        eager_peak,
        peak,
        int(max(plan.timeline, default=0)) - state,
        flops - eager_flops,
        plan.recompute_flops,
        state,
        tuple(leaves[i] for i in kept),
        tuple(leaves[i] for i in beside),
    )
