"""One training step, captured and priced: many budgets can be planned from it without another trace."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import nn

from planner._compat import collecting_seldom, modes_set_aside
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, capture
from planner.capture.module import unwrapped
from planner.capture.outputs import LossFn
from planner.capture.sizes import Dims, Dynamic, varying_dims
from planner.capture.symbolic import SymbolicCaptures, capture_varying
from planner.costs.target import CostSource, Target, target_for
from planner.costs.translation import Translation
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.graph.captured import CapturedStep
from planner.graph.consumed import consuming, taken_of
from planner.graph.ordered import ordered_graph
from planner.graph.step_graph import DROPPED, LAST
from planner.graph.training_graph import TrainingGraph
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import Resident, resident_of
from planner.memory.static import StaticMemory
from planner.options import OnLarger, OrderMode, OutputsMode, Search
from planner.plan import Plan, Whole
from planner.plans.lowering import steps_of
from planner.plans.plan_data import OutputState, PlanData
from planner.runtime.apply import applied
from planner.runtime.held_outputs import HeldOutputs
from planner.runtime.step import ExecutableStep, Lifetimes
from planner.runtime.variants import MATTERS, Varying
from planner.runtime.verify import Report, verify
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from planner.units import bytes_text, gb_enough
from solvers import Schedule

__all__ = ["PricedStep", "prepare"]

log = logging.getLogger(__name__)


@collecting_seldom()
def prepare(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    dynamic: Dynamic | Dims = False,
    on_larger: OnLarger = "replan",
    search: Search | None = None,
    outputs: OutputsMode = "held",
    drops: bool = False,
) -> PricedStep:
    """Capture the step, restate it as ops and storages, price every op, count what is resident.

    Arguments as for :func:`planner.plan`, ``dynamic`` also by tensor; ``search`` is for plans that the step
    itself asks for: the least one, and those for larger batches.  ``drops``: what the model returns that no
    graph can carry, such as a cache of keys and values, is not handed out; so it is where only the loss is
    read.
    """
    search = search or Search()
    tell = search.tell
    model = unwrapped(model)
    target = target_for(model, costs)
    tell.phase("capture", type(model).__name__)
    varying, drops = None, drops or outputs == "unread"
    with target.capturing():
        if dynamic:
            given = Inputs.of(model, inputs)
            given.check(model)
            dims = dynamic if isinstance(dynamic, tuple) else varying_dims(given, dynamic)
            joint, dims = capture_varying(model, given, loss_fn, dims, narrow=dynamic is True, drops=drops)
            later = dataclasses.replace(search, progress=None)  # a batch may come long after its bar closed
            varying = Varying(SymbolicCaptures(dims, joint), on_larger, later)
        else:
            joint = capture(model, inputs, loss_fn, drops=drops)
    if joint.template.dropped:
        log.info(
            "%s is captured without %s, which no graph can carry and no loss reads; whoever reads it from "
            "the planned step gets an error",
            type(model).__name__,
            ", ".join(joint.template.dropped),
        )
    if outputs == "unread":
        joint = _reading_the_loss(model, joint)
    with modes_set_aside():  # a model without memory may be planned under the mode it was built in
        graph = ordered_graph(joint)
        tell.phase("profile", f"{len(graph.ops)} ops")
        graph, priced, translation = target.price(graph)
        arguments = joint.inputs.args, joint.inputs.kwargs
        resident = resident_of(model, arguments, optimizer, device=graph.device, as_on=target.device)
        captured = CapturedStep.of(model, joint, graph)
    memory = _static(captured, resident, target)
    step = PricedStep(
        captured,
        priced,
        memory,
        target,
        translation=translation,
        loss_fn=loss_fn,
        varying=varying,
        least_limit_s=search.time_limit_s,
        outputs=outputs,
    )
    return step.all_released if outputs == "released" else step


def _of_whole(step: PricedStep) -> dict[str, Any]:
    """What a plan tells of the same step with its loss whole."""
    return {
        "whole_step_s": step.problem.total_seconds,
        "whole_step_flops": step.costs.total_flops,
        "whole_peak_bytes": step.baseline_peak_bytes,
    }


def _reading_the_loss(model: nn.Module, joint: JointGraph) -> JointGraph:
    if not joint.sees_loss:
        raise PlannerError(
            f"outputs='unread' says that the loop reads only the loss, and {type(model).__name__} returns "
            f"none "
            "that is told apart: pass labels, or another of 'held', 'released' and 'auto'"
        )
    return joint.reading(joint.differentiated)


def _static(
    captured: CapturedStep, resident: Resident, target: Target, margin_bytes: int = 0
) -> StaticMemory:
    return StaticMemory(captured, resident, target.device, target.grain, target.capability, margin_bytes)


@dataclass(frozen=True, eq=False)
class PricedStep(BudgetedStep):
    """A captured step of one graph with its costs.

    ``translation``    what differs on ``target`` from the capture; ``None`` if nothing does.
    ``varying``        ``None`` where all sizes are fixed.
    ``resident_at``    says what is resident where the step is captured again or evaluated at other sizes;
                       ``None``: what is now, but for the inputs.
    ``unchunked``      the same with its loss whole, where that is computed in chunks.

    ``outputs`` is what was asked for, ``graph.released`` what is planned for.  "auto": that, and for all of
    them released where it does not fit.
    """

    captured: CapturedStep
    translation: Translation | None = None
    varying: Varying | None = None
    resident_at: Callable[[TrainingGraph, Inputs], Resident] | None = None
    unchunked: PricedStep | None = None

    @property
    def whole(self) -> Whole:
        """Itself."""
        return self

    def steps_of(self, schedule: Schedule) -> list[int]:
        """Op positions of a solver's schedule; nothing of ours runs within the loss."""
        return steps_of(self.graph, self.problem, schedule)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Places of what the model returns and no graph can carry, which is not handed out."""
        return self.joint.template.dropped

    @property
    def joint(self) -> JointGraph:
        """Its step as one fx graph."""
        return self.captured.joint

    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model`` train as ``plan``, one of this step, says.

        Where outputs are planned for as "auto", the first steps are looked at, and planned again for what the
        loop does with them.
        """
        if self.outputs == "auto":
            again = partial(self._planned_again, plan)
            return applied(model, plan.executable(model), HeldOutputs("auto"), again)
        return applied(model, plan.executable(model), plan.watch())

    def _planned_again(self, plan: Plan, lifetimes: Lifetimes) -> ExecutableStep:
        """The program for a caller whose outputs live so long."""
        return self.plan_releasing(*lifetimes, plan).executable()

    def verified(
        self, plan: Plan, model: nn.Module, inputs: object, loss_fn: LossFn | None, seed: int
    ) -> Report:
        """The step of ``model`` with the program of ``plan`` beside eager's."""
        return verify(plan, plan.executable(model), model, inputs, loss_fn=loss_fn, seed=seed)

    def with_resident(
        self, resident: Resident, resident_at: Callable[[TrainingGraph, Inputs], Resident]
    ) -> PricedStep:
        """The same step where something else is resident."""
        memory = dataclasses.replace(self.memory, resident=resident)
        return dataclasses.replace(self, memory=memory, resident_at=resident_at)

    def consuming(self, taken: Mapping[str, int]) -> PricedStep:
        """The same step where hooks use up these parameters' gradients (:mod:`planner.graph.consumed`)."""
        held = self.graph.holding or self.graph
        graph = consuming(held, taken)
        if graph is held:
            return self
        graph = graph.releasing(self.graph.released, self.graph.kept)
        captured = dataclasses.replace(self.captured, graph=graph)
        memory = dataclasses.replace(self.memory, captured=captured)
        return dataclasses.replace(self, captured=captured, memory=memory)

    # -- the outputs -------------------------------------------------------------------------------

    def releasing(self, outputs: Collection[int], kept: Collection[int] = ()) -> PricedStep:
        """The same step where the caller lets go of these outputs (indices) before the backward.

        ``kept``: and holds these until the next call has returned.
        """
        graph = self.graph.releasing(outputs, kept)
        if (graph.released, graph.kept) == (self.graph.released, self.graph.kept):
            return self
        captured = dataclasses.replace(self.captured, graph=graph)
        memory = dataclasses.replace(self.memory, captured=captured)
        return dataclasses.replace(self, captured=captured, memory=memory)

    def as_planned(self, plan: PlanData) -> PricedStep:
        """The same step where the outputs live as ``plan`` counts them to."""
        names = [leaf.name for leaf in self.joint.template.leaves]
        released, kept = ({i for i, n in enumerate(names) if n in of} for of in (plan.released, plan.kept))
        return self.releasing(released, kept)

    @cached_property
    def all_released(self) -> PricedStep:
        """The same step where the caller lets go of all outputs but a loss that the backward starts from.

        Those too small to matter stay counted as held: nobody is to be told of 48 bytes.
        """
        graph = self.graph
        made_bytes = self.memory.total_bytes + sum(v.bytes for v in graph.values if v.producer is not None)
        size = {i: graph.values[graph.value_of[graph.outputs[i]]].bytes for i in graph.releasable}
        return self.releasing({i for i, count in size.items() if count * MATTERS >= made_bytes})

    @property
    def lightest(self) -> PricedStep:
        """The step whose least peak is the least that may be planned for."""
        return self.all_released if self.outputs == "auto" else self

    @property
    def output_states(self) -> dict[str, OutputState]:
        """What is planned for, by the name of each output."""
        graph, leaves = self.graph, enumerate(self.joint.template.leaves)
        states: dict[str, OutputState] = {
            leaf.name: "released" if i in graph.released else "kept" if i in graph.kept else "held"
            for i, leaf in leaves
        }
        gone = (*(name for _, name in self.joint.unread), *self.joint.template.dropped)
        return states | dict.fromkeys(gone, "unread")

    def in_chunks(self, chunks: int, *, unread: bool = False) -> PricedStep:
        """The same step with its loss in so many chunks of tokens.

        ``unread``: and of its outputs only the loss is handed out.  Raises ``PlannerError`` where the loss is
        none that can be cut so, with the call in the way.
        """
        step = self.reading_the_loss() if unread else self
        joint = dataclasses.replace(step.joint, chunks=chunks)
        step = dataclasses.replace(step, unchunked=self.unchunked or self)
        return step.recaptured(self.model, joint)

    def in_order(self, order: OrderMode) -> PricedStep:
        """The same step with its backward in this order (:mod:`planner.graph.ordered`)."""
        if self.joint.order == order:
            return self
        joint = dataclasses.replace(self.joint, order=order)
        varying = self.varying
        if varying is not None:
            dims = varying.captures.dims
            varying = dataclasses.replace(varying, captures=SymbolicCaptures(dims, joint))
        return dataclasses.replace(self, varying=varying).recaptured(self.model, joint)

    def reading_the_loss(self) -> PricedStep:
        """The same step where the caller reads only the loss, and nothing else is made for it.

        Raises ``PlannerError`` where there is no loss among the outputs.
        """
        if self.joint.unread:
            return self
        step = dataclasses.replace(self, outputs="unread")
        return step.recaptured(self.model, _reading_the_loss(self.model, self.joint))

    # -- other sizes -------------------------------------------------------------------------------

    def recaptured(self, model: nn.Module, joint: JointGraph) -> PricedStep:
        """The same model and settings, from another capture or at other sizes of this one."""
        graph, costs, translation = self.target.price(ordered_graph(joint))
        graph = consuming(graph, taken_of(self.graph)).releasing(self.graph.released, self.graph.kept)
        captured = CapturedStep.of(model, joint, graph)
        resident = self._resident_at(graph, joint.inputs)
        return dataclasses.replace(
            self,
            captured=captured,
            costs=costs,
            memory=_static(captured, resident, self.target, self.memory.margin_bytes),
            translation=translation,
        )

    def peak_at(self, value_bytes: np.ndarray, inputs: Inputs, steps: list[int]) -> int:
        """Peak of a schedule where each of the graph's values has ``value_bytes``, shape (V,).

        Workspace was measured at this step's sizes; it is taken to grow with the largest value.
        """
        own = np.array([v.bytes for v in self.graph.values], dtype=np.int64)
        growth = max(1.0, float((value_bytes / np.maximum(own, 1)).max()))
        workspace = {name: math.ceil(b * growth) for name, b in self.costs.workspace_bytes.items()}
        values = zip(self.graph.values, value_bytes.tolist(), strict=True)
        graph = dataclasses.replace(
            self.graph, values=tuple(dataclasses.replace(v, bytes=b) for v, b in values)
        )
        captured = dataclasses.replace(self.captured, graph=graph)
        at = dataclasses.replace(
            self,
            captured=captured,
            costs=dataclasses.replace(self.costs, workspace_bytes=workspace),
            memory=_static(captured, self._resident_at(graph, inputs), self.target, self.memory.margin_bytes),
        )
        return at.peak_of(steps)

    def _resident_at(self, graph: TrainingGraph, inputs: Inputs) -> Resident:
        if self.resident_at is not None:
            return self.resident_at(graph, inputs)
        arguments = inputs.args, inputs.kwargs
        found = resident_of(self.model, arguments, device=graph.device, as_on=self.target.device)
        return dataclasses.replace(self.resident, inputs_bytes=found.inputs_bytes)

    def plan_releasing(self, outputs: Collection[int], kept: Collection[int], instead_of: PlanData) -> Plan:
        """A plan for the same budget whose caller lets go of these outputs and holds the others.

        ``kept``: those of the others that it holds until the next call has returned.
        """
        step = dataclasses.replace(self.releasing(outputs, kept), outputs="held")
        same = step.beside_last(instead_of)
        if same is not None:
            return same
        search = Search(time_limit_s=self.least_limit_s)
        made = step.plan_bytes(instead_of.budget_bytes, search, hint=instead_of)
        log.info("planned again for the outputs that the loop lets go of, %s: %r", made.released, made)
        return made

    def beside_last(self, plan: PlanData) -> Plan | None:
        """The schedule of ``plan`` where more or less of the last call is kept beside it.

        ``None`` where it does not fit its budget so, and for a plan that differs in anything else.
        """
        outline, states = plan.outline, self.output_states
        alike = (
            plan.fingerprint == self.captured.fingerprint
            and outline is not None
            and outline.problem.resident_bytes == self.problem.resident_bytes
            and plan.released == tuple(name for name, state in states.items() if state == "released")
        )
        if not alike or plan.outputs == states:
            return None
        names = [name for name in plan.sequence if name not in (LAST, DROPPED)]
        if self.graph.kept:
            phase = {op.name: op.phase for op in self.graph.ops}
            behind = next((t for t, name in enumerate(names) if phase[name] != "forward"), len(names))
            names = [LAST, *names[:behind], DROPPED, *names[behind:]]
        ran = self.execution(self.captured.steps(names))
        if max(ran.peak_bytes, self.memory.optimizer_step_bytes) > plan.budget_bytes:
            return None
        total = self.problem.total_seconds
        seconds = total + ran.timeline.recompute_seconds
        # What was proved where less is kept is proved here too.
        bound = min(seconds, total * (1 + plan.overhead_bound)) if not plan.kept else total
        answer = Answer(plan.budget_bytes, ran, bound, self.floor_bytes, seconds, plan.solver, plan.solve_s)
        return self.plan_of(answer)

    def infeasible(self, budget_bytes: int) -> InfeasibleBudgetError:
        """The error for a budget that no plan fits, with the least that one does and what fills it."""
        error = super().infeasible(budget_bytes)
        held_bytes, apart = error.breakdown.get("outputs", 0), self.all_released
        if self.outputs != "held" or apart is self or held_bytes * 1000 < error.minimum_bytes:
            return error
        need_bytes = apart.least.budget_bytes
        if need_bytes >= error.minimum_bytes:
            return error
        return error.saying(
            f"{error}. The model's outputs, {bytes_text(held_bytes)}, are counted as held to the end of the "
            f"step; a loop that lets go of them before the backward, as model(**batch).loss.backward() does, "
            f"needs {gb_enough(need_bytes)} GB: pass outputs='released'"
        )

    def _identity(self) -> dict[str, Any]:
        """What a plan is for: the step captured, the device, the source of its costs."""
        return {
            **super()._identity(),
            "differentiated": self.joint.differentiated,
            "chunked": self.graph.chunked,
            "order": self.joint.order,
            "answers": self.joint.asked.of_values,
            **({} if self.unchunked is None else _of_whole(self.unchunked)),
            "varying_dims": None if self.varying is None else self.varying.captures.dims,
        }
