"""What all pictures share: axes made on demand, colours of the decisions, the turn, names cut to fit.

Nothing is shown, saved or set globally.  Text and lines take the colours of the style in force, so that
dark styles work; fills are of middling lightness, legible on white and on black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BUDGET",
    "DROPPED",
    "FREED",
    "KEPT",
    "RECOMPUTED",
    "finish",
    "ink",
    "mark_turn",
    "new_axes",
    "short",
]

BUDGET = "#d0433b"
KEPT = "#4479b5"
RECOMPUTED = "#e58a3c"
DROPPED = "#f0bb85"  # what is recomputed later, until it is dropped
FREED = "#b9c0ca"


def new_axes(width: float, height: float) -> Axes:
    """Axes of a new figure; sizes in inches.  Raises ``PlannerError`` without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise PlannerError("pictures need matplotlib: pip install 'rematplan[notebooks]'") from None
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def ink(ax: Axes) -> Any:
    """The colour of the style's text."""
    return ax.xaxis.label.get_color()


def finish(ax: Axes, title: str, *, pad: float = 8.0) -> None:
    """Title on the left, no frame on top and right, grid lines of the style behind the data."""
    ax.set_title(title, loc="left", fontsize=11, pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def mark_turn(ax: Axes, step: int | None, *, inside: bool) -> None:
    """A line where the backward begins, with the names of both sides ``inside`` the axes or above them."""
    if step is None:
        return
    ax.axvline(step, color=ink(ax), lw=0.8, ls=":", alpha=0.6)
    drop, va, size = (-3, "top", 9) if inside else (2, "bottom", 8)
    for text, side, offset in (("forward", "right", -5), ("backward", "left", 5)):
        ax.annotate(
            text, (step, 1.0), (offset, drop), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha=side, va=va, fontsize=size, alpha=0.75,
        )  # fmt: skip


def short(name: str, limit: int = 44) -> str:
    """``name`` with its middle left out where it is too long for an axis."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 3]}...{name[-(limit - limit // 3 - 3) :]}"
