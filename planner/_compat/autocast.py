"""Contexts of autocast, seen from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

ENTERS_AUTOCAST = torch.amp.autocast_mode._enter_autocast  # how Dynamo writes that a context opens; 2.0+


def autocast_depth() -> int:
    """How many contexts of autocast are open in this thread; 1.6+."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def is_under_autocast() -> bool:
    """Whether a context of autocast is open that casts anything; 2.4+."""
    return torch._C._is_any_autocast_enabled()


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
