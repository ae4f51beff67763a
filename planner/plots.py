"""A plan as pictures: memory over the step, placements by layer, the frontier.

Each function draws on the axes it is given and nothing else; without any it makes a figure through
``pyplot``, as pandas does, because a notebook shows only those.  Nothing is shown, saved or set
globally.  Text and lines take the colours of the style in force, so that dark styles work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from planner.bands import aligned_baseline, bands_of, peak_place, picture_title, top_bytes, turn_of
from planner.errors import PlannerError
from planner.layers import layers_of, rows_of
from planner.units import ByteUnit, bytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from planner.frontier import Frontier
    from planner.plan import Plan

__all__ = ["plot_frontier", "plot_memory", "plot_placements"]

_BUDGET = "#d0433b"
_KEPT = "#4479b5"
_RECOMPUTED = "#e58a3c"
_FREED = "#cfd5dd"
_OPTIMIZER = "#b5bcc7"
_PLACED = (("kept", _KEPT), ("recomputed", _RECOMPUTED), ("freed, not needed again", _FREED))
_ROWS = 40  # more layers than this are folded


def plot_memory(plan: Plan, ax: Axes | None = None) -> Axes:
    """Live bytes at each step, stacked by kind, against the budget and the step without recomputation.

    The horizontal axis counts the steps of the plan; the line of the step without recomputation has
    each op where the plan first runs it.  Raises ``PlannerError`` without matplotlib.
    """
    ax = _axes(9.0, 4.2) if ax is None else ax
    top = top_bytes(plan)
    unit = ByteUnit.of(top)
    steps = len(plan.timeline)
    below = np.zeros(steps)
    for band in bands_of(plan):
        above = below + band.bytes / unit.bytes
        name = band.name if band.visible else None
        ax.fill_between(
            _edges(steps), _held(below), _held(above), step="post", color=band.color, label=name, lw=0
        )
        below = above
    before = aligned_baseline(plan) / unit.bytes
    ink = _ink(ax)
    ax.step(
        _edges(steps), _held(before), where="post", color=ink, lw=1.1, alpha=0.8, label="nothing recomputed"
    )
    if plan.optimizer_step_bytes:
        height = plan.optimizer_step_bytes / unit.bytes
        ax.bar(1.01 * steps, height, 0.02 * steps, align="edge", color=_OPTIMIZER, label="optimizer's step")
    ax.axhline(plan.budget_bytes / unit.bytes, color=_BUDGET, ls=(0, (6, 3)), lw=1.4, label="budget")
    ax.set_xlim(0, max(1, steps) * (1.04 if plan.optimizer_step_bytes else 1.0))
    ax.set_ylim(0, 1.2 * top / unit.bytes)
    _mark_turn(ax, plan)
    _mark_peak(ax, plan, unit)
    ax.set_xlabel("step of the plan (ops run, recomputed ones included)")
    ax.set_ylabel(f"live memory ({unit.name})")
    _finish(ax, picture_title(plan))
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9
    )
    return ax


def plot_placements(plan: Plan, ax: Axes | None = None) -> Axes:
    """Bytes kept, recomputed and freed by layer, top to bottom in order of execution.

    Every layer has a bar where they are 40 at most, else alike ones share one, which is their mean.
    Beside each bar is the time its recomputation takes.  Raises ``PlannerError`` without matplotlib.
    """
    rows = rows_of(layers_of(plan), _ROWS, unfolded=True)
    ax = _axes(8.0, 1.5 + 0.22 * max(4, len(rows))) if ax is None else ax
    each = np.array([len(row.layers) if row.alike else 1 for row in rows])
    sizes = np.array([(row.kept_bytes, row.recomputed_bytes, row.freed_bytes) for row in rows]).reshape(-1, 3)
    sizes = sizes / each[:, None]
    unit = ByteUnit.of(max(sizes.sum(axis=1), default=0))
    sizes = sizes / unit.bytes
    ends = sizes.sum(axis=1)
    places = np.arange(len(rows))
    for k, (name, color) in enumerate(_PLACED):
        ax.barh(places, sizes[:, k], left=sizes[:, :k].sum(axis=1), height=0.74, color=color, label=name)
    room = 72 * ax.get_window_extent().height / ax.figure.dpi / max(1, len(rows))  # points
    font = float(np.clip(0.8 * room, 4.0, 9.0))
    for place, row, end, count in zip(places, rows, ends, each, strict=True):
        if row.recompute_s > 0:
            text, at = f"+{seconds_text(row.recompute_s / count)}", (end, place)
            ax.annotate(
                text, at, (4, 0), textcoords="offset points", va="center", fontsize=font, color=_ink(ax)
            )
    names = [_short(row.name) + (" (each)" if n > 1 else "") for row, n in zip(rows, each, strict=True)]
    ax.set_yticks(places, names, fontsize=font)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.14 * max(ends, default=1.0) or 1.0)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"bytes made in the forward ({unit.name}), and the time recomputing them takes")
    extra = f"{plan.overhead:.1%} more step time ({seconds_text(plan.recompute_s)})"
    _finish(ax, f"{plan.model_name}: {extra}", pad=26)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9, borderpad=0.2
    )
    return ax


def plot_frontier(frontier: Frontier, ax: Axes | None = None, *, plan: Plan | None = None) -> Axes:
    """Overhead against budget; the best overhead of any plan lies in the band above the proved bound.

    Lines between the solved budgets guide the eye only.  Below the floor, hatched, no plan exists.
    ``plan`` is marked at its budget.  Raises ``PlannerError`` without matplotlib.
    """
    ax = _axes(7.2, 4.2) if ax is None else ax
    unit = ByteUnit.of(max([frontier.baseline_peak_bytes, *(p.budget_bytes for p in frontier.points)]))
    solved = [p for p in frontier.points if p.overhead is not None and p.overhead_bound is not None]
    budgets = np.array([p.budget_bytes for p in solved]) / unit.bytes
    overhead = np.array([100 * (p.overhead or 0.0) for p in solved])
    bound = np.array([100 * (p.overhead_bound or 0.0) for p in solved])
    ax.fill_between(
        budgets, bound, overhead, color=_RECOMPUTED, alpha=0.22, lw=0, label="gap to the proved bound"
    )
    ax.plot(budgets, bound, color=_KEPT, lw=1.2, ls=(0, (4, 2)), label="proved: no plan has less")
    ax.plot(
        budgets, overhead, color=_RECOMPUTED, lw=1.8, marker="o", ms=5, label="plans found", clip_on=False
    )
    _mark_budgets(ax, frontier, unit)
    if plan is not None:
        here = (plan.budget_bytes / unit.bytes, 100 * plan.overhead)
        ax.plot(
            *here,
            marker="*",
            ms=15,
            ls="",
            color=_BUDGET,
            mec=ax.get_facecolor(),
            zorder=5,
            label=_plan_text(plan),
        )
    ax.set_ylim(0, 1.12 * max([1.0, *overhead, 100 * plan.overhead if plan else 0.0]))
    ax.set_xlabel(f"budget ({unit.name})")
    ax.set_ylabel("overhead (% of step time)")
    _finish(ax, f"{frontier.model_name}: what a smaller budget costs")
    ax.legend(loc="upper right", facecolor=ax.get_facecolor(), edgecolor="none", framealpha=0.9, fontsize=9)
    return ax


# -- parts ----------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> Axes:
    """Axes of a new figure; sizes in inches."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise PlannerError("pictures need matplotlib: pip install 'rematplan[notebooks]'") from None
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _ink(ax: Axes) -> Any:
    """The colour of the style's text."""
    return ax.xaxis.label.get_color()


