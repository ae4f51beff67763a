"""Numbers with their units: bytes in powers of ten, seconds, shares, as people read them; whole multiples."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "DECISIONS",
    "ByteUnit",
    "bytes_text",
    "gb_enough",
    "gb_text",
    "label",
    "rounded_up",
    "seconds_text",
]


@dataclass(frozen=True)
class ByteUnit:
    """A unit that a whole table or axis shares: ``name`` and how many ``bytes`` it is."""

    name: str
    bytes: int

    @classmethod
    def of(cls, largest_bytes: float) -> ByteUnit:
        """The unit in which ``largest_bytes`` is between 1 and 1000."""
        for name, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
            if largest_bytes >= size:
                return cls(name, size)
        return cls("B", 1)

    def text(self, count: float) -> str:
        """``count`` bytes to a hundredth of the unit; ``-`` for none, ``<0.01 MB`` for hardly any."""
        if not count:
            return "-"
        if self.bytes == 1:
            return f"{count:,.0f} B"
        share = count / self.bytes
        return f"{share:,.2f} {self.name}" if share >= 0.005 else f"<0.01 {self.name}"


def gb_enough(need_bytes: int) -> str:
    """GB, rounded up: the number works as a budget."""
    return f"{math.ceil(need_bytes / 1e3) / 1e6:.6f}"


def bytes_text(count: float) -> str:
    """``13_154_321`` as ``13.15 MB``: four digits in the unit that fits."""
    unit = ByteUnit.of(abs(count))
    return f"{count:.0f} B" if unit.bytes == 1 else f"{count / unit.bytes:.4g} {unit.name}"


def gb_text(count: int) -> str:
    """``13_154_321`` as ``0.01315 GB (0.01225 GiB)``."""
    return f"{count / 10**9:.4g} GB ({count / 2**30:.4g} GiB)"


def seconds_text(seconds: float) -> str:
    """Three digits in the unit that fits; ``-`` for none."""
    if not seconds:
        return "-"
    for name, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds / 1e-6:.3g} \N{MICRO SIGN}s"


def rounded_up(count: int, grain: int) -> int:
    """The least multiple of ``grain`` that is not below ``count``."""
    return -(-count // grain) * grain


def label(kind: str) -> str:
    """A kind of memory as a reader would call it."""
    return _LABELS.get(kind, kind.replace("_", " "))


# What a plan decides of a value, in a reader's words.
DECISIONS = {"save": "kept", "recompute": "recomputed", "free": "freed"}

_LABELS = {
    "optimizer_state": "optimizer state",
    "output_gradients": "gradients of outputs",
    "gradients": "parameter gradients",
    "saved": "saved for backward",
    "gradients_in_flight": "gradients in flight",
    "between_regions": "held between regions",
    "temporaries": "forward temporaries",
    "workspace": "kernel workspace",
    "library_workspace": "cuBLAS workspace",
    "allocator_slack": "the allocator's slack",
    "margin": "margin, as measured",
}
