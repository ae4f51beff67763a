"""The chain program against exact recurrences, exhaustive search, a closed form, and its own accounting."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from math import comb, inf
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, ProblemError, Schedule, simulate
from solvers.chain.blocks import Chain, cut_into_blocks
from solvers.chain.method import ChainTable, Ways, solve
from solvers.chain.saved_sets import BlockGraph, saved_sets
from solvers.core.simulate import simulate_steps


@dataclass(frozen=True)
class Links:
    """A heterogeneous chain; index ``i - 1`` belongs to link ``i``, which makes ``a_i``, and to ``g_i``."""

    seconds: tuple[int, ...]
    output: tuple[int, ...]
    gradient: tuple[int, ...]
    forward_scratch: tuple[int, ...]
    backward_scratch: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def g(self, i: int) -> int:
        """Bytes of the gradient with respect to ``a_i``: none yet at the end of the chain."""
        return self.gradient[i] if i < len(self) else 0

    def problem(self, *, backward_reads_output: bool = True) -> Problem:
        n = len(self)
        sizes = {"x": 0} | {f"a{i}": self.output[i - 1] for i in range(1, n + 1)}
        sizes |= {f"g{i}": self.g(i) for i in range(n)}

        def a(i: int) -> str:
            return f"a{i}" if i else "x"

        ops = [
            {
                "name": f"f{i}",
                "inputs": [a(i - 1)],
                "outputs": [a(i)],
                "seconds": self.seconds[i - 1],
                "workspace_bytes": self.forward_scratch[i - 1],
            }
            for i in range(1, n + 1)
        ]
        for i in range(n, 0, -1):
            reads = [a(i - 1)] + [a(i)] * backward_reads_output + [f"g{i}"] * (i < n)
            ops.append(
                {
                    "name": f"b{i}",
                    "inputs": reads,
                    "outputs": [f"g{i - 1}"],
                    "seconds": 2 * self.seconds[i - 1],
                    "workspace_bytes": self.backward_scratch[i - 1],
                }
            )
        return Problem.build(ops, sizes, turn=n)


@st.composite
def links(draw: st.DrawFn, most: int = 6) -> Links:
    n = draw(st.integers(2, most))

    def row(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    return Links(row(1, 9), row(1, 6), row(0, 5), row(0, 3), row(0, 3))


def persistent_optimum(chain: Links, budget: int) -> float:
    """Least recomputation among persistent schedules, by the recurrence in exact bytes."""
    n = len(chain)

    def forward(i: int, held_input: bool, b: int) -> int:
        before = 0 if held_input else chain.output[i - 2]
        return before + chain.output[i - 1] + chain.forward_scratch[i - 1] + chain.g(b)

    def backward(i: int) -> int:
        return chain.output[i - 1] + chain.g(i) + chain.g(i - 1) + chain.backward_scratch[i - 1]

    @cache
    def least(m: int, a: int, b: int) -> float:
        if a > b:
            return 0
        again = 0 if b == n else 1
        answer = inf
        if m >= max(forward(a, True, b), backward(a)):
            answer = again * chain.seconds[a - 1] + least(m - chain.output[a - 1], a + 1, b)
        for j in range(a + 1, b + 1):
            if m >= max(forward(i, i == a, b) for i in range(a, j)):
                sweep = again * sum(chain.seconds[a - 1 : j - 1])
                answer = min(answer, sweep + least(m - chain.output[j - 2], j, b) + least(m, a, j - 1))
        return answer

    return least(budget, 1, n)


def any_optimum(chain: Links, budget: int) -> float:
    """Least recomputation over every schedule, by Dijkstra over what is alive and how far the backward is."""
    n = len(chain)

    def size(alive: frozenset[int]) -> int:
        return sum(chain.output[i - 1] for i in alive)

    start = (frozenset[int](), n)
    spent: dict[tuple[frozenset[int], int], float] = {start: 0}
    queue: list[tuple[float, int, tuple[frozenset[int], int]]] = [(0, 0, start)]
    ticket = 0
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost > spent[state]:
            continue
        alive, todo = state
        if todo == 0:
            return cost - sum(chain.seconds)
        following = [((alive - {i}, todo), 0) for i in alive]
        for i in range(1, n + 1):
            if i not in alive and (i == 1 or i - 1 in alive):
                peak = size(alive | {i}) + chain.g(todo) + chain.forward_scratch[i - 1]
                if peak <= budget:
                    following.append(((alive | {i}, todo), chain.seconds[i - 1]))
        if todo in alive and (todo == 1 or todo - 1 in alive):
            peak = size(alive) + chain.g(todo) + chain.g(todo - 1) + chain.backward_scratch[todo - 1]
            if peak <= budget:
                following.append(((alive, todo - 1), 0))
        for then, seconds in following:
            if cost + seconds < spent.get(then, inf):
                ticket += 1
                spent[then] = cost + seconds
                heapq.heappush(queue, (cost + seconds, ticket, then))
    return inf


def every_op_a_block(problem: Problem) -> Chain:
    assert problem.turn is not None
    return cut_into_blocks(problem, problem.turn)


@settings(max_examples=60, deadline=None)
@given(links())
def test_table_equals_the_persistent_optimum_at_every_budget(chain: Links) -> None:
    problem = chain.problem()
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    table = ChainTable(Ways(every_op_a_block(problem), run_lengths=(1,)), 1, keep_all)
    for budget in range(keep_all + 1):
        best = persistent_optimum(chain, budget)
        assert table.seconds[-1][0, budget] == best
        if best < inf:
            timeline = simulate_steps(problem, table.steps(budget))
            assert timeline.peak_bytes <= budget
            assert timeline.recompute_seconds == best


@settings(max_examples=40, deadline=None)
@given(links(5), st.data())
def test_solve_lies_between_the_persistent_and_the_absolute_optimum(
    chain: Links, data: st.DataObject
) -> None:
    problem = chain.problem()
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    budget = data.draw(st.integers(1, keep_all))
    solution = solve(problem, budget)
    absolute, persistent = any_optimum(chain, budget), persistent_optimum(chain, budget)
    assert absolute <= persistent
    if persistent < inf:
        assert solution.status in ("optimal", "feasible")
    if solution.fits:
        assert absolute <= solution.recompute_seconds <= persistent
    else:
        assert solution.status == "unsettled"
        assert solution.peak_bytes > budget


def revolve_forward_steps(links: int, slots: int) -> int:
    """Griewank and Walther (2000): forward steps to reverse a chain with ``slots`` snapshots."""
    repetitions = 0
    while comb(slots + repetitions, slots) < links:
        repetitions += 1
    return repetitions * links - comb(slots + repetitions, repetitions - 1)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [2, 3, 5, 8, 11])
def test_uniform_chain_needs_as_many_steps_as_the_binomial_formula(length: int, slots: int) -> None:
    # Only inputs are of use to the backward, and one byte of scratch stands for the state that the
    # reversal of a step works on, so that snapshots and one working state are all that fits.
    one = (1,) * length
    chain = Links(one, one, (0,) * length, (0,) * length, one)
    problem = chain.problem(backward_reads_output=False)
    solution = solve(problem, slots + 1)
    assert solution.fits
    # The formula leaves out the forward part of each reversal; here the last op runs once for itself.
    forward_runs = len(solution.schedule) - length
    assert forward_runs == revolve_forward_steps(length, slots) + 1


@st.composite
def training_graphs(draw: st.DrawFn) -> Problem:
    """Forward DAGs with skips, several outputs, pinned ops and finals; a backward that reads anything."""
    n = draw(st.integers(2, 8))
    pick = st.integers(0, 99)
    sizes, made = {"x": 7}, ["x"]
    ops: list[dict[str, Any]] = []
    final: list[str] = []
    for i in range(n):
        outputs = [f"v{i}"] + [f"w{i}"] * (draw(pick) < 30)
        chosen = draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
        inputs = list(dict.fromkeys([made[-1], *chosen])) if draw(pick) < 80 else chosen
        pinned = draw(pick) < 12
        final += [v for v in outputs if draw(pick) < 12]
        ops.append(
            {
                "name": f"f{i}",
                "inputs": inputs,
                "outputs": outputs,
                "seconds": draw(st.integers(1, 9)),
                "recompute_seconds": draw(st.integers(1, 9)),
                "workspace_bytes": draw(st.integers(0, 3)),
                "recomputable": not pinned,
            }
        )
        sizes |= {v: draw(st.integers(0, 6)) for v in outputs}
        made = outputs + made if draw(pick) < 50 else made + outputs
    for i in range(n - 1, -1, -1):
        mine = [v for v in ops[i]["inputs"] if draw(pick) < 70]
        stray = draw(st.lists(st.sampled_from(made), max_size=1))
        gradients = [f"g{i + 1}"] if i + 1 < n else []
        final += [f"g{i}"] if draw(pick) < 30 else []
        ops.append(
            {
                "name": f"b{i}",
                "inputs": list(dict.fromkeys([*mine, *stray * (draw(pick) < 25), *gradients])),
                "outputs": [f"g{i}"],
                "seconds": draw(st.integers(1, 9)),
                "workspace_bytes": draw(st.integers(0, 3)),
            }
        )
        sizes[f"g{i}"] = draw(st.integers(0, 5))
    return Problem.build(ops, sizes, final=final, turn=n, resident_bytes=draw(st.integers(0, 5)))


@settings(max_examples=120, deadline=None)
@given(training_graphs(), st.integers(2, 8), st.sampled_from([2, 3, 2000]))
def test_every_plan_of_every_table_keeps_its_promises(problem: Problem, blocks: int, tiny: int) -> None:
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    # With a small ratio, many values count as tiny and are held throughout.
    with patch("solvers.chain.blocks.TINY", tiny):
        chain = cut_into_blocks(problem, blocks)
    table = ChainTable(Ways(chain), 1, keep_all + 20)
    assert table.seconds[-1][0, -1] == 0.0
    assert_promises_kept(problem, table)


def assert_promises_kept(problem: Problem, table: ChainTable) -> None:
    for m in table.breakpoints():
        timeline = simulate_steps(problem, table.steps(int(m)))
        assert timeline.peak_bytes <= m + problem.resident_bytes
        assert timeline.recompute_seconds <= table.seconds[-1][0, m] + 1e-9


# Each op: name, what it reads, what it makes.  Without inputs it reads the source only.
Rows = tuple[tuple[str, str, str], ...]
# A rare thing that the accounting of blocks must see, on the smallest graph that shows it.
RARE: dict[str, tuple[int, Rows, dict[str, int]]] = {
    "f0 runs again for w and makes the tiny t anew, when t has no reader left": (
        2,
        (("f0", "", "t w"), ("f1", "t", "v"), ("b1", "t", "g1"), ("b0", "g1 w", "g0")),
        {"t": 1, "w": 4, "v": 6, "g1": 3, "g0": 0},
    ),
    "the backward of an earlier block makes c again, which takes the pinned p": (
        2000,
        (
            ("f0", "", "a"),
            ("pinned", "", "p"),
            ("f2", "p", "c"),
            ("f3", "", "d"),
            ("b3", "a", "g3"),
            ("b2", "c", "g2"),
            ("b1", "d", "g1"),
        ),
        {"a": 2, "p": 1, "c": 1, "d": 1, "g3": 0, "g2": 0, "g1": 1},
    ),
    "forward ops run again just where d, of a later block, begins to be held": (
        2000,
        (("f0", "", "a"), ("f1", "a", "b"), ("f2", "a", "c"), ("f3", "", "d"), ("last", "d b", "g")),
        {"a": 2, "b": 1, "c": 1, "d": 1, "g": 1},
    ),
}


@pytest.mark.parametrize("what", RARE)
def test_rare_bytes_are_accounted_for(what: str) -> None:
    tiny, rows, sizes = RARE[what]
    ops = [
        {
            "name": name,
            "inputs": inputs.split() or ["x"],
            "outputs": outputs.split(),
            "seconds": 1,
            "recomputable": name != "pinned",
        }
        for name, inputs, outputs in rows
    ]
    turn = sum(name[0] in "fp" for name, _, _ in rows)
    problem = Problem.build(ops, {"x": 0} | sizes, turn=turn)
    with patch("solvers.chain.blocks.TINY", tiny):
        chain = every_op_a_block(problem)
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    assert_promises_kept(problem, ChainTable(Ways(chain), 1, keep_all + 20))


@settings(max_examples=40, deadline=None)
@given(training_graphs(), st.integers(1, 100))
def test_solutions_on_any_graph_fit_or_say_that_they_do_not(problem: Problem, percent: int) -> None:
    keep_all = simulate(problem, Schedule.keep_all(problem))
    budget = keep_all.peak_bytes * percent // 100
    solution = solve(problem, budget)
    assert solution.fits == (simulate(problem, solution.schedule).peak_bytes <= budget)
    assert solution.bound_seconds == problem.total_seconds
    first = list(dict.fromkeys(solution.schedule.sequence))
    assert first == [op.name for op in problem.ops]
    least = solve(problem, 0)
    assert least.peak_bytes <= keep_all.peak_bytes
    assert solve(problem, least.peak_bytes).fits


@st.composite
def block_graphs(draw: st.DrawFn) -> BlockGraph:
    n = draw(st.integers(1, 6))
    ops: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    size: list[int] = []
    for _ in range(n):
        inputs = draw(st.sets(st.integers(0, len(size) - 1), max_size=3)) if size else set()
        outputs = range(len(size), len(size) + draw(st.integers(1, 2)))
        size += [draw(st.integers(0, 9)) for _ in outputs]
        ops.append((float(draw(st.integers(1, 9))), tuple(sorted(inputs)), tuple(outputs)))
    needed = draw(st.frozensets(st.integers(0, len(size) - 1)))
    return BlockGraph(tuple(ops), tuple(size), needed, tuple(range(len(size))))


def recompute_seconds(block: BlockGraph, saved: frozenset[int]) -> float:
    maker = {k: i for i, (_, _, outputs) in enumerate(block.ops) for k in outputs}
    todo: set[int] = set()
    stack = [k for k in block.needed if k not in saved]
    while stack:
        i = maker[stack.pop()]
        if i not in todo:
            todo.add(i)
            stack += [k for k in block.ops[i][1] if k not in saved]
    return sum(block.ops[i][0] for i in todo)


@settings(max_examples=60, deadline=None)
@given(block_graphs())
def test_saved_sets_are_on_the_hull_of_all_sets(block: BlockGraph) -> None:
    found = [(sum(block.bytes[k] for k in s), recompute_seconds(block, s)) for s in saved_sets(block, 64)]
    everything = [
        (sum(block.bytes[k] for k in s), recompute_seconds(block, frozenset(s)))
        for r in range(len(block.bytes) + 1)
        for s in combinations(range(len(block.bytes)), r)
    ]
    assert found[0][1] == min(seconds for _, seconds in everything)
    assert found[-1][0] == 0
    assert not any(m < bytes_ and s <= seconds for bytes_, seconds in found for m, s in everything)
    assert not any(m <= bytes_ and s < seconds for bytes_, seconds in found for m, s in everything)
    for (more, fast), (less, slow) in pairwise(found):
        price = (slow - fast) / max(1, more - less)
        assert min(s + price * m for m, s in everything) >= fast + price * more - 1e-6


def layered(layers: int, *, grouped: bool) -> Problem:
    """Layers of norm, wide, act, narrow and a residual add, with a backward of one op per layer."""
    sizes: dict[str, int] = {"x": 0, "h0": 10}
    ops = [{"name": "embed", "inputs": ["x"], "outputs": ["h0"], "seconds": 1}]
    for i in range(layers):
        for name, inputs, output, size, seconds in (
            ("norm", [f"h{i}"], f"n{i}", 10, 1),
            ("wide", [f"n{i}"], f"u{i}", 40, 9),
            ("act", [f"u{i}"], f"s{i}", 40, 1),
            ("narrow", [f"s{i}"], f"d{i}", 10, 9),
            ("add", [f"h{i}", f"d{i}"], f"h{i + 1}", 10, 1),
        ):
            group = {"group": str(i)} if grouped else {}
            ops.append(
                {"name": f"{name}{i}", "inputs": inputs, "outputs": [output], "seconds": seconds} | group
            )
            sizes[output] = size
    for i in range(layers - 1, -1, -1):
        reads = [f"h{i}", f"n{i}", f"u{i}", f"s{i}"] + [f"g{i + 1}"] * (i + 1 < layers)
        ops.append({"name": f"back{i}", "inputs": reads, "outputs": [f"g{i}"], "seconds": 40})
        sizes[f"g{i}"] = 10
    return Problem.build(ops, sizes, turn=1 + 5 * layers, name="layered")


@pytest.mark.parametrize("grouped", [True, False])
def test_layers_are_cut_where_only_the_residual_crosses(grouped: bool) -> None:
    problem = layered(12, grouped=grouped)
    chain = cut_into_blocks(problem, 12)
    assert 8 <= len(chain) <= 16
    for crossing in chain.crossing[1:-1]:
        assert [problem.values[v].name[0] for v in crossing] == ["h"]
    assert "blocks" in repr(chain)


def test_layers_fit_where_saving_once_and_recomputing_once_does_not() -> None:
    problem = layered(12, grouped=True)
    residuals = 12 * 10
    lowest = solve(problem, 0)
    assert lowest.peak_bytes < residuals + 100
    assert max(lowest.schedule.times_recomputed().values()) > 1
    assert solve(problem, lowest.peak_bytes).fits


def test_more_memory_is_never_slower_and_keeping_all_is_optimal() -> None:
    problem = layered(6, grouped=False)
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    seconds = [solve(problem, keep_all * p // 100).seconds for p in (50, 60, 70, 80, 90, 100)]
    assert seconds == sorted(seconds, reverse=True)
    assert solve(problem, keep_all).status == "optimal"
    assert seconds[-1] == problem.total_seconds < seconds[0]


def test_same_call_same_schedule() -> None:
    problem = layered(6, grouped=False)
    assert solve(problem, 250, seed=3).schedule == solve(problem, 250, seed=3).schedule


def test_a_budget_nothing_meets_is_unsettled_with_the_lowest_plan_found() -> None:
    problem = replace(layered(4, grouped=False), resident_bytes=1000)
    solution = solve(problem, 900)
    assert solution.status == "unsettled"
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    answers = [solve(problem, budget) for budget in range(1001, keep_all, 25)]
    assert solution.peak_bytes == min(answer.peak_bytes for answer in answers)


@pytest.mark.parametrize("turn", [None, 0, 1, 4])
def test_graphs_without_a_chain_are_refused(turn: int | None) -> None:
    ops = [
        {"name": f"op{i}", "inputs": ["x"] if not i else [f"v{i - 1}"], "outputs": [f"v{i}"], "seconds": 1}
        for i in range(4)
    ]
    problem = Problem.build(ops, {"x": 1} | {f"v{i}": 1 for i in range(4)}, turn=turn)
    with pytest.raises(ProblemError, match=f"turn is {turn} of 4 ops"):
        solve(problem, 10)


def test_little_time_still_gives_a_plan() -> None:
    problem = layered(12, grouped=False)
    keep_all = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    solution = solve(problem, keep_all // 2, time_limit_s=1e-3)
    assert solution.fits
