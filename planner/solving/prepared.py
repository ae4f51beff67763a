"""One training step, captured and priced: many budgets can be planned from it without another trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from planner._compat import modes_set_aside
from planner.capture.expectation import Expectation, expectation_of
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, LossFn, capture
from planner.capture.sizes import Dynamic, varying_dims
from planner.capture.symbolic import Captures, capture_varying
from planner.capture.wrappers import unwrapped
from planner.costs.op_costs import Costs
from planner.costs.target import CostSource, Target, target_for
from planner.costs.translation import Translation
from planner.devices import allocator
from planner.errors import InfeasibleBudgetError, PlannerError, StalePlanError
from planner.frontier import Frontier, frontier_of
from planner.graph.captured import fingerprint_of
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.measure.step import device_of, held
from planner.memory import footprint
from planner.memory.execution import Execution, execute
from planner.memory.lifetimes import bytes_over_time, copies_of
from planner.memory.resident import OptimizerLike, Resident, budget_bytes_of, resident_of
from planner.plan import Plan
from planner.plans.outline import Outline
from planner.plans.placements import placements_of
from planner.progress import Reporter
from planner.runtime.variants import OnLarger, Varying
from planner.solving.fit import LEAST, fitted, infeasible_error
from planner.solving.lowering import as_executed, lower, steps_of
from planner.units import bytes_text
from solvers import Problem, Schedule, Solution, minimum_peak
from solvers.bounds.lower_bounds import peak_floor

__all__ = ["CostSource", "Prepared", "prepare", "prepare_for"]


def prepare(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    dynamic: Dynamic = False,
    on_larger: OnLarger = "replan",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    progress: Reporter | None = None,
) -> Prepared:
    """Capture the step, restate it as ops and storages, price every op, count what is resident.

    Arguments as for :func:`planner.plan`; ``solver`` and ``time_limit_s`` are for plans that the step itself
    asks for: the least one, and those for larger batches.
    """
    tell = progress or Reporter()
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
            varying = Varying(Captures(dims, joint), on_larger, solver, time_limit_s)
        else:
            joint = capture(model, inputs, loss_fn)
    with modes_set_aside():  # a model without memory may be planned under the mode it was built in
        graph = training_graph(joint)
        tell.phase("profile", f"{len(graph.ops)} ops")
        graph, priced, translation = target.price(graph)
        arguments = joint.inputs.args, joint.inputs.kwargs
        resident = resident_of(model, arguments, optimizer, device=graph.device, as_on=target.device)
        expected = expectation_of(model, *joint.inputs.flatten())
    return Prepared(
        model,
        joint,
        graph,
        priced,
        resident,
        expected,
        loss_fn,
        varying,
        least_limit_s=time_limit_s,
        target=target,
        translation=translation,
    )


def prepare_for(plan: Plan, model: nn.Module) -> Prepared:
    """Capture ``model`` again for a plan read from a file; ``StalePlanError`` if it is not the same step."""
    from planner.plans.serialize import inputs_of

    inputs = inputs_of(plan, device_of(model, None, None))
    joint = capture(model, inputs, used=frozenset(plan.differentiated), dims=plan.varying_dims)
    graph = training_graph(joint)
    resident = Resident(0, 0, 0, 0)
    expected = expectation_of(model, *joint.inputs.flatten())
    dims = plan.varying_dims
    varying = None if dims is None else Varying(Captures(dims, joint))
    target = Target("auto", graph.device)
    prepared = Prepared(model, joint, graph, None, resident, expected, None, varying, target=target)
    prepared.check_is_of(plan)
    return prepared


@dataclass(frozen=True, eq=False)
class Prepared:
    """A captured step with its costs; the common ground of all plans made from it.

    ``costs`` is ``None`` where a plan is only to be executed, not made.
    ``varying`` is ``None`` where all sizes are fixed.
    ``resident_at`` says what is resident where the step is captured again or evaluated at other sizes;
    ``None``: what is now, but for the inputs.
    ``least_limit_s`` bounds the search for the least feasible budget.
    ``target`` is the device planned for, and ``translation`` what differs there from the capture; ``None``
    if nothing does.
    ``margin_bytes`` are set aside for what a measured step took beyond its prediction
    (:mod:`planner.solving.calibrate`).
    """

    model: nn.Module
    joint: JointGraph
    graph: TrainingGraph
    costs: Costs | None
    resident: Resident
    expected: Expectation
    loss_fn: LossFn | None
    varying: Varying | None = None
    resident_at: Callable[[TrainingGraph, Inputs], Resident] | None = None
    least_limit_s: float = 30.0
    margin_bytes: int = 0
    target: Target = field(default_factory=lambda: Target("auto", torch.device("cpu")))
    translation: Translation | None = None

    # -- the problem -------------------------------------------------------------------------------

    @cached_property
    def tangent_bytes(self) -> int:
        """Bytes of output gradients that come from outside and are there throughout."""
        return footprint.tangent_bytes(self.graph, self.target.grain)

    @cached_property
    def constant_bytes(self) -> int:
        """Bytes of tensors the trace baked into the graph or that ``loss_fn`` holds itself."""
        arguments = self.joint.inputs.args, self.joint.inputs.kwargs
        return footprint.constant_bytes(self.graph, self.target.grain, held(self.model, arguments))

    @cached_property
    def library_bytes(self) -> int:
        """Bytes that cuBLAS keeps for itself; see :mod:`planner.devices.state`."""
        return sum(footprint.cublas_blocks(self.graph, self.target.capability))

    @cached_property
    def blocks(self) -> allocator.Resident | None:
        """What a CUDA allocator has handed out when the step begins; ``None`` where there is no such one."""
        if self.target.device.type != "cuda":
            return None
        further = [self.tangent_bytes, self.constant_bytes]
        further += footprint.cublas_blocks(self.graph, self.target.capability)
        return footprint.blocks_of(self.model, self.joint.inputs, self.resident, further, self.graph.device)

    @cached_property
    def resident_slack_bytes(self) -> int:
        """What the allocator has handed out for ``blocks`` beyond what was asked for."""
        if self.blocks is None or not allocator.is_default():
            return 0
        asked_bytes = (
            self.resident.total_bytes + self.constant_bytes + self.tangent_bytes + self.library_bytes
        )
        return self.blocks.handed_out_bytes - asked_bytes

    @property
    def further(self) -> dict[str, int]:
        """What is there throughout and not in ``resident``, by kind."""
        slack = {} if self.blocks is None else {"allocator_slack": self.resident_slack_bytes}
        return {
            "output_gradients": self.tangent_bytes,
            "library_workspace": self.library_bytes,
            **slack,
            "margin": self.margin_bytes,
        }

    @cached_property
    def problem(self) -> Problem:
        """What the solvers see."""
        if self.costs is None:
            raise PlannerError("this step was captured to execute a plan, not to make one")
        resident = self.resident.total_bytes + self.constant_bytes + sum(self.further.values())
        name = type(self.model).__name__
        return lower(self.graph, self.costs, resident_bytes=resident, name=name, grain=self.target.grain)

    @cached_property
    def outline(self) -> Outline:
        """What a plan takes along to explain itself."""
        return Outline.of(self)

    @cached_property
    def baseline(self) -> Execution:
        """The step when nothing is recomputed."""
        return self.execution(list(range(len(self.problem))))

    def execution(self, steps: list[int]) -> Execution:
        """What running ``steps`` takes on the device planned for."""
        return execute(self.graph, self.problem, steps, self.blocks, self.margin_bytes)

    def played(self, schedule: Schedule) -> Execution:
        """:meth:`execution` of a solver's schedule."""
        return self.execution(steps_of(self.graph, self.problem, schedule))

    @cached_property
    def optimizer_step_bytes(self) -> int:
        """Bytes during the optimizer's step, when the activations are gone."""
        r = self.resident
        if not r.optimizer_state_bytes and not r.optimizer_step_bytes:
            return 0
        slack = self.resident_slack_bytes
        return r.total_bytes + self.library_bytes + slack + self._gradient_bytes + r.optimizer_step_bytes

    @cached_property
    def _gradient_bytes(self) -> int:
        return footprint.gradient_bytes(self.graph, self.target.grain)

    @cached_property
    def floor_bytes(self) -> int:
        """Proved: no plan has a lower peak (generator states, which a plan may do without, left out)."""
        without_states = as_executed(self.graph, self.problem, [])
        return max(peak_floor(without_states).bytes, self.optimizer_step_bytes)

    @cached_property
    def least(self) -> Solution:
        """The plan of lowest peak that was found within ``least_limit_s``."""
        return minimum_peak(self.problem, time_limit_s=self.least_limit_s)

    @cached_property
    def minimum_peak_bytes(self) -> int:
        """The least peak for which a plan was found, the optimizer's step included."""
        return self.peak_of(steps_of(self.graph, self.problem, self.least.schedule))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the captured step: its calls, sizes, gradients and what it depends on."""
        return fingerprint_of(self.graph, self.expected)

    def check_is_of(self, plan: Plan) -> None:
        """``StalePlanError`` unless ``plan`` was made for this very step."""
        if self.fingerprint != plan.fingerprint:
            raise StalePlanError(
                f"the plan was made for another step than that of this {type(self.model).__name__} "
                f"(fingerprint {plan.fingerprint[:12]} with torch {plan.torch_version}, here "
                f"{self.fingerprint[:12]} with torch {torch.__version__}): the model's structure, its sizes, "
                "its training flags, autocast or the versions of its libraries differ; make a new plan"
            )

    def steps(self, sequence: Sequence[str]) -> list[int]:
        """Op positions of a sequence of names; those of a loss outside this graph are left out."""
        position = {op.name: i for i, op in enumerate(self.graph.ops)}
        missing = [n for n in sequence if n not in position and not n.startswith("loss/")]
        if missing and missing != ["ones_like_loss"]:
            raise StalePlanError(f"the plan runs {missing[0]!r}, which the captured step does not have")
        return [position[name] for name in sequence if name in position]

    def forward_steps(self, sequence: Sequence[str]) -> int:
        """How many leading names of ``sequence`` run in the forward, before the loss."""
        phase = {op.name: op.phase for op in self.graph.ops}
        return next((t for t, name in enumerate(sequence) if phase.get(name) != "forward"), len(sequence))

    # -- other sizes -------------------------------------------------------------------------------

    def again(self, model: nn.Module, joint: JointGraph) -> Prepared:
        """The same model and settings, from another capture or at other sizes of this one."""
        graph, costs, translation = self.target.price(training_graph(joint))
        return dataclasses.replace(
            self,
            model=model,
            joint=joint,
            graph=graph,
            costs=costs,
            translation=translation,
            resident=self._resident_at(graph, joint.inputs),
            expected=expectation_of(model, *joint.inputs.flatten()),
        )

    def peak_of(self, steps: list[int]) -> int:
        """Peak of a schedule, the optimizer's step included."""
        return max(self.execution(steps).peak_bytes, self.optimizer_step_bytes)

    def peak_at(self, value_bytes: np.ndarray, inputs: Inputs, steps: list[int]) -> int:
        """Peak of a schedule where each of the graph's values has ``value_bytes``, shape (V,).

        Workspace was measured at this step's sizes; it is taken to grow with the largest value.
        """
        assert self.costs is not None
        own = np.array([v.bytes for v in self.graph.values], dtype=np.int64)
        growth = max(1.0, float((value_bytes / np.maximum(own, 1)).max()))
        workspace = {name: math.ceil(b * growth) for name, b in self.costs.workspace_bytes.items()}
        values = zip(self.graph.values, value_bytes.tolist(), strict=True)
        graph = dataclasses.replace(
            self.graph, values=tuple(dataclasses.replace(v, bytes=b) for v, b in values)
        )
        at = dataclasses.replace(
            self,
            graph=graph,
            costs=dataclasses.replace(self.costs, workspace_bytes=workspace),
            resident=self._resident_at(graph, inputs),
        )
        return at.peak_of(steps)

    def _resident_at(self, graph: TrainingGraph, inputs: Inputs) -> Resident:
        if self.resident_at is not None:
            return self.resident_at(graph, inputs)
        arguments = inputs.args, inputs.kwargs
        found = resident_of(self.model, arguments, device=graph.device, as_on=self.target.device)
        return dataclasses.replace(self.resident, inputs_bytes=found.inputs_bytes)

    # -- plans -------------------------------------------------------------------------------------

    def plan(
        self,
        budget_gb: float,
        *,
        solver: str = "auto",
        time_limit_s: float = 30.0,
        progress: Reporter | None = None,
    ) -> Plan:
        """The plan for one budget; errors as :func:`planner.plan`."""
        return self.plan_bytes(
            budget_bytes_of(budget_gb), solver=solver, time_limit_s=time_limit_s, progress=progress
        )

    def plan_bytes(
        self,
        budget_bytes: int,
        *,
        solver: str = "auto",
        time_limit_s: float = 30.0,
        progress: Reporter | None = None,
        hint: Plan | None = None,
    ) -> Plan:
        """``plan`` for a budget in bytes; ``hint``, a plan of a like step, is where the search starts."""
        tell = progress or Reporter()
        tell.phase("solve", f"{len(self.problem)} ops in {bytes_text(budget_bytes)}")
        if budget_bytes < self.optimizer_step_bytes:
            raise self.infeasible(budget_bytes)
        found = fitted(
            self.problem,
            budget_bytes,
            self.played,
            solver=solver,
            time_limit_s=time_limit_s,
            progress=tell.searching(self.problem.total_seconds),
            hint=None if hint is None else self._schedule_of(hint),
        )
        if found is None or not found.fits:
            tell.phase("least", LEAST)
        solution = self.or_least(found, budget_bytes)
        if solution is None:
            raise self.infeasible(budget_bytes)
        tell.found(solution, self.problem.total_seconds)
        return self.plan_of(solution)

    def or_least(self, found: Solution | None, budget_bytes: int) -> Solution | None:
        """What a solver found, or the schedule of the least plan where only that one fits.

        It may fit where the solvers proved that nothing does: they count the state of the generator
        before every random op, and a plan that replays none of them runs without.
        """
        if found is not None and found.fits:
            return found
        if budget_bytes < self.minimum_peak_bytes:
            return None
        return dataclasses.replace(
            self.least,
            budget_bytes=budget_bytes,
            peak_bytes=self.minimum_peak_bytes,
            bound_seconds=self.problem.total_seconds if found is None else found.bound_seconds,
            status="feasible",
        )

    def least_plan(self) -> Plan:
        """The plan of the lowest peak that was found; its budget is that peak."""
        return self.plan_of(self.least)

    def _schedule_of(self, plan: Plan) -> Schedule | None:
        """The schedule of a plan made for other sizes, if it runs the same ops."""
        names = {op.name for op in self.problem.ops}
        return Schedule(tuple(plan.sequence)) if names == set(plan.sequence) else None

    def infeasible(self, budget_bytes: int) -> InfeasibleBudgetError:
        """The error for a budget that no plan fits, with the least that one does and what fills it."""
        least = self.plan_of(self.least)
        need = max(least.peak_bytes, self.optimizer_step_bytes)
        return infeasible_error(least, budget_bytes, need, self.floor_bytes)

    def frontier(
        self,
        budgets_gb: Sequence[float] | None = None,
        *,
        points: int = 8,
        solver: str = "auto",
        time_limit_s: float = 10.0,
        progress: Reporter | None = None,
    ) -> Frontier:
        """Overhead at each of ``budgets_gb``, or at ``points`` budgets from the least to keep-all.

        Those are denser towards the least, where the curve is steep.  A plan for a lower budget also
        serves every higher one, so the curve never rises.  ``time_limit_s`` is per budget.
        """
        return frontier_of(
            self, budgets_gb, points=points, solver=solver, time_limit_s=time_limit_s, progress=progress
        )

    def plan_of(self, solution: Solution) -> Plan:
        """The plan that runs a solver's schedule."""
        graph, problem, costs = self.graph, self.problem, self.costs
        assert costs is not None
        steps = steps_of(graph, problem, solution.schedule)
        ran = self.execution(steps)
        timeline = ran.timeline
        copies = copies_of(graph, ran.problem, timeline)
        resident = dataclasses.replace(
            self.resident, buffers_bytes=self.resident.buffers_bytes + self.constant_bytes
        )
        by_kind = bytes_over_time(ran.problem, timeline, copies, resident, self.further, ran.slack_bytes)
        peak = ran.peak_step
        breakdown = {kind: int(b[peak]) for kind, b in by_kind.items()}
        peak_op, peak_module = graph.ops[steps[peak]].name, graph.ops[steps[peak]].module
        if self.optimizer_step_bytes > ran.peak_bytes:
            breakdown = self._optimizer_breakdown(breakdown)
            peak_op, peak_module = "optimizer.step", ""
        total = problem.total_seconds
        overhead = timeline.recompute_seconds / total if total else 0.0
        # The two are equal for an optimal plan, but are rounded differently.
        proved = min(overhead, max(0.0, solution.bound_seconds / total - 1.0)) if total else 0.0
        flops = [costs.flops.get(op.name, 0) for op in graph.ops]
        template = self.joint.template
        return Plan(
            model_name=type(self.model).__name__,
            budget_bytes=solution.budget_bytes,
            peak_bytes=max(ran.peak_bytes, self.optimizer_step_bytes),
            baseline_peak_bytes=max(self.baseline.peak_bytes, self.optimizer_step_bytes),
            overhead=overhead,
            overhead_bound=proved,
            status="optimal" if solution.status == "optimal" else "feasible",
            placements=placements_of(graph, costs.seconds, steps, copies),
            breakdown=breakdown,
            timeline=ran.live_bytes,
            timeline_by_kind=by_kind,
            baseline_timeline=self.baseline.live_bytes,
            sequence=tuple(graph.ops[i].name for i in steps),
            op_count=len(graph.ops),
            step_s=total,
            step_flops=sum(flops),
            recompute_flops=sum(flops[i] for i in steps) - sum(flops),
            floor_bytes=self.floor_bytes,
            optimizer_step_bytes=self.optimizer_step_bytes,
            solver=solution.solver,
            solve_s=solution.solve_seconds,
            cost_source=costs.source,
            cost_device=costs.device,
            device=str(graph.device),
            planned_for=self.target.name,
            reserved_bytes=ran.reserved_bytes,
            torch_version=str(torch.__version__),
            fingerprint=self.fingerprint,
            peak_op=peak_op,
            peak_module=peak_module,
            differentiated=tuple(i for i, leaf in enumerate(template.leaves) if leaf.differentiated),
            input_spec=self.joint.inputs,
            varying_dims=None if self.varying is None else self.varying.captures.dims,
            _prepared=self,
        )

    def _optimizer_breakdown(self, at_peak: dict[str, int]) -> dict[str, int]:
        r = self.resident
        return dict.fromkeys(at_peak, 0) | {
            "parameters": r.parameters_bytes,
            "buffers": r.buffers_bytes,
            "optimizer_state": r.optimizer_state_bytes,
            "inputs": r.inputs_bytes,
            "library_workspace": self.library_bytes,
            **({} if self.blocks is None else {"allocator_slack": self.resident_slack_bytes}),
            "gradients": self._gradient_bytes + r.gradients_bytes,
            "workspace": r.optimizer_step_bytes,
        }
