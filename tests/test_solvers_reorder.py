"""Free order: against brute force over all orders and recomputations, and on layered and training graphs."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import InfeasibleError, Op, Problem, ProblemError, Schedule, Value, simulate
from solvers.free_order import footprint_floor, lower_peak, permuted, solve
from tests.benchmarks.layered import layered_dag
from tests.solver_graphs import best_seconds, problems, random_problem, training_chain

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Ops that have run, and the values alive that are not final.
State = tuple[frozenset[int], frozenset[int]]


def moves(problem: Problem, state: State) -> Iterator[tuple[State, int, float]]:
    """``(next state, bytes needed, seconds)``: run any op whose inputs are there, or let one value go."""
    run, alive = state
    values = problem.values
    for v in alive:
        yield (run, alive - {v}), 0, 0.0
    finals = {v for i in run for v in problem.ops[i].outputs if values[v].final}
    at_hand = alive | finals | {v for v, value in enumerate(values) if value.producer is None}
    for i, op in enumerate(problem.ops):
        again = i in run
        if not at_hand.issuperset(op.inputs) or (again and not op.recomputable):
            continue
        made = set(op.outputs)
        need = problem.resident_bytes + op.workspace_bytes
        need += sum(values[v].bytes for v in alive | finals | made)
        if again:
            need += sum(values[v].bytes for v in made & finals)
        after = alive | {v for v in made if not values[v].final}
        yield (run | {i}, frozenset(after)), need, op.again_s if again else op.seconds


def search(problem: Problem, budget: int | None) -> float | None:
    """Least seconds within ``budget`` over all schedules; without one, their least peak."""
    start: State = (frozenset(), frozenset())
    best: dict[State, float] = {start: 0.0 if budget is not None else problem.resident_bytes}
    heap = [(best[start], 0, start)]
    ties = 0
    while heap:
        cost, _, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        if len(state[0]) == len(problem):
            return cost
        for after, need, seconds in moves(problem, state):
            if budget is not None and need > budget:
                continue
            total = cost + seconds if budget is not None else max(cost, need)
            if total < best.get(after, float("inf")):
                best[after] = total
                ties += 1
                heapq.heappush(heap, (total, ties, after))
    return None


def least_free_peak(problem: Problem) -> int:
    found = search(problem, None)
    assert found is not None
    return int(found)


def top_of(problem: Problem) -> int:
    return simulate(problem, Schedule.keep_all(problem)).peak_bytes


def layered(ops: int, seed: int) -> Problem:
    return Problem.from_networkx(layered_dag(ops, seed), name=f"layered-{ops}-{seed}")


@quick
@given(problem=problems(), fraction=st.floats(0, 1))
def test_never_below_the_truth(problem: Problem, fraction: float) -> None:
    low, top = least_free_peak(problem), top_of(problem)
    assert footprint_floor(problem)[0] <= low
    budget = max(1, round(low - 1 + fraction * (top - low + 1)))
    truth = search(problem, budget)
    if footprint_floor(problem)[0] > budget:
        assert truth is None
        with pytest.raises(InfeasibleError):
            solve(problem, budget)
        return
    solution = solve(problem, budget, time_limit_s=2)
    line = simulate(problem, solution.schedule)
    assert (line.seconds, line.peak_bytes) == (solution.seconds, solution.peak_bytes)
    assert line.peak_bytes >= low
    assert solution.bound_seconds == pytest.approx(problem.total_seconds)
    if solution.fits:
        assert truth is not None
        assert solution.seconds >= truth - 1e-9


def test_small_graphs_mostly_reach_the_optimum_and_beat_the_fixed_order() -> None:
    rng = random.Random(11)
    asked = met = beaten = 0
    for _ in range(200):
        problem = random_problem(rng, 6, rich=False)
        low, top = least_free_peak(problem), top_of(problem)
        budget = max(1, (low + top) // 2)
        if budget >= top:
            continue
        truth, fixed = search(problem, budget), best_seconds(problem, budget)
        assert truth is not None
        solution = solve(problem, budget, time_limit_s=2)
        asked += 1
        met += solution.fits and solution.seconds <= truth + 1e-9
        beaten += fixed is None or (solution.fits and solution.seconds < fixed[0] - 1e-9)
    assert asked > 20
    assert met > 0.8 * asked, (met, asked)
    assert beaten > 0.2 * asked, (beaten, asked)


@quick
@given(problem=problems(8), fraction=st.floats(0, 1))
def test_orders_are_topological_and_no_higher(problem: Problem, fraction: float) -> None:
    order = lower_peak(problem, round(fraction * top_of(problem)), time_limit_s=0.05)
    assert sorted(order) == list(range(len(problem)))
    line = simulate(problem, Schedule.of(problem, order))
    assert line.peak_bytes <= top_of(problem)
    again = permuted(problem, order)
    assert simulate(again, Schedule.keep_all(again)).live_bytes.tolist() == line.live_bytes.tolist()
    if problem.turn is not None:
        assert set(order[: problem.turn]) == set(range(problem.turn))


def test_an_order_that_is_not_topological_is_refused() -> None:
    ops = (Op("a", (), (0,), 1.0), Op("b", (0,), (1,), 1.0))
    with pytest.raises(ProblemError, match=r"op 'b' .position 0. reads 'x' before it is made"):
        permuted(Problem(ops, (Value("x", 1, 0), Value("y", 1, 1))), [1, 0])


def test_branches_run_one_after_the_other() -> None:
    """Two branches that widen and narrow again: side by side they peak at twice one branch."""
    ops, values = [], []
    for wide in (True, False):
        for branch in range(2):
            ops.append(Op(f"{branch}.{wide}", () if wide else (branch,), (len(values),), 1.0))
            values.append(Value(ops[-1].name, 100 if wide else 1, len(values)))
    ops.append(Op("join", (2, 3), (4,), 1.0))
    values.append(Value("join", 1, 4))
    problem = Problem(tuple(ops), tuple(values))
    assert top_of(problem) == 201
    solution = solve(problem, 102)
    assert (solution.status, solution.peak_bytes) == ("optimal", 102)
    assert footprint_floor(problem) == (101, "0.False")


@pytest.mark.parametrize("ops", [100, 200])
def test_layered_dags_need_no_recomputation_at_ninety_percent(ops: int) -> None:
    problem = layered(ops, 4)
    solution = solve(problem, int(0.9 * top_of(problem)), time_limit_s=10)
    assert solution.status == "optimal"
    assert solution.recompute_seconds == 0


def test_what_the_order_leaves_is_recomputed() -> None:
    problem = layered(80, 5)
    budget = int(0.6 * top_of(problem))
    solution = solve(problem, budget, time_limit_s=3)
    assert solution.fits
    assert solution.recompute_seconds > 0
    one, other = (solve(problem, int(0.8 * top_of(problem)), time_limit_s=float("inf")) for _ in range(2))
    assert one.schedule == other.schedule


def test_weight_gradients_move_and_the_turn_stays() -> None:
    """In the order given all weight gradients come last, and hold every activation until then."""
    layers = 6
    names = [f"f{k}" for k in range(layers)] + [f"b{k}" for k in reversed(range(layers))]
    number = {name: k for k, name in enumerate(names)}
    ops = [Op("f0", (), (0,), 1.0)] + [Op(f"f{k}", (k - 1,), (k,), 1.0) for k in range(1, layers)]
    for k in reversed(range(layers)):
        reads = (number[f"b{k + 1}"],) if k + 1 < layers else (layers - 1,)
        ops.append(Op(f"b{k}", reads, (number[f"b{k}"],), 1.0, recomputable=False))
    values = [Value(name, 10, k) for k, name in enumerate(names)]
    for k in range(1, layers):
        v = len(values)
        ops.append(Op(f"w{k}", (number[f"f{k - 1}"], number[f"b{k}"]), (v,), 1.0, recomputable=False))
        values.append(Value(f"w{k}", 1, v, final=True))
    problem = Problem(tuple(ops), tuple(values), turn=layers)
    solution = solve(problem, 80, time_limit_s=5)
    assert top_of(problem) == 110
    assert (solution.status, solution.recompute_seconds) == ("optimal", 0.0)
    assert set(solution.schedule.sequence[:layers]) == set(names[:layers])


def test_training_chains_are_solved_by_the_methods_of_their_kind() -> None:
    problem = training_chain(layers=5, ops_per_layer=3)
    solution = solve(problem, int(0.6 * top_of(problem)), time_limit_s=8)
    assert solution.fits
    assert solution.solver == "reorder"
