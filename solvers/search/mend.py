"""Mending: a schedule above the budget in many places is made to fit, one exact window after the other.

The chain program's cheapest schedules near the floor are right about what to keep from layer to layer, and
above the budget inside every layer, where their options do not go deep enough.  Taking bytes off by single
drops costs such a schedule half a forward pass; a window solved exactly costs it a hundredth.  So the places
above the budget are taken in the order of the run: a few first runs around each are opened, every op that may
be worth it gets a slot to run again there (:mod:`solvers.search.template`), and the fewest seconds are asked
for with which the window is within the budget and nothing outside gets worse.  Where there is no such
schedule, a wider window is tried, which may also do without what waits across it, at the seconds to make
that again behind it; then something is dropped, at the least seconds per byte that it takes off the whole
excess; then the place is left as it is.  What mended one place is laid over all like places
(:mod:`solvers.search.repeats`), so that twenty equal layers take the windows of a few.

Sources: the windows are those of :mod:`solvers.search.local_search` (Shaw, 1998), as a repair; dropping what
waits is the eviction of Kirisame et al., "Dynamic Tensor Rematerialization" (ICLR 2021).
Optimal: each window, within its template and given the rest.  On ViT-L at 2 % above its floor the chain's
schedule of 34 % is 6 % above the budget; mended and then shaved it takes 45 %, shaved alone 49 %.
Weakness: what is kept across layers is decided place by place.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import can_be_dropped, first_runs, trim
from solvers.core.simulate import Timeline, simulate_steps
from solvers.search.local_search import LEAST_GAIN, Search, Window
from solvers.search.repeats import Repeats, flat, reruns
from solvers.search.shave import Places

__all__ = ["mend"]

log = logging.getLogger(__name__)

# Half a layer, within these bounds, is opened at first, and twice as much before something is dropped.
NARROWEST, WIDEST = 6, 16
WIDENINGS = 2
# Windows of one schedule, at most.
FEW_WINDOWS, WINDOWS_PER_PLACE = 20, 4
# A place that takes more than this share of a step is left to others.
TOO_DEAR = 0.06
# What is done in one place is done in a like one for so many times the seconds at most.
DEARER = 1.5
# Values that a window may do without: so many, each at least this share of the budget.
MOST_WAITING, LEAST_SHARE = 24, 1e-3
# Drops that are simulated for one place, of up to so many ops to make it again, and the share of the place's
# excess that one must take off the whole.
LOOKED_AT, MOST_AGAIN, LEAST_FALL = 10, 400, 0.05


def mend(
    run: Incumbent,
    steps: Sequence[int],
    *,
    deadline: float,
    seed: int = 0,
    workers: Callable[[], int] = lambda: 1,
    layer: int | None = None,
) -> list[int]:
    """Offer ``run`` what becomes of ``steps``, and return it, within the budget or not.

    ``deadline``  of ``time.perf_counter()``.  ``layer``: first runs of a usual layer of the backward.
    """
    mending = _Mending(run, list(steps), seed, layer or NARROWEST, deadline)
    with ThreadPoolExecutor(2) as pool:
        while not run.done and time.perf_counter() < deadline and not mending.is_slow():
            places = mending.places(min(workers(), mending.windows_left))
            if not places:
                break
            mending.windows_left -= len(places)
            state = mending.steps, mending.line
            windows = [mending.window(place) for place in places]
            tasks = [pool.submit(mending.solved, window, *state) for window in windows]
            answers = [task.result() for task in tasks]
            for place, window, answer in zip(places, windows, answers, strict=True):
                mending.take(place, state[0], window, answer)
    log.debug("%s: mended to %d of %d", run.problem.name, mending.line.peak_bytes, run.budget_bytes)
    run.offer(mending.steps, "mend")
    return mending.steps


class _Mending:
    """The schedule as it is, and how often each place was tried."""

    def __init__(self, run: Incumbent, steps: list[int], seed: int, layer: int, deadline: float) -> None:
        self.run, self.problem, self.deadline = run, run.problem, deadline
        self.search, self.repeats = Search(run, seed), Repeats(run.problem)
        self.width = max(NARROWEST, min(WIDEST, layer // 2))
        self.tried: dict[int, int] = {}
        self.left: set[int] = set()
        self._set(steps, simulate_steps(self.problem, steps))
        # Windows make fewer places, drops fewer bytes: together they might go round in circles.
        self.windows_left = FEW_WINDOWS + WINDOWS_PER_PLACE * self._over()[0]

    def _set(self, steps: list[int], line: Timeline) -> None:
        self.steps, self.line = steps, line
        self.first = np.minimum(first_runs(steps), len(self.problem) - 1)
        self.excess = np.maximum(line.live_bytes - self.run.budget_bytes, 0)

    def is_slow(self) -> bool:
        """Whether it takes longer than the best that fits by now."""
        return self.run.fits and self.line.recompute_seconds >= self.run.recompute_s

    def places(self, count: int) -> list[int]:
        """First runs above the budget, the first and others far from it; none of those given up."""
        over = np.unique(self.first[self.excess > 0]).tolist()
        chosen: list[int] = []
        for t in over:
            if t not in self.left and all(abs(t - u) > 6 * self.width for u in chosen):
                chosen.append(t)
        return list(islice(chosen, count))

    def window(self, place: int) -> Window:
        """Around ``place`` and what is above the budget right behind it."""
        width = self.width << self.tried.get(place, 0)
        begin, end = place - width // 2, place + width // 2
        over = self.first[(self.excess > 0) & (self.first >= place) & (self.first < end)]
        end = max(end, int(over.max(initial=place)) + 1)
        return Window(max(self.search.reach.first, begin), min(len(self.problem), end), width)

    def solved(self, window: Window, steps: list[int], line: Timeline) -> list[int] | None:
        """The fastest schedule found that is within the budget in ``window``, and elsewhere as ``steps``.

        A window that is as narrow as they begin has to do with all that waits across it.
        """
        if window.end <= window.begin:
            return None
        waiting = self._waiting(window, steps, line) if window.ahead > self.width else []
        found = self.search.fitting(window, steps, line, waiting, self.deadline)
        if found is None:
            return None
        now, dropped = found
        for v in dropped:  # in the order in which they are read again
            places = Places(self.run, now, simulate_steps(self.problem, now))
            behind = now.index(window.end - 1)
            b = next((s for s in places.at[v] if s > behind), None)
            again = None if b is None else places.to_make([v], b, MOST_AGAIN)
            if again:
                now = trim(self.problem, [*now[:b], *again, *now[b:]])
        return now

    def _waiting(self, window: Window, steps: list[int], line: Timeline) -> list[tuple[int, float]]:
        """Values that nobody touches in ``window`` or on the way to it and that are read behind it, by when;
        with the seconds to make each again there: those that take least of these per byte."""
        problem, ops = self.problem, self.problem.ops
        places = Places(self.run, steps, line)
        first = first_runs(steps)
        begin, end = bisect_left(first, window.begin), bisect_left(first, window.end)
        least = LEAST_SHARE * self.run.budget_bytes
        found: list[tuple[float, int, int, float]] = []
        for v, at in places.at.items():
            size, k = problem.values[v].bytes, bisect_left(at, begin)
            if not 0 < k < len(at) or at[k] < end or places.made[v][k] or size < least:
                continue
            if can_be_dropped(problem, v) and (again := places.to_make([v], at[k], MOST_AGAIN)):
                seconds = math.fsum(ops[i].again_s for i in again)
                found.append((seconds / size, at[k], v, seconds))
        cheapest = sorted(found)[:MOST_WAITING]
        return [(v, seconds) for _, _, v, seconds in sorted(cheapest, key=lambda one: one[1])]

    def take(self, place: int, base: list[int], window: Window, answer: list[int] | None) -> None:
        """What ``answer`` changed in ``base`` is changed, here and in like places; or the place is tried
        otherwise next."""
        before = self.steps, self.line
        if answer is not None and self._judged(self._merged(base, answer)):
            more_s = self.line.recompute_seconds - before[1].recompute_seconds
            if more_s > TOO_DEAR * self.problem.total_seconds:
                self._set(*before)
            elif not self._is_over(place):
                self.tried.pop(place, None)
                self._repeat(place, base, window, answer, more_s)
                return
        self.tried[place] = self.tried.get(place, 0) + 1
        before_turn = place < self.search.reach.first
        if (before_turn or self.tried[place] >= WIDENINGS) and not self._drop(place):
            self.left.add(place)

    def _merged(self, base: list[int], answer: list[int]) -> list[int]:
        if base is self.steps:
            return answer
        now, old, new = reruns(self.steps), reruns(base), reruns(answer)
        laid = [c if a != c else b for a, b, c in zip(old, now, new, strict=True)]
        return trim(self.problem, flat(laid))

    def _repeat(self, place: int, base: list[int], window: Window, answer: list[int], more_s: float) -> None:
        """Change the same where the graph repeats itself and is above the budget in the same place, if that
        takes not much more than the ``more_s`` seconds that it took here."""
        turn = self.search.reach.first
        old, new = reruns(base), reruns(answer)
        changed = [t for t in range(turn, len(self.problem)) if old[t] != new[t]]
        most_s = DEARER * max(0.0, more_s) + LEAST_GAIN * self.problem.total_seconds
        for shift in self.repeats.shifts(window.begin, window.end):
            like = place + shift.behind
            if not self._is_over(like):
                continue
            now = reruns(self.steps)
            for t in changed:
                to = t + shift.behind
                if turn <= to < len(self.problem):
                    now[to] = [i for i in self.repeats.moved(new[t], shift) if i < to]
            steps, before = trim(self.problem, flat(now)), (self.steps, self.line)
            better = self._judged(steps)
            dearer = self.line.recompute_seconds > before[1].recompute_seconds + most_s
            if better and (dearer or self._is_over(like)):
                self._set(*before)

    def _is_over(self, place: int) -> bool:
        """Whether the schedule is above the budget at the first run ``place`` or on the way to it."""
        return bool((self.excess[self.first == place] > 0).any())

    def _judged(self, steps: list[int]) -> bool:
        """Go on with ``steps`` if they are above the budget in fewer places, or in as many by less."""
        before = self.steps, self.line, *self._over()
        self._set(steps, simulate_steps(self.problem, steps))
        if self._over() < before[2:]:
            return True
        self._set(*before[:2])
        return False

    def _over(self) -> tuple[int, int]:
        """At how many first runs the schedule is above the budget, and by how many bytes over all steps."""
        return len(np.unique(self.first[self.excess > 0])), int(self.excess.sum())

    def _drop(self, place: int) -> bool:
        """Drop what costs least per byte that this takes off; whether anything does."""
        places = Places(self.run, self.steps, self.line)
        here = self.first == place
        most = int(self.excess[here].max(initial=0))
        if not most:
            self.tried.pop(place, None)
            return True
        places.excess = np.where(here, self.excess, 0)
        drops = places.drops(MOST_AGAIN)
        drops.sort(key=lambda drop: drop.again_s / min(drop.size, most))
        least_s = 1e-6 * self.problem.total_seconds
        best: tuple[float, list[int], Timeline] | None = None
        for drop in drops[:LOOKED_AT]:
            steps = trim(self.problem, [*self.steps[: drop.b], *drop.ops, *self.steps[drop.b :]])
            line = simulate_steps(self.problem, steps)
            fall = float(self.excess.sum() - np.maximum(line.live_bytes - self.run.budget_bytes, 0).sum())
            more_s = line.recompute_seconds - self.line.recompute_seconds
            gain = fall / max(least_s, more_s)
            cheap = more_s <= TOO_DEAR * self.problem.total_seconds
            if cheap and fall >= LEAST_FALL * most and (best is None or gain > best[0]):
                best = gain, steps, line
        if best is None:
            return False
        self._set(*best[1:])
        self.tried.pop(place, None)
        return True
