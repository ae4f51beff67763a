"""Model depth against time: when each layer's values are in memory, and why.

From top to bottom the layers in order of execution, from left to right the steps of the plan.  The
forward runs down the picture and the backward up again: what is kept bridges the way between the two in
blue; what is dropped leaves a pale gap there, and is orange where it is computed again.  The height of a
row is what the layer would hold if nothing were dropped, so the blue part of it is the share that is
kept; what that is in bytes stands in the panel beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from planner.units import ByteUnit, seconds_text
from planner.view.bands import highest, turn_of
from planner.view.canvas import DROPPED, FREED, KEPT, RECOMPUTED, finish, ink, mark_turn, new_axes, short
from planner.view.layers import Row, depth_rows, layers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from planner.plans.plan_data import PlanData

__all__ = ["STATES", "plot_placements", "states_of"]

_ROWS = 36  # more layers than this are folded
_COLUMNS = 700  # more steps than this share one
_FILL = 0.84  # of the room a row has
_PANEL = 0.24  # width of the panel of bytes, in widths of the picture
_ABSENT = 0.27  # opacity of what is not in memory

# State of a value -> colour; from the bottom of a row to its top.
STATES = {
    "kept": KEPT,
    "recomputed": RECOMPUTED,
    "in memory until dropped": DROPPED,
    "dropped": RECOMPUTED,
    "not needed by the backward": FREED,
}
_GONE = list(STATES).index("dropped")
_ROW_BYTES = (("kept_bytes", KEPT), ("recomputed_bytes", RECOMPUTED), ("freed_bytes", FREED))


def states_of(row: Row, steps: int) -> np.ndarray:
    """Bytes of the row's values in each of ``STATES`` at each step, shape (5, steps)."""
    delta = np.zeros((len(STATES), steps + 1), dtype=np.int64)

    def add(state: int, first: int, end: int, size: int) -> None:
        delta[state, first] += size
        delta[state, end] -= size

    in_forward = {"save": 0, "recompute": 2, "free": 4}
    for layer in row.layers:
        for p in layer.placements:
            for k, (first, last) in enumerate(p.spans):
                add(1 if k else in_forward[p.decision], first, last + 1, p.bytes)
                if k:
                    add(_GONE, p.spans[k - 1][1] + 1, first, p.bytes)
    return np.cumsum(delta, axis=1)[:, :steps]


def plot_placements(plan: PlanData, ax: Axes | None = None) -> Axes:
    """When each layer's values are in memory: kept, dropped, recomputed; bytes by layer in a panel beside it.

    Every layer has a row where they are 36 at most, else neighbours of one structure share one.  The
    panel is a child of the axes.  Raises ``PlannerError`` without matplotlib.
    """
    rows = depth_rows(layers_of(plan), _ROWS)
    ax = new_axes(11.0, 1.6 + 0.25 * max(5, len(rows))) if ax is None else ax
    steps = len(plan.sequence)
    for place, row in enumerate(rows):
        _draw_row(ax, place + _FILL / 2, states_of(row, steps))
    font = float(np.clip(0.62 * _room(ax, len(rows)), 4.0, 9.0))
    ax.set_yticks(range(len(rows)), [short(row.name, 40) for row in rows], fontsize=font)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, max(1, steps))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("step of the plan")
    extra = f"{plan.overhead:.1%} more step time ({seconds_text(plan.recompute_s)})"
    finish(ax, f"{plan.model_name}: what is kept and what is recomputed, {extra}", pad=36)
    mark_turn(ax, turn_of(plan), inside=False)
    _legend(ax)
    _bytes_panel(ax, rows, font)
    return ax


def _draw_row(ax: Axes, base: float, states: np.ndarray) -> None:
    """The states of one row above ``base``, which counts downwards."""
    steps = states.shape[1]
    total = states.sum(axis=0)
    full = max(1, int(total.max(initial=0)))
    at = highest(total, _COLUMNS)
    edges = np.append(np.linspace(0, steps, len(at) + 1)[:-1], steps)
    below = np.zeros(len(at))
    for k, color in enumerate(STATES.values()):
        level = states[k, at]
        above = below + level * (_FILL / full)
        there = np.flatnonzero(level)
        if len(there):
            columns = slice(there[0], there[-1] + 1)
            low, high = (base - np.append(y[columns], y[there[-1]]) for y in (below, above))
            x = edges[there[0] : there[-1] + 2]
            ax.fill_between(x, low, high, step="post", color=color, alpha=_opacity(k), lw=0)
        below = above
    ax.axhline(base, color=ink(ax), lw=0.4, alpha=0.3)


def _opacity(state: int) -> float:
    return _ABSENT if state == _GONE else 1.0


def _room(ax: Axes, rows: int) -> float:
    """Points from one row to the next."""
    return float(72 * ax.get_window_extent().height / ax.figure.dpi / max(1, rows))


def _legend(ax: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, alpha=_opacity(k), lw=0, label=name)
        for k, (name, color) in enumerate(STATES.items())
    ]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles), frameon=False,
        fontsize=8, borderaxespad=1.6, borderpad=0.0, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


def _bytes_panel(ax: Axes, rows: tuple[Row, ...], font: float) -> None:
    """Bars of the bytes each row makes in the forward, and the time its recomputation takes."""
    from matplotlib.ticker import MaxNLocator

    panel = ax.inset_axes((1.015, 0.0, _PANEL, 1.0), sharey=ax)
    sizes = np.array([[getattr(row, name) for name, _ in _ROW_BYTES] for row in rows], dtype=float)
    sizes = sizes.reshape(-1, len(_ROW_BYTES))
    unit = ByteUnit.of(sizes.sum(axis=1).max(initial=0))
    sizes /= unit.bytes
    ends = sizes.sum(axis=1)
    for k, (_, color) in enumerate(_ROW_BYTES):
        panel.barh(range(len(rows)), sizes[:, k], left=sizes[:, :k].sum(axis=1), height=0.7, color=color)
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        if row.recompute_s > 0:
            panel.annotate(
                f"+{seconds_text(row.recompute_s)}", (end, place), (3, 0), textcoords="offset points",
                va="center", fontsize=0.9 * font, color=ink(ax),
            )  # fmt: skip
    panel.set_xlim(0, 1.45 * ends.max(initial=0) or 1.0)
    panel.xaxis.set_major_locator(MaxNLocator(3, prune="lower"))
    panel.tick_params(axis="y", left=False, labelleft=False)
    panel.set_xlabel(f"values made ({unit.name}),\nextra time", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
