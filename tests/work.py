"""How much work a call is, without a clock: the same numbers on every machine, however busy it is."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any


class Name(str):
    """A name that counts when it is compared: what a search through a list does, out of Python's sight."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)

    def __str__(self) -> str:
        return self  # and not a plain copy

    __hash__ = str.__hash__


class Work:
    """Lines of Python run (a turn of a loop is one), functions of C called, names compared, bytes at most."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.lines = self.calls = 0
        compared, traced, profiled = Name.compared, sys.gettrace(), sys.getprofile()
        tracemalloc.start()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(traced)
            sys.setprofile(profiled)
            self.peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        self.compared = Name.compared - compared

    def times(self, smaller: Work) -> float:
        """How many times the ``smaller`` work, in what grew most."""
        return max(mine / max(1, its) for mine, its in zip(self.counts(), smaller.counts(), strict=True))

    def counts(self) -> tuple[int, int, int, int]:
        return self.lines, self.calls, self.compared, self.peak_bytes

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.lines += event == "line"
        return self._trace

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        self.calls += event == "c_call"
