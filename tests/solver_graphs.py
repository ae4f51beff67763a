"""Random small problems, and the answers found by looking at every schedule.

``best_seconds`` and ``least_peak`` are shortest-path searches over (ops begun, values alive): slow, plain,
and written from the definition of the memory model, not from the simulator.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

from hypothesis import strategies as st

from solvers import Op, Problem, Schedule, Value, simulate
from solvers.bounds.instants import InstantProgram
from solvers.core.facts import Facts

# Passes that stand for "any sequence whose first executions keep the order".
ANY = None


def random_problem(rng: random.Random, max_ops: int = 6, *, rich: bool = True) -> Problem:
    """Up to ``max_ops`` ops; ``rich`` adds workspace, second outputs, pins, finals, sources, other costs."""
    n = rng.randint(1, max_ops)
    values: list[Value] = []
    ops: list[Op] = []
    if rich and rng.random() < 0.3:
        values.append(Value("source", rng.randint(0, 9)))
    for i in range(n):
        k = rng.randint(0, min(3, len(values)))
        recent = values[-4:] if rng.random() < 0.6 else values
        inputs = tuple(sorted(values.index(v) for v in rng.sample(recent, min(k, len(recent)))))
        outputs = []
        for j in range(2 if rich and rng.random() < 0.25 else 1):
            outputs.append(len(values))
            values.append(Value(f"v{i}.{j}", rng.randint(0, 9), i, rich and rng.random() < 0.12))
        ops.append(
            Op(
                f"op{i}",
                inputs,
                tuple(outputs),
                seconds=rng.randint(0, 8) / 4,
                workspace_bytes=rng.randint(1, 6) if rich and rng.random() < 0.25 else 0,
                recompute_seconds=rng.randint(0, 8) / 4 if rich and rng.random() < 0.3 else None,
                recomputable=not (rich and rng.random() < 0.15),
            )
        )
    turn = rng.randint(0, n) if rng.random() < 0.5 else None
    return Problem(tuple(ops), tuple(values), turn=turn, resident_bytes=rng.choice([0, 0, 5]), name="random")


def problems(max_ops: int = 6, *, rich: bool = True) -> st.SearchStrategy[Problem]:
    """``random_problem`` as a hypothesis strategy."""
    return st.randoms(use_true_random=False).map(lambda rng: random_problem(rng, max_ops, rich=rich))


def tense_problem(rng: random.Random, max_ops: int = 6) -> Problem:
    """Ops that mostly read the one before and one long before; recomputation lowers its peak.

    Drawn again until it does: in one of six draws.
    """
    while True:
        n = rng.randint(4, max_ops)
        ops: list[Op] = []
        values: list[Value] = []
        for i in range(n):
            inputs = {i - 1} if i and rng.random() < 0.8 else set()
            inputs |= {rng.randrange(i) for _ in range(rng.randint(0, 1 + (i > 2))) if i}
            pinned = rng.random() < 0.07
            ops.append(
                Op(f"op{i}", tuple(sorted(inputs)), (i,), rng.randint(1, 8) / 4, recomputable=not pinned)
            )
            values.append(Value(f"v{i}", rng.randint(1, 9), i, rng.random() < 0.06))
        turn = rng.choice([None, rng.randint(2, n - 1)])
        problem = Problem(tuple(ops), tuple(values), turn=turn, name="tense")
        if least_peak(problem)[0] < simulate(problem, Schedule.keep_all(problem)).peak_bytes:
            return problem


def with_replay_only(problem: Problem, rng: random.Random, most: int = 3) -> Problem:
    """``problem`` with up to ``most`` values, not final ones, held only where a reader of them runs again."""
    may = [v for v, value in enumerate(problem.values) if not value.final and value.producer is not None]
    chosen = set(rng.sample(may, min(len(may), rng.randint(1, most))))
    values = (replace(value, replay_only=v in chosen) for v, value in enumerate(problem.values))
    return replace(problem, values=tuple(values))


def from_seeds(make: Callable[[random.Random], Problem]) -> st.SearchStrategy[Problem]:
    """What ``make`` draws from random seeds: nearly all examples differ, none is shrunk."""
    return st.binary(min_size=8, max_size=8).map(lambda seed: make(random.Random(seed)))


State = tuple[int, int, int, int]


class _Moves:
    """``(next state, bytes needed, seconds, op or -1)`` from a state: run an op, or let one value go.

    A state is (ops begun, last op rerun in this pass, pass, counted values alive that are not final); sets
    of values are the bits of a number.
    """

    def __init__(self, problem: Problem, passes: int | None) -> None:
        values = problem.values
        self.problem, self.passes = problem, passes
        self.reads = [_bits(op.inputs) for op in problem.ops]
        self.makes = [_bits(op.outputs) for op in problem.ops]
        self.finals = [_bits(v for v in op.outputs if values[v].final) for op in problem.ops]
        self.given = _bits(v for v, value in enumerate(values) if value.producer is None)
        self._bytes = {0: 0}

    def __call__(self, state: State) -> Iterator[tuple[State, int, float, int]]:
        begun, last, done, alive = state
        rest = alive
        while rest:
            yield (begun, last, done, alive & ~(rest & -rest)), 0, 0.0, -1
            rest &= rest - 1
        ops, passes = self.problem.ops, self.passes
        held = alive
        for final in self.finals[:begun]:
            held |= final
        at_hand = held | self.given
        for i in range(min(begun + 1, len(ops))):
            op, final = ops[i], self.finals[i]
            first = i == begun
            if self.reads[i] & ~at_hand or not (first or op.recomputable):
                continue
            place = (begun + 1, -1, 0) if first else (begun, i, done)
            if passes is not None and not first and i <= last:
                if done + 1 >= passes:
                    continue
                place = (begun, i, done + 1)
            if passes is None:
                place = (place[0], -1, 0)
            need = self.problem.resident_bytes + op.workspace_bytes + self.bytes_of(held | self.makes[i])
            if not first:
                need += self.bytes_of(final)
            yield (*place, alive | self.makes[i] & ~final), need, op.seconds if first else op.again_s, i

    def bytes_of(self, some: int) -> int:
        if some not in self._bytes:
            size = self.problem.values[(some & -some).bit_length() - 1].bytes
            self._bytes[some] = size + self.bytes_of(some & (some - 1))
        return self._bytes[some]


def _bits(positions: Iterable[int]) -> int:
    return sum({1 << v for v in positions})


def _search(problem: Problem, passes: int | None, budget: int | None) -> tuple[float, list[int]] | None:
    """Least seconds within ``budget``, or least peak if ``budget`` is ``None``, with a sequence."""
    start: State = (0, -1, 0, 0)
    best: dict[State, float] = {start: 0.0 if budget is not None else problem.resident_bytes}
    back: dict[State, tuple[State, int]] = {}
    heap = [(best[start], 0, start)]
    ties, moves, ops = 0, _Moves(problem, passes), len(problem)
    while heap:
        cost, _, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        if state[0] == ops:
            steps = []
            while state in back:
                state, i = back[state]
                if i >= 0:
                    steps.append(i)
            return cost, steps[::-1]
        for after, need, seconds, i in moves(state):
            if budget is not None and need > budget:
                continue
            total = cost + seconds if budget is not None else max(cost, need)
            if total < best.get(after, math.inf):
                best[after] = total
                back[after] = (state, i)
                ties += 1
                heapq.heappush(heap, (total, ties, after))
    return None


def _by_replays(problem: Problem) -> Iterator[Problem]:
    """One problem without ``replay_only`` values per choice of those that may be replayed.

    A value that may has its bytes; one that may not has none, and each reader of it runs once.  Every
    schedule is one of some choice that counts it as it is, and of no choice that counts it lower.
    """
    flagged = [v for v, value in enumerate(problem.values) if value.replay_only]
    for choice in product((False, True), repeat=len(flagged)):
        idle = {v for v, replayed in zip(flagged, choice, strict=True) if not replayed}
        yield replace(
            problem,
            values=tuple(
                replace(value, bytes=0 if v in idle else value.bytes, replay_only=False)
                for v, value in enumerate(problem.values)
            ),
            ops=tuple(
                replace(op, recomputable=op.recomputable and idle.isdisjoint(op.inputs)) for op in problem.ops
            ),
        )


def best_seconds(problem: Problem, budget: int, passes: int | None = ANY) -> tuple[float, list[int]] | None:
    """Least total seconds within ``budget`` and op positions that take them; ``None`` if nothing fits."""
    found = (_search(one, passes, budget) for one in _by_replays(problem))
    return min((one for one in found if one is not None), default=None)


def least_peak(problem: Problem, passes: int | None = ANY) -> tuple[int, list[int]]:
    """Least peak in bytes of any schedule of the class, and op positions that reach it."""
    found = [one for one in (_search(choice, passes, None) for choice in _by_replays(problem)) if one]
    return min((int(peak), steps) for peak, steps in found)


def training_chain(layers: int, ops_per_layer: int, seed: int = 0) -> Problem:
    """Grouped forward layers, a loss, and per forward op a backward op that reads its input and output."""
    rng = random.Random(seed)
    ops: list[Op] = []
    values: list[Value] = []

    def add(name: str, inputs: tuple[int, ...], group: str | None) -> None:
        ops.append(Op(name, inputs, (len(values),), rng.randint(1, 20) / 8, group=group))
        values.append(Value(name, rng.randint(4, 40), len(values)))

    forward = [(i, j) for i in range(layers) for j in range(ops_per_layer)]
    for k, (i, j) in enumerate(forward):
        add(f"f{i}.{j}", (k - 1,) if k else (), f"layer{i}")
    add("loss", (len(forward) - 1,), None)
    for k, (i, j) in reversed(list(enumerate(forward))):
        add(f"b{i}.{j}", (k - 1, k, len(values) - 1) if k else (k, len(values) - 1), f"layer{i}")
    return Problem(tuple(ops), tuple(values), turn=len(forward) + 1, name=f"{layers}x{ops_per_layer}")


def relaxed_recompute(problem: Problem, budget: int, instants: list[int], *, time_limit_s: float) -> float:
    """Seconds beyond one run of every op: optimum of the relaxed program at ``instants``; 0 if it was cut."""
    program = InstantProgram(Facts.of(problem), instants, budget)
    answer = program.lp.solve(time_limit_s=time_limit_s, relax=True)
    if answer.infeasible:
        return math.inf
    return max(0.0, answer.objective) * program.unit_s if answer.optimal else 0.0
