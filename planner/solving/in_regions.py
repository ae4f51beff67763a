"""A step in regions with its costs: plans for any budget are made from it, as from a step of one graph."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.module import unwrapped
from planner.capture.outputs import LossFn
from planner.capture.refusals import refuse_unplannable
from planner.costs.target import CostSource, Target, target_for
from planner.errors import PlannerError, TraceError
from planner.graph.training_graph import TrainingGraph
from planner.memory.execution import Execution, execute
from planner.memory.lifetimes import copies_of
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import Resident, resident_of
from planner.memory.static import StaticMemory
from planner.options import CaptureMode, Search
from planner.plan import Plan
from planner.plans.lowering import lower
from planner.plans.plan_data import PlanData, RegionSummary
from planner.plans.within_budget import WithinBudget
from planner.regions.forward import RegionsForward, Solved, apply_plan
from planner.regions.join import join
from planner.regions.joined import Joined, RecordedStep, parts
from planner.regions.kept import Foresight, Own
from planner.regions.observe import NotInRegions, observe
from planner.regions.proposal import proposal
from planner.regions.record import Record
from planner.regions.session import Session
from planner.runtime.apply import put, restored
from planner.runtime.verify import verify
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from planner.solving.priced import PricedStep
from solvers import Schedule

__all__ = ["MOST_LEFT", "JoinedStep", "captured_as", "step_in_regions", "taken_in"]


log = logging.getLogger(__name__)

# The part of what a step holds that its regions made: where it is less, and Dynamo left functions to eager
# for their loops, these are followed.
MOST_LEFT = 0.5


@dataclass(frozen=True, eq=False)
class JoinedStep(BudgetedStep):
    """A recorded step in regions with its costs."""

    captured: RecordedStep
    session: Session | None = None  # that recorded it
    why: str = ""  # it is not one graph
    calls: tuple[Any, ...] = ()  # the session's, of the recorded step

    @classmethod
    def of(
        cls,
        record: Record,
        model: nn.Module,
        inputs: Inputs,
        resident: Resident,
        target: Target,
        *,
        loss_fn: LossFn | None = None,
        least_limit_s: float = 30.0,
        session: Session | None = None,
        margin: float = 1.0,
    ) -> JoinedStep:
        """The step of ``record``; ``resident``: what it finds on the device and leaves there.

        ``margin``  the share that is counted of what steps may hold more that the session has yet to see.

        Raises ``ValueError`` for a record in which something is read before it is made.
        """
        known = {} if session is None else session.plans.sizes.get(session.kind, {})
        joined = join(record, known, margin=margin)
        captured = RecordedStep(model, inputs, joined)
        memory = StaticMemory(captured, resident, target.device, target.grain, target.capability)
        return cls(
            captured,
            joined.costs,
            memory,
            target,
            loss_fn=loss_fn,
            least_limit_s=least_limit_s,
            session=session,
            calls=() if session is None else tuple(session.calls),
        )

    @property
    def joined(self) -> Joined:
        """The step as one graph, and the way back to its regions."""
        return self.captured.joined

    @property
    def record(self) -> Record:
        """What the step was seen to do."""
        return self.joined.record

    def steps_of(self, schedule: Schedule) -> list[int]:
        """Op positions of a solver's schedule, each where its region can run it."""
        return self.joined.normal(schedule.steps(self.problem))

    def parts(self, plan: Plan) -> list[tuple[list[int], int]]:
        """What each call runs of a plan for this step: positions in its own graph, and its turn."""
        return parts(self.joined, self.positions(plan))

    def positions(self, plan: PlanData) -> list[int]:
        """Op positions in the order in which a plan for this step runs them."""
        position = {op.name: i for i, op in enumerate(self.graph.ops)}
        return [position[name] for name in plan.sequence]

    def schedule_of(self, plan: PlanData) -> Schedule | None:
        """That of a plan made for other sizes, or by another process, if it runs the same ops of regions."""
        steps = self.joined.named(plan.sequence)
        return None if steps is None else Schedule(tuple(self.graph.ops[i].name for i in steps))

    def as_run_here(self, received: PlanData, budget_bytes: int) -> Plan | None:
        """The plan that another rank made of the same step, with what it takes here; ``None`` if that is over
        the budget, or it is of another step.
        """
        schedule = self.schedule_of(received)
        if received.fingerprint != self.captured.fingerprint or schedule is None:
            return None
        ran, total = self.execution_as(received, schedule, budget_bytes), self.problem.total_seconds
        if ran.peak_bytes > budget_bytes:
            return None
        seconds = total + ran.timeline.recompute_seconds
        # what was proved there is proved here where nothing is held that was not there
        least = self._least_share(received) if ran.peak_bytes == received.peak_bytes else 0.0
        bound = total + least * received.overhead_bound * received.step_s
        return self.plan_of(
            Answer(
                budget_bytes,
                ran,
                min(bound, seconds),
                self.floor_bytes,
                seconds=seconds,
                solver=received.solver,
                solve_seconds=received.solve_s,
            )
        )

    def execution_as(self, received: PlanData, schedule: Schedule, budget_bytes: int) -> Execution:
        """What running ``schedule``, that of ``received``, takes here in a budget."""
        return self.execution_of(schedule)

    def _least_share(self, received: PlanData) -> float:
        """Each op takes at least this share of what it takes by the costs of ``received``."""
        there = {op.name: op.again_s for op in received.outline.problem.ops} if received.outline else {}
        mine = {op.name: op.again_s for op in self.problem.ops if not math.isinf(op.again_s)}
        return min((mine[name] / s for name, s in there.items() if s > 0 and name in mine), default=0.0)

    def solved(self, plan: Plan, over: Callable[[Sequence[int]], Solved | None] | None = None) -> Solved:
        """``plan``, one of this step, as it is run; ``over`` hears what steps of it took."""
        return Solved(self.parts(plan), over, plan, self.foresight(plan))

    def foresight(self, plan: Plan) -> Foresight:
        """What is known of steps that are as ``plan``'s, but for their sizes."""
        joined, memory, planned = self.joined, self.memory, dict(enumerate(self.parts(plan)))

        def peak_of(calls: Mapping[int, tuple[TrainingGraph, Own]]) -> int:
            graph = joined.resized({call: graph for call, (graph, _) in calls.items()})
            problem = lower(graph, self.costs, resident_bytes=memory.total_bytes, grain=memory.grain)
            steps = joined.as_run({**planned, **{call: own for call, (_, own) in calls.items()}})
            return execute(problem, steps, memory.blocks, memory.margin_bytes).peak_bytes

        bounds = [joined.bounds(call) for call in planned]
        return Foresight(peak_of, joined.sizes_at, bounds, plan.budget_bytes)

    def plan_of(self, answer: Answer) -> Plan:
        """The plan that runs the schedule of ``answer``; ``ValueError`` where there is none."""
        plan = super().plan_of(answer)
        assert answer.execution is not None
        return dataclasses.replace(
            plan,
            regions=self._summaries(answer.execution),
            cuts=self.record.cuts or ((self.why,) if self.why else ()),
        )

    def _summaries(self, ran: Execution) -> tuple[RegionSummary, ...]:
        """What the plan that runs so does with each call."""
        problem, joined, line = self.problem, self.joined, self.baseline.timeline
        peak = line.peak_step
        copies = copies_of(self.graph, self.baseline.problem, line)
        there = [c for c in copies if c.born <= peak <= c.died]
        added_bytes = int(line.live_bytes[peak]) - problem.resident_bytes
        again = Counter(ran.timeline.steps.tolist())
        kept = copies_of(self.graph, ran.problem, ran.timeline)
        owned = zip(self.graph.ops, joined.owners, strict=True)
        call_of = {v: owner[0] for op, owner in owned if owner is not None for v in op.outputs}
        found = []
        for number, call in enumerate(self.record.calls):
            own = [i for i, owner in enumerate(joined.owners) if owner is not None and owner[0] == number]
            of = [c for c in kept if call_of.get(c.value) == number]
            peak_bytes = sum(c.bytes for c in there if call_of.get(c.value) == number)
            seconds = math.fsum(problem.ops[i].seconds for i in own)
            found.append(
                RegionSummary(
                    call.name,
                    call.path,
                    len(own),
                    seconds,
                    _share(seconds, problem.total_seconds),
                    peak_bytes,
                    _share(peak_bytes, added_bytes),
                    sum(c.bytes for c in of if c.kind == "saved"),
                    sum({c.value: c.bytes for c in of if c.kind == "recomputed"}.values()),
                    math.fsum(problem.ops[i].again_s * (again[i] - 1) for i in own),
                )
            )
        return tuple(found)

    @property
    def share(self) -> float:
        """Of what the step holds at its peak if nothing is recomputed, the part that its regions made."""
        line = self.baseline.timeline
        made = {
            v for op, of in zip(self.graph.ops, self.joined.owners, strict=True) if of for v in op.outputs
        }
        copies = copies_of(self.graph, self.baseline.problem, line)
        there = (c for c in copies if c.born <= line.peak_step <= c.died and c.value in made)
        added_bytes = int(line.live_bytes[line.peak_step]) - self.problem.resident_bytes
        return _share(sum(c.bytes for c in there), added_bytes)

    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model`` train as ``plan``, one of this step, says; other kinds of steps are planned as they
        come.
        """
        session = self.session
        if session is None or session.model is not model:
            return apply_plan(plan, model)
        session.calls = list(self.calls)  # others may have run since
        session.plans.forget()
        solved = self.solved(plan)
        session.follow(solved.parts, solved, solved.foresight)
        return put(restored(model), RegionsForward(model, session, partial(self._again, plan)))

    def verified(
        self, plan: Plan, model: nn.Module, inputs: object, loss_fn: LossFn | None, seed: int
    ) -> WithinBudget:
        """The step of ``model`` with ``plan`` beside eager's."""
        return verify(plan, partial(plan.apply, model), model, inputs, loss_fn=loss_fn, seed=seed)

    def _again(self, plan: Plan, record: Record) -> Solved:
        """Another kind of step is planned for the same budget."""
        resident = dataclasses.replace(self.resident, inputs_bytes=0, gradients_bytes=0)
        other = JoinedStep.of(
            record, self.model, self.captured.inputs, resident, self.target,
            loss_fn=self.loss_fn, least_limit_s=self.least_limit_s, session=self.session,
        )  # fmt: skip
        known = resident.parameters_bytes + resident.buffers_bytes
        other = other.with_margin(max(0, record.found_bytes - known))
        made = other.plan_bytes(plan.budget_bytes, Search(time_limit_s=self.least_limit_s))
        log.info("another kind of step was planned: %r", made)
        return other.solved(made)


