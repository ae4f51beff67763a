"""What a schedule does with each value of the forward: the rows of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from planner.graph.step_graph import LAST, RNG_STATE, forward_length, release_of
from planner.graph.training_graph import TrainingGraph
from planner.memory.lifetimes import Copy
from planner.plans.plan_data import Decision, Placement

__all__ = ["placements_of"]


def placements_of(
    graph: TrainingGraph, seconds: Mapping[str, float], steps: list[int], copies: list[Copy]
) -> tuple[Placement, ...]:
    """A placement for each value of the forward, in order; ``seconds`` by op, ``copies`` of ``steps``."""
    turn, released = forward_length(graph, steps), release_of(graph, steps)
    runs = [0] * len(graph.ops)
    for i in steps:
        runs[i] += 1
    spans: dict[int, list[tuple[int, int]]] = {}
    for c in copies:
        spans.setdefault(c.value, []).append((c.born, c.died))
    crosses = {c.value for c in copies if c.born < turn <= c.died and c.died != released}
    reborn = {c.value for c in copies if c.kind == "recomputed" and c.died > c.born}
    out = []
    for v, value in enumerate(graph.values):
        if value.producer is None or graph.ops[value.producer].phase != "forward":
            continue
        op = graph.ops[value.producer]
        if op.target == LAST:
            continue
        if op.target == RNG_STATE and v not in crosses:
            continue
        decision: Decision = "recompute" if v in reborn else "save" if v in crosses else "free"
        again = runs[value.producer] - 1 if v in reborn else 0
        held = tuple(spans[v][: 1 + again])  # a further copy that nothing reads is gone at once
        out.append(
            Placement(
                value.name,
                value.module,
                op.target,
                value.bytes,
                decision,
                seconds[op.name],
                again,
                op.name,
                held,
            )
        )
    return tuple(out)
