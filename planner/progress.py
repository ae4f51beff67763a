"""What planning is doing while it runs: capture, profile, solve, with the plan and its bound as they close.

``progress=True`` draws one line on stderr with tqdm; a callable gets an :class:`Event` at the start of
each phase and whenever the search finds a better plan or proves a better bound; nothing is shown without
being asked.  The same events go to the log at level DEBUG, so ``TORCH_LOGS="+planner"`` shows them with
their times (and ``"+planner,+solvers"`` what each method of the search does).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias, get_args

from planner.errors import PlannerError
from planner.units import bytes_text, seconds_text

__all__ = ["Bar", "Event", "Phase", "Progress", "Reporter", "reporting"]

log = logging.getLogger(__name__)

Phase = Literal["capture", "profile", "solve", "least", "calibrate"]


@dataclass(frozen=True)
class Event:
    """A moment of planning.

    ``phase``           "capture" traces the step, "profile" prices its ops, "solve" looks for the plan,
                        "least" for the least budget that has one, where the budget asked for is too low,
                        "calibrate" runs the planned step.
    ``elapsed_s``       seconds since planning began.
    ``note``            what is worked on, in words, at the start of a phase.
    ``budget_bytes``    what is solved for; ``None`` outside "solve".
    ``peak_bytes``      of the best schedule so far; above the budget while nothing fits.
    ``overhead``        of the best plan so far that fits, as a share of step time; ``None`` before one does.
    ``overhead_bound``  proved so far: no plan within the budget has less.
    """

    phase: Phase
    elapsed_s: float
    note: str = ""
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    overhead: float | None = None
    overhead_bound: float | None = None

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise ValueError(f"phase is {self.phase!r}, want one of {', '.join(get_args(Phase))}")

    @property
    def gap(self) -> float | None:
        """``overhead - overhead_bound``; ``None`` while nothing fits."""
        if self.overhead is None or self.overhead_bound is None:
            return None
        return max(0.0, self.overhead - self.overhead_bound)

    @property
    def found(self) -> str:
        """The search in a few words; empty outside it."""
        if self.peak_bytes is None or self.budget_bytes is None:
            return ""
        if self.overhead is None or self.gap is None:
            return f"{bytes_text(self.peak_bytes - self.budget_bytes)} over the budget"
        return (
            f"overhead {self.overhead:.2%}, proved {self.overhead_bound:.2%}, gap {100 * self.gap:.2f} points"
        )

    def __str__(self) -> str:
        said = self.found or self.note
        return f"{seconds_text(self.elapsed_s)}: {self.phase}" + (f", {said}" if said else "")


# Called with each event; returning True from one of the search ends it with the best plan so far.
Progress: TypeAlias = Callable[[Event], object]


class Found(Protocol):
    """What a search has found so far: a ``solvers.Solution``, or an answer made of one."""

    @property
    def budget_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bound_seconds(self) -> float: ...


class Reporter:
    """Tells one listener, and the log, what one call of the planner is doing."""

    def __init__(self, listener: Progress | None = None) -> None:
        self._listener = listener
        self._began = time.perf_counter()
        self.stopped = False  # a listener, or Ctrl-C, ended a search: no other is begun

    def phase(self, phase: Phase, note: str = "") -> None:
        """A phase begins."""
        self._tell(Event(phase, time.perf_counter() - self._began, note))

    def heed(self, interrupted: bool) -> None:
        """Remember that a search was ended before its time, so that none is begun after it."""
        self.stopped = self.stopped or interrupted

    def searching(self, step_s: float) -> Callable[[Found], object] | None:
        """A ``progress`` for :func:`solvers.solve` on a step of ``step_s`` seconds; None if none listens."""
        if self._listener is None and not log.isEnabledFor(logging.DEBUG):
            return None  # the search makes a Solution for every call

        def heard(best: Found) -> object:
            wish = self.found(best, step_s)
            self.heed(wish is True)
            return wish

        return heard

    def found(self, best: Found, step_s: float) -> object:
        """``best`` is the best answer so far for a step of ``step_s`` seconds."""
        overhead, bound = (max(0.0, s / step_s - 1.0) if step_s else 0.0 for s in _seconds(best))
        return self._tell(
            Event(
                "solve",
                time.perf_counter() - self._began,
                budget_bytes=best.budget_bytes,
                peak_bytes=best.peak_bytes,
                overhead=overhead if best.fits else None,
                overhead_bound=bound,
            )
        )

    def _tell(self, event: Event) -> object:
        log.debug("%s", event)
        return None if self._listener is None else self._listener(event)


def _seconds(best: Found) -> tuple[float, float]:
    return best.seconds, best.bound_seconds


class Bar:
    """Events as one line on stderr.  Raises ``PlannerError`` without tqdm."""

    def __init__(self) -> None:
        if not self.is_possible():
            raise PlannerError("progress=True needs tqdm: pip install tqdm, or 'rematplan[notebooks]'")
        from tqdm import tqdm

        self._phases: list[str] = []
        self._bar: Any = tqdm(
            total=3, file=sys.stderr, bar_format="{desc}|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        )

    @staticmethod
    def is_possible() -> bool:
        """Whether tqdm is installed."""
        try:
            import tqdm
        except ImportError:
            return False
        return hasattr(tqdm, "tqdm")

    def __call__(self, event: Event) -> None:
        if event.phase not in self._phases:
            self._phases.append(event.phase)
            self._bar.n = len(self._phases) - 1
            self._bar.total = max(3, len(self._phases))
        self._bar.set_description_str(f"{event.phase:<8}", refresh=False)
        self._bar.set_postfix_str(event.found or event.note)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.n = self._bar.total
            self._bar.refresh()
        self._bar.close()


@contextmanager
def reporting(progress: bool | Progress | None) -> Iterator[Reporter]:
    """The reporter for a ``progress`` argument: ``True`` draws, a callable is called, else silence.

    Raises ``TypeError`` for anything else, ``PlannerError`` for ``True`` without tqdm.
    """
    if progress is None or progress is False:
        yield Reporter()
    elif progress is True:
        with Bar() as bar:
            yield Reporter(bar)
    elif callable(progress):
        yield Reporter(progress)
    else:
        raise TypeError(f"progress must be True, False, None or a callable, not {progress!r}")
