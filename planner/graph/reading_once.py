"""A step that reads some of what it is given in its forward only.

What somebody writes over between a forward and its backward (the queue of a memory bank, a teacher's weights)
is another thing by the time of the backward, so that no call that reads it can run again there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from planner.errors import TraceError
from planner.graph.nodes import ignores_running_stats
from planner.graph.training_graph import GraphOp, TrainingGraph

__all__ = ["reading_once"]


def reading_once(
    graph: TrainingGraph, sources: Collection[tuple[str, str | int]], outputs: Collection[int] = ()
) -> TrainingGraph:
    """``graph`` with no second run of what reads ``sources`` (kind and name, as ``graph.sources`` has them)
    or what it hands out itself (``outputs``, by their indices).

    Raises ``TraceError`` if its backward reads one itself.
    """
    over = {
        graph.value_of[node]: name for node, (kind, name) in graph.sources.items() if (kind, name) in sources
    }
    over |= {graph.value_of[graph.outputs[i]]: f"output {i}" for i in outputs}
    if not over:
        return graph

    def reads(op: GraphOp) -> bool:
        takes = not over.keys().isdisjoint(op.inputs)
        return takes and (op.node is None or not ignores_running_stats(op.node))

    for op in graph.ops[graph.turn :]:
        if reads(op):
            what = next(over[v] for v in op.inputs if v in over)
            raise TraceError(f"its backward ({op.target}) reads {what}, which is written over before it runs")
    once = (replace(op, recomputable=op.recomputable and not reads(op)) for op in graph.ops[: graph.turn])
    return replace(graph, ops=(*once, *graph.ops[graph.turn :]))
