"""Dynamic program over a chain of blocks: several options per block, recomputation as often as it pays.

The problem is cut into blocks (see ``solvers.chain.blocks``).  With blocks ``a..b`` still to be run forward
and backward, what crosses into ``a`` at hand and ``m`` bytes to spend, either

- run ``a``, ..., ``j - 1`` forward keeping only what crosses into ``j``, solve ``j..b`` in what is
  left, then solve ``a..j-1`` in ``m`` again: everything before ``j`` is recomputed, once the
  backward ops that need none of it have run; or
- run ``a..c`` with one of its options (a saved set), solve ``c+1..b`` in what is left, and run the
  backward of ``a..c``.

``Opt(m, a, b)`` is the least recomputation, for all ``m`` at once.  The two moves nest, so an op may
run any number of times, which is what plans near the floor need and what a program that recomputes
once cannot express.

Sources: the recursion over where to restart is that of Griewank and Walther, "Algorithm 799: Revolve"
(TOMS 2000, https://doi.org/10.1145/347837.347846); the two moves, with bytes and seconds per block, are the
dynamic program of Beaumont et al., "Optimal checkpointing for heterogeneous chains"
(https://arxiv.org/abs/1911.13214); options per block are those of Zhao et al., "Rockmate" (ICML 2023,
https://arxiv.org/abs/2307.01236); runs of blocks, restarts, preludes and the rounding of slots are ours.

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
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from solvers.chain.blocks import Chain, Option, check_chain, cut_into_blocks
from solvers.core.incumbent import Incumbent
from solvers.core.problem import Problem
from solvers.core.simulate import simulate_steps
from solvers.core.solution import Solution

__all__ = ["ChainTable", "Chains", "solve"]

log = logging.getLogger(__name__)

# Numbers of blocks to cut into, in the order they are tried; small graphs also get one block per op.
BLOCKS = (48, 96, 24)
EVERY_OP = 64
OPTIONS = 8
# Runs of so many blocks get options of their own, up to so many forward ops.
RUN_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
RUN_OPS = 350
SLOTS = 400
# Plans made for more than the budget often simulate below it, because the table rounds and holds more
# than the simulator does.
HEADROOM = 1.15
GOLDEN = 0.6180339887498949


class WaysFrom:
    """The options of all runs of blocks that begin with block ``a``, as columns, by their last block.

    ``options``   the O options themselves.
    ``last``      the last block of each one's run, ascending, int64, (O,).
    ``first_peak``, ``again_peak``, ``backward_peak``  in bytes, int64, (O,); see :class:`Option`.
    ``again_s``, ``backward_s``  in seconds, (O,).
    ``restarts``  by last block, the option that runs backward with no forward of its own before.
    """

    def __init__(self, found: dict[int, list[Option]], restarts: dict[int, Option]) -> None:
        self.options = [option for options in found.values() for option in options]
        self.last = np.array([b for b, options in found.items() for _ in options])
        self.first_peak = np.array([o.first_peak_bytes for o in self.options])
        self.again_peak = np.array([o.again_peak_bytes for o in self.options])
        self.backward_peak = np.array([o.backward_peak_bytes for o in self.options])
        self.again_s = np.array([o.again_s for o in self.options])
        self.backward_s = np.array([o.backward_s for o in self.options])
        self.restarts = restarts


class Ways:
    """Every way to run every run of blocks of a chain; what tables of different memory share.

    ``of[a]``            options of the runs that begin with block ``a``.
    ``prelude_peak[i]``  peak bytes of the backward of ``i`` before it needs a forward value, int64, (L,).
    ``sweep_first[a, j]``, ``sweep_again[a, j]``  peak bytes of running ``a..j-1`` keeping what crosses into
    ``j``, in the first pass and in a later one, int64, (L, L); ``sweep_s[j] - sweep_s[a]`` the seconds of
    the latter, (L + 1,).
    """

    def __init__(
        self,
        chain: Chain,
        most_options: int = OPTIONS,
        run_lengths: Sequence[int] = RUN_LENGTHS,
        deadline: float = math.inf,
    ) -> None:
        self.chain = chain
        blocks = len(chain)
        found: list[dict[int, list[Option]]] = [{} for _ in range(blocks)]
        for length in run_lengths:
            if length > 1 and time.perf_counter() > deadline:
                break
            for a in _run_starts(chain, length):
                found[a][a + length - 1] = chain.options(a, a + length - 1, most_options)
        self.of = [
            WaysFrom(runs, {b: chain.restart(a, b) for b in runs if b < blocks - 1})
            for a, runs in enumerate(found)
        ]
        self.prelude_peak = np.array([chain.prelude_peak(i) for i in range(blocks)])
        through = np.array([chain.sweep_peaks(i) for i in range(blocks)]).T
        self.sweep_first, self.sweep_again = (np.zeros((blocks, blocks), dtype=np.int64) for _ in range(2))
        for a in range(blocks):
            # What crosses into a is held outside, so it is not counted where it passes through.
            peaks = through - chain.common_bytes[a, 1:]
            bare = chain.option(a, a, ())
            peaks[:, a] = bare.first_peak_bytes, bare.again_peak_bytes
            reached = np.maximum.accumulate(peaks[:, a:], axis=1)
            self.sweep_first[a, a + 1 :], self.sweep_again[a, a + 1 :] = reached[:, :-1]
        each = [
            chain.again_seconds(chain.closure(chain.crossing[i + 1], chain.crossing[i]))
            for i in range(blocks)
        ]
        self.sweep_s = np.concatenate(([0.0], np.cumsum(each)))


def _run_starts(chain: Chain, length: int) -> list[int]:
    """First blocks of the runs of ``length`` that get options: all short ones, fewer of the long ones."""
    starts = range(0, len(chain) - length + 1, max(1, length // 4))
    return [a for a in starts if length == 1 or len(chain.forward(a, a + length - 1)) <= RUN_OPS]


class ChainTable:
    """``Opt(m, a, b)`` of one chain for ``m`` of 0 to ``slots`` slots of ``slot_bytes`` each.

    Building it takes O(blocks^3 slots) vectorised work.  ``seconds[b][a, m]`` is the least recomputation
    in seconds of blocks ``a..b`` (inclusive), infinite where it does not fit: per ``b`` an array of shape
    (b + 2, slots + 1), its last row of zeros for no block left.  ``choice[b][a, m]``, per ``b`` of shape
    (b + 1, slots + 1), is ``j > 0`` to keep only what crosses into ``j``, ``-1 - k`` for option ``k`` of
    ``options[a]``, and 0 to restart: run ``a..b`` backward at once, recomputing just in time.
    """

    def __init__(self, ways: Ways, slot_bytes: int, slots: int = SLOTS, *, seed: int = 0) -> None:
        self.ways, self.slot_bytes, self.slots = ways, slot_bytes, slots
        self.chain = chain = ways.chain
        blocks = len(chain)
        self._again: dict[tuple[int, int], list[int]] = {}
        # What is kept is rounded up or down by a sequence without bias, so that errors of many equal
        # blocks cancel; whole numbers of slots stay what they are.
        self._shift = (GOLDEN * (np.arange(blocks + 1) + seed)) % 1.0
        common = chain.common_bytes
        self._crossing_slots = self._floor(common.diagonal()[None, :] - common, self._shift[None, :])
        self._kept_slots = [
            self._floor(np.array([o.kept_bytes for o in w.options]), self._shift[w.last + 1])
            for w in self.ways.of
        ]
        # Row b + 1 stands for "no block left".
        self.seconds = [np.full((b + 2, slots + 1), np.inf) for b in range(blocks)]
        self.choice = [np.zeros((b + 1, slots + 1), dtype=np.int16) for b in range(blocks)]
        self._by_first = [np.full((blocks - a, slots + 1), np.inf) for a in range(blocks)]
        for b in range(blocks):
            self.seconds[b][b + 1] = 0.0
        for length in range(blocks):
            for b in range(length, blocks):
                self._fill(b - length, b)

    def _floor(self, amount: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Slots of ``amount`` bytes, rounded by ``shift`` in [0, 1)."""
        return np.floor(amount / self.slot_bytes + shift).astype(np.int64)

    def _fill(self, a: int, b: int) -> None:
        """``Opt(m, a, b)`` for all ``m``: the best of all options and all splits.

        Each candidate goes on with ``row..b`` after ``kept`` slots are taken, if there are at least
        the slots that its ``peak`` needs, and takes ``own`` seconds itself.
        """
        slots, ways = self.slots, self.ways.of[a]
        first_pass = b == len(self.chain) - 1
        fixed = 0 if first_pass else self.chain.fixed_after_prelude(b)
        within = int(np.searchsorted(ways.last, b, side="right" if first_pass else "left"))
        forward = ways.first_peak[:within] if first_pass else ways.again_peak[:within] + fixed
        middle = np.arange(a + 1, b + 1)
        sweep = self.ways.sweep_first[a, middle] if first_pass else self.ways.sweep_again[a, middle] + fixed
        restart = [] if first_pass or b not in ways.restarts else [ways.restarts[b]]
        peak = np.concatenate(
            (
                np.maximum(forward, ways.backward_peak[:within]),
                np.maximum(sweep, self.ways.prelude_peak[a:b]),
                [r.backward_peak_bytes for r in restart],
            )
        )
        row = np.concatenate((ways.last[:within] + 1, middle, [b + 1] * len(restart))).astype(np.int64)
        kept = np.concatenate(
            (self._kept_slots[a][:within], self._crossing_slots[a, middle], [0] * len(restart))
        ).astype(np.int64)
        own = np.concatenate(
            (
                ways.backward_s[:within] + (0.0 if first_pass else ways.again_s[:within]),
                np.zeros(b - a) if first_pass else self.ways.sweep_s[middle] - self.ways.sweep_s[a],
                [r.backward_s for r in restart],
            )
        )
        code = np.concatenate((-1 - np.arange(within), middle, [0] * len(restart))).astype(np.int16)
        need = np.maximum(-(-peak.astype(np.int64) // self.slot_bytes), kept)
        fits = need <= slots
        if fits.any():
            low = int(need[fits].min())
            m = np.arange(low, slots + 1)
            at = row[:, None] * (slots + 1) + np.maximum(m[None, :] - kept[:, None], 0)
            rows = np.take(self.seconds[b].ravel(), at)
            rows += own[:, None]
            rows[within : within + b - a] += self._by_first[a][: b - a, low:]
            rows[m[None, :] < need[:, None]] = np.inf
            winner = rows.argmin(axis=0)
            self.seconds[b][a, low:] = rows[winner, np.arange(len(m))]
            self.choice[b][a, low:] = code[winner]
        self._by_first[a][b - a] = self.seconds[b][a]

    def breakpoints(self) -> np.ndarray:
        """Slot counts at which the whole chain becomes cheaper, ascending; the first is the least."""
        cost = self.seconds[-1][0]
        return np.flatnonzero(cost < np.concatenate(([np.inf], cost[:-1])))

    def steps(self, slots: int) -> list[int]:
        """The op positions of the best plan for ``slots`` slots, which must be feasible."""
        chain, last = self.chain, len(self.chain) - 1
        out: list[int] = []
        # A frame is blocks a..b with m slots, or ops that are due when what is above them is done.
        stack: list[tuple[int, int, int] | range | Option] = [(0, last, slots)]
        while stack:
            frame = stack.pop()
            if isinstance(frame, range | Option):
                out += frame if isinstance(frame, range) else frame.backward_steps
                continue
            a, b, m = frame
            code = int(self.choice[b][a, m])
            if code > 0:
                out += range(chain.starts[a], chain.starts[code]) if b == last else self._again_steps(a, code)
                stack += [
                    (a, code - 1, m),
                    chain.prelude(code - 1),
                    (code, b, m - int(self._crossing_slots[a, code])),
                ]
            elif code == 0:
                out += self.ways.of[a].restarts[b].backward_steps
            else:
                option, end = self.ways.of[a].options[-1 - code], int(self.ways.of[a].last[-1 - code])
                out += chain.forward(a, end) if b == last else option.again_steps
                stack.append(option)
                if end < b:
                    stack.append((end + 1, b, m - int(self._kept_slots[a][-1 - code])))
        return out

    def _again_steps(self, a: int, j: int) -> list[int]:
        """Ops that lead again from what crosses into ``a`` to what crosses into ``j``."""
        if (a, j) not in self._again:
            self._again[a, j] = self.chain.closure(self.chain.crossing[j], self.chain.crossing[a])
        return self._again[a, j]


def _slot_bytes(capacity: int) -> int:
    return max(1, -(-capacity // SLOTS))


def _search(run: Incumbent, table: ChainTable, deadline: float) -> None:
    """Offer the plans of ``table`` around the point where their simulated peak crosses the budget."""
    points = table.breakpoints()
    low, high = 0, len(points)
    tried: set[int] = set()

    def fits(k: int) -> bool:
        tried.add(k)
        return run.offer(table.steps(int(points[k])), "chain").peak_bytes <= run.budget_bytes

    while low < high and time.perf_counter() < deadline:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    # Peaks are not quite monotone in slots.
    for k in range(max(0, low - 3), min(len(points), low + 8)):
        if k not in tried and time.perf_counter() < deadline:
            fits(k)


def _lowest(run: Incumbent, ways: Ways, capacity: int, seed: int, deadline: float) -> None:
    """Offer the plans of least memory: find the floor of the chain coarsely, then with fine slots."""
    for _ in range(3):
        table = ChainTable(ways, _slot_bytes(capacity), seed=seed)
        points = table.breakpoints()
        for m in points[:6]:
            run.offer(table.steps(int(m)), "chain")
        if not len(points) or points[0] > 0.8 * SLOTS or time.perf_counter() > deadline:
            return
        capacity = int(points[0] * table.slot_bytes * HEADROOM)


class Chains:
    """The problem cut into chains in several ways, each with the options of its runs, built once.

    Raises ``ProblemError`` if the problem has no turn, no backward, or nothing to cut.
    """

    def __init__(self, problem: Problem) -> None:
        check_chain(problem)
        self.problem = problem
        keep_all = simulate_steps(problem, list(range(len(problem))))
        self._keep_all_bytes = keep_all.peak_bytes - problem.resident_bytes
        self._ways: list[Ways] = []

    def offer_plans(self, run: Incumbent, *, time_limit_s: float = 30.0, seed: int = 0) -> None:
        """Offer ``run`` the plans around its budget, and if none fits those of least memory.

        ``time_limit_s`` is looked at between tables; one way of cutting is always tried.
        """
        resident = self.problem.resident_bytes
        deadline = time.perf_counter() + min(time_limit_s, run.left_s)
        capacity = min(int(HEADROOM * (run.budget_bytes - resident)), self._keep_all_bytes)
        for ways in self._each_way(deadline):
            if run.stopped or run.settled:
                return
            if capacity > 0:
                _search(run, ChainTable(ways, _slot_bytes(capacity), seed=seed), deadline)
            if not run.fits:
                _lowest(run, ways, self._keep_all_bytes, seed, deadline)

    def _each_way(self, deadline: float) -> Iterator[Ways]:
        """The most promising first, while another may fit the time."""
        known = list(self._ways)
        yield from known
        turn = self.problem.turn or 0
        seen = {ways.chain.starts for ways in known}
        begun = time.perf_counter()
        for blocks in (turn, *BLOCKS) if turn <= EVERY_OP else BLOCKS:
            chain = cut_into_blocks(self.problem, blocks)
            if chain.starts in seen:
                continue
            now = time.perf_counter()
            if seen and now + (now - begun) > deadline:
                return
            begun = now
            seen.add(chain.starts)
            # The tables and the simulator get the other half of the time.
            self._ways.append(Ways(chain, deadline=now + (deadline - now) / 2))
            yield self._ways[-1]
            log.debug("%r: %.2f s", chain, time.perf_counter() - begun)


def solve(problem: Problem, budget_bytes: int, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The fastest plan of the chain program that the simulator finds within ``budget_bytes``.

    If no plan fits, the status is ``unsettled`` and the schedule is the one of lowest peak that was
    found.  Raises as :class:`Chains`.
    """
    chains = Chains(problem)
    run = Incumbent(problem, budget_bytes, deadline=time.perf_counter() + time_limit_s)
    if not run.fits:
        chains.offer_plans(run, time_limit_s=time_limit_s, seed=seed)
    return run.solution()
