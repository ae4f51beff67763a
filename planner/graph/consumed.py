"""Gradients that a hook takes as soon as they are there: an optimizer's step inside the backward.

``p.register_post_accumulate_grad_hook(lambda p: (step[p].step(), step[p].zero_grad()))`` leaves no gradient
behind.  Such a gradient lives from the op that makes it to the hook's run, which is an op of its own in the
graph, with what the optimizer's step takes besides.  The hook runs at the end of the segment of the backward
that hands the gradient out, for then the engine gives it to its parameter; the backward is cut there
(:mod:`planner.rewrite.segments`).

It may write to the parameter.  So it is behind everything that reads that: behind the product that leads back
to the layer's input where that comes after the one for the weight, and nothing that reads the parameter is
made again behind it.  And it is not before the output gradients have been read for the last time, which the
engine holds together with the first segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.graph.step_graph import OPTIMIZER_STEP, scratch_of
from planner.graph.training_graph import GraphOp, TrainingGraph

__all__ = ["consumed_of", "consuming", "first_handed_out", "taken_of"]


def consuming(graph: TrainingGraph, taken: Mapping[str, int]) -> TrainingGraph:
    """The same step where the gradients of these parameters are gone once they were handed out.

    ``taken``  by name of the parameter the bytes that its hook takes for itself; 0: none, or not known.
    """
    outputs = {graph.value_of[node] for node in graph.outputs}
    made = {str(name): graph.value_of[node] for name, node in graph.gradients.items() if name in taken}
    value = {n: v for n, v in made.items() if graph.values[v].producer is not None and v not in outputs}
    if not value:
        return graph
    values, ops = list(graph.values), list(graph.ops)
    once = graph.pinned - {values[v].producer for v in value.values()}  # whoever holds it: handed out once
    for v in value.values():
        values[v] = replace(values[v], final=False)
    places = _places(graph, value)
    for i in _read_too_late(graph, places):
        ops[i] = replace(ops[i], recomputable=False)
    behind: dict[int, list[GraphOp]] = {}  # by the op with which gradients are handed out
    for name, v in sorted(value.items(), key=lambda item: item[1]):
        module = ops[values[v].producer or 0].module
        behind.setdefault(places[name], []).append(_step(name, v, module, taken[name]))
    return _with_steps(replace(graph, values=tuple(values), pinned=once), ops, behind)


def _places(graph: TrainingGraph, value: Mapping[str, int]) -> dict[str, int]:
    """By parameter the op with which its gradient, a value, is handed out."""
    first = first_handed_out(graph)
    read = _last_reads(graph)
    made = {name: graph.values[v].producer or 0 for name, v in value.items()}
    place = {name: max(first, at, read.get(name, -1)) for name, at in made.items()}
    waits = sorted((at, place[name]) for name, at in made.items() if max(first, at) < place[name])
    for begin, end in waits:  # one hook's wait is that of all whose gradients come meanwhile
        for name, at in place.items():
            if begin <= at < end:
                place[name] = end
    return place


def _last_reads(graph: TrainingGraph) -> dict[str, int]:
    """By parameter the last op of the backward that reads it, or what is made of it alone, as its cast."""
    names = _names_by_value(graph)
    last: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        if op.phase == "forward" and len(op.inputs) == 1 and op.inputs[0] in names:
            names |= dict.fromkeys(op.outputs, names[op.inputs[0]])
        if op.phase == "backward":
            last.update((name, i) for v in op.inputs for name in names.get(v, ()))
    return last


def _names_by_value(graph: TrainingGraph) -> dict[int, set[str]]:
    """Names of the parameters on each storage; tied ones share theirs."""
    names: dict[int, set[str]] = {}
    for node, (kind, name) in graph.sources.items():
        if kind == "parameter" and node in graph.value_of:
            names.setdefault(graph.value_of[node], set()).add(str(name))
    return names


def _read_too_late(graph: TrainingGraph, places: Mapping[str, int]) -> list[int]:
    """Ops of the forward that read a parameter, and would be run again behind its step."""
    needed = [-1] * len(graph.values)  # the last op of the backward that reads it, or what is made of it
    late = []
    names = _names_by_value(graph)
    for i in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[i]
        if op.phase != "forward":
            for v in op.inputs:
                needed[v] = max(needed[v], i)
            continue
        until = max((needed[v] for v in op.outputs), default=-1)
        stepped = [places[name] for v in op.inputs for name in names.get(v, ()) if name in places]
        if op.recomputable and stepped and until > min(stepped):
            late.append(i)
            continue  # kept, so that nothing before it is needed for that
        for v in op.inputs:
            needed[v] = max(needed[v], until)
    return late


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


def first_handed_out(graph: TrainingGraph) -> int:
    """The op of the backward with which the first gradients can be handed out; -1: with any."""
    given = {graph.value_of[node] for node in graph.tangents.values() if node in graph.value_of}
    readers = [i for i, op in enumerate(graph.ops) if op.phase == "backward" and given & {*op.inputs}]
    return max(readers, default=-1)
