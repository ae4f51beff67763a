"""Which plan serves a call: the one place that knows that batches come in many shapes.

:class:`PerShape` keeps a plan per signature, or one for all calls that differ in sizes only where a plan
is for any size (:mod:`planner.runtime.variants`); the least recently used is dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from planner.plan import Plan
from planner.runtime.forward import PlannedForward
from planner.training.calls import Call, Signature

__all__ = ["Kept", "PerShape"]


class Kept(NamedTuple):
    """A plan, what runs it, and the room it was made for: bytes at its peak, and while it waits.

    ``any_size``  whether it serves calls of other sizes too.
    """

    plan: Plan
    runner: PlannedForward
    left_bytes: int
    most_held_bytes: int | None
    any_size: bool = False


class PerShape:
    """One plan per signature, ``most`` of them.

    ``largest``  the signature with most elements that has been planned.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.largest: Signature | None = None
        self._kept: OrderedDict[Signature, Kept] = OrderedDict()

    def find(self, call: Call) -> Kept | None:
        """The plan for this call and what runs it, if there is one."""
        for signature in (call.signature, call.signature.kind):
            kept = self._kept.get(signature)
            if kept is not None:
                self._kept.move_to_end(signature)
                return kept
        return None

    def keep(self, call: Call, kept: Kept) -> None:
        """From now on this serves calls like ``call``."""
        self._kept[call.signature.kind if kept.any_size else call.signature] = kept
        if len(self._kept) > self.most:
            self._kept.popitem(last=False)
        if self.largest is None or sum(call.signature.sizes) > sum(self.largest.sizes):
            self.largest = call.signature

    def exceeds(self, call: Call) -> bool:
        """Whether the call has a tensor larger than the same one of ``largest``."""
        if self.largest is None:
            return False
        sizes = call.signature.sizes, self.largest.sizes
        return len(sizes[0]) != len(sizes[1]) or any(a > b for a, b in zip(*sizes, strict=True))
