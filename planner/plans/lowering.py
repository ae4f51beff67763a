"""TrainingGraph -> solvers.Problem, and a schedule's steps back to ops.

Values keep their numbers, ops keep their names, so going back is a lookup.  Bytes are rounded up to
the allocator's grain (512 on CUDA, 1 on CPU); what is resident throughout is one constant.
"""

from __future__ import annotations

from planner.costs.op_costs import Costs
from planner.devices.state import allocation_grain
from planner.graph.nodes import layer_of
from planner.graph.step_graph import BETWEEN, OPTIMIZER_STEP, RNG_STATE
from planner.graph.training_graph import GraphOp, GraphValue, TrainingGraph
from planner.units import rounded_up
from solvers import Op, Problem, Schedule, Value

__all__ = ["lower", "steps_of"]


def lower(
    graph: TrainingGraph,
    costs: Costs,
    *,
    resident_bytes: int,
    name: str = "training step",
    grain: int | None = None,
) -> Problem:
    """The problem that a plan solves; ``resident_bytes`` is what lives through the whole step.

    ``grain``: bytes to which storages are rounded up; default: as on the graph's device.
    """
    grain = allocation_grain(graph.device) if grain is None else grain
    size = [rounded_up(v.bytes, grain) for v in graph.values]

    def value(i: int, v: GraphValue) -> Value:
        # A generator's state is read where a random op runs again, and dropped where none does.
        state = v.producer is not None and graph.ops[v.producer].target == RNG_STATE
        return Value(f"{i}:{v.name}", size[i], v.producer, v.final, state)

    values = tuple(value(i, v) for i, v in enumerate(graph.values))

    def op(o: GraphOp) -> Op:
        # What runs nothing of ours has a cost only where it was measured.
        seconds = costs.seconds.get(o.name, 0.0) if o.node is None else costs.seconds[o.name]
        workspace = costs.workspace_bytes.get(o.name, 0) + o.scratch_bytes
        if o.workspace is not None:
            workspace += size[o.workspace]
        workspace = rounded_up(workspace, grain) - (0 if o.reuses is None else size[o.reuses])
        return Op(
            o.name,
            o.inputs,
            o.outputs,
            0.0 if o.fused_with_previous else seconds,
            workspace,
            seconds if o.fused_with_previous else None,
            o.recomputable and o.phase == "forward",
            None if o.target in BETWEEN else layer_of(o.module),
            o.reuses,
        )

    return Problem(tuple(map(op, graph.ops)), values, graph.turn, resident_bytes, name)


def steps_of(graph: TrainingGraph, problem: Problem, schedule: Schedule) -> list[int]:
    """Op positions in execution order, recomputations that a solver put inside the loss moved behind it.

    ``loss_fn`` runs in the caller's hands, so nothing of ours can run between its ops.
    """
    steps = schedule.steps(problem)
    theirs = [
        op.phase == "loss" or (op.node is None and op.phase != "forward" and op.target != OPTIMIZER_STEP)
        for op in graph.ops
    ]
    loss = [t for t, i in enumerate(steps) if theirs[i]]
    if not loss:
        return steps
    first, last = loss[0], loss[-1]
    between = steps[first : last + 1]
    ours = [i for i in between if graph.ops[i].phase == "forward"]
    others = [i for i in between if graph.ops[i].phase != "forward"]
    return steps[:first] + others + ours + steps[last + 1 :]
