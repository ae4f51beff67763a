"""What is known of a step without a search: schedules that take milliseconds, and the floor below all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from planner.memory.execution import Execution
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from planner.solving.in_regions import JoinedStep
from planner.solving.priced import PricedStep
from solvers.baselines.simple import BASELINES
from solvers.bounds.lower_bounds import peak_floor

__all__ = ["Floor", "Step", "checkpointed", "floor_of", "least_known", "overhead_of"]

Step: TypeAlias = "PricedStep | JoinedStep"

# Beside everything kept; the first is what the checkpointing flags of model libraries do.
_SCHEDULES = ("every_block", "sqrt", "recompute_all")


@dataclass(frozen=True)
class Floor:
    """No plan's peak is below ``bytes``, because of ``op`` in ``module``.

    ``op_bytes``  what that op reads, makes and needs as scratch, all at once.
    """

    bytes: int
    op: str
    module: str
    op_bytes: int


def floor_of(step: BudgetedStep) -> Floor:
    """The proved floor of all plans that may be made of ``step``, outputs let go of where it allows that."""
    lightest = step.lightest
    found = peak_floor(lightest.problem)
    by_optimizer = lightest.memory.optimizer_step_bytes
    if by_optimizer > found.bytes:
        return Floor(by_optimizer, "optimizer.step", "", by_optimizer)
    ops = {op.name: i for i, op in enumerate(lightest.problem.ops)}
    if found.op_name not in ops:  # a step without ops
        return Floor(found.bytes, "", "", 0)
    i = ops[found.op_name]
    op = lightest.problem.ops[i]
    read_or_made = {*op.inputs, *op.outputs}
    op_bytes = sum(lightest.problem.values[v].bytes for v in read_or_made) + op.workspace_bytes
    return Floor(lightest.floor_bytes, op.name, lightest.graph.ops[i].module, max(0, op_bytes))


def checkpointed(step: BudgetedStep) -> Execution | None:
    """The step as a checkpointing flag runs it: each block's inputs kept, the rest of it made again.

    Blocks are those by which the plan's layers are told apart.  ``None`` where none can be told.
    """
    baseline = BASELINES["every_block"]
    if not baseline.suits(step.problem):
        return None
    return step.execution_of(baseline.run(step.problem, 0))


def least_known(step: BudgetedStep) -> Answer:
    """The schedule of lowest peak among those that need no search, as an answer for a budget of its peak."""
    lightest = step.lightest
    runs = [lightest.baseline]
    for name in _SCHEDULES:
        if BASELINES[name].suits(lightest.problem):
            runs.append(lightest.execution_of(BASELINES[name].run(lightest.problem, 0)))
    best = min(runs, key=lambda ran: (ran.peak_bytes, ran.timeline.recompute_seconds))
    total_s = lightest.problem.total_seconds
    return Answer(
        max(best.peak_bytes, lightest.memory.optimizer_step_bytes),
        best,
        bound_seconds=total_s,
        floor_bytes=lightest.floor_bytes,
        seconds=total_s + best.timeline.recompute_seconds,
        solver="no search",
    )


def overhead_of(step: BudgetedStep, ran: Execution) -> float:
    """Seconds of recomputation, as a share of the step without; 0 where nothing takes any."""
    total_s = step.problem.total_seconds
    return ran.timeline.recompute_seconds / total_s if total_s else 0.0
