"""Memory over the step as a picture shows it: bands by kind, and the step without recomputation beside it.

Two steps of different length share one axis here: the plan's.  Each op of the step without
recomputation stands where the plan first runs it, and its level is held while the plan recomputes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from planner.memory.lifetimes import MEMORY_KINDS
from planner.units import bytes_text, label

if TYPE_CHECKING:
    from planner.plans.plan_data import PlanData

__all__ = [
    "Band",
    "aligned_baseline",
    "bands_of",
    "highest",
    "peak_place",
    "picture_title",
    "top_bytes",
    "turn_of",
]

_THIN = 0.01  # of the peak: below it a band is not worth a name

# Greys for what is there whatever is decided, blue for what is kept, orange for what is computed again.
_COLORS = {
    "parameters": "#8c96a5",
    "buffers": "#a3abb8",
    "optimizer_state": "#b5bcc7",
    "inputs": "#c6ccd5",
    "output_gradients": "#d6dae1",
    "library_workspace": "#d9c48a",
    "allocator_slack": "#cdbfa0",
    "margin": "#e9e2d2",
    "gradients": "#4f8a83",
    "outputs": "#8f7fb8",
    "between_regions": "#b59fc9",
    "saved": "#4479b5",
    "recomputed": "#e58a3c",
    "gradients_in_flight": "#86bfb4",
    "temporaries": "#a9c7e6",
    "workspace": "#e3c75f",
}
_OTHER = "#c9b8a8"


@dataclass(frozen=True, eq=False)
class Band:
    """One band of the picture: ``bytes`` at each step of the plan, shape (T,); ``visible`` at its size."""

    name: str
    color: str
    bytes: np.ndarray
    visible: bool = True


def bands_of(plan: PlanData) -> tuple[Band, ...]:
    """From the bottom up; kinds that are nowhere 1 % of the peak are together in "other", on top."""
    order = [k for k in MEMORY_KINDS if k in plan.timeline_by_kind]
    order += [k for k in plan.timeline_by_kind if k not in MEMORY_KINDS]
    bands = []
    other = np.zeros(len(plan.timeline), dtype=np.int64)
    for kind in order:
        level = plan.timeline_by_kind[kind]
        if level.max(initial=0) >= _THIN * plan.peak_bytes:
            bands.append(Band(label(kind), _COLORS.get(kind, _OTHER), level))
        else:
            other = other + level
    if other.any():
        bands.append(Band("other", _OTHER, other, visible=bool(other.max() >= _THIN * plan.peak_bytes)))
    return tuple(bands)


def aligned_baseline(plan: PlanData) -> np.ndarray:
    """``baseline_timeline`` over the steps of the plan, shape (T,)."""
    seen: set[str] = set()
    position = np.empty(len(plan.sequence), dtype=np.int64)
    for t, name in enumerate(plan.sequence):
        seen.add(name)
        position[t] = len(seen) - 1
    return plan.baseline_timeline[np.minimum(position, len(plan.baseline_timeline) - 1)]


def highest(level: np.ndarray, count: int) -> np.ndarray:
    """Indices of the highest entry in each of at most ``count`` stretches of ``level``."""
    edges = np.unique(np.linspace(0, len(level), min(count, len(level)) + 1).astype(int))
    return np.array([a + int(np.argmax(level[a:b])) for a, b in pairwise(edges)], dtype=int)


def turn_of(plan: PlanData) -> int | None:
    """The first step of the backward: the first at which a gradient is in flight."""
    flying = np.flatnonzero(plan.timeline_by_kind.get("gradients_in_flight", np.zeros(1)))
    return int(flying[0]) if len(flying) else None


def peak_place(plan: PlanData) -> str:
    """The op at the peak, and the module it works for."""
    if plan.peak_op == "optimizer.step":
        return plan.peak_op
    return f"{plan.peak_op} in {plan.peak_module or 'the model itself'}"


def picture_title(plan: PlanData) -> str:
    """What the picture of memory shows, in a line."""
    peak, before = bytes_text(plan.peak_bytes), bytes_text(plan.baseline_peak_bytes)
    return f"{plan.model_name}: peak {peak} instead of {before}, {plan.overhead:.1%} more step time"


def top_bytes(plan: PlanData) -> int:
    """The highest thing to show; a budget far above everything else is left out of the frame."""
    highest = max(plan.peak_bytes, plan.baseline_peak_bytes)
    return plan.budget_bytes if highest < plan.budget_bytes < 2 * highest else highest
