"""Batch against speed and overhead, as a picture."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from planner.units import bytes_text
from planner.view.canvas import BUDGET, KEPT, RECOMPUTED, finish, ink, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_batches"]

_MARKS = "sDv^"  # of other ways to train


def plot_batches(found: Any, ax: Axes | None = None) -> Axes:
    """Examples per second against the size of the batch, and the plans' overhead on the axis to the right.

    ``found`` is a :class:`planner.sizing.batches.LargestBatch`.  Its answer and its fastest size are marked,
    and so are the largest batches of other ways to train.  Raises ``PlannerError`` without matplotlib.
    """
    ax = new_axes(7.2, 4.2) if ax is None else ax
    sizes = [p.batch for p in found.points]
    speed = {p.batch: p.examples_per_s for p in found.points}
    right = ax.twinx()
    right.fill_between(
        sizes, [100 * p.overhead_bound for p in found.points], [100 * p.overhead for p in found.points],
        color=RECOMPUTED, alpha=0.27, lw=0,
    )  # fmt: skip
    right.plot(
        sizes, [100 * p.overhead for p in found.points], color=RECOMPUTED, lw=1.4, ls=(0, (4, 2)), marker=".",
    )  # fmt: skip
    ax.plot([], [], color=RECOMPUTED, lw=1.4, ls=(0, (4, 2)), label="their overhead, to its proved bound")
    right.set_ylim(0, 1.15 * max([1.0, *(100 * p.overhead for p in found.points)]))
    right.set_ylabel("overhead (% of step time)", color=RECOMPUTED)
    right.spines[["top"]].set_visible(False)
    ax.plot(sizes, [speed[n] for n in sizes], color=KEPT, lw=1.8, marker="o", ms=5, label="plans found")
    for mark, other in zip(cycle(_MARKS), found.others):
        ax.plot(
            other.batch, other.examples_per_s, mark, ms=7, color=ink(ax), mfc="none", mew=1.4, zorder=4,
            label=f"{other.name}: at most {other.batch}",
        )  # fmt: skip
    ax.axvline(found.batch, color=BUDGET, lw=1.0, label=f"largest: {found.batch}, by {found.stop.by}")
    ax.plot(
        found.fastest, speed[found.fastest], "*", ms=15, color=BUDGET, mec=ax.get_facecolor(), zorder=5,
        label=f"fastest: {found.fastest}",
    )  # fmt: skip
    ax.set_ylim(0, 1.2 * max([*speed.values(), *(o.examples_per_s for o in found.others)]) or 1.0)
    ax.set_xlabel("examples in a batch")
    ax.set_ylabel("examples per second, predicted")
    finish(ax, f"{found.model_name} in {bytes_text(found.budget_bytes)}: how large a batch")
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8)
    return ax
