"""A compiled step as generated code runs it: what a schedule takes, in which form, and whose code that is.

A schedule's code is written in one of several forms.  The fastest that is within a budget is taken: first
layouts that take less time and more memory are given up where they run when there is no room for them, then
loops stay apart and nothing that is dead is held (:class:`planner.compiled.piece.Own`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.compiled.layouts import Ways
from planner.compiled.piece import Own
from planner.compiled.session import CompiledSession
from planner.errors import PlannerError
from planner.memory.execution import Execution
from planner.plans.plan_data import PlanData
from planner.regions.joined import parts
from planner.solving.in_regions import JoinedStep
from solvers import Schedule

__all__ = ["AS_TORCH", "BY_TORCH", "ENOUGH", "SPARING", "CodedExecution", "CodedStep", "Form"]

log = logging.getLogger(__name__)

ENOUGH = 1e-3  # of a step's seconds: less is not to be seen, nor worth another round

SPARING = 0.02  # of a step's seconds, what sparing code takes more: up to 2 % of large ops

# Memory budgets of torch's own partitions that are tried, and the solver's name in plans that are one.
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
BY_TORCH = "torch's partition for "


@dataclass(frozen=True)
class Form:
    """How the code of a schedule is written; by default as torch's is.

    ``sparing``  see :class:`Own`.
    ``last``     positions of ops whose operands have the channels last (:attr:`CompiledStep.swifter`).
    """

    sparing: bool = False
    last: frozenset[int] = frozenset()


AS_TORCH = Form()


@dataclass(frozen=True, kw_only=True)
class CodedExecution(Execution):
    """A schedule as code of ``form`` runs it.

    ``gradient_bytes``  live while each of ``form.last`` runs, its scratch included.
    """

    form: Form
    gradient_bytes: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class CodedStep(JoinedStep):
    """A recorded step whose regions are the graphs that inductor compiles."""

    graphs: CompiledSession | None = None  # that recorded it

    @property
    def owner(self) -> CompiledSession:
        """Whose graphs they are."""
        assert self.graphs is not None
        return self.graphs

    @cached_property
    def baseline(self) -> Execution:
        """The step as ``torch.compile`` runs it without a plan."""
        for share, steps, _ in self.torchs:
            if share == SHARES[0]:
                return self.coded(steps, share)
        return self.coded(list(range(len(self.problem))), None)

    def execution(self, steps: list[int]) -> Execution:
        """What running ``steps`` takes at least, each graph as inductor's code allocates."""
        return self.within(steps, 0)

    def within(self, steps: list[int], budget_bytes: int) -> CodedExecution:
        """What they take in a budget, by the fastest code that is within it; else by that of the least."""
        swift = Form(last=frozenset(self.swifter if budget_bytes else ()))
        roomy = self.in_form(steps, budget_bytes, swift)
        if roomy.peak_bytes <= budget_bytes:
            return roomy
        spared = self.in_form(steps, budget_bytes, dataclasses.replace(roomy.form, sparing=True))
        return min(roomy, spared, key=lambda ran: ran.peak_bytes)

    def in_form(self, steps: list[int], budget_bytes: int, form: Form) -> CodedExecution:
        """What they take in a budget by code of ``form``, less the layouts for which there is no room."""
        while True:
            ran = self.coded(steps, None, form)
            over = {i for i, size in ran.gradient_bytes.items() if size > budget_bytes}
            if ran.peak_bytes <= budget_bytes or not over:
                return ran
            form = dataclasses.replace(form, last=form.last - over)

    def coded(self, steps: list[int], torchs: float | None, form: Form = AS_TORCH) -> CodedExecution:
        """What ``steps`` take by code of ``form``; where ``torchs`` is not ``None``, by graphs that torch
        splits for that memory budget.
        """
        ran = super().execution(steps)
        live = ran.timeline.live_bytes
        kept = ran.timeline.kept_bytes
        slack = np.zeros(len(steps), dtype=np.int64)
        by_event: dict[int, list[int]] = {}
        for t, (_, event) in enumerate(self.joined.placed(steps)):
            by_event.setdefault(event, []).append(t)
        own = self._owns(steps, torchs, form)
        gradients: dict[int, int] = {}
        more = 0  # what calls that wait for their backward hold beyond their stored values
        of_call: dict[int, int] = {}
        for event, what in enumerate(self.record.events):
            places = by_event.get(event, [])
            if what.call is None:
                slack[places] = more
                continue
            if not places:
                continue
            piece = self.calls[what.call].piece
            forward, backward = piece.played(own[what.call], self._going(what.call))
            played = forward if what.kind == "forward" else backward
            peak = piece.peak_bytes(played)
            before = int(kept[places[0] - 1]) if places[0] else self.memory.total_bytes
            top = before + more + peak
            at = max(places, key=lambda t: int(live[t]))
            for t in places:
                slack[t] = min(more, top - int(live[t]))
            slack[at] = top - int(live[at])
            if what.kind == "forward":
                of_call[what.call] = forward.left_bytes - (int(kept[places[-1]]) - before)
                more += of_call[what.call]
            else:
                for position, size in piece.gradient_bytes(own[what.call], backward).items():
                    gradients[self._joint[what.call, position]] = before + more + size
                more -= of_call.pop(what.call, 0)
        return CodedExecution(ran.problem, ran.timeline, slack, form=form, gradient_bytes=gradients)

    def _owns(self, steps: list[int], torchs: float | None, form: Form) -> list[Own]:
        last: dict[int, list[int]] = {}
        for i in sorted(form.last) if torchs is None else ():
            call, position = self.joined.owners[i] or (-1, -1)
            last.setdefault(call, []).append(position)
        return [
            Own(tuple(own), turn, torchs, form.sparing, tuple(last.get(call, ())))
            for call, (own, turn) in enumerate(parts(self.joined, steps))
        ]

    @cached_property
    def _joint(self) -> dict[tuple[int, int], int]:
        """Positions of ops by number of the call and position in its graph."""
        return {owner: i for i, owner in enumerate(self.joined.owners) if owner is not None}

    @cached_property
    def swifter(self) -> dict[int, Ways]:
        """Ops that take clearly less time with the channels last, by position."""
        return {
            self._joint[number, position]: ways
            for number, call in enumerate(self.calls)
            for position, ways in call.piece.swifter.items()
        }

    def slower_s(self, form: Form) -> float:
        """Seconds that code of ``form`` takes beyond the fastest there is of the same schedule.

        Plans are chosen by them; the overhead that a plan tells is of what is recomputed alone.
        """
        rows_s = math.fsum(way.rows_s - way.last_s for i, way in self.swifter.items() if i not in form.last)
        return rows_s + form.sparing * SPARING * self.problem.total_seconds

    def _going(self, number: int) -> frozenset[int]:
        """Output gradients that were gone when the backward of a call had run: their maker let them go."""
        call, at = self.record.calls[number], self.record.events_of(number)[1]
        crossings = self.record.crossings
        return frozenset(
            int(key)
            for (kind, key), k in call.crossings.items()
            if kind == "tangent" and at is not None and crossings[k].died == at
        )

    # -- what a plan runs ------------------------------------------------------------------------

    def owns_of(self, plan: PlanData) -> list[Own]:
        """What each call runs of a plan for this step."""
        torchs, steps = _torchs(plan), self.positions(plan)
        form = AS_TORCH if torchs is not None else self._form_of(plan, steps, plan.budget_bytes)
        return self._owns(steps, torchs, form)

    def _form_of(self, plan: PlanData, steps: list[int], budget_bytes: int) -> Form:
        """As code of ``plan``, whoever made it, is written for a budget."""
        position = {op.name: i for i, op in enumerate(self.graph.ops)}
        last = frozenset(position[name] for name in plan.channels_last if name in position)
        ran = self.coded(steps, None, Form(last=last))
        return dataclasses.replace(ran.form, sparing=ran.peak_bytes > budget_bytes)

    def execution_as(self, received: PlanData, schedule: Schedule, budget_bytes: int) -> Execution:
        """What running ``schedule``, that of ``received``, takes here in a budget."""
        steps, torchs = self.steps_of(schedule), _torchs(received)
        form = AS_TORCH if torchs is not None else self._form_of(received, steps, budget_bytes)
        return self.coded(steps, torchs, form)

    # -- torch's own partitions ------------------------------------------------------------------

    @cached_property
    def torchs(self) -> tuple[tuple[float, list[int], float], ...]:
        """Torch's own partitions for some memory budgets, steps and seconds of each, the fastest first."""
        found = []
        for share in SHARES:
            try:
                owns = [call.piece.torchs(share) for call in self.calls]
            except PlannerError as error:
                log.debug("%s", error)
                continue
            steps = self.joined.as_run({k: (own.steps, own.turn) for k, own in enumerate(owns)})
            again = steps.copy()
            for i in range(len(self.problem)):
                again.remove(i)
            more = math.fsum(self.problem.ops[i].again_s for i in again)
            found.append((share, steps, self.problem.total_seconds + more))
        return tuple(sorted(found, key=operator.itemgetter(2)))

    @property
    def without_s(self) -> float:
        """Seconds of the step without a plan: what torch makes again for nobody's budget is no overhead."""
        by_torch = (seconds for share, _, seconds in self.torchs if share == SHARES[0])
        return max(self.problem.total_seconds * (1 + ENOUGH), *by_torch, 0.0)

    def least_left_bytes(self, share: float) -> int:
        """What is there when the backward begins, at least, of graphs that torch splits for a budget."""
        return self.memory.total_bytes + sum(call.piece.left_bytes(share) for call in self.calls)


def _torchs(plan: PlanData) -> float | None:
    """The memory budget that torch's partition was made for, of a plan that runs it."""
    share = plan.solver.removeprefix(BY_TORCH)
    return None if share == plan.solver else float(share)
