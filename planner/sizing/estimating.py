"""``estimate``: a capture and a simulation, from a model and one batch to an ``Estimate``."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from planner._compat import FakeTensorMode
from planner.capture.outputs import LossFn
from planner.costs.target import CostSource
from planner.errors import PlannerError
from planner.memory.optimizer_state import OptimizerLike
from planner.options import (
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OutputsMode,
    Search,
)
from planner.plans.plan_data import PlanData
from planner.progress import Progress
from planner.sizing.estimates import Estimate
from planner.sizing.memoryless import is_on_meta, remade, remade_inputs
from planner.sizing.simple import Step, floor_of, least_known
from planner.solving.chunked import asked_in_chunks, lowest_in_chunks, refuse_chunks
from planner.solving.fit import Answer
from planner.solving.priced import PricedStep
from planner.solving.request import StepRequest

__all__ = ["estimate", "estimate_of"]

log = logging.getLogger(__name__)


def estimate(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    outputs: OutputsMode = "auto",
    gradients: GradientsMode = "auto",
    capture: CaptureMode = "auto",
    chunk_loss: ChunkLoss = "auto",
    time_limit_s: float = 0.0,
    progress: bool | Progress | None = None,
) -> Estimate:
    """What a training step of ``model`` takes, and what no plan for it goes below, without a search.

    Arguments as for :func:`planner.plan`, whose numbers these are: its ``baseline_peak_bytes`` and floor.
    ``model`` may be without memory: made under ``FakeTensorMode``, or on the meta device, as by
    ``with torch.device("meta")`` or accelerate's ``init_empty_weights``; with ``costs="H100"`` the GPU may
    be elsewhere.

    ``chunk_loss``    "auto": beside the floor stands that of the step with its loss in chunks of tokens,
                      where that is lower, and verdicts know of both; n: the step in n chunks; True: in the
                      number with the lowest floor; False: the loss whole.
    ``time_limit_s``  seconds of search for the least peak; 0: only what is known without one, the step as it
                      is and three schedules that take milliseconds.

    ``.fits(budget_gb)`` says what is known of a budget.  Raises as :func:`planner.plan`, but for budgets.
    """
    request = StepRequest(
        model=model, inputs=inputs, search=Search("auto", time_limit_s, progress), loss_fn=loss_fn,
        optimizer=optimizer, costs=costs, outputs=outputs, gradients=gradients, capture=capture,
        chunk_loss=chunk_loss,
    )  # fmt: skip
    if is_on_meta(model):
        request = _on_fakes(request)
    with request.reporting() as request:
        step = request.step()
        if isinstance(step, PricedStep):
            step = asked_in_chunks(step, chunk_loss)
        else:
            refuse_chunks(chunk_loss, step.loss_fn, None, True, step.why)
        cut = _in_chunks(step, request) if chunk_loss == "auto" else None
        return estimate_of(step, request.search, cut)


def _on_fakes(request: StepRequest) -> StepRequest:
    """The same of a model on the meta device, remade of fake tensors with all that belongs to it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, optimizer = remade(request.model, request.optimizer, mode)
    inputs = remade_inputs(_own(model) if request.inputs is None else request.inputs, mode)
    return replace(request, model=model, inputs=inputs, optimizer=optimizer)


def _in_chunks(step: Step, request: StepRequest) -> PricedStep | None:
    """``step`` with its loss in chunks, where that has a lower floor."""
    whole = step
    if not isinstance(whole, PricedStep):
        if not whole.why or whole.loss_fn is not None:
            return None
        try:
            whole = request.as_one_graph()
        except PlannerError as error:
            log.debug("no one graph: %s", error)
            return None
    cut = lowest_in_chunks(whole)
    return None if cut is None or floor_of(cut).bytes >= floor_of(step).bytes else cut


def _own(model: nn.Module) -> object:
    for name in ("dummy_inputs", "example_input_array"):
        found = getattr(model, name, None)
        if found is not None:
            return found
    return None


def estimate_of(step: Step, search: Search | None = None, cut: PricedStep | None = None) -> Estimate:
    """The figures of a captured, priced step; ``search`` is for its least peak, none where that takes 0 s.

    ``cut``  the same with its loss in chunks; ``None``: there is none, or it is no better.
    """
    least_step = step.lightest
    known = least_known(step)
    if search is not None and search.time_limit_s > 0:
        search.tell.phase("least", "the least budget that has a plan")
        if least_step.least.budget_bytes < known.budget_bytes:
            known = least_step.least
    floor, full, least = floor_of(step), _as_it_is(step), least_step.plan_of(known)
    memory = step.target.memory
    log.info("%s takes %d bytes as it is", full.model_name, full.peak_bytes)
    return Estimate(
        model_name=full.model_name,
        device=full.device,
        planned_for=full.planned_for,
        unplanned_peak_bytes=full.baseline_peak_bytes,
        floor_bytes=floor.bytes,
        least_known_bytes=least.peak_bytes,
        breakdown=full.breakdown,
        peak_op=full.peak_op,
        peak_module=full.peak_module,
        floor_op=floor.op,
        floor_module=floor.module,
        floor_op_bytes=floor.op_bytes,
        least_breakdown=least.breakdown,
        least_overhead=least.overhead,
        reserved_bytes=full.reserved_bytes,
        device_bytes=None if memory is None else memory.total_bytes,
        step_s=full.step_s,
        step_flops=full.step_flops,
        cost_source=full.cost_source,
        let_go=least.released,
        regions=len(full.regions),
        chunks=max((of.chunks for of in (cut or step).graph.chunked), default=0),
        chunked_floor_bytes=None if cut is None else floor_of(cut).bytes,
        chunked_least_bytes=None if cut is None else least_known(cut).budget_bytes,
    )


def _as_it_is(step: Step) -> PlanData:
    """The plan that recomputes nothing."""
    ran, total_s = step.baseline, step.problem.total_seconds
    budget = max(ran.peak_bytes, step.memory.optimizer_step_bytes)
    return step.plan_of(Answer(budget, ran, total_s, step.floor_bytes, seconds=total_s, solver="no search"))