def _edges(steps: int) -> np.ndarray:
    return np.arange(steps + 1)


def _held(level: np.ndarray) -> np.ndarray:
    """``level`` with its last entry repeated, so that the last step has a width too."""
    return np.append(level, level[-1:])


def _finish(ax: Axes, title: str, *, pad: float = 8.0) -> None:
    ax.set_title(title, loc="left", fontsize=11, pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def _mark_turn(ax: Axes, plan: Plan) -> None:
    turn = turn_of(plan)
    if turn is None:
        return
    ax.axvline(turn, color=_ink(ax), lw=0.8, ls=":", alpha=0.6)
    for text, side, offset in (("forward", "right", -5), ("backward", "left", 5)):
        ax.annotate(
            text,
            (turn, 1.0),
            (offset, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=9,
            alpha=0.75,
        )


def _mark_peak(ax: Axes, plan: Plan, unit: ByteUnit) -> None:
    """A dot at the peak, named in the upper right corner, which the end of the backward leaves free."""
    if not len(plan.timeline):
        return
    step = int(np.argmax(plan.timeline))
    at = (step + 0.5, plan.timeline[step] / unit.bytes)
    if plan.peak_bytes > plan.timeline[step]:  # the optimizer's step
        at = (1.02 * len(plan.timeline), plan.peak_bytes / unit.bytes)
    ax.plot(*at, marker="o", ms=5, color=_BUDGET, mec=ax.get_facecolor(), zorder=6)
    ax.annotate(
        f"peak {bytes_text(plan.peak_bytes)}\n{_short(peak_place(plan))}",
        at,
        (0.995, 0.92),
        textcoords="axes fraction",
        ha="right",
        va="top",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "lw": 0.8, "color": _ink(ax), "alpha": 0.6, "shrinkB": 3},
    )


def _mark_budgets(ax: Axes, frontier: Frontier, unit: ByteUnit) -> None:
    """The floor, the step without recomputation, and the budgets that no plan was found for."""
    floor, full = frontier.floor_bytes / unit.bytes, frontier.baseline_peak_bytes / unit.bytes
    budgets = [p.budget_bytes / unit.bytes for p in frontier.points]
    low, high = min([floor, *budgets]), max([full, *budgets])
    margin = 0.05 * (high - low or high)
    ax.set_xlim(low - margin, high + margin)
    ax.axvspan(
        low - margin,
        floor,
        fill=False,
        hatch="///",
        ec=_FREED,
        lw=0,
        label="below the floor: no plan, proved",
    )
    ax.axvline(floor, color=_ink(ax), lw=0.8, alpha=0.6)
    ax.axvline(full, color=_ink(ax), lw=0.8, ls=":", alpha=0.6, label="nothing recomputed")
    failed = [p.budget_bytes / unit.bytes for p in frontier.points if p.overhead is None]
    if failed:
        ax.plot(failed, [0] * len(failed), "x", color=_ink(ax), clip_on=False, label="no plan found")


def _plan_text(plan: Plan) -> str:
    return f"this plan: {plan.overhead:.1%} at {bytes_text(plan.budget_bytes)}"


def _short(name: str, limit: int = 44) -> str:
    """``name`` with its middle left out where it is too long for an axis."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 3]}...{name[-(limit - limit // 3 - 3) :]}"
