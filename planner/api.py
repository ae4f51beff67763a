"""``plan`` and ``frontier``: the pipeline from a model to its plan.

    nn.Module, inputs -> JointGraph -> TrainingGraph, Costs -> Problem -> Solution -> Plan

Each arrow is a function in the module named after its result; this one only calls them in order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from planner.capture.outputs import LossFn
from planner.capture.sizes import Dynamic
from planner.compiled.step import compiled_step
from planner.costs.target import CostSource
from planner.devices.state import warn_of_little_memory
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.frontier import Frontier
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import budget_bytes_of, budgets_bytes_of
from planner.options import (
    BackendMode,
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OnLarger,
    OrderMode,
    OutputsMode,
    RecomputeMode,
    Search,
    check_count,
)
from planner.plan import Plan
from planner.progress import Progress
from planner.solving.calibrate import calibrated
from planner.solving.chunked import asked_in_chunks, in_chunks_instead, refuse_chunks, with_loss_in_chunks
from planner.solving.in_regions import JoinedStep
from planner.solving.priced import PricedStep
from planner.solving.request import PlanRequest, StepRequest
from planner.units import bytes_text

__all__ = ["frontier", "plan"]

log = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    budget_gb: float,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    dynamic: Dynamic = False,
    on_larger: OnLarger = "replan",
    calibrate: bool = False,
    outputs: OutputsMode = "auto",
    gradients: GradientsMode = "auto",
    capture: CaptureMode = "auto",
    backend: BackendMode = "eager",
    recompute: RecomputeMode = "fastest",
    chunk_loss: ChunkLoss = "auto",
    order: OrderMode = "given",
    progress: bool | Progress | None = None,
) -> Plan:
    """Choose what to keep and what to recompute so that a training step of ``model`` fits ``budget_gb``.

    ``budget_gb``     GB of 10**9 bytes for the whole step on the model's device: parameters, buffers,
                      gradients, optimizer state, inputs, activations, kernel workspace.
    ``inputs``        one batch of the size to plan for: a tuple of positional or a dict of keyword
                      arguments of ``model.forward``.  ``None``: ``model.dummy_inputs`` or
                      ``model.example_input_array``.  A yes or no that the forward asks of it (``mask.all()``)
                      is asked of each batch; those with another answer are planned for when they come.
    ``loss_fn``       ``loss_fn(outputs) -> scalar`` where the loss is computed outside the model; its
                      memory is then planned for.  Without it the plan covers the model, and gradients
                      of its outputs count as given.
    ``optimizer``     an instance or a class; its state and its step's temporaries count.
    ``costs``         "profile": measure every distinct op on the device; "roofline": work it out from
                      FLOPs and bytes; "auto": profile where that is quick; "H200", "H100", "A100", "L4" or
                      "RTX 4090": plan for that GPU from a machine without one, with the kernels and
                      bytes it would have (:mod:`planner.costs.target`).  Such a plan is not to be applied
                      here.
    ``solver``        a name in ``solvers.SOLVERS``; ``time_limit_s`` bounds its search, and again the
                      search for the least budget where this one turns out to be too low.
    ``dynamic``       True: sizes may differ from batch to batch (batch, sequence, number of tiles); one
                      trace and one plan, made for ``inputs`` as the largest, serve them all.  A mapping
                      names what varies: ``{"input_ids": (0, 1)}``, argument -> dimensions.
    ``on_larger``     with ``dynamic``: for a batch that the plan cannot serve within the budget,
                      "replan" for its sizes, or "raise" ``StalePlanError``.
    ``calibrate``     True: run the planned step, and plan again until what it was measured to take
                      (on CUDA: what the allocator reserved) is within the budget.  Needs a model and
                      inputs that are real; their state is afterwards what it was.
    ``outputs``       until when the loop holds what the model returns.  "held": to the end of the step.
                      "released": the backward begins without them, as in ``model(**batch).loss.backward()``
                      or after ``del outputs``; they then count as other values do, and the first steps check
                      that they are gone.  "unread": it reads only the loss; what else there is, is not made
                      for it, and says so when it is read.  "auto": held, or, where no such plan fits,
                      released; an applied plan looks at the first steps and plans again for what each output
                      does, also where the last call's are still held while the next one runs.
    ``gradients``     "held": they are there until the loop lets go of them, after the step.  "consumed":
                      hooks on the parameters (``register_post_accumulate_grad_hook``) step the optimizer and
                      drop them inside the backward; each then counts until its hook has run.  Parameters
                      without a hook keep theirs.  "auto": those with a hook and an optimizer of their own are
                      consumed (:func:`planner.optimizer_in_backward`, or the same by hand), with what the
                      optimizer's step takes and, where ``optimizer`` is not given, its state; the others
                      are held.
    ``capture``       "one graph": the whole step, or an error.  "regions": the forward is cut by Dynamo
                      where it cannot be followed (values read in Python, hooks, caches, code outside torch),
                      and each piece is captured by itself; the code between them runs as it is.  One plan
                      and one budget cover all of it.  Two steps of the real model on the real batch are run
                      for that, and put back: parameters, gradients, buffers, attributes of modules, random
                      states; not what the forward does elsewhere (files, globals).  "auto": one graph, or
                      regions where that is refused, with a line in the log.
    ``backend``       "inductor": the step is compiled by ``torch.compile``, and the plan chooses what its
                      forward keeps for its backward and what that computes again.  All graphs that Dynamo
                      cuts share the budget.  As with regions, steps of the real model are run for that and
                      put back.  The applied model trains compiled: gradients are those of ``torch.compile``
                      without a budget but for the last bits.
    ``recompute``     compiled, a value that is made again in another loop may differ in its last bits.  "same
                      bits": only such are that do not (products, attention, sums of two, gathers, dropout);
                      sums over many and approximated functions (exp, tanh) are kept.  In eager all of them
                      always have the same.
    ``chunk_loss``    the last product and the loss behind it run for some tokens after the other, so that
                      logits, softmax and their gradient never exist whole: n: in n chunks; True: in as many
                      as make the fastest plan; "auto": so where no plan fits without, proved or after the
                      search, with a line in the log; False: never.  Sums over tokens are then in
                      another order, so the gradients' last bits are others, and plan.verify() says how far
                      they are from float64 beside eager's own.  Logits that the model returns are made whole
                      all the same, unless ``outputs`` is "unread", or "auto" and they do not fit.  A cache
                      of keys and values that the model returns is not handed out then, so that
                      the step is one graph, and says so when it is read.
    ``order``         of the backward.  "given": as autograd runs it.  "free": also one in which gradients of
                      weights come as soon as less is held for it (:mod:`planner.graph.ordered`); both are
                      searched, each for half of ``time_limit_s``, and the plan of less overhead is taken.
                      Bits are the same.  What is proved is proved of the order of that plan, not of any.
                      For a step of one graph.
    ``progress``      True draws a line on stderr (needs tqdm); a callable gets a
                      :class:`planner.progress.Event` at each phase, better plan and better bound, and
                      ends the search by returning True.  Ctrl-C ends it too, with the best plan so far.

    Planning one graph allocates no activation memory, runs no forward (``calibrate`` runs whole steps) and
    changes nothing of the model.

    Raises ``TypeError`` or ``ValueError`` for arguments that make no sense; ``InfeasibleBudgetError``
    if no plan fits, naming the least budget that one does; ``TraceError`` if the step is not one
    graph; ``PlannerError`` for what cannot be planned.
    """
    request = PlanRequest(
        model=model, inputs=inputs, budget_bytes=budget_bytes_of(budget_gb),
        search=Search(solver, time_limit_s, progress), loss_fn=loss_fn, optimizer=optimizer, costs=costs,
        dynamic=dynamic, on_larger=on_larger, calibrate=calibrate, outputs=outputs, gradients=gradients,
        capture=capture, backend=backend, recompute=recompute, chunk_loss=chunk_loss, order=order,
    )  # fmt: skip
    log.debug("asked for: %r", request)
    with request.reporting() as request:
        step = _captured(request)
        found = _in_either_order(step, request) if order == "free" else _in_given_order(step, request)
        warn_of_little_memory(request.budget_bytes, found.plan.peak_bytes, found.step.target.memory)
    log.info("%r", found.plan)
    if outputs == "auto":
        _tell_of_outputs(found, request.budget_bytes)
    return found.plan


class _Found(NamedTuple):
    """A plan, and the step it is of."""

    step: PricedStep | JoinedStep
    plan: Plan


def _captured(request: PlanRequest) -> PricedStep | JoinedStep:
    """The step that is to be planned, priced, and with its loss in chunks where that is asked for."""
    if request.backend == "inductor":
        return compiled_step(
            request.model, request.inputs, loss_fn=request.loss_fn, optimizer=request.optimizer,
            costs=request.costs, search=request.search, same_bits=request.recompute == "same bits",
        )  # fmt: skip
    return _in_chunks(request.step(), request.budget_bytes, request)


def _in_chunks(
    step: PricedStep | JoinedStep, budget_bytes: int, request: StepRequest
) -> PricedStep | JoinedStep:
    """``step`` with its loss in chunks where ``chunk_loss`` says so; see :func:`plan`.

    Raises ``PlannerError`` where it must be and cannot.
    """
    if isinstance(step, PricedStep):
        return with_loss_in_chunks(step, budget_bytes, request.chunk_loss, request.search)
    refuse_chunks(request.chunk_loss, step.loss_fn, None, True, step.why)
    return step


def _in_given_order(step: PricedStep | JoinedStep, request: PlanRequest) -> _Found:
    """The plan of ``step``; where it has none, that of it as one graph, and with its loss in chunks."""
    try:
        return _Found(step, _planned(step, request))
    except InfeasibleBudgetError as error:
        other = _instead_of(step, request)
        if other is None:
            raise _with_why(error, step, request.chunk_loss) from None
    return _in_given_order(other, request)


def _in_either_order(step: PricedStep | JoinedStep, request: PlanRequest) -> _Found:
    """The plan of less overhead of two orders of the backward."""
    if not isinstance(step, PricedStep):
        raise PlannerError(
            f"order='free' is for a step of one graph, and this one is in regions: {step.why or 'as asked'}. "
            "Pass order='given'"
        )
    half = request.in_seconds(request.search.time_limit_s / 2)
    found: list[_Found] = []
    refused: list[InfeasibleBudgetError] = []
    for each in (step, step.in_order("free")):
        try:
            found.append(_in_given_order(each, half))
        except InfeasibleBudgetError as error:
            refused.append(error)
    if not found:
        raise min(refused, key=lambda error: error.minimum_bytes)
    return min(found, key=lambda one: one.plan.step_s * (1 + one.plan.overhead))


def _planned(step: PricedStep | JoinedStep, request: PlanRequest) -> Plan:
    if request.calibrate and isinstance(step, PricedStep):
        return calibrated(step, request.budget_bytes, request.search)
    # in regions what is held beside them was measured
    return step.plan_bytes(request.budget_bytes, request.search)


def _instead_of(step: PricedStep | JoinedStep, request: PlanRequest) -> PricedStep | None:
    """The step to plan where ``step`` has no plan; ``None``: there is no other."""
    if isinstance(step, PricedStep):
        return in_chunks_instead(step, request.budget_bytes, request.chunk_loss, request.search)
    return _as_one_graph(step, request)


def _as_one_graph(step: JoinedStep, request: PlanRequest) -> PricedStep | None:
    """A step that in regions has no plan, as one graph without what no graph can carry, such as a cache.

    Its loss is in chunks where that too would have none.  ``None`` where it is no one graph even so, or needs
    more.
    """
    if request.chunk_loss is False or not step.why or step.loss_fn is not None:
        return None
    try:
        made = request.as_one_graph()
    except PlannerError as error:
        log.debug("not as one graph either: %s", error)
        return None
    if not made.dropped:
        return None
    fewer = with_loss_in_chunks(made, request.budget_bytes, request.chunk_loss, request.search)
    if request.budget_bytes < fewer.lightest.floor_bytes:
        return None
    log.warning(
        "no plan of %s in regions fits %s: it is planned as one graph without %s, which no loss reads; "
        "whoever reads it gets an error",
        type(made.model).__name__,
        bytes_text(request.budget_bytes),
        ", ".join(made.dropped),
    )
    return fewer


def _with_why(
    error: InfeasibleBudgetError, step: PricedStep | JoinedStep, chunk_loss: ChunkLoss
) -> InfeasibleBudgetError:
    """What else could be done of a step that would be planned for less as one graph."""
    if isinstance(step, PricedStep) or not step.why or chunk_loss is False:
        return error
    return error.saying(
        f"{error}. As one graph its loss could be computed in chunks, for less where logits are large; it is "
        f"planned in regions, since: {step.why}"
    )


def _tell_of_outputs(found: _Found, budget_bytes: int) -> None:
    """Warn of what the loop must not hold, or not read, for the plan to be within its budget."""
    step, made = found
    budget_gb = budget_bytes / 1e9
    if made.released:
        log.warning(
            "%s fits %.4g GB only where %s is let go of before the backward, so that is what is planned for: "
            "read model(**batch).loss, or del outputs",
            made.model_name,
            budget_gb,
            ", ".join(made.released),
        )
    whole_outputs = [name for name in made.unread if name not in step.dropped]
    if whole_outputs:
        log.warning(
            "%s fits %.4g GB only where %s is not made whole, so it is not: a loop that reads it gets an "
            "error; outputs='unread' says that it does not",
            made.model_name,
            budget_gb,
            ", ".join(whole_outputs),
        )


def frontier(
    model: nn.Module,
    inputs: object = None,
    budgets_gb: Sequence[float] | None = None,
    *,
    points: int = 8,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    solver: str = "auto",
    time_limit_s: float = 10.0,
    outputs: OutputsMode = "auto",
    gradients: GradientsMode = "auto",
    capture: CaptureMode = "auto",
    chunk_loss: ChunkLoss = False,
    progress: bool | Progress | None = None,
) -> Frontier:
    """Overhead against budget, from one trace: at ``budgets_gb``, or ``points`` of them from the least up.

    Arguments as for :func:`plan`; ``time_limit_s`` is seconds per budget, and ``outputs="auto"`` counts them
    as held at every budget.

    ``chunk_loss``  one number of chunks for all budgets, to whose step overheads then refer: n, or what
                    ``plan`` takes of True and "auto" at the lowest of ``budgets_gb``; without those True is
                    the number with the lowest floor, and "auto" the loss whole.

    Raises as :func:`plan`, and ``ValueError`` for ``points`` that are no count.
    """
    request = StepRequest(
        model=model, inputs=inputs, search=Search(solver, time_limit_s, progress), loss_fn=loss_fn,
        optimizer=optimizer, costs=costs, outputs="held" if outputs == "auto" else outputs,
        gradients=gradients, capture=capture, chunk_loss=chunk_loss,
    )  # fmt: skip
    budgets = budgets_bytes_of(budgets_gb)
    check_count("points", points)
    with request.reporting() as request:
        step = request.step()
        if budgets is not None or isinstance(step, JoinedStep):
            step = _in_chunks(step, min(budgets or [0]), request)
        else:
            step = asked_in_chunks(step, chunk_loss)
        return step.frontier(budgets, request.search, points=points)
