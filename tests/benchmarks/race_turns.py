"""Turns on one GPU between processes: many may compile at once, but whoever measures is alone.

Two locked files.  Compiling holds the first one shared, measuring holds it alone.  The second is a gate that
everyone passes first and that whoever wants to be alone keeps while waiting, so that those who only share
cannot keep it waiting for ever.  The locks are the kernel's (``flock``): a process that dies gives them back.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["TimeIsUp", "Turns"]

_POLL_S = 0.02


class TimeIsUp(Exception):
    """The deadline passed before a turn came; what was measured so far stays."""


class Turns:
    """Turns among all processes that name the same ``folder``; ``deadline`` is in ``time.time()`` seconds."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline = folder, deadline

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others that share."""
        with (self.folder / "gate").open("a") as gate, (self.folder / "turn").open("a") as turn:
            self._take(gate, fcntl.LOCK_EX)
            self._take(turn, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody beside."""
        with (self.folder / "gate").open("a") as gate, (self.folder / "turn").open("a") as turn:
            self._take(gate, fcntl.LOCK_EX)
            self._take(turn, fcntl.LOCK_EX)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def _take(self, file: IO[str], kind: int) -> None:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if self.left_s < 0:
                    raise TimeIsUp from None
                time.sleep(_POLL_S)
            else:
                return
