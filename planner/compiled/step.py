"""A compiled step with its costs: plans for any budget, judged by what inductor's code will allocate."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from planner import _compat
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.compiled.applied import CompiledForward
from planner.compiled.bound import under
from planner.compiled.coded import AS_TORCH, BY_TORCH, ENOUGH, SPARING, CodedExecution, CodedStep, Form
from planner.compiled.session import CompiledSession
from planner.compiled.verify import CompiledReport, verified
from planner.costs.target import CostSource
from planner.errors import PlannerError
from planner.measure.step import backward, device_of, held, passed_on, tangents_for
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import Resident, resident_of
from planner.memory.static import StaticMemory
from planner.options import Search
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.regions.join import join
from planner.regions.joined import RecordedStep
from planner.regions.observe import apart, without_memory
from planner.regions.record import Record
from planner.regions.recorder import Recorder
from planner.runtime.apply import put, restored
from planner.solving.fit import Answer
from planner.solving.in_regions import taken_in
from solvers import InfeasibleError, Problem, Schedule, Solution, simulate, solve
from solvers.bounds.lower_bounds import time_bound
from solvers.core.facts import Facts
from solvers.portfolio import Methods

__all__ = ["CompiledStep", "compiled_step"]

log = logging.getLogger(__name__)

ROUNDS = 4  # targets that are tried at least: playing each takes seconds
NEAR = 0.01  # of the budget: so much that is left is not worth another round
MUCH = 0.5  # of a step's seconds, a forward and a half: the least plan, which takes a search, may be faster
LITTLE = 0.1  # of a step's seconds: who recomputes more looks whether a higher target's code fits too
PROBE = 0.04  # of the budget: so much higher, since code may take less than what is simulated


@dataclass(frozen=True, eq=False)
class CompiledStep(CodedStep):
    """A recorded step whose regions are the graphs that inductor compiles."""

    forward: CompiledForward | None = None  # likewise, where the step was run for that

    @classmethod
    def of_session(
        cls,
        session: CompiledSession,
        record: Record,
        model: nn.Module,
        inputs: Inputs,
        resident: Resident,
        *,
        loss_fn: LossFn | None = None,
        least_limit_s: float = 30.0,
    ) -> CompiledStep:
        """The step of ``record``, which ``session`` has seen; ``resident``: what it found and left."""
        captured = RecordedStep(model, inputs, join(record))
        target = session.target
        memory = StaticMemory(captured, resident, target.device, target.grain, target.capability)
        return cls(
            captured, captured.joined.costs, memory, target,
            loss_fn=loss_fn, least_limit_s=least_limit_s, calls=tuple(session.calls), graphs=session,
        )  # fmt: skip

    def _in_budget(self, answer: Answer, budget_bytes: int) -> Answer:
        """``answer``, which was found for another budget, as it runs in this one."""
        ran = answer.execution
        assert ran is not None
        if not answer.solver.startswith(BY_TORCH):
            ran = self.within(ran.timeline.steps.tolist(), budget_bytes)
        return dataclasses.replace(answer, budget_bytes=budget_bytes, execution=ran)

    def plan_bytes(
        self, budget_bytes: int, search: Search | None = None, *, hint: PlanData | None = None
    ) -> Plan:
        """The plan for a budget in bytes, by what the generated code allocates.

        The solvers count values that inductor may never store; what a schedule really takes is played, and
        the target moved by the difference.  What is proved: :mod:`planner.compiled.bound`.

        Raises ``InfeasibleBudgetError`` where no schedule that was tried fits.
        """
        search = search or Search()
        search.tell.phase("solve", f"{len(self.problem)} ops")
        if budget_bytes < self.memory.optimizer_step_bytes:
            raise self.infeasible(budget_bytes)
        best = None if self.swifter else self._by_torch(budget_bytes, self.without_s)
        if best is None:
            problem = self._layouts_for(budget_bytes, search) if self.swifter else self.problem
            best = self._searched(problem, budget_bytes, search)
            known = self._answers.copy()
            total = self.problem.total_seconds
            if self._total_s(best) > (1 + SPARING) * total:
                best = self._faster(best, self._searched(problem, budget_bytes, search, sparing=True))
            if self._total_s(best) > (1 + MUCH) * total:
                known.append(super().least)
            for answer in known:  # what serves less serves more
                if answer.peak_bytes <= budget_bytes and answer.seconds < self._total_s(best):
                    best = self._faster(best, self._in_budget(answer, budget_bytes))
            by_torch = self._by_torch(budget_bytes, self._total_s(best) + ENOUGH * total)
            best = by_torch or best
        if best is None:
            raise self.infeasible(budget_bytes)
        self._answers.append(best)
        return self.plan_of(self._with_bound(best, search.time_limit_s / 4))

    def _total_s(self, answer: Answer | None) -> float:
        """Seconds of a step, what its code takes included; ``inf`` without one."""
        if answer is None:
            return math.inf
        ran = answer.execution
        return answer.seconds + self.slower_s(ran.form if isinstance(ran, CodedExecution) else AS_TORCH)

    def _faster(self, one: Answer | None, other: Answer | None) -> Answer | None:
        """The first where neither is."""
        return other if self._total_s(other) < self._total_s(one) else one

    def _with_bound(self, answer: Answer, limit_s: float) -> Answer:
        """``answer`` with what is proved of its budget."""
        problem, counted = self._below
        bound_s = time_bound(
            problem, answer.budget_bytes, time_limit_s=limit_s, enough_seconds=answer.seconds, counted=counted
        )
        return dataclasses.replace(answer, bound_seconds=min(answer.seconds, bound_s))

    @property
    def floor_bytes(self) -> int:
        """Proved: no plan has a lower peak."""
        problem, counted = self._below
        need = Facts.of(problem).pressure[counted]
        return max(int(need.max(initial=0)), self.memory.optimizer_step_bytes)

    def _least_within(self, limit_s: float, *, fast: bool = True) -> Answer:
        """The lowest by what generated code takes: the solvers' own, torch's partitions, and keeping all."""
        least = super()._least_within(limit_s, fast=fast)
        ways: list[tuple[str, float, float | None, list[int]]] = [
            (f"{BY_TORCH}{share:g}", seconds, share, steps)
            for share, steps, seconds in self.torchs
            if self.least_left_bytes(share) < least.budget_bytes
        ]
        everything = Schedule.keep_all(self.problem)
        if simulate(self.problem, everything).peak_bytes < least.budget_bytes:
            ways.append(("keep all", self.problem.total_seconds, None, everything.steps(self.problem)))
        for solver, seconds, share, steps in ways:
            ran = self.coded(steps, share)
            need = max(ran.peak_bytes, self.memory.optimizer_step_bytes)
            if need < least.budget_bytes:
                floor = min(least.floor_bytes, need)
                least = Answer(need, ran, self.problem.total_seconds, floor, seconds, solver)
        return least

    @cached_property
    def _answers(self) -> list[Answer]:
        """What was found for budgets so far."""
        return []

    @cached_property
    def _below(self) -> tuple[Problem, list[int]]:
        return under(self.graph, self.problem)

    def _with_room(self, last: Collection[int]) -> Problem:
        """The problem where ops at ``last`` have room for the scratch of their channels last."""
        if not last:
            return self.problem
        ops = list(self.problem.ops)
        for i in last:
            most = max(ops[i].workspace_bytes, self.swifter[i].last_bytes)
            ops[i] = dataclasses.replace(ops[i], workspace_bytes=most)
        return dataclasses.replace(self.problem, ops=tuple(ops))

    def _layouts_for(self, budget_bytes: int, search: Search) -> Problem:
        """The problem with room for those layouts with which a step is fastest, as the solvers count.

        Those that save most for their memory come first.
        """
        gain = {i: (way.rows_s - way.last_s) / max(way.last_bytes, 1) for i, way in self.swifter.items()}
        best, best_s = self.problem, math.inf
        for least in [math.inf, *sorted(set(gain.values()), reverse=True)]:
            last = frozenset(i for i, worth in gain.items() if worth >= least)
            problem = self._with_room(last)
            found = self._solved(problem, budget_bytes, search, Methods(problem))
            if found is not None and found.seconds + self.slower_s(Form(last=last)) < best_s:
                best, best_s = problem, found.seconds + self.slower_s(Form(last=last))
        return best

    def _searched(
        self, problem: Problem, budget_bytes: int, search: Search, *, sparing: bool = False
    ) -> Answer | None:
        """The best schedule found whose code fits, ``sparing`` or not; targets move by what the code takes.

        It ends where next to nothing is left of the budget, or when the search's seconds are over.
        """
        best: Answer | None = None
        methods, total = Methods(problem), self.problem.total_seconds
        most = simulate(problem, Schedule.keep_all(problem)).peak_bytes
        # At ``low`` a schedule fits, or the solvers find none; at ``high`` they find one that does not fit.
        target, low, high = budget_bytes, 0, 2 * most
        step = int(PROBE * budget_bytes) // 2
        began = time.perf_counter()
        for turn in itertools.count(1):
            found = self._solved(problem, min(target, most), search, methods)
            if found is None:
                low = max(low, target)
                step = min(2 * step, (high - low) // 2)
                target = low + step
            else:
                form = Form(sparing, frozenset(self.swifter))
                ran = self.in_form(self.steps_of(found.schedule), budget_bytes, form)
                over = ran.peak_bytes - budget_bytes
                log.debug("target %d: simulated %d, code takes %d", target, found.peak_bytes, ran.peak_bytes)
                if over <= 0:
                    best = self._faster(
                        best,
                        Answer(budget_bytes, ran, total, 0, max(total, found.seconds), found.solver,
                               found.solve_seconds),
                    )  # fmt: skip
                    low = max(low, target)
                    is_near = -over <= NEAR * budget_bytes and found.seconds <= total * (1 + LITTLE)
                    if is_near or found.peak_bytes >= most or found.seconds <= total * (1 + ENOUGH):
                        break
                    target = min(target + max(-over, int(PROBE * budget_bytes)), (low + high) // 2)
                else:
                    high = min(high, found.peak_bytes)
                    target = high - max(over, most // 100)
                    if target <= low:
                        target = (low + high) // 2
            is_late = turn >= ROUNDS and time.perf_counter() - began > search.time_limit_s
            if is_late or min(high, most) - low <= NEAR * budget_bytes:
                break
        return best

    def _solved(
        self, problem: Problem, target_bytes: int, search: Search, methods: Methods
    ) -> Solution | None:
        try:
            found = solve(
                problem,
                target_bytes,
                solver=search.solver,
                time_limit_s=search.time_limit_s / ROUNDS,
                methods=methods if search.solver == "auto" else None,
            )
        except InfeasibleError:
            return None
        return found if found.fits else None

    # -- torch's own partitions --------------------------------------------------------------------

    def _by_torch(self, budget_bytes: int, most_s: float) -> Answer | None:
        """The fastest of torch's own partitions that fits and takes no more than ``most_s``, if one does."""
        more_s = self.slower_s(AS_TORCH)
        for share, steps, seconds in self.torchs:
            if seconds + more_s > most_s:
                break
            if self.least_left_bytes(share) > budget_bytes:
                continue
            ran = self.coded(steps, share)
            log.debug("torch's partition for %s: generated code takes %d", share, ran.peak_bytes)
            if ran.peak_bytes <= budget_bytes:
                total = self.problem.total_seconds
                return Answer(budget_bytes, ran, total, 0, seconds, f"{BY_TORCH}{share:g}")
        return None

    def plan_of(self, answer: Answer) -> Plan:
        """The plan that runs the schedule of ``answer``."""
        ran, ops = answer.execution, self.graph.ops
        last = sorted(ran.form.last) if isinstance(ran, CodedExecution) else ()
        names = tuple(ops[i].name for i in last)
        return dataclasses.replace(super().plan_of(answer), backend="inductor", channels_last=names)

    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model`` train compiled, as ``plan`` says.  Raises ``PlannerError`` for another model."""
        if model is not self.model:
            raise PlannerError(
                f"this plan is of the compiled graphs of one {type(self.model).__name__}, which hold its own "
                "code and guards; plan the other model too"
            )
        assert self.forward is not None
        self.follow(plan)
        return put(restored(model), self.forward)

    def follow(self, plan: Plan) -> None:
        """Let the graphs run as ``plan`` says."""
        self.owner.calls = list(self.calls)
        self.owner.follow(self.owns_of(plan))

    def verified(
        self, plan: Plan, model: nn.Module, inputs: object, loss_fn: LossFn | None, seed: int
    ) -> CompiledReport:
        """The compiled step with the plan beside ``torch.compile``'s without a budget."""
        given = self.captured.inputs if inputs is None else Inputs.of(model, inputs)
        pieces = (call.piece for call in self.calls)
        terms = max([piece.added_terms for piece in pieces], default=1)
        return verified(plan, model, given, loss_fn, seed, self.memory, terms)


