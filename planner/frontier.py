"""The frontier: least overhead against budget, with what is proved about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

__all__ = ["Frontier", "FrontierPoint"]


@dataclass(frozen=True)
class FrontierPoint:
    """One budget.  ``overhead`` and ``overhead_bound`` are ``None`` where no plan fits it."""

    budget_bytes: int
    peak_bytes: int
    overhead: float | None
    overhead_bound: float | None
    status: Literal["optimal", "feasible", "infeasible"]


@dataclass(frozen=True)
class Frontier:
    """Points in order of budget; ``overhead`` never rises with it."""

    model_name: str
    baseline_peak_bytes: int
    floor_bytes: int
    points: tuple[FrontierPoint, ...]

    def __str__(self) -> str:
        lines = [f"{'budget GB':>10} {'peak GB':>10} {'overhead':>9} {'proved >=':>9}  status"]
        for p in self.points:
            over = "" if p.overhead is None else f"{p.overhead:.2%}"
            bound = "" if p.overhead_bound is None else f"{p.overhead_bound:.2%}"
            lines.append(
                f"{p.budget_bytes / 1e9:>10.4g} {p.peak_bytes / 1e9:>10.4g} {over:>9} {bound:>9}  {p.status}"
            )
        return "\n".join(lines)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per budget (needs pandas)."""
        from planner.display import frontier_dataframe

        return frontier_dataframe(self)

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Overhead against budget with the proved bound as a band (needs matplotlib)."""
        from planner.plots import plot_frontier

        return plot_frontier(self, ax)
