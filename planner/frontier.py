"""The frontier with its verbs: as a table, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.plans.frontier_data import FrontierData, FrontierPoint, Peers
from planner.plans.plan_data import PlanData
from planner.view.display import frontier_dataframe
from planner.view.plots import plot_frontier

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

__all__ = ["Frontier", "FrontierPoint", "Peers"]


class Frontier(FrontierData):
    """Points in order of budget; ``overhead`` never rises with it.  Bytes are of the whole step."""

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per budget; columns: :func:`planner.view.display.frontier_dataframe` (needs pandas)."""
        return frontier_dataframe(self)

    def plot(
        self,
        ax: matplotlib.axes.Axes | None = None,
        *,
        plan: PlanData | None = None,
        peers: Peers | None = None,
    ) -> matplotlib.axes.Axes:
        """Overhead against budget with the proved bound as a band (needs matplotlib).

        ``plan`` is marked on it, and so are ``peers``, other ways to train the same step: name -> (peak in
        bytes, overhead as a share of step time), one pair or several.
        """
        return plot_frontier(self, ax, plan=plan, peers=peers)
