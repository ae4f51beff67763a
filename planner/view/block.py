"""The ops of one module as a graph: what the forward keeps, and what the backward computes again from it.

On the left the forward, from top to bottom; an op stands below everything it reads.  On the right, at the
same heights, the ops that run again, with dashed lines from the kept values they start from.  Levels are
networkx's topological generations; within a level a few sweeps put each op below the mean of what it
reads and is read by (K. Sugiyama, S. Tagawa, M. Toda, Methods for visual understanding of hierarchical
system structures, 1981), which leaves few crossings in a block of a model, but has no proof of it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from planner.errors import PlannerError
from planner.units import bytes_text
from planner.view.canvas import FREED, KEPT, RECOMPUTED, finish, ink, new_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from planner.plans.outline import Outline
    from planner.plans.plan_data import Placement, PlanData

__all__ = ["block_graph", "plot_graph"]

_MOST_OPS = 64
_SWEEPS = 4
_NEGLIGIBLE = 1e-4  # of the bytes of a block
_WIDE, _HIGH = 1.7, 0.46  # inches of a box with the room around it
_BULGE = 0.8  # inches by which an edge leaves its column to go around a box
_COLORS = {"save": KEPT, "recompute": RECOMPUTED, "free": FREED}
_INK = {KEPT: "white", RECOMPUTED: "black", FREED: "black"}
_LEGEND = (("kept", KEPT), ("recomputed", RECOMPUTED), ("not needed by the backward", FREED))


@dataclass(frozen=True)
class _Node:
    """``side``: 0 the forward, 1 what runs again; ``inside`` the module."""

    name: str
    side: int
    inside: bool = True


def block_graph(plan: PlanData, module: str) -> nx.DiGraph:
    """Ops of ``module`` as nodes, the values between them as edges.

    Node attributes: ``op``, ``module`` (its path below ``module``), ``bytes`` (of its outputs),
    ``decision`` (of the largest of them), ``times`` (it runs, on its side).  The edge attribute ``kept`` is
    true from a kept value to an op that runs again.  Raises ``PlannerError`` as :func:`plot_graph`.
    """
    graph = plan.outline
    if graph is None:
        raise PlannerError("this plan's file does not say what each op reads; make the plan again")
    chosen = [i for i, op in enumerate(graph.ops) if op.phase == "forward" and _within(op.module, module)]
    if not chosen:
        raise PlannerError(_unknown(plan, module))
    if len(chosen) > _MOST_OPS:
        parts = sorted({_part(graph.ops[i].module, module) for i in chosen} - {module})
        raise PlannerError(
            f"{module or 'the whole model'} has {len(chosen)} ops, of which a picture shows {_MOST_OPS} at "
            f"most; its parts are {', '.join(map(repr, parts[:12]))}{', ...' if len(parts) > 12 else ''}"
        )
    return _built(plan, graph, module, chosen)


def _built(plan: PlanData, graph: Outline, module: str, chosen: list[int]) -> nx.DiGraph:
    placed = {p.name: p for p in plan.placements}
    decisions = [placed.get(v.name) for v in graph.values]
    runs = dict.fromkeys((graph.ops[i].name for i in chosen), 0)
    for name in plan.sequence:
        if name in runs:
            runs[name] += 1
    out = nx.DiGraph()
    for side in (0, 1):
        for i in chosen:
            op = graph.ops[i]
            times = runs[op.name] - 1 if side else 1
            if times < 1:
                continue
            node = _Node(op.name, side)
            made = [p for v in op.outputs if (p := decisions[v]) is not None]
            below = op.module[len(module) :].lstrip(".")
            out.add_node(node, op=op.target, module=below, times=times, **_made(made))
            for v in op.inputs:
                _connect(out, graph, runs, decisions[v], v, node)
    return _without_side_shows(out)


def _without_side_shows(graph: nx.DiGraph) -> nx.DiGraph:
    """``graph`` without what is tied to nothing that takes memory: counters of batches, random states."""
    weights = [
        (sum(graph.nodes[n]["bytes"] for n in part), part) for part in nx.weakly_connected_components(graph)
    ]
    least = _NEGLIGIBLE * sum(weight for weight, _ in weights)
    return graph.subgraph([n for weight, part in weights if weight >= least for n in part]).copy()


def _connect(
    out: nx.DiGraph, graph: Outline, runs: dict[str, int], read: Placement | None, v: int, node: _Node
) -> None:
    """The edge that brings value ``v`` to ``node``; none for parameters and inputs."""
    producer = graph.problem.values[v].producer
    if producer is None or read is None:
        return
    op = graph.ops[producer]
    inside = op.name in runs
    again = node.side and read.decision == "recompute"
    source = _Node(op.name if inside else graph.values[v].name, 1 if again else 0, inside)
    if not inside and source not in out:
        out.add_node(source, op=op.target, module=op.module, times=1, **_made([read]))
    out.add_edge(source, node, kept=bool(node.side and not source.side))


def _made(placements: list[Placement]) -> dict[str, Any]:
    largest = max(placements, key=lambda p: p.bytes, default=None)
    return {
        "bytes": sum(p.bytes for p in placements),
        "decision": "free" if largest is None else largest.decision,
    }


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _part(path: str, module: str) -> str:
    """``path`` cut one name below ``module``."""
    depth = len(module.split(".")) if module else 0
    return ".".join(path.split(".")[: depth + 1])


def _unknown(plan: PlanData, module: str) -> str:
    paths = {p.module for p in plan.placements}
    known = sorted(
        x for x in {".".join(x.split(".")[:k]) for x in paths for k in range(1, 1 + len(x.split(".")))} if x
    )
    near = difflib.get_close_matches(module, known, n=5, cutoff=0.4) or known[:5]
    return f"no op of the forward is in a module {module!r}; near names: {', '.join(map(repr, near))}"


# -- drawing --------------------------------------------------------------------------------------


def plot_graph(plan: PlanData, module: str, ax: Axes | None = None) -> Axes:
    """The ops of ``module``, coloured by what happens to what they make; on the right those that run again.

    Raises ``PlannerError`` if no op is in such a module (naming near ones), if there are more than 64 (naming
    its parts), if the plan is of a file that does not have its ops, or without matplotlib.
    """
    graph = block_graph(plan, module)
    places, width, height = _layout(graph)
    ax = new_axes(max(6.0, _WIDE * width), max(2.5, 1.0 + _HIGH * height)) if ax is None else ax
    ax.set_xlim(-0.5, max(width - 0.5, 0.5))
    ax.set_ylim(height - 0.4, -0.9)
    ax.set_axis_off()
    boxes = {node: _box(ax, node, graph.nodes[node], places[node]) for node in graph}
    for a, b, kept in graph.edges(data="kept"):
        style = {"color": KEPT, "ls": "--", "alpha": 0.8} if kept else {"color": ink(ax), "alpha": 0.55}
        ends = {"patchA": boxes[a].get_bbox_patch(), "patchB": boxes[b].get_bbox_patch()}
        curve = f"arc3,rad={_bend(places[a], places[b])}"
        arrow = {"arrowstyle": "-|>,head_width=.16,head_length=.32", "connectionstyle": curve, "lw": 0.9}
        arrow |= {"shrinkA": 0, "shrinkB": 1, **style, **ends}
        ax.annotate("", places[b], places[a], zorder=1, arrowprops=arrow)
    sides = {node.side for node in graph}
    for side, title in ((0, "forward"), (1, "computed again in the backward")):
        if side in sides:
            across = [places[node][0] for node in graph if node.side == side]
            ax.text(sum((min(across), max(across))) / 2, -0.75, title, ha="center", fontsize=9, alpha=0.75)
    made = [p for p in plan.placements if _within(p.module, module)]
    kept, again = (sum(p.bytes for p in made if p.decision == d) for d in ("save", "recompute"))
    finish(ax, f"{module or plan.model_name}: {bytes_text(kept)} kept, {bytes_text(again)} recomputed")
    _legend(ax)
    return ax


def _layout(graph: nx.DiGraph) -> tuple[dict[_Node, tuple[float, float]], int, int]:
    """Place of each node, counted in boxes, and how many boxes wide and high it all is."""
    level = _levels(graph)
    places: dict[_Node, tuple[float, float]] = {}
    left = 0
    for side in (0, 1):
        lines = _lines(graph.subgraph([n for n in graph if n.side == side]), level)
        width = max(map(len, lines.values()), default=0)
        for rank, line in lines.items():
            start = left + (width - len(line)) / 2
            places |= {n: (start + k, float(rank)) for k, n in enumerate(line)}
        left += width
    return places, left, 1 + max(level.values(), default=0)


def _levels(graph: nx.DiGraph) -> dict[_Node, int]:
    forward = graph.subgraph([n for n in graph if not n.side])
    level = {n: k for k, generation in enumerate(nx.topological_generations(forward)) for n in generation}
    for n in forward:  # what reads nothing stands just above its first reader
        if forward.in_degree(n) == 0:
            level[n] = min((level[m] for m in forward.successors(n)), default=1) - 1
    return level | {n: level.get(_Node(n.name, 0, n.inside), 0) for n in graph if n.side}


def _lines(part: nx.DiGraph, level: dict[_Node, int]) -> dict[int, list[_Node]]:
    """The nodes of each level from left to right."""
    lines: dict[int, list[_Node]] = {}
    for n in part:
        lines.setdefault(level[n], []).append(n)
    at = {n: k - (len(line) - 1) / 2 for line in lines.values() for k, n in enumerate(line)}
    for sweep in range(_SWEEPS):
        near = part.successors if sweep % 2 else part.predecessors
        for rank in sorted(lines, reverse=bool(sweep % 2)):
            line = lines[rank]
            mean = {n: float(np.mean([at[m] for m in near(n)] or [at[n]])) for n in line}
            line.sort(key=mean.__getitem__)
            at |= {n: k - (len(line) - 1) / 2 for k, n in enumerate(line)}
    return lines


def _bend(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Curvature of an edge: what skips levels in its own column goes around the boxes between."""
    levels = b[1] - a[1]
    return 0.0 if abs(a[0] - b[0]) > 0.3 or levels <= 1 else min(1.2, 2 * _BULGE / (levels * _HIGH))


def _box(ax: Axes, node: _Node, facts: dict[str, Any], at: tuple[float, float]) -> Annotation:
    """Op, module and bytes; an outline only for what is made outside."""
    color = _COLORS[facts["decision"]]
    name = facts["op"].rpartition(".")[2] + (f" x{facts['times']}" if facts["times"] > 1 else "")
    size = bytes_text(facts["bytes"]) if facts["bytes"] else "in place"
    where = facts["module"].rpartition(".")[2] if node.inside else f"of {facts['module'] or 'the model'}"
    text = f"{short(name, 24)}\n{short(where, 20)} {size}"
    return ax.annotate(
        text, at, ha="center", va="center", fontsize=7.5, zorder=2, linespacing=1.15,
        color=_INK[color] if node.inside else ink(ax),
        bbox={
            "boxstyle": "round,pad=0.35", "fc": color if node.inside else ax.figure.get_facecolor(),
            "ec": color, "lw": 1.2,
        },
    )  # fmt: skip


def _legend(ax: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, lw=0, label=name) for name, color in _LEGEND]
    handles.append(Patch(fc="none", ec=FREED, label="made outside"))
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 0.0), ncols=len(handles), frameon=False,
        fontsize=8, borderaxespad=0.0, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
