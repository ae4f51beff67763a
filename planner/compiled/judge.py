"""What the code that inductor generates for a graph allocates: played on tensors without data.

The generated Python is run as it is, with kernels that do nothing, so buffers that are written over, freed
and reused are those of the compiled step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner._compat import Lowered
from planner.measure.meter import StorageMeter

__all__ = ["Played", "play"]


@dataclass(frozen=True)
class Played:
    """Bytes of what a call makes.

    ``peak_bytes``   most at once beyond what was there when it began; of arguments that it frees, less.
    ``left_bytes``   of what it returns beyond its arguments.
    ``at``           the same as ``peak_bytes`` for each call of a library's kernel, by name: "aten.mm".
    """

    peak_bytes: int
    left_bytes: int
    at: Mapping[str, int]

    def with_scratch(self, scratch_bytes: Mapping[str, int]) -> int:
        """``peak_bytes`` where calls take so much beside their operands and results, by name."""
        return max(self.peak_bytes, *(most + scratch_bytes.get(name, 0) for name, most in self.at.items()))


def play(code: Lowered, args: Sequence[Any], held: Sequence[int] = ()) -> Played:
    """Run ``code`` on fake ``args``; those at the positions ``held`` stay alive with whoever has them."""
    meter = StorageMeter(timeline=True)
    with code.mode, torch.no_grad():
        fresh = [_like(a) if isinstance(a, torch.Tensor) else a for a in args]
        meter.register(*(a for a in fresh if isinstance(a, torch.Tensor)))
        before = meter.live_bytes
        kept = [fresh[i] for i in held]
        with meter:
            results = code.run(fresh)
        peak, left = meter.peak_bytes - before, meter.live_bytes - before
    del kept
    del results
    at: dict[str, int] = {}
    for name, live in meter.timeline:
        name = name.rpartition(".")[0]
        at[name] = max(at.get(name, live - before), live - before)
    return Played(peak, left, at)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
