"""One training step, captured and priced: many budgets can be planned from it without another trace."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from planner._compat import modes_set_aside
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, capture
from planner.capture.module import unwrapped
from planner.capture.outputs import LossFn
from planner.capture.sizes import Dynamic, varying_dims
from planner.capture.symbolic import SymbolicCaptures, capture_varying
from planner.costs.op_costs import Costs
from planner.costs.target import CostSource, Target, target_for
from planner.costs.translation import Translation
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.frontier import Frontier, FrontierPoint
from planner.graph.captured import CapturedStep
from planner.graph.consumed import consumed_of, consuming
from planner.graph.step_graph import DROPPED, LAST
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.memory.execution import Execution, execute
from planner.memory.lifetimes import bytes_over_time, copies_of
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import Resident, resident_of
from planner.memory.static import StaticMemory
from planner.options import OutputsMode, Search
from planner.plan import Plan
from planner.plans.outline import Outline
from planner.plans.placements import placements_of
from planner.plans.plan_data import OutputState, PlanData
from planner.runtime.variants import MATTERS, OnLarger, Varying
from planner.solving.fit import Answer, fitted, fitted_each
from planner.solving.lowering import lower, steps_of
from planner.units import bytes_text
from solvers import Problem, Schedule, minimum_peak
from solvers.bounds.lower_bounds import peak_floor

__all__ = ["CostSource", "PricedStep", "prepare"]

log = logging.getLogger(__name__)

LEAST = "the least budget that has a plan"


def prepare(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    dynamic: Dynamic = False,
    on_larger: OnLarger = "replan",
    search: Search | None = None,
    outputs: OutputsMode = "held",
) -> PricedStep:
    """Capture the step, restate it as ops and storages, price every op, count what is resident.

    Arguments as for :func:`planner.plan`; ``search`` is for plans that the step itself asks for: the least
    one, and those for larger batches.
    """
    search = search or Search()
    tell = search.tell
    model = unwrapped(model)
    target = target_for(model, costs)
    tell.phase("capture", type(model).__name__)
    varying = None
    with target.capturing():
        if dynamic:
            given = Inputs.of(model, inputs)
            given.check(model)
            dims = varying_dims(given, dynamic)
            joint, dims = capture_varying(model, given, loss_fn, dims, narrow=dynamic is True)
            later = dataclasses.replace(search, progress=None)  # a batch may come long after its bar closed
            varying = Varying(SymbolicCaptures(dims, joint), on_larger, later)
        else:
            joint = capture(model, inputs, loss_fn)
    with modes_set_aside():  # a model without memory may be planned under the mode it was built in
        graph = training_graph(joint)
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
        translation,
        loss_fn,
        varying,
        least_limit_s=search.time_limit_s,
        outputs=outputs,
    )
    return step.all_released if outputs == "released" else step


def _static(
    captured: CapturedStep, resident: Resident, target: Target, margin_bytes: int = 0
) -> StaticMemory:
    return StaticMemory(captured, resident, target.device, target.grain, target.capability, margin_bytes)


class _Shown:
    """What the searches on one problem have shown so far."""

    def __init__(self) -> None:
        self.least: Answer | None = None
        self.floor_bytes = 0  # proved: no schedule's peak is lower

    def raise_floor(self, floor_bytes: int) -> None:
        self.floor_bytes = max(self.floor_bytes, floor_bytes)


@dataclass(frozen=True, eq=False)
class PricedStep:
    """A captured step with its costs; the common ground of all plans made from it.

    ``memory``         what is there throughout, on the device planned for.
    ``target``         that device, and ``translation`` what differs there from the capture; ``None`` if
                       nothing does.
    ``loss_fn``        the loss outside the model, if there is one.
    ``varying``        ``None`` where all sizes are fixed.
    ``resident_at``    says what is resident where the step is captured again or evaluated at other sizes;
                       ``None``: what is now, but for the inputs.
    ``least_limit_s``  seconds of search for the least feasible budget.
    ``outputs``        until when the caller holds them, as asked for; ``graph.released`` is what is planned
                       for.  "auto": that, and for all of them released where it does not fit.
    """

    captured: CapturedStep
    costs: Costs
    memory: StaticMemory
    target: Target
    translation: Translation | None = None
    loss_fn: LossFn | None = None
    varying: Varying | None = None
    resident_at: Callable[[TrainingGraph, Inputs], Resident] | None = None
    least_limit_s: float = 30.0
    outputs: OutputsMode = "held"
    _shown: _Shown = field(default_factory=_Shown, init=False, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model captured."""
        return self.captured.model

    @property
    def joint(self) -> JointGraph:
        """Its step as one fx graph."""
        return self.captured.joint

    @property
    def graph(self) -> TrainingGraph:
        """Its step as ops and storages."""
        return self.captured.graph

    @property
    def resident(self) -> Resident:
        """What the step finds on the device and leaves there."""
        return self.memory.resident

    def with_resident(
        self, resident: Resident, resident_at: Callable[[TrainingGraph, Inputs], Resident]
    ) -> PricedStep:
        """The same step where something else is resident."""
        memory = dataclasses.replace(self.memory, resident=resident)
        return dataclasses.replace(self, memory=memory, resident_at=resident_at)

    def with_margin(self, margin_bytes: int) -> PricedStep:
        """The same step with so many bytes set aside (:mod:`planner.solving.calibrate`)."""
        return dataclasses.replace(self, memory=dataclasses.replace(self.memory, margin_bytes=margin_bytes))

    def consuming(self, names: Collection[str]) -> PricedStep:
        """The same step where hooks use up these parameters' gradients (:mod:`planner.graph.consumed`)."""
        held = self.graph.holding or self.graph
        graph = consuming(held, names)
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
        return {
            leaf.name: "released" if i in graph.released else "kept" if i in graph.kept else "held"
            for i, leaf in leaves
        }

    # -- the problem -------------------------------------------------------------------------------

    @cached_property
    def problem(self) -> Problem:
        """What the solvers see."""
        name = type(self.model).__name__
        resident = self.memory.total_bytes
        return lower(self.graph, self.costs, resident_bytes=resident, name=name, grain=self.memory.grain)

    @cached_property
    def outline(self) -> Outline:
        """What a plan takes along to explain itself."""
        return Outline.of(self.graph, self.problem, self.memory.by_kind)

    @cached_property
    def baseline(self) -> Execution:
        """The step when nothing is recomputed."""
        return self.execution(list(range(len(self.problem))))

    @property
    def baseline_peak_bytes(self) -> int:
        """Its peak, the optimizer's step included."""
        return max(self.baseline.peak_bytes, self.memory.optimizer_step_bytes)

    def execution(self, steps: list[int]) -> Execution:
        """What running ``steps`` takes on the device planned for."""
        return execute(self.problem, steps, self.memory.blocks, self.memory.margin_bytes)

    def execution_of(self, schedule: Schedule) -> Execution:
        """:meth:`execution` of a solver's schedule."""
        return self.execution(steps_of(self.graph, self.problem, schedule))

    # -- what is known of the least peak -----------------------------------------------------------

    @property
    def floor_bytes(self) -> int:
        """Proved so far: no plan has a lower peak."""
        shown = self._shown
        if not shown.floor_bytes:
            shown.raise_floor(max(peak_floor(self.problem).bytes, self.memory.optimizer_step_bytes))
        return shown.floor_bytes

    @property
    def least(self) -> Answer:
        """The schedule of lowest peak that was found within ``least_limit_s``, looked for once."""
        shown = self._shown
        if shown.least is None:
            shown.least = self._least_within(self.least_limit_s)
            shown.raise_floor(max(self.floor_bytes, shown.least.floor_bytes))
        return shown.least

    def _least_within(self, limit_s: float) -> Answer:
        found = minimum_peak(self.problem, time_limit_s=limit_s)
        execution = self.execution_of(found.schedule)
        need = max(execution.peak_bytes, self.memory.optimizer_step_bytes)
        # What was proved at the solver's own budget says nothing of a larger one.
        proved_s = found.bound_seconds if need == found.budget_bytes else self.problem.total_seconds
        return Answer(
            need,
            execution,
            min(proved_s, found.seconds),
            found.floor_bytes,
            found.seconds,
            found.solver,
            found.solve_seconds,
            found.interrupted,
        )

    @property
    def minimum_peak_bytes(self) -> int:
        """The least peak for which a plan was found, the optimizer's step included."""
        return self.lightest.least.budget_bytes

    @property
    def known_minimum_bytes(self) -> int | None:
        """The same if it was looked for before, else ``None``."""
        least = self.lightest._shown.least
        return None if least is None else least.budget_bytes

    # -- other sizes -------------------------------------------------------------------------------

    def recaptured(self, model: nn.Module, joint: JointGraph) -> PricedStep:
        """The same model and settings, from another capture or at other sizes of this one."""
        graph, costs, translation = self.target.price(training_graph(joint))
        graph = consuming(graph, consumed_of(self.graph)).releasing(self.graph.released, self.graph.kept)
        captured = CapturedStep.of(model, joint, graph)
        resident = self._resident_at(graph, joint.inputs)
        return dataclasses.replace(
            self,
            captured=captured,
            costs=costs,
            memory=_static(captured, resident, self.target, self.memory.margin_bytes),
            translation=translation,
        )

    def peak_of(self, steps: list[int]) -> int:
        """Peak of a schedule, the optimizer's step included."""
        return max(self.execution(steps).peak_bytes, self.memory.optimizer_step_bytes)

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

    # -- plans -------------------------------------------------------------------------------------

    def plan_bytes(
        self, budget_bytes: int, search: Search | None = None, *, hint: PlanData | None = None
    ) -> Plan:
        """The plan for a budget in bytes; ``hint``, a plan of a like step, is where the search starts.

        Raises ``InfeasibleBudgetError`` if none is found that fits, ``PlannerError`` where the search was
        stopped before one was.
        """
        search = search or Search()
        tell = search.tell
        tell.phase("solve", f"{len(self.problem)} ops in {bytes_text(budget_bytes)}")
        if budget_bytes < self.memory.optimizer_step_bytes:
            raise self.infeasible(budget_bytes)
        found = fitted(
            self.problem,
            budget_bytes,
            self.execution_of,
            search,
            None if hint is None else self._schedule_of(hint),
        )
        if not found.fits:
            lightest = self.lightest
            if lightest is not self and not tell.stopped:
                return lightest.plan_bytes(budget_bytes, search)
            if tell.stopped and self._shown.least is None:
                raise self._stopped(found)
            tell.phase("least", LEAST)
        answer = self.or_least(found)
        if not answer.fits:
            raise self.infeasible(budget_bytes)
        tell.found(answer, self.problem.total_seconds)
        return self.plan_of(answer)

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

    def or_least(self, found: Answer) -> Answer:
        """What was found, or the least plan where nothing was and that one fits."""
        self._shown.raise_floor(max(self.floor_bytes, found.floor_bytes))
        if found.fits or found.is_infeasible or found.budget_bytes < self.least.budget_bytes:
            return found
        return dataclasses.replace(
            found,
            execution=self.least.execution,
            bound_seconds=min(found.bound_seconds, self.least.seconds),
            seconds=self.least.seconds,
            solver=self.least.solver,
        )

    def least_plan(self) -> Plan:
        """The plan of the lowest peak that was found; its budget is that peak."""
        return self.plan_of(self.least)

    def _schedule_of(self, plan: PlanData) -> Schedule | None:
        """The schedule of a plan made for other sizes, if it runs the same ops."""
        names = {op.name for op in self.problem.ops}
        return Schedule(tuple(plan.sequence)) if names == set(plan.sequence) else None

    def _stopped(self, found: Answer) -> PlannerError:
        """The error for a search that was ended before a schedule that fits was found."""
        if found.is_infeasible:
            least = self.plan_of(self._least_within(0.0))
            return _infeasible_error(least, found.budget_bytes, max(self.floor_bytes, found.floor_bytes))
        return PlannerError(
            f"planning {type(self.model).__name__} was stopped before a plan for "
            f"{bytes_text(found.budget_bytes)} was found; it is proved that none needs less than "
            f"{bytes_text(max(self.floor_bytes, found.floor_bytes))}. Let it search longer, or raise "
            "the budget"
        )

    def infeasible(self, budget_bytes: int) -> InfeasibleBudgetError:
        """The error for a budget that no plan fits, with the least that one does and what fills it."""
        error = _infeasible_error(self.least_plan(), budget_bytes, self.floor_bytes)
        held_bytes, apart = error.breakdown.get("outputs", 0), self.all_released
        if self.outputs != "held" or apart is self or held_bytes * 1000 < error.minimum_bytes:
            return error
        need_bytes = apart.least.budget_bytes
        if need_bytes >= error.minimum_bytes:
            return error
        return error.saying(
            f"{error}. The model's outputs, {bytes_text(held_bytes)}, are counted as held to the end of the "
            f"step; a loop that lets go of them before the backward, as model(**batch).loss.backward() does, "
            f"needs {_gb_enough(need_bytes)} GB: pass outputs='released'"
        )

    def frontier(
        self, budgets_bytes: Sequence[int] | None = None, search: Search | None = None, *, points: int = 8
    ) -> Frontier:
        """Overhead at each of ``budgets_bytes``, or at ``points`` budgets from the least to keep-all.

        Those are denser towards the least, where the curve is steep.  A plan for a lower budget also
        serves every higher one, so the curve never rises.  ``search.time_limit_s`` is per budget.  Where
        the search is stopped, the curve has the budgets for which there was an answer.
        """
        search = search or Search(time_limit_s=10.0)
        tell = search.tell
        if budgets_bytes is None:
            tell.phase("least", LEAST)
            low, high = self.least.budget_bytes, self.baseline_peak_bytes
            tell.heed(self.least.interrupted)
            shares = [0.0] if tell.stopped else [(k / max(1, points - 1)) ** 1.5 for k in range(points)]
            budgets = [round(low + (high - low) * share) for share in shares]
        else:
            budgets = sorted(budgets_bytes)
        tell.phase("solve", f"{len(budgets)} budgets")
        least = self._shown.least
        known = None if least is None or least.execution is None else self._named(least.execution)
        open_to = [b for b in budgets if b >= self.memory.optimizer_step_bytes]
        answers = fitted_each(self.problem, open_to, self.execution_of, search, known)
        found: list[FrontierPoint] = []
        for budget in budgets:
            answer = answers.get(budget)
            undecided = answer is not None and not (answer.fits or answer.is_infeasible)
            if undecided and tell.stopped and self._shown.least is None:
                continue
            answer = None if answer is None else self.or_least(answer)
            if answer is None or not answer.fits:
                error = self.infeasible(budget)
                found.append(FrontierPoint(budget, error.minimum_bytes, None, None, "infeasible"))
                continue
            plan = self.plan_of(answer)
            found.append(
                FrontierPoint(budget, plan.peak_bytes, plan.overhead, plan.overhead_bound, plan.status)
            )
        name = type(self.model).__name__
        return Frontier(name, self.baseline.peak_bytes, self.floor_bytes, tuple(found))

    def _named(self, execution: Execution) -> Schedule:
        return Schedule(tuple(self.problem.ops[i].name for i in execution.timeline.steps.tolist()))

    def plan_of(self, answer: Answer) -> Plan:
        """The plan that runs the schedule of ``answer``; ``ValueError`` where there is none."""
        ran = answer.execution
        if ran is None:
            raise ValueError(f"no schedule was found for {answer.budget_bytes} bytes")
        graph, memory = self.graph, self.memory
        steps = ran.timeline.steps.tolist()
        copies = copies_of(graph, ran.problem, ran.timeline)
        by_kind = bytes_over_time(ran.problem, ran.timeline, copies, memory.by_kind, ran.slack_bytes)
        peak = ran.peak_step
        breakdown = {kind: int(b[peak]) for kind, b in by_kind.items()}
        peak_op, peak_module = graph.ops[steps[peak]].name, graph.ops[steps[peak]].module
        if memory.optimizer_step_bytes > ran.peak_bytes:
            breakdown = dict.fromkeys(breakdown, 0) | memory.optimizer_breakdown()
            peak_op, peak_module = "optimizer.step", ""
        flops = [self.costs.flops.get(op.name, 0) for op in graph.ops]
        return Plan(
            model_name=type(self.model).__name__,
            budget_bytes=answer.budget_bytes,
            peak_bytes=max(ran.peak_bytes, memory.optimizer_step_bytes),
            baseline_peak_bytes=self.baseline_peak_bytes,
            status="optimal" if answer.is_optimal else "feasible",
            placements=placements_of(graph, self.costs.seconds, steps, copies),
            breakdown=breakdown,
            timeline=ran.live_bytes,
            timeline_by_kind=by_kind,
            baseline_timeline=self.baseline.live_bytes,
            sequence=tuple(graph.ops[i].name for i in steps),
            op_count=len(graph.ops),
            step_flops=sum(flops),
            recompute_flops=sum(flops[i] for i in steps) - sum(flops),
            floor_bytes=self.floor_bytes,
            optimizer_step_bytes=memory.optimizer_step_bytes,
            solver=answer.solver,
            solve_s=answer.solve_seconds,
            reserved_bytes=ran.reserved_bytes,
            outputs=self.output_states,
            peak_op=peak_op,
            peak_module=peak_module,
            outline=self.outline,
            **self._times(ran, answer.bound_seconds),
            **self._identity(),
            _origin=self,
        )

    def _times(self, ran: Execution, bound_seconds: float) -> dict[str, Any]:
        """Overhead and its bound, as shares of the step's seconds."""
        total = self.problem.total_seconds
        overhead = ran.timeline.recompute_seconds / total if total else 0.0
        # The two are equal for an optimal plan, but are rounded differently.
        proved = min(overhead, max(0.0, bound_seconds / total - 1.0)) if total else 0.0
        return {"overhead": overhead, "overhead_bound": proved, "step_s": total}

    def _identity(self) -> dict[str, Any]:
        """What a plan is for: the step captured, the device, the source of its costs."""
        leaves = self.joint.template.leaves
        return {
            "cost_source": self.costs.source,
            "cost_device": self.costs.device,
            "device": str(self.graph.device),
            "planned_for": self.target.name,
            "torch_version": str(torch.__version__),
            "fingerprint": self.captured.fingerprint,
            "differentiated": tuple(i for i, leaf in enumerate(leaves) if leaf.differentiated),
            "inputs": self.joint.inputs,
            "varying_dims": None if self.varying is None else self.varying.captures.dims,
        }


