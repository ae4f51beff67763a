"""Every copy of every value in a schedule: when it is born, when it dies, and what it is.

From this come the breakdown of a peak, the picture of memory over the step, and each value's
placement.  Nothing is decided here; it is a reading of the steps that ``simulate`` has judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.graph.step_graph import LAST, StepGraph, forward_length, release_of
from solvers import Problem, Timeline

__all__ = ["MEMORY_KINDS", "Copy", "bytes_over_time", "copies_of"]

# From the bottom of the picture to its top.
MEMORY_KINDS = (
    "parameters",
    "buffers",
    "optimizer_state",
    "inputs",
    "output_gradients",
    "library_workspace",
    "allocator_slack",
    "margin",
    "gradients",
    "outputs",
    "between_regions",
    "saved",
    "recomputed",
    "gradients_in_flight",
    "temporaries",
    "workspace",
)


@dataclass(frozen=True)
class Copy:
    """One copy of a value: alive from step ``born`` to step ``died``, both included."""

    value: int
    born: int
    died: int
    bytes: int
    kind: str


def copies_of(graph: StepGraph, problem: Problem, timeline: Timeline) -> list[Copy]:
    """All copies that ``timeline`` makes, in order of birth.

    ``saved`` is what the forward leaves for the backward; ``recomputed`` what a further execution
    made; ``temporaries`` what the forward drops again; ``gradients_in_flight`` what the backward
    makes for itself; ``between_regions`` what code that is no region's holds, FSDP2's hooks among it;
    ``gradients`` and ``outputs`` are held to the end, or, of outputs, until the caller
    lets go of them: one that the backward reads after that is ``saved``.
    """
    steps = timeline.steps.tolist()
    turn, released = forward_length(graph, steps), release_of(graph, steps)
    last = {v for op in graph.ops if op.target == LAST for v in op.outputs}
    died: dict[tuple[int, int], int] = {}
    born: dict[int, int] = {}
    ran: set[int] = set()
    again: set[tuple[int, int]] = set()
    order: list[tuple[int, int]] = []
    for t, i in enumerate(steps):
        for v in problem.ops[i].outputs:
            born[v] = t
            order.append((v, t))
            if i in ran:
                again.add((v, t))
        ran.add(i)
        for v in timeline.frees[t]:  # a storage that is written over is the result's from then on
            died[v, born[v]] = t - (v == problem.ops[i].reuses)
    end = len(steps) - 1
    out = []
    for v, t in order:
        death = died.get((v, t), end)
        if graph.values[v].kind == "output" and (death == released or v in last):
            kind = "outputs"
        else:
            kind = _kind(graph, v, t, death, turn, (v, t) in again)
        out.append(Copy(v, t, death, problem.values[v].bytes, kind))
    return out


def _kind(graph: StepGraph, v: int, born: int, died: int, turn: int, again: bool) -> str:
    value = graph.values[v]
    if value.kind == "held":
        return "between_regions"
    if value.final and value.kind in ("gradient", "output"):
        return value.kind + "s"
    if again:
        return "recomputed"
    if born >= turn:
        return "gradients_in_flight"
    return "saved" if died >= turn else "temporaries"


def bytes_over_time(
    problem: Problem,
    timeline: Timeline,
    copies: list[Copy],
    static: Mapping[str, int],
    slack: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """For each of ``MEMORY_KINDS``, bytes alive at each step, shape (T,).  Their sum:
    ``timeline.live_bytes``.

    ``static``: bytes by kind that are there throughout.  ``slack``: what an allocator hands out at each
    step beyond ``timeline.live_bytes``; ``None`` where there is none.
    """
    length = len(timeline.steps)
    delta = {kind: np.zeros(length + 1, dtype=np.int64) for kind in MEMORY_KINDS}
    for copy in copies:
        delta[copy.kind][copy.born] += copy.bytes
        delta[copy.kind][copy.died + 1] -= copy.bytes
    out = {kind: np.cumsum(d)[:length] for kind, d in delta.items()}
    scratch = [problem.ops[i].workspace_bytes + problem.reused_bytes(i) for i in timeline.steps.tolist()]
    out["workspace"] = np.array(scratch, dtype=np.int64)
    for kind, size in static.items():
        out[kind] = out[kind] + size
    if slack is None:
        del out["allocator_slack"]
    else:
        out["allocator_slack"] = out["allocator_slack"] + slack
    return out
