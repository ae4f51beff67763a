"""Memory over the step, and the frontier, as pictures.

Each function draws on the axes it is given and nothing else; without any it makes a figure through
``pyplot``, as pandas does, because a notebook shows only those.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from planner.units import ByteUnit, bytes_text
from planner.view.bands import (
    aligned_baseline,
    bands_of,
    highest,
    peak_place,
    picture_title,
    top_bytes,
    turn_of,
)
from planner.view.canvas import BUDGET, FREED, KEPT, RECOMPUTED, finish, ink, mark_turn, new_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from planner.plans.frontier_data import FrontierData, Peers
    from planner.plans.plan_data import PlanData

__all__ = ["plot_frontier", "plot_memory"]

_MARKS = "sDv^Xp"  # of peers
_OPTIMIZER = "#a8937e"
_COLUMNS = 700  # more steps than this share one


def plot_memory(plan: PlanData, ax: Axes | None = None) -> Axes:
    """Live bytes at each step, stacked by kind, against the budget and the step without recomputation.

    The horizontal axis counts the steps of the plan, of which the highest are drawn where there are more
    than pixels; the line of the step without recomputation has each op where the plan first runs it.
    Raises ``PlannerError`` without matplotlib.
    """
    ax = new_axes(9.0, 4.2) if ax is None else ax
    top = top_bytes(plan)
    unit = ByteUnit.of(top)
    steps = len(plan.timeline)
    # A step narrower than a pixel would fade: each column shows the highest of its steps.
    at, at_before = highest(plan.timeline, _COLUMNS), highest(baseline := aligned_baseline(plan), _COLUMNS)
    below = np.zeros(len(at))
    for band in bands_of(plan):
        above = below + band.bytes[at] / unit.bytes
        name = band.name if band.visible else None
        ax.fill_between(
            _edges(at, steps), _held(below), _held(above), step="post", color=band.color, label=name, lw=0
        )
        below = above
    ax.step(
        _edges(at_before, steps),
        _held(baseline[at_before] / unit.bytes),
        where="post",
        color=ink(ax),
        lw=1.1,
        alpha=0.8,
        label="nothing recomputed",
    )
    if plan.optimizer_step_bytes:
        height = plan.optimizer_step_bytes / unit.bytes
        ax.bar(1.01 * steps, height, 0.02 * steps, align="edge", color=_OPTIMIZER, label="optimizer's step")
    ax.axhline(plan.budget_bytes / unit.bytes, color=BUDGET, ls=(0, (6, 3)), lw=1.4, label="budget")
    ax.set_xlim(0, max(1, steps) * (1.04 if plan.optimizer_step_bytes else 1.0))
    ax.set_ylim(0, 1.25 * top / unit.bytes)
    mark_turn(ax, turn_of(plan), inside=True)
    _mark_peak(ax, plan, unit)
    ax.set_xlabel("step of the plan (ops run, recomputed ones included)")
    ax.set_ylabel(f"live memory ({unit.name})")
    finish(ax, picture_title(plan))
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9
    )
    return ax


def plot_frontier(
    frontier: FrontierData,
    ax: Axes | None = None,
    *,
    plan: PlanData | None = None,
    peers: Peers | None = None,
) -> Axes:
    """Overhead against budget; the best overhead of any plan lies in the band above the proved bound.

    Lines between the solved budgets guide the eye only.  Below the floor, hatched, no plan exists.
    ``plan`` is marked at its budget.  ``peers`` are other ways to train the same step: name -> (peak in
    bytes, overhead as a share of step time), or several such pairs.  Raises ``PlannerError`` without
    matplotlib, ``ValueError`` for peers that are no such pairs.
    """
    others = _pairs(peers or {})
    ax = new_axes(7.2, 4.2) if ax is None else ax
    unit = ByteUnit.of(max([frontier.baseline_peak_bytes, *(p.budget_bytes for p in frontier.points)]))
    solved = [p for p in frontier.points if p.overhead is not None and p.overhead_bound is not None]
    budgets = np.array([p.budget_bytes for p in solved]) / unit.bytes
    overhead = np.array([100 * (p.overhead or 0.0) for p in solved])
    bound = np.array([100 * (p.overhead_bound or 0.0) for p in solved])
    ax.fill_between(
        budgets, bound, overhead, color=RECOMPUTED, alpha=0.27, lw=0, label="gap to the proved bound"
    )
    ax.plot(budgets, bound, color=KEPT, lw=1.2, ls=(0, (4, 2)), label="proved: no plan has less")
    ax.plot(budgets, overhead, color=RECOMPUTED, lw=1.8, marker="o", ms=5, label="plans found", clip_on=False)
    _mark_budgets(ax, frontier, unit, [size for pairs in others.values() for size, _ in pairs])
    for mark, (name, pairs) in zip(cycle(_MARKS), others.items()):
        x, y = np.array(pairs).T * [[1 / unit.bytes], [100]]
        ax.plot(x, y, mark, ms=7, color=ink(ax), mfc="none", mew=1.4, label=name, zorder=4, clip_on=False)
    if plan is not None:
        here = (plan.budget_bytes / unit.bytes, 100 * plan.overhead)
        ax.plot(
            *here,
            marker="*",
            ms=15,
            ls="",
            color=BUDGET,
            mec=ax.get_facecolor(),
            zorder=5,
            label=_plan_text(plan),
        )
    shares = [100 * share for pairs in others.values() for _, share in pairs]
    ax.set_ylim(0, 1.12 * max([1.0, *overhead, *shares, 100 * plan.overhead if plan else 0.0]))
    ax.set_xlabel(f"budget ({unit.name})")
    ax.set_ylabel("overhead (% of step time)")
    finish(ax, f"{frontier.model_name}: what a smaller budget costs")
    ax.legend(loc="upper right", facecolor=ax.get_facecolor(), edgecolor="none", framealpha=0.9, fontsize=9)
    return ax


# -- parts ----------------------------------------------------------------------------------------


def _edges(at: np.ndarray, steps: int) -> np.ndarray:
    """Where the columns that show the steps ``at`` begin, and where the last one ends."""
    return np.linspace(0, steps, len(at) + 1)


def _held(level: np.ndarray) -> np.ndarray:
    """``level`` with its last entry repeated, so that the last step has a width too."""
    return np.append(level, level[-1:])


def _mark_peak(ax: Axes, plan: PlanData, unit: ByteUnit) -> None:
    """A dot at the peak, named in the upper left corner, which the start of the forward leaves free."""
    if not len(plan.timeline):
        return
    step = int(np.argmax(plan.timeline))
    at = (step + 0.5, plan.timeline[step] / unit.bytes)
    if plan.peak_bytes > plan.timeline[step]:  # the optimizer's step
        at = (1.02 * len(plan.timeline), plan.peak_bytes / unit.bytes)
    ax.plot(*at, marker="o", ms=5, color=BUDGET, mec=ax.get_facecolor(), zorder=6)
    ax.annotate(
        f"peak {bytes_text(plan.peak_bytes)}\n{short(peak_place(plan))}",
        at,
        (0.012, 0.91),
        textcoords="axes fraction",
        ha="left",
        va="top",
        fontsize=9,
        bbox={"boxstyle": "square,pad=0.15", "fc": ax.get_facecolor(), "ec": "none", "alpha": 0.8},
        arrowprops={"arrowstyle": "-", "lw": 0.8, "color": ink(ax), "alpha": 0.6, "shrinkB": 3},
    )


def _pairs(peers: Peers) -> dict[str, list[tuple[float, float]]]:
    """By name, the (bytes, overhead) of each point."""
    out = {}
    for name, given in peers.items():
        points = np.asarray(given, dtype=float)
        if points.shape[-1:] != (2,) or points.ndim > 2 or not np.isfinite(points).all():
            raise ValueError(
                f"peer {name!r} is {given!r}, want (peak in bytes, overhead as a share of step time)"
            )
        out[name] = [(float(size), float(share)) for size, share in points.reshape(-1, 2)]
    return out


def _mark_budgets(ax: Axes, frontier: FrontierData, unit: ByteUnit, others: Sequence[float]) -> None:
    """The floor, the step without recomputation, and the budgets that no plan was found for."""
    floor, full = frontier.floor_bytes / unit.bytes, frontier.baseline_peak_bytes / unit.bytes
    budgets = [b / unit.bytes for b in (*(p.budget_bytes for p in frontier.points), *others)]
    low, high = min([floor, *budgets]), max([full, *budgets])
    margin = 0.05 * (high - low or high)
    ax.set_xlim(low - margin, high + margin)
    ax.axvspan(
        low - margin,
        floor,
        fill=False,
        hatch="///",
        ec=FREED,
        alpha=0.6,
        lw=0,
        label="below the floor: no plan, proved",
    )
    ax.axvline(floor, color=ink(ax), lw=0.8, alpha=0.6)
    ax.axvline(full, color=ink(ax), lw=0.8, ls=":", alpha=0.6, label="nothing recomputed")
    failed = [p.budget_bytes / unit.bytes for p in frontier.points if p.overhead is None]
    if failed:
        ax.plot(failed, [0] * len(failed), "x", color=ink(ax), clip_on=False, label="no plan found")


def _plan_text(plan: PlanData) -> str:
    return f"this plan: {plan.overhead:.1%} at {bytes_text(plan.budget_bytes)}"
