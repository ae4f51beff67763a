"""Gradients that a hook takes as soon as they are there: an optimizer's step inside the backward.

``p.register_post_accumulate_grad_hook(lambda p: (step[p].step(), step[p].zero_grad()))`` leaves no gradient
behind.  Such a gradient lives from the op that makes it to the end of the segment of the backward that this
op is in, for then the engine hands it to its parameter.  The backward is cut there
(:mod:`planner.rewrite.segments`), so it dies with its op; but not before the output gradients have been read
for the last time, which the engine holds together with the first segment.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from planner.graph.training_graph import TrainingGraph

__all__ = ["consumed_of", "consuming", "first_handed_out"]


def consuming(graph: TrainingGraph, names: Collection[str]) -> TrainingGraph:
    """The same step where the gradients of these parameters are gone once they were handed out."""
    chosen = [graph.value_of[node] for name, node in graph.gradients.items() if name in names]
    outputs = {graph.value_of[node] for node in graph.outputs}
    chosen = [v for v in chosen if graph.values[v].producer is not None and v not in outputs]
    if not chosen:
        return graph
    values, ops = list(graph.values), list(graph.ops)
    last = first_handed_out(graph)
    for v in chosen:
        values[v] = replace(values[v], final=False)
        if (values[v].producer or 0) < last and v not in ops[last].inputs:
            ops[last] = replace(ops[last], inputs=(*ops[last].inputs, v))
    once = graph.pinned - {values[v].producer for v in chosen}  # whoever holds it: it is handed out once
    return replace(graph, ops=tuple(ops), values=tuple(values), pinned=once)


def consumed_of(graph: TrainingGraph) -> frozenset[str]:
    """Names of the parameters whose gradients are gone once they were handed out."""
    return frozenset(
        str(name)
        for name, node in graph.gradients.items()
        if (value := graph.values[graph.value_of[node]]).kind == "gradient" and not value.final
    )


def first_handed_out(graph: TrainingGraph) -> int:
    """The op of the backward with which the first gradients can be handed out; -1: with any."""
    given = {graph.value_of[node] for node in graph.tangents.values() if node in graph.value_of}
    readers = [i for i, op in enumerate(graph.ops) if op.phase == "backward" and given & {*op.inputs}]
    return max(readers, default=-1)
