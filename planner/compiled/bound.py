"""What no schedule of a compiled step goes below, in seconds, within a budget.

The solvers' own bound is of a problem that holds every stored value from its op to its last reader, and of
generated code that is not true: inductor writes a result over an operand, or an elementwise result into its
readers.  So the bound is proved of a problem in which

* memory counts only while a library's kernel of the backward runs, where the arguments lie in buffers of
  their own, and of what is alive then only what is stored whatever inductor does;
* an elementwise result of the backward counts where a kernel reads it, or where what it was made from, which
  is as large, would be held in its place;
* what is elementwise is made again for nothing, so that a schedule may make it for each reader.

Every schedule that runs kernels and reductions in the graph's order then takes no more there than in truth,
and no longer; so what is proved of that problem holds of it.
"""

from __future__ import annotations

from dataclasses import replace

from planner import _compat
from planner.graph.training_graph import TrainingGraph
from solvers import Problem

__all__ = ["under"]


def under(graph: TrainingGraph, problem: Problem) -> tuple[Problem, list[int]]:
    """The problem that is below ``problem``, which is of ``graph``, and the ops while which memory counts."""
    nodes = [op.node for op in graph.ops]
    fused = [n is not None and _compat.is_fused(n) for n in nodes]
    kernels = [n is not None and not _compat.is_lowered(n) for n in nodes]
    sizes = [value.bytes for value in problem.values]
    scratch = [0] * len(problem)
    for i in range(graph.turn, len(problem)):
        if not fused[i]:
            continue
        op = problem.ops[i]
        own = (
            sizes[v]
            for v in op.inputs
            if (problem.values[v].producer or 0) >= graph.turn
            and not problem.values[v].final
            and problem.consumers[v][-1] == i
        )
        most = max(own, default=0)
        for v in op.outputs:
            if sizes[v] > most:
                for reader in problem.consumers[v]:
                    scratch[reader] += sizes[v] * kernels[reader]
                sizes[v] = 0
    ops = [
        replace(
            op,
            workspace_bytes=scratch[i],
            reuses=None,
            recompute_seconds=0.0 if fused[i] else op.recompute_seconds,
        )
        for i, op in enumerate(problem.ops)
    ]
    values = [replace(v, bytes=b) for v, b in zip(problem.values, sizes, strict=True)]
    counted = [i for i in range(graph.turn, len(problem)) if kernels[i]]
    return replace(problem, ops=tuple(ops), values=tuple(values)), counted
