"""Gradients that a hook takes as soon as they are there: an optimizer's step inside the backward.

``p.register_post_accumulate_grad_hook(lambda p: (step[p].step(), step[p].zero_grad()))`` leaves no gradient
behind.  Such a gradient lives from the op that makes it to the end of the segment of the backward that this
op is in, for then the engine hands it to its parameter.  The backward is cut there
(:mod:`planner.rewrite.segments`), so it dies with its op; but not before the output gradients have been read
for the last time, which the engine holds together with the first segment.

Where it is known what the optimizer's step takes beside the gradient and its state, that step is an op of its
own behind it: what the backward holds then, it holds beside that scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.graph.step_graph import OPTIMIZER_STEP
from planner.graph.training_graph import GraphOp, TrainingGraph

__all__ = ["consumed_of", "consuming", "first_handed_out", "scratch_of", "taken_of"]


def consuming(graph: TrainingGraph, taken: Mapping[str, int]) -> TrainingGraph:
    """The same step where the gradients of these parameters are gone once they were handed out.

    ``taken``  by name of the parameter the bytes that its hook takes for itself; 0: none, or not known.
    """
    value = {name: graph.value_of[node] for name, node in graph.gradients.items() if name in taken}
    outputs = {graph.value_of[node] for node in graph.outputs}
    value = {str(n): v for n, v in value.items() if graph.values[v].producer is not None and v not in outputs}
    if not value:
        return graph
    values, ops = list(graph.values), list(graph.ops)
    last = first_handed_out(graph)
    behind: dict[int, list[GraphOp]] = {}  # by the op with which gradients are handed out
    for name, v in sorted(value.items(), key=lambda item: item[1]):
        made = graph.values[v].producer or 0
        values[v] = replace(values[v], final=False)
        if made < last and v not in ops[last].inputs:
            ops[last] = replace(ops[last], inputs=(*ops[last].inputs, v))
        if taken[name]:
            behind.setdefault(max(made, last), []).append(_step(name, v, ops[made].module, taken[name]))
    once = graph.pinned - {values[v].producer for v in value.values()}  # whoever holds it: handed out once
    if not behind:
        return replace(graph, ops=tuple(ops), values=tuple(values), pinned=once)
    return _with_steps(replace(graph, values=tuple(values), pinned=once), ops, behind)


def _step(name: str, gradient: int, module: str, scratch_bytes: int) -> GraphOp:
    return GraphOp(
        f"{OPTIMIZER_STEP}/{name}",
        None,
        "backward",
        module,
        (gradient,),
        (),
        recomputable=False,
        scratch_bytes=scratch_bytes,
    )


def _with_steps(
    graph: TrainingGraph, ops: Sequence[GraphOp], behind: Mapping[int, Sequence[GraphOp]]
) -> TrainingGraph:
    """``graph`` with other ops, and the optimizer's steps behind some of them."""
    number: list[int] = []
    all_ops: list[GraphOp] = []
    for i, op in enumerate(ops):
        number.append(len(all_ops))
        all_ops += [op, *behind.get(i, ())]
    values = tuple(
        replace(v, producer=None if v.producer is None else number[v.producer]) for v in graph.values
    )
    turn = number[graph.turn] if graph.turn < len(number) else len(all_ops)
    pinned = frozenset(number[i] for i in graph.pinned)
    return replace(graph, ops=tuple(all_ops), values=values, turn=turn, pinned=pinned)


def consumed_of(graph: TrainingGraph) -> frozenset[str]:
    """Names of the parameters whose gradients are gone once they were handed out."""
    return frozenset(
        str(name)
        for name, node in graph.gradients.items()
        if (value := graph.values[graph.value_of[node]]).kind == "gradient" and not value.final
    )


def taken_of(graph: TrainingGraph) -> dict[str, int]:
    """What :func:`consuming` was told."""
    scratch = scratch_of(graph.ops, [op.scratch_bytes for op in graph.ops])
    return {name: scratch.get(name, 0) for name in consumed_of(graph)}


def scratch_of(ops: Sequence[Any], scratch_bytes: Sequence[int]) -> dict[str, int]:
    """By name of the parameter what its optimizer's step in the backward takes; of ops of a graph or plan."""
    word = f"{OPTIMIZER_STEP}/"
    return {
        op.name.removeprefix(word): count
        for op, count in zip(ops, scratch_bytes, strict=True)
        if op.name.startswith(word)
    }


def first_handed_out(graph: TrainingGraph) -> int:
    """The op of the backward with which the first gradients can be handed out; -1: with any."""
    given = {graph.value_of[node] for node in graph.tangents.values() if node in graph.value_of}
    readers = [i for i, op in enumerate(graph.ops) if op.phase == "backward" and given & {*op.inputs}]
    return max(readers, default=-1)
