"""What the ops of a compiled step cost: libraries' calls, and the loops that inductor writes.

A loop that is made again makes again all that is written into it, so its price is that of every call from the
stored values it reads: what those calls take one by one, times what is left of that in one loop.  On a CPU
that is measured to be a half (``bench_compiled --loops``: 0.15 to 0.6 of four models' steps), for such loops
wait for arithmetic too; on a GPU they wait for memory alone, and one call's worth is left: the last one's.
"""

from __future__ import annotations

import dataclasses
import math

from torch import fx

from planner import _compat
from planner.compiled.fused import FusedStep
from planner.compiled.judge import in_layout, scratch_bytes
from planner.compiled.layouts import Ways, swifter
from planner.costs.op_costs import Costs, costs_of
from planner.costs.roofline import is_view
from planner.costs.target import Target

__all__ = ["costs_of_fused", "laid_out_faster"]

# What is left of the seconds of calls that are written into one loop, on a CPU.
FUSED = 0.5

# On a GPU, of an elementwise call's own: it rides along in a loop that moves as much without it.
RIDES = 0.05


def laid_out_faster(step: FusedStep, costs: Costs) -> tuple[Costs, dict[int, Ways]]:
    """Ops of ``step`` that are clearly faster with the channels last, by position, and ``costs`` as they are
    then.

    None where what ops take is not measured.
    """
    ops, device = step.graph.ops, step.graph.device
    if costs.source != "profile":
        return costs, {}

    def seconds_of(nodes: list[fx.Node]) -> list[float]:
        each = [costs_of([node], "profile", device) for node in nodes]
        return [math.nan if of.estimated else of.total_seconds for of in each]

    ways = swifter({i: op.node for i, op in enumerate(ops) if op.node is not None}, seconds_of)
    seconds = dict(costs.seconds) | {ops[i].name: way.last_s for i, way in ways.items()}
    return dataclasses.replace(costs, seconds=seconds), ways


def costs_of_fused(step: FusedStep, target: Target) -> Costs:
    """Costs of the ops of ``step``, by name."""
    graph, on_cpu = step.graph, target.here.type == "cpu"
    ours = {op.name: op.node for op in graph.ops if op.node is not None}
    loops = {name: _written_into(step, node) for name, node in ours.items() if _compat.is_lowered(node)}
    inside = {n for nodes in loops.values() for n in nodes} if on_cpu else set[fx.Node]()
    nodes = list(dict.fromkeys([*ours.values(), *inside]))
    costs = costs_of(nodes, target.source, graph.device, rates=target.named)
    seconds = {name: costs.seconds[node.name] for name, node in ours.items()}
    for name, written in loops.items():
        if on_cpu:
            seconds[name] = FUSED * math.fsum([seconds[name], *(costs.seconds[n.name] for n in written)])
        elif _compat.is_fused(ours[name]):
            seconds[name] *= RIDES
    workspace = {name: 0 if name in loops else costs.workspace_bytes[n.name] for name, n in ours.items()}
    if on_cpu:
        workspace |= _least_scratch({name: node for name, node in ours.items() if name not in loops})
    flops = {name: costs.flops[node.name] for name, node in ours.items()}
    return dataclasses.replace(costs, seconds=seconds, workspace_bytes=workspace, flops=flops)


def _written_into(step: FusedStep, node: fx.Node) -> set[fx.Node]:
    """The calls that are made again with ``node``: what it is made from, back to what is stored."""
    found, stack = set[fx.Node](), list(node.all_input_nodes)
    while stack:
        n = stack.pop()
        if n in found or n in step.stored or n.op != "call_function":
            continue
        found.add(n)
        stack += n.all_input_nodes
    return {n for n in found if _compat.is_lowered(n) and not is_view(n)}


def _least_scratch(calls: dict[str, fx.Node]) -> dict[str, int]:
    """What libraries take at least, which is measured whatever prices their seconds have.

    Which layout a call is given, and so how much it takes, is seen when generated code is played.
    """
    ways = {}
    for name, node in calls.items():
        ways[name] = [node]
        if str(node.target).startswith("aten.convolution"):
            ways[name] += [in_layout(node, channels_last=way) for way in (False, True)]
    found = iter(scratch_bytes([node for way in ways.values() for node in way]))
    return {name: min([next(found) for _ in way]) for name, way in ways.items()}