def taken_in(model: nn.Module, inputs: object, costs: CostSource) -> tuple[nn.Module, Target, Inputs]:
    """The model, the device planned for and the inputs of a step that is run to see it.

    Raises ``PlannerError`` for what cannot be run.
    """
    model = unwrapped(model)
    target = target_for(model, costs)
    given = Inputs.of(model, inputs)
    refuse_unplannable(model, given.tensors(), in_regions=True)
    given.check(model)
    return model, target, given


def step_in_regions(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    search: Search | None = None,
) -> JoinedStep:
    """Cut the forward of ``model`` into regions, run its step and see what it does.  Everything is put back.

    Raises ``PlannerError`` for a model without memory, for a GPU that is elsewhere, and where no region is
    left to plan.
    """
    search = search or Search()
    model, target, given = taken_in(model, inputs, costs)

    def step_of(session: Session) -> JoinedStep:
        record = _recorded(session, given, loss_fn)
        resident = resident_of(
            model, (given.args, given.kwargs), optimizer, device=target.device, as_on=target.device
        )
        return JoinedStep.of(
            record, model, given, resident, target,
            loss_fn=loss_fn, least_limit_s=search.time_limit_s, session=session,
        )  # fmt: skip

    try:
        return _with_loops(Session(model, target, 0), step_of, search)
    except NotInRegions as error:
        search.tell.phase("capture", f"parts of {type(model).__name__}, for one that is one graph")
        raise PlannerError(f"{error}.\n{proposal(model, given)}") from None


