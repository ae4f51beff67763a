"""The best schedule so far, the best bound so far, and whether to go on.

Every method offers what it finds here, and every offer goes through the simulator, so plans found by
one method are what the next one starts from, and nothing that is found is ever lost: whoever stops the
search, a time limit, a callback, Ctrl-C or the proof that no more than ``ENOUGH`` of a step is to be
gained, gets the best of all.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import Timeline, simulate_steps
from solvers.core.solution import Rank, Solution, solution_of

__all__ = ["ENDS_AT", "ENOUGH", "Candidate", "Incumbent", "Offer", "Progress", "Verdict"]

log = logging.getLogger(__name__)

# Where a constant's comment says nothing else it was chosen by trial on the graphs of tests/benchmarks.

# A gap below this share of the time without recomputation is not worth more search: a judgement.
ENOUGH = 5e-4
# A search is told to end a little early, since a linear program in flight overruns its limit by some: at this
# share of it, a judgement.
ENDS_AT = 0.97
# Of the norm over steps that says how far above the budget a schedule is; high: the worst steps count.
OVER_POWER = 4
# Above the budget by at most this share of it, and so many of them, are worth to be remembered.
NEAR, MOST_NEAR = 0.2, 40

Progress = Callable[[Solution], object]


class Verdict(NamedTuple):
    """``taken``: it is the best schedule now; ``peak_bytes``: its peak."""

    taken: bool
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Offer:
    """A schedule that was offered, in short.

    ``steps``        op positions; nobody changes the list.
    ``solver``       the method that found it.
    ``over``         how far it is above the budget: the sum over steps of (excess / budget) to the power of
                     ``OVER_POWER``, a number without unit.
    ``recompute_s``  seconds beyond every op's first run.
    ``peak_bytes``   the most bytes at any step.
    """

    steps: list[int]
    solver: str
    over: float
    recompute_s: float
    peak_bytes: int

    @property
    def rank(self) -> Rank:
        """Lower is better."""
        return Rank(self.over, self.recompute_s, self.peak_bytes)


@dataclass(frozen=True, eq=False)
class Candidate:
    """The best schedule at some moment: its ``steps``, what the simulator says of it, and as in ``Offer``."""

    steps: list[int]
    line: Timeline
    solver: str
    over: float

    @property
    def offer(self) -> Offer:
        """The same in short."""
        line = self.line
        return Offer(self.steps, self.solver, self.over, line.recompute_seconds, line.peak_bytes)


class Incumbent:
    """Shared by all the methods of one solve, from several threads.

    What several threads read is replaced whole under ``lock`` and never changed in place, so that each read
    of a field is of one moment.

    ``best``       the best schedule so far: the least above the budget (in the norm of ``OVER_POWER`` over
                   its steps), then the fewest seconds, then the lowest peak.
    ``bound_s``    no schedule within the budget takes fewer seconds in total.
    ``progress``   called with a ``Solution`` for each better schedule or bound; returning ``True`` stops
                   the search.
    ``enough_s``   a gap that ends the search.
    ``lowest``     the schedule of lowest peak, for an answer where nothing fits.
    ``starts``     per method, the best it found.
    ``near``       schedules that are above the budget by no more than ``NEAR`` of it, each faster than those
                   nearer, by peak.
    """

    def __init__(
        self,
        problem: Problem,
        budget_bytes: int,
        *,
        deadline: float = math.inf,
        enough_s: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.problem, self.budget_bytes = problem, budget_bytes
        self.started, self.deadline = time.perf_counter(), deadline
        self.total_s = problem.total_seconds
        self.enough_s = ENOUGH * self.total_s if enough_s is None else enough_s
        self.progress = progress
        self.best = self._candidate(list(range(len(problem))), "keep_all")
        self.lowest = self.best.offer
        self.bound_s = self.total_s
        self.stopped = self.interrupted = False
        self.parent: Incumbent | None = None
        self.starts: Mapping[str, Offer] = {}
        self.near: tuple[Offer, ...] = ()
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        best = self.best
        return (
            f"Incumbent({best.line.recompute_seconds / (self.total_s or 1.0):.4%} by {best.solver}, bound "
            f"{self.bound_s / (self.total_s or 1.0) - 1:.4%}, peak {best.line.peak_bytes} of "
            f"{self.budget_bytes})"
        )

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 once stopped."""
        if self.stopped or (self.parent is not None and self.parent.done):
            return 0.0
        return max(0.0, self.deadline - time.perf_counter())

    def fork(self, steps: Sequence[int], share: float) -> Incumbent:
        """A search of its own from ``steps``, for a share of the time left; ends when this one does."""
        child = Incumbent(
            self.problem,
            self.budget_bytes,
            deadline=min(self.deadline, time.perf_counter() + share * self.left_s),
            enough_s=self.enough_s,
        )
        child.offer(steps, self.best.solver)
        child.parent = self
        return child

    @property
    def fits(self) -> bool:
        """Whether the best schedule is within the budget."""
        return self.best.line.peak_bytes <= self.budget_bytes

    @property
    def gap_s(self) -> float:
        """Seconds by which the best schedule may exceed the best possible."""
        return self.total_s + self.recompute_s - self.bound_s

    @property
    def done(self) -> bool:
        """Out of time, stopped, close enough to the bound, or proved to have no answer."""
        return self.left_s <= 0 or self.settled or math.isinf(self.bound_s)

    @property
    def settled(self) -> bool:
        """Close enough to the bound."""
        line = self.best.line
        gap_s = self.total_s + line.recompute_seconds - self.bound_s
        return line.peak_bytes <= self.budget_bytes and gap_s <= self.enough_s

    @property
    def steps(self) -> list[int]:
        """Of the best schedule; who wants several of its parts reads ``best`` once."""
        return self.best.steps

    @property
    def line(self) -> Timeline:
        """Of the best schedule."""
        return self.best.line

    @property
    def solver(self) -> str:
        """That found the best schedule."""
        return self.best.solver

    @property
    def peak_bytes(self) -> int:
        """Of the best schedule."""
        return self.best.line.peak_bytes

    @property
    def recompute_s(self) -> float:
        """Of the best schedule."""
        return self.best.line.recompute_seconds

    def _candidate(self, steps: list[int], solver: str) -> Candidate:
        line = simulate_steps(self.problem, steps)
        return Candidate(steps, line, solver, self.over_of(line))

    def offer(self, steps: Sequence[int], solver: str) -> Verdict:
        """Take ``steps`` if they are better than what is there."""
        candidate = self._candidate(list(steps), solver)
        offer = candidate.offer
        with self.lock:
            if solver not in self.starts or offer.rank < self.starts[solver].rank:
                self.starts = {**self.starts, solver: offer}
            if offer.peak_bytes < self.lowest.peak_bytes:
                self.lowest = offer
            if 0 < offer.peak_bytes - self.budget_bytes <= NEAR * self.budget_bytes:
                self._remember(offer)
            taken = offer.rank < self.best.offer.rank
            if taken:
                self.best = candidate
                self._tell()
        return Verdict(taken, offer.peak_bytes)

    def _remember(self, offer: Offer) -> None:
        if any(o.peak_bytes <= offer.peak_bytes and o.recompute_s <= offer.recompute_s for o in self.near):
            return
        rest = [o for o in self.near if o.peak_bytes < offer.peak_bytes or o.recompute_s < offer.recompute_s]
        near = sorted([*rest, offer], key=lambda o: (o.peak_bytes, o.recompute_s))
        self.near = tuple(near[:MOST_NEAR])

    def over_of(self, line: Timeline) -> float:
        """How far ``line`` is above the budget; spreading a peak over more steps counts as progress."""
        return self.excess(line.live_bytes)

    def excess(self, live_bytes: np.ndarray) -> float:
        """What steps with ``live_bytes`` in memory, shape (T,), add to ``over``."""
        over = np.maximum(live_bytes - self.budget_bytes, 0) / max(1, self.budget_bytes)
        return float((over**OVER_POWER).sum())

    def raise_bound(self, bound_s: float) -> None:
        """``bound_s``: proved lower bound on the total seconds of any schedule within the budget."""
        with self.lock:
            if bound_s > self.bound_s:
                self.bound_s = bound_s
                self._tell()

    def refuse(self) -> None:
        """It is proved that nothing fits."""
        self.raise_bound(math.inf)

    def stop(self) -> None:
        """Nothing new is begun from now on."""
        self.stopped = True

    def interrupt(self) -> None:
        """``stop``, because somebody asked for it and not because time is up."""
        self.interrupted = True
        self.stop()

    def solution(self) -> Solution:
        """The best so far; the one of lowest peak while none fits."""
        with self.lock:
            answer = self.best.offer if self.fits else self.lowest
            return solution_of(
                self.problem,
                Schedule.of(self.problem, answer.steps),
                self.budget_bytes,
                solver=answer.solver,
                bound_seconds=self.bound_s,
                solve_seconds=time.perf_counter() - self.started,
                interrupted=self.interrupted,
            )

    def _tell(self) -> None:
        log.debug("%.2f s: %r", time.perf_counter() - self.started, self)
        if self.progress is not None and not self.stopped and self.progress(self.solution()) is True:
            self.interrupt()
