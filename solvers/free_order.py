"""Free order: run the ops in another order first, and recompute only for what that leaves over the budget.

1. *Beam search* from the last op backwards.  A state is a set of ops that run last; adding an op changes the
   live bytes by its inputs that nothing placed reads, less its outputs.  States with the same set are
   merged, and the few of least (peak above a target, live bytes) go on.  Width one is list scheduling.
   Backwards is better than forwards: on layered DAGs of 100 to 1000 ops list scheduling gives 0.80 to 0.97
   of the layer order's peak against 0.92 to 1.09.
2. *Descent*: an op moves with all that must move with it (what depends on it, if it moves to later; what it
   depends on, if to earlier), and stays if the bytes above the budget, summed over the ops, have not grown.
   Annealing at several temperatures ended within 0.1 % of the same peak.
3. If the budget is not met, the problem in the new order goes to the methods of a fixed order.

A training graph keeps its turn: forward ops stay before it, backward ops after, each part in any order, so
weight gradients can move to where they free most, and branches run one after the other.

The fixed order's bounds and floors do not hold here.  The bound is the seconds of one run of each op; the
floor (:func:`footprint_floor`) the most that an op, its inputs and outputs need.  So an answer without
recomputation is ``optimal``, and others are ``feasible``, however good.

On the layered DAGs of tests/benchmarks/layered.py at 90 and 80 % of what the layers' order takes, seconds
added: none and none (100 and 250 ops, in 0.1 s), none and 1.1 % (500 ops), 0.5 and 2.8 % (1000 ops); in the
fixed order it is 1.6 and 4.6, 1.1 and 2.9, 1.3 and 7.1, 1.0 and 4.7 %.  Of BERT, ResNet-50 and U-Net joint
graphs the order alone lowers neither peak nor seconds: they peak where the forward ends and all is kept.

Sources: Bartan et al., "MOCCASIN" (ICML 2023) for recomputation in an order that was chosen before; Gagrani
et al., "Neural Topological Ordering for Computation Graphs" (NeurIPS 2022) for the problem of the order.
Weakness: recomputation plays no part in choosing the order.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from solvers.core.problem import Op, Problem, Value
from solvers.core.schedule import Schedule
from solvers.core.simulate import simulate_steps
from solvers.core.solution import InfeasibleError, Solution, fits_better, solution_of
from solvers.fixed_order import solve as solve_fixed

__all__ = ["footprint_floor", "lower_peak", "permuted", "solve"]

# Chosen by trial on the layered graphs of tests/benchmarks, as the module's figures.

# Beam widths, tried in turn while time lasts, and the targets, as shares of the budget.
WIDTHS = (1, 10, 50, 200)
TARGETS = (1.0, 0.8)
# Moves tried by the descent, and how far an op moves.
MOVES = 150_000
SPANS = (3, 10, 30, 100)
# Below this share of the given order's peak, the given order is not looked at again once there is a plan.
MUCH_LOWER = 0.98
# Share of the time for the order.
ORDER_SHARE = 0.3


def solve(problem: Problem, budget_bytes: int, *, time_limit_s: float = 60.0, seed: int = 0) -> Solution:
    """The fastest schedule found within ``budget_bytes``, its ops in whatever order that takes.

    ``bound_seconds`` is ``problem.total_seconds``: any order needs that, and no better bound is known.
    Where the new order does not lower the peak much, the given order is solved too.  If nothing fits, the
    answer is ``unsettled`` and its schedule the one of lowest peak that was found.  With an infinite time
    limit the same ``seed`` gives the same answer, if the method for the fixed order does.

    Raises ``InfeasibleError`` if one op alone needs more than the budget.
    """
    started = time.perf_counter()
    floor, op_name = footprint_floor(problem)
    if floor > budget_bytes:
        raise InfeasibleError(budget_bytes, floor, op_name)

    def left_s() -> float:
        return max(0.0, started + time_limit_s - time.perf_counter())

    def judged(schedule: Schedule) -> Solution:
        return solution_of(problem, schedule, budget_bytes, solver="reorder", floor_bytes=floor)

    best = judged(Schedule.keep_all(problem))
    if not best.fits:
        order = lower_peak(problem, budget_bytes, time_limit_s=ORDER_SHARE * time_limit_s, seed=seed)
        given, best = best, min_of(best, judged(Schedule.of(problem, order)))
        much_lower = best.peak_bytes < MUCH_LOWER * given.peak_bytes
        for steps, share in ((order, 0.7), (list(range(len(problem))), 1.0)):
            settled = best.fits and (much_lower or not best.recompute_seconds)
            if not settled and left_s() > 0:
                found = _in_order(permuted(problem, steps), budget_bytes, share * left_s(), seed)
                best = best if found is None else min_of(best, judged(found))
    return replace(best, solve_seconds=time.perf_counter() - started)


def min_of(one: Solution, other: Solution) -> Solution:
    """The better of two."""
    return other if fits_better(other, one) else one


def _in_order(problem: Problem, budget_bytes: int, time_limit_s: float, seed: int) -> Schedule | None:
    """The best schedule of a fixed order; ``None`` if this order has none."""
    solver = "retention" if problem.turn is None else "auto"
    try:
        found = solve_fixed(problem, budget_bytes, solver=solver, limit_s=time_limit_s, seed=seed)
    except InfeasibleError:
        return None
    return found.schedule


def footprint_floor(problem: Problem) -> tuple[int, str]:
    """Bytes that no schedule peaks below, in any order, and the op that needs them.

    Whenever it runs, an op's inputs, its outputs and its workspace are resident together (but for what only
    a replay needs).
    """
    problem = problem.relaxed
    worst, name = problem.resident_bytes, ""
    for i, op in enumerate(problem.ops):
        around = (*problem.counted_inputs[i], *op.outputs)
        need = problem.resident_bytes + op.workspace_bytes + sum(problem.values[v].bytes for v in around)
        if need > worst or not name:
            worst, name = need, op.name
    return worst, name


def permuted(problem: Problem, order: Sequence[int]) -> Problem:
    """``problem`` with its ops in ``order``; names, values and ``turn`` as they were.

    Raises ``ProblemError`` if the order is not topological.
    """
    place = {i: k for k, i in enumerate(order)}
    ops: tuple[Op, ...] = tuple(problem.ops[i] for i in order)
    values: tuple[Value, ...] = tuple(
        value if value.producer is None else replace(value, producer=place[value.producer])
        for value in problem.values
    )
    return Problem(ops, values, problem.turn, problem.resident_bytes, problem.name)


def lower_peak(
    problem: Problem, budget_bytes: int, *, time_limit_s: float = 10.0, seed: int = 0
) -> list[int]:
    """A topological order of op positions, of as low a peak as is found; it ends once the budget is met.

    With ``turn``, the forward ops come first, in some order.
    """
    started = time.perf_counter()
    problem = problem.relaxed  # no op runs again in an order
    order = list(range(len(problem)))

    def excess(steps: list[int]) -> float:
        return max(0, simulate_steps(problem, steps).peak_bytes - budget_bytes)

    for width in WIDTHS:
        for target in TARGETS:
            begun = time.perf_counter()
            found = _beam(problem, round(target * budget_bytes), width)
            order = min(order, found, key=excess)
            took_s = time.perf_counter() - begun
            if not excess(order):
                return order
        if time.perf_counter() - started + 10 * took_s > time_limit_s / 2:
            break
    descent = _Descent(problem, budget_bytes, order, random.Random(seed))
    # The sum of what is too much can fall while the peak rises.
    return min(descent.run(lambda: time.perf_counter() - started < time_limit_s), order, key=excess)


def _neighbours(problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
    """Per op, the ops it reads from, and the ops that read from it."""
    before: list[list[int]] = []
    after: list[list[int]] = [[] for _ in problem.ops]
    for i, reads in enumerate(problem.counted_inputs):
        before.append(sorted({problem.values[v].producer or 0 for v in reads}))
        for j in before[i]:
            after[j].append(i)
    return before, after


def _beam(problem: Problem, target_bytes: int, width: int) -> list[int]:
    """The order that a beam of ``width`` finds from the end (see the module)."""
    n, size = len(problem), [value.bytes for value in problem.values]
    reads, made = problem.counted_inputs, [op.outputs for op in problem.ops]
    before, after = _neighbours(problem)
    turn = problem.turn or 0
    rng = random.Random(0)
    key = [rng.getrandbits(62) for _ in range(n)]
    finals = sum(
        1 << v for v, value in enumerate(problem.values) if value.final and value.producer is not None
    )
    live = problem.resident_bytes + sum(size[v] for v in range(len(size)) if finals >> v & 1)
    # peak, live bytes, key of the set, reader counts to come, live values, ops that may come next, the order
    State = tuple[int, int, int, dict[int, int], int, tuple[int, ...], "_Link | None"]
    states: list[State] = [
        (0, live, 0, {}, finals, tuple(i for i in range(n) if not after[i]), None),
    ]
    for step in range(n):
        moves: dict[int, tuple[int, int, int, int, int]] = {}
        for s, (peak, live, placed, _, alive, ready, _) in enumerate(states):
            for i in ready:
                if i < turn and step < n - turn:
                    continue
                gone = fresh = brought = 0
                for v in made[i]:
                    if alive >> v & 1:
                        gone += size[v]
                    else:
                        fresh += size[v]
                for v in reads[i]:
                    if not alive >> v & 1:
                        brought += size[v]
                top = max(peak, live + fresh + brought + problem.ops[i].workspace_bytes)
                move = (max(top, target_bytes), live + brought - gone, top, s, i)
                known = moves.get(placed ^ key[i])
                if known is None or move < known:
                    moves[placed ^ key[i]] = move
        chosen = heapq.nsmallest(width, ((move, placed) for placed, move in moves.items()))
        following: list[State] = []
        for (_, live, top, s, i), placed in chosen:
            _, _, _, counts, alive, ready, link = states[s]
            for v in made[i]:
                alive &= ~(1 << v)
            for v in reads[i]:
                alive |= 1 << v
            counts = dict(counts)
            opened = []
            for j in before[i]:
                left = counts.pop(j, len(after[j])) - 1
                if left:
                    counts[j] = left
                else:
                    opened.append(j)
            rest = (*(j for j in ready if j != i), *opened)
            following.append((top, live, placed, counts, alive, rest, (i, link)))
        states = following
    order: list[int] = []
    link = states[0][6]
    while link is not None:
        i, link = link
        order.append(i)
    return order


_Link = tuple[int, "_Link | None"]


class _Descent:
    """Moves of ops that do not raise the bytes above the budget."""

    def __init__(self, problem: Problem, budget: int, order: list[int], rng: random.Random) -> None:
        self.n, self.budget, self.order, self.rng = len(problem), budget, list(order), rng
        self.turn = problem.turn or 0
        before, after = _neighbours(problem)
        self.before, self.after = list(map(frozenset, before)), list(map(frozenset, after))
        counted = [v for v, value in enumerate(problem.values) if value.producer is not None]
        touch = [(problem.values[v].producer or 0, *problem.consumers[v]) for v in counted]
        self.touch = np.array([i for ops in touch for i in ops], dtype=np.int64)
        self.offset = np.cumsum([0, *map(len, touch)])[:-1]
        self.final = np.array([problem.values[v].final for v in counted], dtype=bool)
        self.producer = self.touch[self.offset] if counted else self.touch
        self.size = np.array([problem.values[v].bytes for v in counted], dtype=float)
        self.workspace = np.array([op.workspace_bytes for op in problem.ops], dtype=float)
        self.resident = problem.resident_bytes

    def live(self) -> np.ndarray:
        """Bytes at each place of the order; shape (n,)."""
        order = np.array(self.order)
        place = np.empty(self.n, dtype=np.int64)
        place[order] = np.arange(self.n)
        last = np.maximum.reduceat(place[self.touch], self.offset) if len(self.offset) else self.touch
        last = np.where(self.final, self.n - 1, last)
        change = np.bincount(place[self.producer], self.size, self.n + 1)
        change -= np.bincount(last + 1, self.size, self.n + 1)
        return np.cumsum(change)[: self.n] + self.workspace[order] + self.resident

    def run(self, goes_on: Callable[[], bool]) -> list[int]:
        """The order after ``MOVES`` moves, or when it meets the budget, or when ``goes_on`` says no."""
        rng, n = self.rng, self.n
        live = self.live()
        worth = self._worth(live)
        for _ in range(MOVES):
            if not worth[0] or not goes_on():
                break
            over = np.flatnonzero(live > self.budget)
            near = int(over[rng.randrange(len(over))]) + rng.randint(-30, 30)
            start = min(max(near if rng.random() < 0.7 else rng.randrange(n), 0), n - 1)
            stop = start + rng.choice((-1, 1)) * rng.randint(1, rng.choice(SPANS))
            stop = min(max(stop, 0), n - 1)
            if start < self.turn <= stop:
                stop = self.turn - 1
            elif stop < self.turn <= start:
                stop = self.turn
            low, high = min(start, stop), max(start, stop) + 1
            old = self.order[low:high]
            self.order[low:high] = self._moved(old, later=stop > start)
            trial = self.live()
            if self._worth(trial) <= worth:
                live, worth = trial, self._worth(trial)
            else:
                self.order[low:high] = old
        return self.order

    def _worth(self, live: np.ndarray) -> tuple[float, float]:
        return float(np.maximum(live - self.budget, 0).sum()), float(live.max())

    def _moved(self, stretch: list[int], *, later: bool) -> list[int]:
        """The first op of ``stretch`` moved to its end, or the last to its start, with what must follow."""
        stretch, depends = (stretch, self.before) if later else (stretch[::-1], self.after)
        moving, staying = {stretch[0]}, []
        for i in stretch[1:]:
            if depends[i].isdisjoint(moving):
                staying.append(i)
            else:
                moving.add(i)
        out = staying + [i for i in stretch if i in moving]
        return out if later else out[::-1]
