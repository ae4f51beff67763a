"""A step with its costs: any number of plans for any number of budgets are made from it.

What is the same for a step of one graph (:class:`planner.solving.priced.PricedStep`) and one in regions
(:class:`planner.solving.in_regions.JoinedStep`): from the step as ops and storages to a problem, from a
budget to a schedule that fits it, from that to a plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.costs.op_costs import Costs
from planner.costs.target import Target
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.frontier import Frontier, FrontierPoint
from planner.graph.training_graph import TrainingGraph
from planner.memory.execution import Execution, execute
from planner.memory.lifetimes import bytes_over_time, copies_of
from planner.memory.resident import Resident
from planner.memory.static import StaticMemory
from planner.options import OutputsMode, Search
from planner.plan import Plan, Whole
from planner.plans.lowering import lower
from planner.plans.outline import Outline
from planner.plans.placements import placements_of
from planner.plans.plan_data import OutputState, PlanData
from planner.plans.within_budget import WithinBudget
from planner.solving.fit import Answer, fitted, fitted_each
from planner.solving.kept import KeptSchedule, Recalled, never_rising
from planner.units import bytes_text, gb_enough
from solvers import Problem, Schedule, minimum_peak
from solvers.bounds.lower_bounds import peak_floor

__all__ = ["BudgetedStep", "SeenStep"]

LEAST = "the least budget that has a plan"


class SeenStep(Protocol):
    """A step as it was captured: a :class:`~planner.graph.captured.CapturedStep`, or one in regions."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def graph(self) -> TrainingGraph: ...
    @property
    def inputs(self) -> Inputs: ...
    @property
    def fingerprint(self) -> str: ...


class _Shown:
    """What the searches on one problem have shown so far."""

    def __init__(self) -> None:
        self.least: Answer | None = None
        self.lowest: Answer | None = None  # the same, told in a refusal, as slow as it was found
        self.floor_bytes = 0  # proved: no schedule's peak is lower
        self.first: Schedule | None = None  # where a search may begin

    def raise_floor(self, floor_bytes: int) -> None:
        self.floor_bytes = max(self.floor_bytes, floor_bytes)


