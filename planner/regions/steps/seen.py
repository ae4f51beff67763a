"""What was seen of the calls of a step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.measure.step import tensors_in
from planner.regions.cut.region import Region, Variant

__all__ = ["Seen", "Step", "tracked"]


class Step:
    """One step; its calls hold it."""


@dataclass(eq=False)
class Seen:
    """What one call of a region gave and took.

    ``variant``  that ran; ``None`` where eager did.
    ``turn_of``  how often the region had been called in the step before.
    ``present``  the outputs that got gradients; ``None`` before its backward; ``able``: those that can.
    """

    step: Step
    number: int
    region: Region
    turn_of: int
    variant: Variant | None
    key: Any
    used: frozenset[int] | None
    base: str = ""
    args: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    turn: int = 0
    present: frozenset[int] | None = None
    able: frozenset[int] = frozenset()
    looked: bool = False
    read: list[tuple[Any, int]] = field(default_factory=list)
    lent: list[tuple[int, Any, int, bool]] = field(default_factory=list)
    crossings: dict[tuple[str, str | int], int] = field(default_factory=dict)
    gives: dict[tuple[str, str | int], int] = field(default_factory=dict)

    def lend(self, args: Sequence[Any], outputs: Any) -> None:
        """Remember what the call took and gave that has no gradient, as it is now."""
        taken = [(i, x, True) for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        given = [(i, x, False) for i, x in enumerate(tensors_in(outputs))]
        self.lent = [
            (i, weakref.ref(x), x._version, is_taken)
            for i, x, is_taken in taken + given
            if not (x.requires_grad or x.is_inference())
        ]

    def note_writes(self) -> list[torch.Tensor]:
        """Tell the region of what was written to since :meth:`lend`; the arguments among it."""
        now = ((i, ref(), version, is_taken) for i, ref, version, is_taken in self.lent)
        found = [(i, x, taken) for i, x, version, taken in now if x is not None and x._version != version]
        known = self.region.spoilt  # what was known before, whose copies the step has made
        if found:
            self.region.is_spoilt_at([i for i, _, taken in found if taken], [i for i, _, t in found if not t])
        return [x for i, x, taken in found if taken and i not in known]


def tracked(x: Any) -> bool:
    """Whether autograd follows ``x``."""
    return isinstance(x, torch.Tensor) and x.requires_grad
