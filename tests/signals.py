"""Ctrl-C in tests, whoever started them: ``nohup make test &`` has the whole run ignore SIGINT.

A process that is born ignoring a signal goes on ignoring it, and hands that on to its children.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["HEARD", "IGNORING", "ctrl_c_heard"]

# Put before a command, it is started as `nohup` and a shell's `&` start one: ignoring Ctrl-C.
IGNORING = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")

# The first lines of a child's script that is to be interrupted.
HEARD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@contextlib.contextmanager
def ctrl_c_heard() -> Iterator[None]:
    """In here SIGINT raises KeyboardInterrupt in the main thread; behind it, what it did before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
