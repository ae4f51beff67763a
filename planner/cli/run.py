"""Run one command of ``python -m planner``: its result on stdout, everything else on stderr, an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from planner.cli.commands import CANNOT, INTERRUPTED, Outcome
from planner.cli.parser import parser
from planner.errors import PlannerError

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    made = parser()
    arguments = made.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars would break ours
    name = f"{made.prog} {arguments.command}"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is not the result
            outcome: Outcome = arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (PlannerError, ValueError, TypeError, OSError) as error:
        log.debug("%s could not run", name, exc_info=True)
        print(f"{name}: {error}", file=sys.stderr)
        return CANNOT
    _tell(outcome.text)
    for line in outcome.notes:
        print(line, file=sys.stderr)
    return outcome.code


def _tell(text: str) -> None:
    """``text`` on stdout; whoever reads it may have had enough (``| head``)."""
    if not text:
        return
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
