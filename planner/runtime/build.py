"""From a plan to the step that runs it.

A plan that was made here brings its captured step along.  One from a file does not: its model is captured
again, and what comes out must be the step the plan was made for.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.joint_graph import capture
from planner.capture.symbolic import SymbolicCaptures
from planner.errors import StalePlanError
from planner.graph.captured import CapturedStep
from planner.graph.consumed import consuming
from planner.graph.ordered import ordered_graph
from planner.graph.step_graph import scratch_of
from planner.measure.step import device_of
from planner.options import Search
from planner.plans.plan_data import PlanData
from planner.plans.serialize import inputs_of
from planner.runtime.step import ExecutableStep
from planner.runtime.variants import Replanner, Variants, Varying, step_of

__all__ = ["check_is_of", "executable", "recaptured"]


def executable(
    plan: PlanData,
    captured: CapturedStep,
    varying: Varying | None = None,
    replanner: Replanner | None = None,
) -> ExecutableStep:
    """The program of ``plan`` on ``captured``, shared by every model it is applied to.

    ``varying``    what a plan for many sizes was asked for; ``None``: its sizes are fixed.
    ``replanner``  plans for further sizes; ``None``: those at hand are all there are.

    Raises ``StalePlanError`` for a plan that runs an op which the step does not have.
    """
    replan = for_batch = None
    if replanner is not None:
        replan = functools.partial(_replanned, plan, varying, replanner)
        for_batch = functools.partial(_for_other_answers, plan, replanner)
    if varying is not None:
        variants = Variants(plan, captured, replanner, varying)
        return replace(variants.all[0].step, variants=variants, replan=replan)
    step = step_of(plan, captured, captured.steps(plan.sequence), captured.turn(plan.sequence))
    return replace(step, replan=replan, for_batch=for_batch)


def _for_other_answers(
    plan: PlanData, replanner: Replanner, model: nn.Module, inputs: Inputs
) -> ExecutableStep:
    """The step in the budget of ``plan`` for a batch that answers otherwise what the forward asks of it.

    Raises ``InfeasibleBudgetError`` where none fits.
    """
    known = replanner.captured.joint
    given = inputs.without_data(until_captured=True)
    joint = capture(model, given, replanner.loss_fn, drops=bool(plan.unread))
    joint = joint.reading([i for i, leaf in enumerate(joint.template.leaves) if leaf.name not in plan.unread])
    joint = replace(joint, chunks=known.chunks, order=known.order)
    step = replanner.recaptured(model, joint).as_planned(plan)
    made = step.plan_bytes(plan.budget_bytes, Search(time_limit_s=replanner.least_limit_s), hint=plan)
    step = step.as_planned(made)
    return executable(made, step.captured, None, step)


def _replanned(
    plan: PlanData,
    varying: Varying | None,
    replanner: Replanner,
    model: nn.Module,
    inputs: Inputs,
    used: frozenset[int],
) -> ExecutableStep:
    """The step in the budget of ``plan`` with the outputs ``used`` differentiated, whatever loss it had.

    Raises ``InfeasibleBudgetError`` where none fits.
    """
    with nullcontext() if varying is None else varying.around():
        dims = None if varying is None else varying.captures.dims
        joint = capture(model, inputs, used=used, dims=dims, drops=bool(plan.unread))
        joint = replace(joint, order=plan.order)
        step = replanner.recaptured(model, joint)
        search = Search(time_limit_s=replanner.least_limit_s) if varying is None else varying.search
        made = step.plan_bytes(plan.budget_bytes, search)
    if varying is not None:
        varying = replace(varying, captures=SymbolicCaptures(varying.captures.dims, joint, used))
    step = step.as_planned(made)
    return executable(made, step.captured, varying, step)


def recaptured(plan: PlanData, model: nn.Module) -> tuple[CapturedStep, Varying | None]:
    """Capture ``model`` for a plan read from a file, and what that plan says of varying sizes.

    Raises ``StalePlanError`` if it is not the same step, ``TraceError`` if it is not one graph.
    """
    inputs = inputs_of(plan, device_of(model, None, None))
    used, drops = frozenset(plan.differentiated), bool(plan.unread)
    joint = capture(model, inputs, used=used, dims=plan.varying_dims, drops=drops)
    names = [leaf.name for leaf in joint.template.leaves]
    joint = joint.reading([i for i, name in enumerate(names) if name not in plan.unread])
    if plan.chunked:
        joint = replace(joint, chunks=max(of.chunks for of in plan.chunked))
    joint = replace(joint, order=plan.order)
    captured = CapturedStep.of(model, joint, ordered_graph(joint))
    check_is_of(plan, captured)
    if plan.outline is not None:
        graph = captured.graph  # without the loss, so its values have other numbers than the plan's
        loose = {v.name for v in plan.outline.values if v.kind == "gradient" and not v.final}
        made = {name: graph.values[graph.value_of[node]].name for name, node in graph.gradients.items()}
        scratch = scratch_of(plan.outline.ops, [op.workspace_bytes for op in plan.outline.problem.ops])
        gone = {str(name): scratch.get(str(name), 0) for name, value in made.items() if value in loose}
        captured = replace(captured, graph=consuming(graph, gone))
    return captured, None if plan.varying_dims is None else Varying(
        SymbolicCaptures(plan.varying_dims, joint)
    )


def check_is_of(plan: PlanData, captured: CapturedStep) -> None:
    """``StalePlanError`` unless ``plan`` was made for this very step."""
    if captured.fingerprint != plan.fingerprint:
        raise StalePlanError(
            f"the plan was made for another step than that of this {type(captured.model).__name__} "
            f"(fingerprint {plan.fingerprint[:12]} with torch {plan.torch_version}, here "
            f"{captured.fingerprint[:12]} with torch {torch.__version__}): the model's structure, its sizes, "
            "its training flags, autocast or the versions of its libraries differ; make a new plan"
        )
