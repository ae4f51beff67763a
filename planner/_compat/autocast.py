"""Contexts of autocast, seen from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planner._compat.running import modes_set_aside, saved_tensors_hooks_set_aside

ENTERS_AUTOCAST = torch.amp.autocast_mode._enter_autocast  # how Dynamo writes that a context opens; 2.0+


def autocast_depth() -> int:
    """How many contexts of autocast are open in this thread; 1.6+."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def is_under_autocast() -> bool:
    """Whether a context of autocast is open that casts anything; 2.4+."""
    return torch._C._is_any_autocast_enabled()


_MARKERS: dict[torch.device, torch.Tensor] = {}


def autocast_notes(device: torch.device) -> dict[str, Any] | None:
    """What is noted here is there until the outermost context of autocast ends; 2.0+.

    ``None`` where autocast keeps no casts on ``device``.  It lies with the cast of an empty tensor, in the
    cache that the context has.
    """
    marker = _MARKERS.get(device)
    if marker is None:
        marker = _MARKERS[device] = torch.empty(0, 0, device=device, requires_grad=True)
    with modes_set_aside(), saved_tensors_hooks_set_aside():
        made = torch.mm(marker, marker)
    cast: Any = made.grad_fn
    if cast is None or made.dtype == marker.dtype:
        return None
    notes: dict[str, Any] = cast.next_functions[0][0].metadata
    return notes


@contextlib.contextmanager
def autocast_watched(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Say when an outermost context of autocast begins and ends in this thread; 1.6+.

    The functions that its contexts call are replaced meanwhile, for all threads.
    """
    thread = threading.get_ident()
    increment, clear = torch.autocast_increment_nesting, torch.clear_autocast_cache

    def entered() -> int:
        depth = increment()
        if depth == 1 and threading.get_ident() == thread:
            begin()
        return depth

    def cleared() -> None:
        clear()
        if threading.get_ident() == thread:
            end()

    torch.autocast_increment_nesting, torch.clear_autocast_cache = entered, cleared
    try:
        yield
    finally:
        torch.autocast_increment_nesting, torch.clear_autocast_cache = increment, clear
