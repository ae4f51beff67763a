"""The order of the backward: gradients of weights as soon as what they need is there, where that frees more.

Of a product torch computes the gradient of its input first, and then that of its weight.  Until the second is
done the input of the product, kept since the forward, lies beside both gradients; in the other order it is
gone by then.  A gradient that nothing else reads may come at any time, so it is moved up behind the last call
that makes something for it, where what it reads last is no smaller than what it makes: then from there on no
more is held than before.  It is the rule of Sethi and Ullman (1970, https://doi.org/10.1145/321607.321620),
to run first what leaves less behind, for one call at a time.

Bits stay: the calls are the same on the same numbers.  Only calls move that are read by nobody, so sums of
several gradients are added up in the order that they had; draws, writes and collectives stay where they are,
and nothing moves past a call that may write over what it reads.
"""

from __future__ import annotations

from dataclasses import replace

from planner.capture import meta
from planner.capture.joint_graph import JointGraph
from planner.graph.nodes import is_mutation, is_random, talks
from planner.graph.training_graph import GraphOp, TrainingGraph, training_graph

__all__ = ["ordered_graph", "weights_first"]


def ordered_graph(joint: JointGraph) -> TrainingGraph:
    """The training graph of ``joint``, in the order that it asks for."""
    graph = training_graph(joint)
    return weights_first(graph) if joint.order == "free" else graph


def weights_first(graph: TrainingGraph) -> TrainingGraph:
    """The same step where gradients of weights come first; itself where nothing moves."""
    readers: dict[int, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for v in op.inputs:
            readers.setdefault(v, []).append(i)
    place = {i: (i, 0) for i in range(len(graph.ops))}
    for i, op in enumerate(graph.ops):
        if not _is_alone(graph, i, readers):
            continue
        made = [p for v in op.inputs if (p := graph.values[v].producer) is not None]
        written = [j for v in op.inputs for j in readers[v] if j < i and _writes(graph.ops[j])]
        behind = max([graph.turn, *made, *written])
        last = [v for v in op.inputs if all(r <= behind or r == i for r in readers[v])]
        freed = sum(graph.values[v].bytes for v in last if not graph.values[v].final and _is_made(graph, v))
        if freed >= sum(graph.values[v].bytes for v in op.outputs) and behind + 1 < i:
            place[i] = (behind, 1)
    order = sorted(place, key=lambda i: (*place[i], i))
    return graph if order == list(place) else _in_order(graph, order)


def _writes(op: GraphOp) -> bool:
    """Whether it may write over what it reads, so that others find something else there before and after."""
    return op.node is None or not op.outputs or is_mutation(op.node) or meta.over(op.node) is not None


def _is_made(graph: TrainingGraph, v: int) -> bool:
    return graph.values[v].producer is not None


def _is_alone(graph: TrainingGraph, i: int, readers: dict[int, list[int]]) -> bool:
    """Whether an op only makes gradients that nobody reads, of which the engine adds up none."""
    op = graph.ops[i]
    if op.phase != "backward" or op.node is None or not op.outputs or op.reuses is not None:
        return False
    if is_random(op.node) or is_mutation(op.node) or talks(op.node):
        return False
    return all(graph.values[v].kind == "gradient" and v not in readers for v in op.outputs)


def _in_order(graph: TrainingGraph, order: list[int]) -> TrainingGraph:
    number = {old: new for new, old in enumerate(order)}
    values = tuple(
        replace(v, producer=None if v.producer is None else number[v.producer]) for v in graph.values
    )
    pinned = frozenset(number[i] for i in graph.pinned)
    return replace(graph, ops=tuple(graph.ops[i] for i in order), values=values, pinned=pinned)