def _gb_enough(need_bytes: int) -> str:
    """GB, rounded up: the number works as a budget."""
    return f"{math.ceil(need_bytes / 1e3) / 1e6:.6f}"


def _infeasible_error(least: PlanData, budget_bytes: int, floor_bytes: int) -> InfeasibleBudgetError:
    """For a budget that no plan fits: what ``least``, the plan of the lowest peak, needs, what fills it."""
    need_bytes = least.peak_bytes
    largest = sorted(least.breakdown.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{k.replace('_', ' ')} {bytes_text(b)}" for k, b in largest if b > need_bytes / 1000)
    decided = (
        f"it is proved that none needs less than {floor_bytes / 1e9:.4g} GB"
        if budget_bytes < floor_bytes
        else f"none was found between the proved floor of {floor_bytes / 1e9:.4g} GB and there"
    )
    released = ", with the outputs let go of before the backward" if least.released else ""
    return InfeasibleBudgetError(
        f"no plan for {least.model_name} fits {budget_bytes / 1e9:.4g} GB. The least budget "
        f"with a plan is {_gb_enough(need_bytes)} GB{released}, and {decided}. At that plan's peak: {parts}. "
        "Raise the budget, or make the batch smaller",
        budget_bytes=budget_bytes,
        minimum_bytes=need_bytes,
        floor_bytes=floor_bytes,
        breakdown=dict(least.breakdown),
    )
