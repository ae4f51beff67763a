"""Dynamic program over a chain of blocks: several options per block, recomputation as often as it pays.

The problem is cut into blocks (see ``solvers.blocks``).  With blocks ``a..b`` still to be run forward
and backward, what crosses into ``a`` at hand and ``m`` bytes to spend, either

- run ``a``, ..., ``j - 1`` forward keeping only what crosses into ``j``, solve ``j..b`` in what is
  left, then solve ``a..j-1`` in ``m`` again: everything before ``j`` is recomputed; or
- run ``a`` with one of its options (a saved set), solve ``a+1..b`` in what is left, and run the
  backward of ``a``.

``Opt(m, a, b)`` is the least recomputation, for all ``m`` at once.  The two moves nest, so an op may
run any number of times, which is what plans near the floor need and what a program that recomputes
once cannot express.

Papers: Griewank and Walther, "Revolve", TOMS 2000; Beaumont et al., "Optimal checkpointing for
heterogeneous chains", TOMS 2024; options per block: Zhao et al., "Rockmate", ICML 2023.

Optimal when the graph is a chain of its blocks, among persistent schedules (what is saved stays until
the backward of its block) made of the given options, and memory divides into slots evenly.
Otherwise: bytes are rounded to slots, without bias along the chain; the plans of all slot counts are
read from one table, and the simulator picks the fastest that truly fits.

Weaknesses: at generous budgets, programs that decide value by value find better mixtures than a few
options per block; long skips must be held across their span or recomputed with it; the bound is
the trivial one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np

from solvers.blocks import Chain, Option, cut_into_blocks
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.simulate import simulate_steps
from solvers.solution import Solution, solution_of

__all__ = ["ChainTable", "minimum_peak", "solve"]

log = logging.getLogger(__name__)

# Numbers of blocks to cut into, in the order they are tried; small graphs also get one block per op.
BLOCKS = (48, 96, 24)
EVERY_OP = 64
OPTIONS = 8
SLOTS = 400
# Plans made for more than the budget often simulate below it, because the table rounds and holds more
# than the simulator does.
HEADROOM = 1.15
GOLDEN = 0.6180339887498949


class ChainTable:
    """``Opt(m, a, b)`` of one chain for ``m`` of 0 to ``slots`` slots of ``slot_bytes`` each.

    Building it takes O(blocks^3 slots) vectorised work.  ``seconds[b][a, m]`` is the least
    recomputation of blocks ``a..b`` (inclusive), infinite where it does not fit; ``choice[b][a, m]``
    is ``j`` to keep only what crosses into ``j``, or ``-1 - k`` for option ``k``.
    """

    def __init__(
        self, chain: Chain, slot_bytes: int, slots: int = SLOTS, *, seed: int = 0, most_options: int = OPTIONS
    ) -> None:
        self.chain, self.slot_bytes, self.slots = chain, slot_bytes, slots
        blocks = len(chain)
        self.options = [chain.options(i, most_options) for i in range(blocks)]
        self.restarts = [chain.restart(i) for i in range(blocks)]
        self._again: dict[tuple[int, int], list[int]] = {}
        # What is kept is rounded up or down by a sequence without bias, so that errors of many equal
        # blocks cancel; whole numbers of slots stay what they are.
        shift = (GOLDEN * (np.arange(blocks + 1) + seed)) % 1.0
        self._crossing_slots = self._floor(
            chain.common_bytes.diagonal()[None, :] - chain.common_bytes, shift[None, :]
        )
        self._kept_slots = [
            self._floor(np.array([o.kept_bytes for o in options]), shift[i + 1])
            for i, options in enumerate(self.options)
        ]
        self.seconds = [np.full((b + 1, slots + 1), np.inf) for b in range(blocks)]
        self.choice = [np.zeros((b + 1, slots + 1), dtype=np.int16) for b in range(blocks)]
        self._by_first = [np.full((blocks - a, slots + 1), np.inf) for a in range(blocks)]
        for length in range(blocks):
            for b in range(length, blocks):
                self._fill(b - length, b)

    def _floor(self, amount: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
        """Slots of ``amount`` bytes, rounded by ``shift`` in [0, 1)."""
        return np.floor(amount / self.slot_bytes + shift).astype(np.int64)

    def _slots_to_hold(self, peak_bytes: int | np.ndarray) -> np.ndarray:
        """Slots that a peak needs."""
        return -(-np.asarray(peak_bytes, dtype=np.int64) // self.slot_bytes)

    @cached_property
    def _sweep_peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """``[a, j]``: peak of running ``a..j-1`` keeping what crosses into ``j``; first pass, later pass."""
        chain, blocks = self.chain, len(self.chain)
        first, again = (np.zeros((blocks, blocks), dtype=np.int64) for _ in range(2))
        through = np.empty((2, blocks), dtype=np.int64)
        for i in range(blocks):
            entering, leaving = chain.crossing[i], chain.crossing[i + 1]
            fixed = chain.fixed_live[chain.starts[i] : chain.starts[i + 1]].tolist()
            through[0, i] = chain.inner_peak(
                chain.forward(i), fixed, start=entering, keep=leaving | entering & leaving
            )
            steps = chain.closure(leaving, entering)
            through[1, i] = chain.inner_peak(steps, [0] * len(steps), start=entering, keep=leaving)
        for a in range(blocks):
            bare = self.options[a][-1]
            peaks = through - chain.common_bytes[a, 1:]
            peaks[:, a] = bare.first_peak_bytes, bare.again_peak_bytes
            reached = np.maximum.accumulate(peaks[:, a:], axis=1)
            first[a, a + 1 :], again[a, a + 1 :] = reached[:, :-1]
        return first, again

    @cached_property
    def _sweep_seconds(self) -> np.ndarray:
        """``[i]``: seconds of running blocks ``0..i-1`` again, keeping what crosses, shape (L+1,)."""
        chain = self.chain
        each = [
            chain.again_seconds(chain.closure(chain.crossing[i + 1], chain.crossing[i]))
            for i in range(len(chain))
        ]
        return np.concatenate(([0.0], np.cumsum(each)))

    def _fill(self, a: int, b: int) -> None:
        first_pass = b == len(self.chain) - 1
        fixed = 0 if first_pass else self.chain.fixed_before_backward(b)
        seconds, choice = self.seconds[b][a], self.choice[b][a]

        def offer(cost: np.ndarray, from_slot: int, code: int) -> None:
            better = cost < seconds[from_slot:]
            seconds[from_slot:][better] = cost[better]
            choice[from_slot:][better] = code

        if a == b and not first_pass:
            restart = self.restarts[a]
            need = int(self._slots_to_hold(restart.backward_peak_bytes))
            if need <= self.slots:
                offer(np.full(self.slots + 1 - need, restart.backward_s), need, -1)
        else:
            for k, option in enumerate(self.options[a]):
                kept = int(self._kept_slots[a][k])
                forward = option.first_peak_bytes if first_pass else option.again_peak_bytes + fixed
                need = max(kept, int(self._slots_to_hold(max(forward, option.backward_peak_bytes))))
                if need <= self.slots:
                    own = option.backward_s + (0.0 if first_pass else option.again_s)
                    rest = self.seconds[b][a + 1, need - kept : self.slots + 1 - kept] if a < b else 0.0
                    offer(np.broadcast_to(rest + own, (self.slots + 1 - need,)), need, -1 - k)
        if a < b:
            self._offer_splits(a, b, fixed, first_pass, offer)
        self._by_first[a][b - a] = seconds

    def _offer_splits(
        self, a: int, b: int, fixed: int, first_pass: bool, offer: Callable[[np.ndarray, int, int], None]
    ) -> None:
        """Every ``j``: run up to ``j`` keeping only what crosses into it; the best one for each ``m``."""
        middle = np.arange(a + 1, b + 1)
        kept = self._crossing_slots[a, a + 1 : b + 1]
        first, again = self._sweep_peaks
        sweep = first[a, a + 1 : b + 1] if first_pass else again[a, a + 1 : b + 1] + fixed
        need = np.maximum(self._slots_to_hold(sweep), kept)
        fits = need <= self.slots
        if not fits.any():
            return
        low = int(need[fits].min())
        m = np.arange(low, self.slots + 1)
        left = m[None, :] - kept[:, None]
        rows = np.take(self.seconds[b].ravel(), middle[:, None] * (self.slots + 1) + np.maximum(left, 0))
        rows += self._by_first[a][: b - a, low:]
        if not first_pass:
            rows += (self._sweep_seconds[a + 1 : b + 1] - self._sweep_seconds[a])[:, None]
        rows[m[None, :] < need[:, None]] = np.inf
        winner = rows.argmin(axis=0)
        cost = rows[winner, np.arange(len(m))]
        seconds, choice = self.seconds[b][a], self.choice[b][a]
        better = cost < seconds[low:]
        seconds[low:][better] = cost[better]
        choice[low:][better] = middle[winner[better]]

    def breakpoints(self) -> np.ndarray:
        """Slot counts at which the whole chain becomes cheaper, ascending; the first is the least feasible."""
        cost = self.seconds[-1][0]
        return np.flatnonzero(cost < np.concatenate(([np.inf], cost[:-1])))

    def steps(self, slots: int) -> list[int]:
        """The op positions of the best plan for ``slots`` slots, which must be feasible."""
        chain, last = self.chain, len(self.chain) - 1
        out: list[int] = []
        # A frame is blocks a..b with m slots, or a backward that is due when what is above it is done.
        stack: list[tuple[int, int, int] | Option] = [(0, last, slots)]
        while stack:
            frame = stack.pop()
            if isinstance(frame, Option):
                out += frame.backward_steps
                continue
            a, b, m = frame
            code = int(self.choice[b][a, m])
            if code > 0:
                out += range(chain.starts[a], chain.starts[code]) if b == last else self._again_steps(a, code)
                stack += [(a, code - 1, m), (code, b, m - int(self._crossing_slots[a, code]))]
            elif a == b != last:
                out += self.restarts[a].backward_steps
            else:
                option = self.options[a][-1 - code]
                out += chain.forward(a) if b == last else option.again_steps
                stack.append(option)
                if a < b:
                    stack.append((a + 1, b, m - int(self._kept_slots[a][-1 - code])))
        return out

    def _again_steps(self, a: int, j: int) -> list[int]:
        """Ops that lead again from what crosses into ``a`` to what crosses into ``j``."""
        if (a, j) not in self._again:
            self._again[a, j] = self.chain.closure(self.chain.crossing[j], self.chain.crossing[a])
        return self._again[a, j]


class _Best:
    """The best schedule seen: least seconds within the budget, else least peak."""

    def __init__(self, problem: Problem, budget_bytes: int) -> None:
        self.problem, self.budget_bytes = problem, budget_bytes
        self.steps: list[int] = []
        self.rank: tuple[bool, float, float] = (True, np.inf, np.inf)

    def offer(self, steps: list[int]) -> int:
        """Take note of a schedule and return its peak."""
        timeline = simulate_steps(self.problem, steps)
        peak = timeline.peak_bytes
        fits = peak <= self.budget_bytes
        rank = (False, timeline.seconds, peak) if fits else (True, peak, timeline.seconds)
        if rank < self.rank:
            self.steps, self.rank = steps, rank
        return peak

    @property
    def fits(self) -> bool:
        return not self.rank[0]


def _chains(problem: Problem) -> Iterator[Chain]:
    """The problem cut in several ways, the most promising first, none twice."""
    turn = problem.turn or 0
    seen: set[tuple[int, ...]] = set()
    for blocks in (turn, *BLOCKS) if turn <= EVERY_OP else BLOCKS:
        chain = cut_into_blocks(problem, blocks)
        if len(chain) > 1 and chain.starts not in seen:
            seen.add(chain.starts)
            yield chain


def _slot_bytes(capacity: int) -> int:
    return max(1, -(-capacity // SLOTS))


def _search(best: _Best, table: ChainTable, deadline: float) -> None:
    """Offer the plans of ``table`` around the point where their simulated peak crosses the budget."""
    points = table.breakpoints()
    low, high = 0, len(points)
    tried: set[int] = set()

    def fits(k: int) -> bool:
        tried.add(k)
        return best.offer(table.steps(int(points[k]))) <= best.budget_bytes

    while low < high and time.perf_counter() < deadline:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    # Peaks are not quite monotone in slots.
    for k in range(max(0, low - 3), min(len(points), low + 8)):
        if k not in tried and time.perf_counter() < deadline:
            fits(k)


def _lowest(best: _Best, chain: Chain, capacity: int, seed: int, deadline: float) -> None:
    """Offer the plans of least memory: find the floor of the chain coarsely, then with fine slots."""
    for _ in range(3):
        table = ChainTable(chain, _slot_bytes(capacity), seed=seed)
        points = table.breakpoints()
        for m in points[:6]:
            best.offer(table.steps(int(m)))
        if not len(points) or points[0] > 0.8 * SLOTS or time.perf_counter() > deadline:
            return
        capacity = int(points[0] * table.slot_bytes * 1.15)


def solve(problem: Problem, budget_bytes: int, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The fastest plan of the chain program that the simulator finds within ``budget_bytes``.

    ``time_limit_s`` is looked at between tables; one way of cutting is always tried.  If no plan fits,
    the status is ``unsettled`` and the schedule is the one of lowest peak that was found.  Raises
    ``ProblemError`` if the problem has no turn, no backward, or nothing to cut.
    """
    started = time.perf_counter()
    deadline = started + time_limit_s
    best = _Best(problem, budget_bytes)
    keep_all = list(range(len(problem)))
    chains = _chains(problem)
    chain = next(chains, None) or cut_into_blocks(problem, BLOCKS[0])
    peak = best.offer(keep_all)
    capacity = min(int(HEADROOM * (budget_bytes - problem.resident_bytes)), peak - problem.resident_bytes)
    while chain is not None and peak > budget_bytes:
        begun = time.perf_counter()
        if capacity > 0:
            _search(best, ChainTable(chain, _slot_bytes(capacity), seed=seed), deadline)
        if not best.fits:
            _lowest(best, chain, peak - problem.resident_bytes, seed, deadline)
        now = time.perf_counter()
        log.debug("%r: %.2f s, %s", chain, now - begun, best.rank)
        chain = next(chains, None) if 2 * now - begun < deadline else None
    return _finish(best, "chain", started)


def minimum_peak(problem: Problem, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The plan of lowest peak that the chain program finds; its ``budget_bytes`` is that peak.

    Errors and time limit as for ``solve``.
    """
    started = time.perf_counter()
    deadline = started + time_limit_s
    best = _Best(problem, -1)
    chains = _chains(problem)
    chain = next(chains, None) or cut_into_blocks(problem, BLOCKS[0])
    capacity = best.offer(list(range(len(problem)))) - problem.resident_bytes
    while chain is not None:
        begun = time.perf_counter()
        _lowest(best, chain, capacity, seed, deadline)
        now = time.perf_counter()
        chain = next(chains, None) if 2 * now - begun < deadline else None
    best.budget_bytes = int(best.rank[1])
    return _finish(best, "chain", started)


def _finish(best: _Best, solver: str, started: float) -> Solution:
    return solution_of(
        best.problem,
        Schedule.of(best.problem, best.steps),
        best.budget_bytes,
        solver=solver,
        solve_seconds=time.perf_counter() - started,
    )
