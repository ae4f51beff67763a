"""The largest batch with what was found on the way to it: data, words, a table and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from planner.plan import Plan
from planner.units import bytes_text, seconds_text
from planner.view.batches import plot_batches
from planner.view.display import batches_dataframe
from planner.view.text import aligned

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

__all__ = ["BatchPoint", "LargestBatch", "Other", "Stop", "StoppedBy"]

# At one more: its proved floor is above the budget; no plan was found in the time; the plan found takes more
# time than allowed; more was not asked for.
StoppedBy: TypeAlias = Literal["floor", "search", "overhead", "high"]


@dataclass(frozen=True)
class BatchPoint:
    """The plan for one size of batch, in figures; ``batch`` examples in a step.

    ``overhead`` and ``overhead_bound``, which is proved, are shares of the ``step_s`` seconds that the step
    takes when nothing is recomputed; ``floor_bytes``: no plan for this size has a lower peak.
    """

    batch: int
    peak_bytes: int
    floor_bytes: int
    overhead: float
    overhead_bound: float
    step_s: float
    status: str

    @property
    def examples_per_s(self) -> float:
        """Predicted, recomputation included; 0 where a step is predicted to take no time."""
        return _per_s(self.batch, self.step_s, self.overhead)


@dataclass(frozen=True)
class Other:
    """The largest batch of another way to train within the budget, as simulated on the same step."""

    name: str
    batch: int
    peak_bytes: int
    overhead: float
    step_s: float

    @property
    def examples_per_s(self) -> float:
        """Predicted, recomputation included."""
        return _per_s(self.batch, self.step_s, self.overhead)


@dataclass(frozen=True)
class Stop:
    """What kept the batch from being larger, and whether that is proved.

    ``at``  the size that was refused; for ``by="high"`` the one that was not asked for.
    """

    by: StoppedBy
    at: int
    is_proved: bool
    words: str

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True, eq=False, repr=False)
class LargestBatch:
    """The answer of :func:`planner.largest_batch`.

    ``batch``       the largest with a plan within the budget, and the overhead where that is bounded.
    ``plan``        that plan, to be applied; ``plans`` has those of all ``points``, by size.
    ``fastest``     the size of most examples per second predicted, among those looked at.
    ``stop``        which bound was met.
    ``points``      the frontier, by size.
    ``others``      the largest of the step as it is and of every block checkpointed; those that fit.
    ``looked_at``   sizes above the answer whose proved floor was seen to exceed the budget.
    ``traces``      how often the step was captured; ``kind``: how sizes were had, in words.

    Raises ``ValueError`` where the plans do not serve the points.
    """

    model_name: str
    budget_bytes: int
    batch: int
    fastest: int
    stop: Stop
    points: tuple[BatchPoint, ...]
    plans: Mapping[int, Plan] = field(repr=False)
    others: tuple[Other, ...]
    at_most_overhead: float | None
    looked_at: tuple[int, ...]
    traces: int
    kind: str
    cost_source: str

    def __post_init__(self) -> None:
        sizes = [point.batch for point in self.points]
        if sizes != sorted(set(sizes)) or {*sizes} != {*self.plans}:
            raise ValueError(f"points are of {sizes}, plans of {sorted(self.plans)}")
        if self.batch not in self.plans or self.fastest not in self.plans:
            raise ValueError(f"there is no plan at batch={self.batch} or fastest={self.fastest}")
        over = [n for n, plan in self.plans.items() if plan.peak_bytes > self.budget_bytes]
        if over:
            raise ValueError(f"the plan at {over[0]} is over the budget of {self.budget_bytes} bytes")

    @property
    def plan(self) -> Plan:
        """The plan at ``batch``."""
        return self.plans[self.batch]

    def __str__(self) -> str:
        limit = "" if self.at_most_overhead is None else f" and {self.at_most_overhead:.4g} of extra time"
        point = {p.batch: p for p in self.points}
        best, fastest = point[self.batch], point[self.fastest]
        head = [
            f"{self.model_name} in {bytes_text(self.budget_bytes)}{limit}: largest batch {self.batch}, at "
            f"{best.overhead:.1%} overhead (proved >= {best.overhead_bound:.1%})",
            f"stopped by {self.stop}",
            *(
                [f"let go of before the backward: {', '.join(self.plan.released)}"]
                if self.plan.released
                else []
            ),
            f"most examples per second, as predicted by {self.cost_source}: {fastest.examples_per_s:.4g}, at "
            f"a batch of {self.fastest}",
        ]
        told = {self.batch: "largest", self.fastest: "fastest"}
        if self.batch == self.fastest:
            told[self.batch] = "largest, fastest"
        rows = [("batch", "peak GB", "floor GB", "overhead", "proved >=", "step", "examples/s", "")]
        for p in self.points:
            rows.append(
                (
                    str(p.batch), f"{p.peak_bytes / 1e9:.4g}", f"{p.floor_bytes / 1e9:.4g}",
                    f"{p.overhead:.2%}", f"{p.overhead_bound:.2%}",
                    seconds_text(p.step_s * (1 + p.overhead)), f"{p.examples_per_s:.4g}",
                    told.get(p.batch, ""),
                )
            )  # fmt: skip
        for other in self.others:
            rows.append(
                (
                    str(other.batch), f"{other.peak_bytes / 1e9:.4g}", "", f"{other.overhead:.2%}", "",
                    seconds_text(other.step_s * (1 + other.overhead)), f"{other.examples_per_s:.4g}",
                    f"largest of {other.name}",
                )
            )  # fmt: skip
        return "\n".join([*head, *aligned(rows, "rrrrrrrl"), self._assumed])

    __repr__ = __str__

    @property
    def _assumed(self) -> str:
        traced = f"{self.traces} trace{'s' * (self.traces != 1)}, {self.kind}"
        above = ", ".join(map(str, self.looked_at))
        seen = f"; of larger ones {above} {'were' if len(self.looked_at) > 1 else 'was'} looked at"
        return f"{traced}. That a larger batch needs no less was taken for granted{seen if above else ''}"

    def figures(self) -> dict[str, Any]:
        """The numbers for other programs, without plans: bytes, seconds, shares of step time."""
        names = ("model_name", "budget_bytes", "batch", "fastest", "at_most_overhead", "looked_at", "traces")
        return {
            **{name: getattr(self, name) for name in (*names, "kind", "cost_source")},
            "stop": dataclasses.asdict(self.stop),
            "points": [dataclasses.asdict(p) | {"examples_per_s": p.examples_per_s} for p in self.points],
            "others": [dataclasses.asdict(o) | {"examples_per_s": o.examples_per_s} for o in self.others],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per point: :func:`planner.view.display.batches_dataframe` (needs pandas)."""
        return batches_dataframe(self)

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Examples per second and overhead against the size of the batch (needs matplotlib)."""
        return plot_batches(self, ax)


def _per_s(batch: int, step_s: float, overhead: float) -> float:
    seconds = step_s * (1 + overhead)
    return batch / seconds if seconds else 0.0
