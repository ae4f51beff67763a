"""A frontier as data: least overhead against budget, with what is proved about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from planner.memory.resident import budget_bytes_of
from planner.units import ByteUnit, bytes_text

__all__ = ["FrontierData", "FrontierPoint", "Peers"]

# Other ways to train the same step: name -> (peak in bytes, overhead as a share of step time), or several.
Peers: TypeAlias = "Mapping[str, tuple[float, float] | Sequence[tuple[float, float]]]"


@dataclass(frozen=True)
class FrontierPoint:
    """One budget.  ``overhead`` and ``overhead_bound`` are ``None`` where no plan fits it."""

    budget_bytes: int
    peak_bytes: int
    overhead: float | None
    overhead_bound: float | None
    status: Literal["optimal", "feasible", "infeasible"]


@dataclass(frozen=True)
class FrontierData:
    """Points in order of budget; ``overhead`` never rises with it."""

    model_name: str
    baseline_peak_bytes: int
    floor_bytes: int
    points: tuple[FrontierPoint, ...]

    def __str__(self) -> str:
        unit = self.unit
        head = f"{'budget GB':>10} {'peak GB':>10} {'overhead':>9} {'proved >=':>9}"
        lines = [f"{head} {f'next {unit.name} buys':>12}  status"]
        for p, saved in zip(self.points, self.saved_per_gb, strict=True):
            over = "" if p.overhead is None else f"{p.overhead:.2%}"
            bound = "" if p.overhead_bound is None else f"{p.overhead_bound:.2%}"
            rate = "" if saved is None else f"{100 * saved * unit.bytes / 10**9:.3g} points"
            lines.append(
                f"{p.budget_bytes / 1e9:>10.4g} {p.peak_bytes / 1e9:>10.4g} {over:>9} {bound:>9} {rate:>12}"
                f"  {p.status}"
            )
        return "\n".join((*lines, self.next_gb()))

    __repr__ = __str__

    @property
    def unit(self) -> ByteUnit:
        """The unit its budgets are told in."""
        return ByteUnit.of(max([self.baseline_peak_bytes, *(p.budget_bytes for p in self.points)]))

    @property
    def saved_per_gb(self) -> tuple[float | None, ...]:
        """For each point, the share of step time that a GB more saves on the way to the next one.

        ``None`` for the last point and where no plan fits.
        """
        out: list[float | None] = [
            None
            if a.overhead is None or b.overhead is None or a.budget_bytes == b.budget_bytes
            else (a.overhead - b.overhead) / (b.budget_bytes - a.budget_bytes) * 10**9
            for a, b in pairwise(self.points)
        ]
        return (*out, None) if self.points else ()

    def overhead_at(self, budget_gb: float) -> float | None:
        """Overhead at a budget in GB, on the line between the solved ones; ``None`` below the least of them.

        Raises as :func:`planner.memory.resident.budget_bytes_of`.  Above the last budget it is what it is
        there: a plan for less memory also serves more.
        """
        solved = [p for p in self.points if p.overhead is not None]
        budget_bytes = budget_bytes_of(budget_gb)
        if not solved or budget_bytes < solved[0].budget_bytes:
            return None
        for a, b in pairwise(solved):
            if budget_bytes < b.budget_bytes:
                share = (budget_bytes - a.budget_bytes) / (b.budget_bytes - a.budget_bytes)
                return (a.overhead or 0.0) + share * ((b.overhead or 0.0) - (a.overhead or 0.0))
        return solved[-1].overhead

    def next_gb(self, budget_gb: float | None = None, more_gb: float | None = None) -> str:
        """What a little more memory buys, in one line.

        ``budget_gb``  where from; default: the least budget with a plan.
        ``more_gb``    how much more; default: 1 GB, or a round part of a smaller curve.

        Between solved budgets the overhead is read off the line that joins them.
        """
        solved = [p for p in self.points if p.overhead is not None]
        if not solved:
            return "no budget of these has a plan"
        start_gb = solved[0].budget_bytes / 10**9 if budget_gb is None else budget_gb
        more_gb = self._step_bytes(solved) / 10**9 if more_gb is None else more_gb
        budget_bytes_of(more_gb, "more_gb")
        before, after = self.overhead_at(start_gb), self.overhead_at(start_gb + more_gb)
        start, more = bytes_text(start_gb * 10**9), bytes_text(more_gb * 10**9)
        if before is None or after is None:
            return f"at {start} there is no plan; the least of these budgets with one is " + bytes_text(
                solved[0].budget_bytes
            )
        return (
            f"at {start} the next {more} buys {100 * (before - after):.2f} points of step time: "
            f"overhead {before:.2%} -> {after:.2%}"
        )

    @staticmethod
    def _step_bytes(solved: Sequence[FrontierPoint]) -> int:
        """1 GB, or the power of ten that is at most a fifth of the curve."""
        room = solved[-1].budget_bytes - solved[0].budget_bytes
        return min(10**9, 10 ** max(0, math.floor(math.log10(max(1, room) / 5))))
