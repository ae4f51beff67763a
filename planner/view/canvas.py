"""What all pictures share: axes made on demand, colours of the decisions, names cut to fit.

Nothing is shown, saved or set globally.  Text and lines take the colours of the style in force, so that
dark styles work; fills are of middling lightness, legible on white and on black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BUDGET", "DROPPED", "FREED", "KEPT", "RECOMPUTED", "finish", "ink", "new_axes", "short"]

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


def short(name: str, limit: int = 44) -> str:
    """``name`` with its middle left out where it is too long for an axis."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 3]}...{name[-(limit - limit // 3 - 3) :]}"