def compiled_step(
    model: nn.Module,
    inputs: object = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    search: Search | None = None,
    same_bits: bool = False,
) -> CompiledStep:
    """The step of ``model`` as ``torch.compile`` cuts it and inductor stores it.  Everything is put back.

    Raises ``PlannerError`` for a model without memory, a GPU that is elsewhere, and a step of which nothing
    is compiled.
    """
    search = search or Search()
    if any(map(_compat.is_fully_sharded, model.modules())):
        raise PlannerError(
            f"{type(model).__name__} is sharded (FSDP2), and its compiled step is planned as it trains: "
            "planner.enable(model, budget_gb, backend='inductor', now=True), or "
            "block.compile(backend=planner.inductor(budget_gb)) for each block"
        )
    model, target, given = taken_in(model, inputs, costs)
    hollow = without_memory(model, given.tensors())
    if hollow:
        raise PlannerError(
            f"backend='inductor' compiles and runs steps of {type(model).__name__}, for which {hollow}: take "
            "real tensors, or backend='eager', which plans without running"
        )
    if target.elsewhere:
        raise PlannerError(
            f"what is compiled is planned for the device that it is compiled on, {target.here}, not for the "
            f"{target.name}: plan it there"
        )
    search.tell.phase("capture", f"{type(model).__name__} by torch.compile")
    session = CompiledSession(target, model, same_bits=same_bits)
    forward = CompiledForward(model, session)
    recorder = Recorder(device_of(model, given, None))
    with apart(model, given):
        _step(forward, given, loss_fn)  # Dynamo compiles
    with apart(model, given):
        recorder.register(*held(model, (given.args, given.kwargs)))
        session.begin(recorder)
        try:
            with recorder:
                _step(forward, given, loss_fn)
        finally:
            recorder.finish()
    if not session.calls:
        whys = "; ".join(dict.fromkeys(p.why for p in session.pieces if p.why))
        raise PlannerError(
            f"nothing of a step of {type(model).__name__} can be planned compiled: "
            f"{whys or 'torch.compile found no graph in it'}. backend='eager' plans it as it is written"
        )
    try:
        record = session.record()
    except ValueError as error:
        raise PlannerError(f"a compiled step of {type(model).__name__} cannot be planned: {error}") from error
    resident = resident_of(
        model, (given.args, given.kwargs), optimizer, device=target.device, as_on=target.device
    )
    step = CompiledStep.of_session(
        session, record, model, given, resident, loss_fn=loss_fn, least_limit_s=search.time_limit_s
    )
    return dataclasses.replace(step, forward=forward)


def _step(forward: CompiledForward, inputs: Inputs, loss_fn: LossFn | None) -> None:
    outputs = forward(*inputs.args, **inputs.kwargs)
    passed = passed_on(outputs, loss_fn)
    del outputs
    backward(passed, tangents_for(passed, None))
