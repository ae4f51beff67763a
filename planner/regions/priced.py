"""A step in regions with its costs: plans for any budget are made from it, as from a step of one graph."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.costs.target import Target
from planner.graph.captured import fingerprint_of
from planner.graph.training_graph import TrainingGraph
from planner.memory.execution import Execution
from planner.memory.lifetimes import copies_of
from planner.memory.resident import Resident
from planner.memory.static import StaticMemory
from planner.plan import Plan
from planner.plans.plan_data import RegionSummary
from planner.regions.joined import Joined, join, parts
from planner.regions.record import Record
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from solvers import Schedule

__all__ = ["JoinedStep", "RecordedStep"]


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One training step of ``model`` on ``inputs``, as it was seen to run in regions."""

    model: nn.Module
    inputs: Inputs
    joined: Joined

    @property
    def graph(self) -> TrainingGraph:
        """The step as ops and storages."""
        return self.joined.graph

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the regions, their order and what passes between them; not of what was measured."""
        record = self.joined.record
        h = hashlib.sha256()
        known: dict[int, str] = {}
        for event in record.events:
            h.update(f"{event.kind}|{event.call}|{event.is_forward}\n".encode())
        for call in record.calls:
            graph = known.setdefault(id(call.graph), fingerprint_of(call.graph))
            given, taken = (sorted(of.items(), key=repr) for of in (call.gives, call.crossings))
            renamed = sorted(call.renamed.items())
            h.update(f"{call.name}|{call.path}|{graph}|{renamed}|{taken}|{given}\n".encode())
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class JoinedStep(BudgetedStep):
    """A recorded step in regions with its costs."""

    captured: RecordedStep

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
    ) -> JoinedStep:
        """The step of ``record``; ``resident``: what it finds on the device and leaves there.

        Raises ``ValueError`` for a record in which something is read before it is made.
        """
        joined = join(record)
        captured = RecordedStep(model, inputs, joined)
        memory = StaticMemory(captured, resident, target.device, target.grain, target.capability)
        return cls(captured, joined.costs, memory, target, loss_fn=loss_fn, least_limit_s=least_limit_s)

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
        position = {op.name: i for i, op in enumerate(self.graph.ops)}
        return parts(self.joined, [position[name] for name in plan.sequence])

    def plan_of(self, answer: Answer) -> Plan:
        """The plan that runs the schedule of ``answer``; ``ValueError`` where there is none."""
        plan = super().plan_of(answer)
        assert answer.execution is not None
        return dataclasses.replace(plan, regions=self._summaries(answer.execution), cuts=self.record.cuts)

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


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 0.0
