"""Weights that autocast casts once for all calls in one of its contexts.

Eager keeps the cast of a weight until the outermost context ends, so the calls within share it: the gradients
of the cast are added up in its low precision, whichever call they are of, and cast back once.  A planned call
casts for itself.  Where one backward goes through several calls of a context, each leaves the gradients of
the casts here, and the one that the engine comes to last casts the sums back.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch

from planner import _compat

__all__ = ["SharedCasts", "shared_casts"]


class Sharing(Protocol):
    """A call that waits for its backward."""

    nodes: list[Any]

    @property
    def task(self) -> int:
        """The backward that its first node ran in last."""
        ...

    @property
    def cast(self) -> Collection[int]:
        """The parameters (identities) that are cast for it."""
        ...


class SharedCasts:
    """Those of one context.

    ``low``  what came so far in a backward, by identity of the parameter.
    """

    def __init__(self) -> None:
        self.calls: list[weakref.ref[Sharing]] = []
        self.low: dict[int, torch.Tensor] = {}
        self._task = -1

    def join(self, call: Sharing) -> None:
        """A call in this context has run its forward."""
        self.calls = [ref for ref in self.calls if ref() is not None]
        self.calls.append(weakref.ref(call))

    def begin(self, call: Sharing, task: int) -> bool:
        """The backward ``task`` comes to ``call``; whether it goes through others of this context too."""
        if self._task != task:
            self._task = task
            self.low.clear()
        return bool(self.low) or bool(self._behind(call, task))

    def _behind(self, call: Sharing, task: int) -> list[Sharing]:
        others = [other for ref in self.calls if (other := ref()) is not None and other is not call]
        return [other for other in others if other.task != task and _will_run(other)]

    def add(self, parameter: torch.Tensor, low: torch.Tensor) -> None:
        """A gradient of the cast of ``parameter``, behind those that came before it."""
        before = self.low.get(id(parameter))
        self.low[id(parameter)] = low if before is None else before.add_(low)

    def taken(self, call: Sharing, parameter: torch.Tensor) -> torch.Tensor | None:
        """Their sum, cast back; ``None`` where there is none, or another call is to come."""
        if any(id(parameter) in other.cast for other in self._behind(call, call.task)):
            return None
        low = self.low.pop(id(parameter), None)
        return None if low is None else low.to(parameter.dtype)


def _will_run(call: Sharing) -> bool:
    first = call.nodes[0]()
    return first is not None and _compat.will_run(first)


def shared_casts(device: torch.device) -> SharedCasts | None:
    """Those of the context of autocast that is open; ``None`` where none shares casts."""
    if not (torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()):
        return None
    notes = _compat.autocast_notes(device)
    found: SharedCasts | None = None
    if notes is not None:
        found = notes.setdefault("planner", SharedCasts())
    return found
