"""What a training step takes, and what is known of a budget for it: data, and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from planner.memory.resident import budget_bytes_of
from planner.units import ByteUnit, bytes_text, gb_text, label, seconds_text
from planner.view.text import aligned

__all__ = ["Estimate", "Fit", "Verdict"]

# As it is; by recomputing; between the floor and the least peak that is known, where only a search can tell;
# below the proved floor.
Verdict: TypeAlias = Literal["as it is", "with a plan", "perhaps", "no"]


@dataclass(frozen=True)
class Fit:
    """What is known of one budget.  True where the step is known to fit it, with a plan or without.

    ``verdict``      "as it is", "with a plan", "perhaps" or "no"; the last is proved.
    ``lacks_bytes``  what the budget is below the proved floor; 0 where it is not.
    ``words``        the same as a sentence, with the next step.
    """

    budget_bytes: int
    verdict: Verdict
    lacks_bytes: int
    words: str

    def __post_init__(self) -> None:
        if (self.verdict == "no") != (self.lacks_bytes > 0):
            raise ValueError(f"verdict is {self.verdict!r} and lacks_bytes {self.lacks_bytes}")

    def __bool__(self) -> bool:
        return self.verdict in ("as it is", "with a plan")

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Estimate:
    """A training step's memory, without a search for plans.  Bytes are of the whole step on its device.

    ``device``               where the model is; ``planned_for``: the GPU that was named, if elsewhere.
    ``unplanned_peak_bytes`` nothing recomputed; ``breakdown``: what fills that peak, by kind, and
                             ``peak_op`` in ``peak_module`` is where it is reached.
    ``floor_bytes``          proved: no plan has a lower peak, because of ``floor_op`` in ``floor_module``,
                             which reads, makes and uses ``floor_op_bytes`` at once.
    ``least_known_bytes``    the lowest peak of a schedule that was met; ``least_breakdown`` fills it, and it
                             makes again what takes ``least_overhead`` of the step's time.
    ``reserved_bytes``       what the allocator takes from the driver for the step as it is; ``None``: none.
    ``device_bytes``         all memory of the device; ``None`` where it is not known.
    ``step_s``               predicted seconds of the step as it is, by the costs ``cost_source``.
    ``let_go``               outputs that floor and least peak count as gone when the backward begins.
    ``regions``              in how many pieces the step was captured; 0: one graph.
    ``chunks``               of tokens that the loss is computed in; where ``chunked_floor_bytes`` is given,
                             only there, and in ``chunked_least_bytes``: floor and least known peak of the
                             step with its loss in chunks, where that has a lower floor.

    Raises ``ValueError`` for a floor above a peak and a breakdown that does not add up to its peak.
    """

    model_name: str
    device: str
    planned_for: str
    unplanned_peak_bytes: int
    floor_bytes: int
    least_known_bytes: int
    breakdown: Mapping[str, int]
    peak_op: str
    peak_module: str
    floor_op: str
    floor_module: str
    floor_op_bytes: int
    least_breakdown: Mapping[str, int] = field(repr=False)
    least_overhead: float
    reserved_bytes: int | None
    device_bytes: int | None
    step_s: float
    step_flops: int
    cost_source: str
    let_go: tuple[str, ...] = ()
    regions: int = 0
    chunks: int = 0
    chunked_floor_bytes: int | None = None
    chunked_least_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.floor_bytes <= self.least_known_bytes:
            raise ValueError(
                f"floor_bytes={self.floor_bytes} is above least_known_bytes={self.least_known_bytes}"
            )
        for name, filled, peak in (
            ("breakdown", self.breakdown, self.unplanned_peak_bytes),
            ("least_breakdown", self.least_breakdown, self.least_known_bytes),
        ):
            if sum(filled.values()) != peak:
                raise ValueError(f"{name} adds up to {sum(filled.values())} bytes, its peak is {peak}")

    def fits(self, budget_gb: float) -> Fit:
        """What is known of a budget in GB of 10**9 bytes for the whole step.

        Raises ``TypeError`` or ``ValueError`` for budgets that make no sense.
        """
        budget = budget_bytes_of(budget_gb)
        told = f"{self.model_name} in {bytes_text(budget)}"
        if budget >= self.unplanned_peak_bytes:
            peak = bytes_text(self.unplanned_peak_bytes)
            return Fit(budget, "as it is", 0, f"{told}: fits as it is, at a peak of {peak}")
        least = bytes_text(self.least_known_bytes)
        full = f"as it is the step takes {bytes_text(self.unplanned_peak_bytes)}"
        if budget >= self.least_known_bytes:
            words = f"{told}: fits with a plan{self._let_go}; {full}, and recomputing goes down to {least}"
            return Fit(budget, "with a plan", 0, words)
        floor = bytes_text(self.floor_bytes)
        cut = self._in_chunks(budget, told, full, floor)
        if cut is not None and cut.verdict == "with a plan":
            return cut
        if budget >= self.floor_bytes:
            words = (
                f"{told}: perhaps with a plan{self._let_go}. It is at or above the proved floor of {floor}, "
                f"and the least peak known without a search is {least}; {full}. planner.plan searches, and "
                "so does planner.estimate(..., time_limit_s=10)"
            )
            return Fit(budget, "perhaps", 0, words)
        if cut is not None:
            return cut
        lacks = self.floor_bytes - budget
        below = f"{told}: no. It is {bytes_text(lacks)} below the proved floor of {floor}{self._let_go}"
        return Fit(budget, "no", lacks, f"{below}, {self._floor_words}; {full}")

    def _in_chunks(self, budget: int, told: str, full: str, floor: str) -> Fit | None:
        """What is known of a budget with the loss in chunks; ``None`` where that has no lower floor."""
        low, least = self.chunked_floor_bytes, self.chunked_least_bytes
        if low is None or least is None:
            return None
        cut = f"with the loss in {self.chunks} chunks of tokens"
        whole = f"with it whole the proved floor is {floor}, and {full}"
        if budget >= least:
            words = f"{told}: fits with a plan {cut}, which goes down to {bytes_text(least)}; {whole}"
            return Fit(budget, "with a plan", 0, words)
        low_text = bytes_text(low)
        if budget >= low:
            known = f"where the proved floor is {low_text} and the least peak known without a search "
            words = f"{told}: perhaps {cut}, {known}{bytes_text(least)}; {whole}. planner.plan searches"
            return Fit(budget, "perhaps", 0, words)
        lacks = f"{bytes_text(low - budget)} below the proved floor {cut}, {low_text}"
        return Fit(budget, "no", low - budget, f"{told}: no. It is {lacks}; {whole}. Make the batch smaller")

    @property
    def _floor_words(self) -> str:
        if self.floor_op == "optimizer.step":
            return (
                "which is what the optimizer's step holds: parameters, gradients, state and its scratch. "
                "Neither recomputation nor a smaller batch helps: take an optimizer with less state"
            )
        place = f" in {self.floor_module}" if self.floor_module else ""
        return (
            f"of which {self.floor_op}{place} takes {bytes_text(self.floor_op_bytes)} for itself. No "
            "recomputation helps: make the batch smaller"
        )

    @property
    def _let_go(self) -> str:
        return f" that lets go of {', '.join(self.let_go)} before the backward" if self.let_go else ""

    def __str__(self) -> str:
        unit = ByteUnit.of(self.unplanned_peak_bytes)
        where = f"{self.planned_for} (captured on {self.device})" if self.planned_for else self.device
        above = f"{self.least_overhead:.1%} more time"
        rows = [("as it is", gb_text(self.unplanned_peak_bytes), _at(self.peak_op, self.peak_module))]
        if self.reserved_bytes is not None:
            rows.append(("  reserved", gb_text(self.reserved_bytes), "by the allocator"))
        rows += [
            ("least known", gb_text(self.least_known_bytes), f"recomputing, {above}; a search may find less"),
            ("proved floor", gb_text(self.floor_bytes), _at(self.floor_op, self.floor_module)),
            ("step", seconds_text(self.step_s), f"{self.step_flops:.4g} FLOPs, by {self.cost_source}"),
        ]
        if self.chunked_floor_bytes is not None:
            told = f"floor with the loss in {self.chunks} chunks of tokens"
            rows.insert(-1, ("  in chunks", gb_text(self.chunked_floor_bytes), told))
        if self.device_bytes is not None:
            rows.insert(0, ("the device has", gb_text(self.device_bytes), ""))
        if self.let_go:
            rows.append(("outputs let go of", ", ".join(self.let_go), "in the two lower lines"))
        if self.regions:
            rows.append(("regions", str(self.regions), "it is not one graph"))
        filled = sorted(((k, b) for k, b in self.breakdown.items() if b), key=lambda item: -item[1])
        share = self.unplanned_peak_bytes
        return "\n".join(
            [
                f"{self.model_name} on {where}",
                *aligned(rows, "lll", indent=2),
                "",
                "At the peak, as it is:",
                *aligned([(label(k), unit.text(b), f"{b / share:.1%}") for k, b in filled], "lrr", indent=2),
            ]
        )


def _at(op: str, module: str) -> str:
    return f"at {op} in {module}" if module else f"at {op}" if op else ""