def _with_loops(session: Session, step_of: Callable[[Session], JoinedStep], search: Search) -> JoinedStep:
    """The step as it is cut, or, where little of it lies in regions, cut in its loops too."""
    name, target = type(session.model).__name__, session.target
    if target.elsewhere:
        raise NotInRegions(
            f"{name} is planned in regions, for which a step is run on {target.here}: nothing is known of "
            f"one on the {target.name}. Plan it there, or plan a part of it that is one graph"
        )
    search.tell.phase("capture", f"{name} in regions")
    try:
        step = step_of(session)
    except PlannerError:
        if not session.loops.are_left:
            raise
    else:
        if not session.loops.are_left or step.share >= MOST_LEFT:
            return step
    search.tell.phase("capture", f"{name} in regions, cut in its loops too")
    session = session.with_loops_turned()
    try:
        step = step_of(session)
    except PlannerError:
        if not session.loops.are_too_long:
            raise
    return step_of(session.with_loops_turned()) if session.loops.are_too_long else step


def _recorded(session: Session, given: Inputs, loss_fn: LossFn | None) -> Record:
    """A step of ``session``; ``PlannerError`` for one that cannot be planned."""
    name = type(session.model).__name__
    observe(session, given, loss_fn)
    if all(seen.variant is None for seen in session.calls):
        raise _nothing_to_plan(name, session)
    try:
        return session.record()
    except ValueError as error:
        cuts = "".join(f"\n  {where}: {why}" for where, why in session.breaks)
        raise NotInRegions(
            f"{name} cannot be planned in regions: {error}{f'. It was cut at{cuts}' if cuts else ''}"
        ) from None