@dataclass(frozen=True, eq=False)
class BudgetedStep(ABC):
    """A step with its costs; the common ground of all plans made from it.

    ``memory``         what is there throughout, on the device planned for, which is ``target``.
    ``loss_fn``        the loss outside the model, if there is one.
    ``least_limit_s``  seconds of search for the least feasible budget.
    ``outputs``        until when the caller holds them, as asked for.
    """

    captured: SeenStep
    costs: Costs
    memory: StaticMemory
    target: Target
    loss_fn: LossFn | None = None
    least_limit_s: float = 30.0
    outputs: OutputsMode = "held"
    _shown: _Shown = field(default_factory=_Shown, init=False, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model captured."""
        return self.captured.model

    @property
    def graph(self) -> TrainingGraph:
        """Its step as ops and storages."""
        return self.captured.graph

    @property
    def resident(self) -> Resident:
        """What the step finds on the device and leaves there."""
        return self.memory.resident

    def with_margin(self, margin_bytes: int) -> Self:
        """The same step with so many bytes set aside (:mod:`planner.solving.calibrate`)."""
        return replace(self, memory=replace(self.memory, margin_bytes=margin_bytes))

    # -- what differs from kind to kind ------------------------------------------------------------

    @property
    def whole(self) -> Whole | None:
        """The same where it is one graph, which has a program of its own."""
        return None

    @abstractmethod
    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model`` train as ``plan``, one of this step, says.  Returns the model."""

    @abstractmethod
    def verified(
        self, plan: Plan, model: nn.Module, inputs: object, loss_fn: LossFn | None, seed: int
    ) -> WithinBudget:
        """The report of a step of ``model`` with ``plan``, one of this step, and without."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Places of what the model returns and no graph can carry, which is not handed out."""
        return ()

    @property
    def lightest(self) -> BudgetedStep:
        """The step whose least peak is the least that may be planned for."""
        return self

    @property
    def output_states(self) -> dict[str, OutputState]:
        """What is planned for, by the name of each output."""
        return {}

    def steps_of(self, schedule: Schedule) -> list[int]:
        """Op positions in the order in which a solver's schedule is run."""
        return schedule.steps(self.problem)

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
        return self.execution(self.steps_of(schedule))

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
            least = self._least_within(self.least_limit_s)
            if shown.lowest is not None and shown.lowest.budget_bytes < least.budget_bytes:
                least = shown.lowest
            shown.least = least
            shown.raise_floor(max(self.floor_bytes, least.floor_bytes))
        return shown.least

    def _least_within(self, limit_s: float, *, fast: bool = True) -> Answer:
        """The lowest that a search finds, or that an earlier process's did; ``fast``: made fast, too."""
        search = Search(time_limit_s=limit_s)
        kept = KeptSchedule.of(self.problem, None, search, "least, fast" if fast else "least")
        recalled = Recalled() if kept is None else kept.recall(search, self.execution_of)
        if recalled.answer is not None:
            return self._stepping(recalled.answer)
        found = self._lowest(limit_s, fast=fast)
        if recalled.hint is not None:  # of a search of less time, or at other seconds
            before, total_s = self.execution_of(recalled.hint), self.problem.total_seconds
            if before.peak_bytes < found.peak_bytes:
                seconds = total_s + before.timeline.recompute_seconds
                peak_bytes = before.peak_bytes
                found = replace(found, budget_bytes=peak_bytes, execution=before, seconds=seconds)
                found = replace(found, bound_seconds=total_s)
        if kept is not None:
            kept.keep(found, search)
        return self._stepping(found)

    def _stepping(self, least: Answer) -> Answer:
        """``least`` with room for the optimizer's step; what was proved says nothing of a larger budget."""
        need = self.memory.optimizer_step_bytes
        if need <= least.budget_bytes:
            return least
        return replace(least, budget_bytes=need, bound_seconds=self.problem.total_seconds)

    def _lowest(self, limit_s: float, *, fast: bool) -> Answer:
        found = minimum_peak(self.problem, time_limit_s=limit_s, fast=fast)
        execution = self.execution_of(found.schedule)
        need = execution.peak_bytes
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

    def peak_of(self, steps: list[int]) -> int:
        """Peak of a schedule, the optimizer's step included."""
        return max(self.execution(steps).peak_bytes, self.memory.optimizer_step_bytes)

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
        found = self._found(budget_bytes, search, None if hint is None else self.schedule_of(hint))
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

    def begin_from(self, answer: Answer) -> None:
        """Let searches that have no better place begin from what was found before."""
        if answer.execution is not None:
            self._shown.first = self._named(answer.execution)

    def _found(self, budget_bytes: int, search: Search, hint: Schedule | None) -> Answer:
        """The answer for a budget: an earlier process's, if it left one."""
        hint = hint or self._shown.first
        kept = KeptSchedule.of(self.problem, budget_bytes, search)
        if kept is None:
            return fitted(self.problem, budget_bytes, self.execution_of, search, hint)
        recalled = kept.recall(search, self.execution_of)
        if recalled.answer is not None:
            return recalled.answer
        found = fitted(self.problem, budget_bytes, self.execution_of, search, recalled.hint or hint)
        kept.keep(found, search)
        return found

    def keep(self, answer: Answer, search: Search) -> None:
        """Leave what was found beside the training for the next process."""
        kept = KeptSchedule.of(self.problem, answer.budget_bytes, search)
        if kept is not None:
            kept.keep(answer, search)

    def _found_each(self, budgets: list[int], search: Search, hint: Schedule | None) -> dict[int, Answer]:
        """:meth:`_found` for each; those that no earlier process has an answer for are solved together."""
        places = {b: KeptSchedule.of(self.problem, b, search) for b in budgets}
        recalled = {b: kept.recall(search, self.execution_of) for b, kept in places.items() if kept}
        answers = {b: found.answer for b, found in recalled.items() if found.answer is not None}
        left = [b for b in budgets if b not in answers]
        if not left:
            return never_rising(answers.values())
        below = [ran for b, found in answers.items() if b <= left[0] and (ran := found.execution)]
        first = recalled[left[0]].hint if left[0] in recalled else None
        start = first or (self._named(below[-1]) if below else hint)
        for b, found in fitted_each(self.problem, left, self.execution_of, search, start).items():
            answers[b] = found
            if (kept := places[b]) is not None:
                kept.keep(found, search)
        return never_rising(answers[b] for b in sorted(answers))

    def or_least(self, found: Answer) -> Answer:
        """What was found, or the least plan where nothing was and that one fits."""
        self._shown.raise_floor(max(self.floor_bytes, found.floor_bytes))
        if found.fits or found.is_infeasible or found.budget_bytes < self.least.budget_bytes:
            return found
        return replace(
            found,
            execution=self.least.execution,
            bound_seconds=min(found.bound_seconds, self.least.seconds),
            seconds=self.least.seconds,
            solver=self.least.solver,
            searched_on=self.least.searched_on,
        )

    def least_plan(self) -> Plan:
        """The plan of the lowest peak that was found; its budget is that peak."""
        return self.plan_of(self.least)

    def schedule_of(self, plan: PlanData) -> Schedule | None:
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
        shown = self._shown
        least = shown.least or shown.lowest
        if least is None:  # nobody waits for that plan to be made fast
            least = shown.lowest = self._least_within(self.least_limit_s, fast=False)
            shown.raise_floor(max(self.floor_bytes, least.floor_bytes))
        return _infeasible_error(self.plan_of(least), budget_bytes, self.floor_bytes)

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
        answers = self._found_each(open_to, search, known)
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
            searched_on=answer.searched_on,
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
        return {
            "cost_source": self.costs.source,
            "cost_device": self.costs.device,
            "device": str(self.graph.device),
            "planned_for": self.target.name,
            "torch_version": str(torch.__version__),
            "fingerprint": self.captured.fingerprint,
            "differentiated": (),
            "inputs": self.captured.inputs,
        }


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
    if least.chunked:
        released += f", with the loss in {max(of.chunks for of in least.chunked)} chunks"
    return InfeasibleBudgetError(
        f"no plan for {least.model_name} fits {budget_bytes / 1e9:.4g} GB. The least budget "
        f"with a plan is {gb_enough(need_bytes)} GB{released}, and {decided}. At that plan's peak: {parts}. "
        "Raise the budget, or make the batch smaller",
        budget_bytes=budget_bytes,
        minimum_bytes=need_bytes,
        floor_bytes=floor_bytes,
        breakdown=dict(least.breakdown),
    )
