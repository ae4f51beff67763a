"""The search for a better schedule in a process of its own, at low priority, while the caller goes on.

The process imports this folder and nothing else, so it starts in the time that numpy takes.  It is handed the
problem, the schedule to better and the time limit, and sends back whatever it finds as it finds it.  It ends
with its search, with :meth:`SearchBeside.end`, with the object that began it, and with the process that did.

Known limits: it needs ``sys.executable`` to be a Python; where one cannot be started, ``OSError`` says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.solution import InfeasibleError, Solution
from solvers.solve import solve

__all__ = ["SearchBeside"]

log = logging.getLogger(__name__)

# The caller's training, and whatever else the machine does, goes first.
NICENESS = 19
# Without the folder that happens to be the current one, whose files might be named as others are.
_START = (
    "import sys; sys.path[:] = [{folder!r}, *filter(None, sys.path)]; from solvers.beside import run; run()"
)


class SearchBeside:
    """:func:`solvers.solve` of ``problem`` within ``budget_bytes``, in another process.

    ``hint``          the schedule to better.
    ``time_limit_s``  seconds of search; ``math.inf``: until nothing better is found.
    ``process_id``    the other process, as the system knows it.

    Raises ``OSError`` where no process can be started.
    """

    def __init__(
        self,
        problem: Problem,
        budget_bytes: int,
        hint: Schedule,
        *,
        time_limit_s: float,
        solver: str = "auto",
        seed: int = 0,
    ) -> None:
        if not sys.executable:
            raise OSError("this Python does not know its own executable")
        code = _START.format(folder=str(Path(__file__).parent.parent))
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.process_id = process.pid
        self._found: list[Solution] = []  # the talking thread's
        self._ended = weakref.finalize(self, _kill, process, os.getpid())
        asked = (problem, budget_bytes, hint, time_limit_s, solver, seed)
        # In a thread, since a process that is slow to start must not hold up the caller.
        self._talking = threading.Thread(
            target=_talk, args=(process, asked, self._found), name="search beside", daemon=True
        )
        self._talking.start()

    @property
    def is_over(self) -> bool:
        """Whether the search has ended, by itself or by :meth:`end`, and all it found is here."""
        return not self._talking.is_alive()

    @property
    def best(self) -> Solution | None:
        """The best so far; its bound is the best proved so far.  ``None``: nothing was sent yet."""
        return self._found[-1] if self._found else None

    def end(self) -> None:
        """End the process; what it found stays."""
        self._ended()


def _kill(process: subprocess.Popen[bytes], of_pid: int) -> None:
    if os.getpid() != of_pid:  # a fork of the one that began it, which goes on
        return
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()


def _talk(process: subprocess.Popen[bytes], asked: tuple[Any, ...], found: list[Solution]) -> None:
    """Send what is asked and keep what comes; the pipe stays open, for its end ends the process."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError), process.stdout as answers:
        pickle.dump(asked, process.stdin)
        process.stdin.flush()
        while True:
            found[:] = [pickle.load(answers)]  # of a process of our own
    with contextlib.suppress(OSError):
        process.stdin.close()
    log.debug("a search beside has ended: %d", process.wait())


def run() -> None:
    """The other process: read what is asked, search, and write each better ``Solution`` as it is found."""
    with contextlib.suppress(OSError, AttributeError):  # Windows has no such call
        os.nice(NICENESS)
    asking, answers = sys.stdin.buffer, sys.stdout.buffer
    problem, budget_bytes, hint, time_limit_s, solver, seed = pickle.load(asking)
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()

    def send(found: Solution) -> None:
        if found.fits:
            pickle.dump(found, answers)
            answers.flush()

    with contextlib.suppress(InfeasibleError, BrokenPipeError):
        send(
            solve(
                problem,
                budget_bytes,
                solver=solver,
                time_limit_s=time_limit_s,
                seed=seed,
                hint=hint,
                progress=send,
            )
        )


def _end_with(asking: IO[bytes]) -> None:
    """End this process when the one that asked is gone, or wants no more."""
    asking.read()
    os._exit(0)