def _nothing_to_plan(name: str, session: Session) -> NotInRegions:
    whys = [v.why for region in session.regions for v in region.variants.values() if v.why]
    cuts = "; ".join(f"{where}: {why}" if where else why for where, why in session.breaks)
    cut = f" (cut at {cuts})" if cuts else ""
    because = f" Its pieces run as eager runs them: {'; '.join(dict.fromkeys(whys))}." if whys else ""
    return NotInRegions(
        f"no part of a step of {name} can be planned: Dynamo found no piece of its forward that gets "
        f"gradients{cut}.{because} Where a loop is cut, all of the function that "
        "it stands in runs as eager: make the loop's body a function or a module of its own"
    )


def captured_as(
    capture: CaptureMode, whole: Callable[[], PricedStep], regions: Callable[[], JoinedStep]
) -> PricedStep | JoinedStep:
    """The step as ``capture`` says; "auto": as one graph, and in regions where that is refused.

    Raises ``TraceError`` where neither can be had, for both reasons.
    """
    if capture == "regions":
        return regions()
    try:
        return whole()
    except TraceError as error:
        if capture == "one graph":
            raise
        refused = error
    try:
        step = regions()
    except PlannerError as error:
        raise TraceError(f"{refused}\nNor can it be planned in regions: {error}") from error
    step = dataclasses.replace(step, why=str(refused).split(". ")[0])
    log.info(
        "%s is planned in %d regions, not as one graph: %s",
        type(step.model).__name__,
        len(step.record.calls),
        refused,
    )
    return step


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 0.0
