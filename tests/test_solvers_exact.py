"""The exact program against brute force over its class, and what its class leaves out."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import InfeasibleError, Op, Problem, Schedule, Value, simulate
from solvers.core.simulate import simulate_steps
from solvers.exact import method as checkmate
from solvers.exact.bursts import Bursts, Way
from solvers.exact.program import AnyOrder, Program
from tests.benchmarks import bench_exactness
from tests.solver_graphs import (
    best_seconds,
    from_seeds,
    least_peak,
    problems,
    random_problem,
    tense_problem,
    training_chain,
)

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(problems(), st.sampled_from([1, 2]), st.floats(0, 1))
def test_least_time_equals_brute_force(problem: Problem, passes: int, fraction: float) -> None:
    low, _ = least_peak(problem)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    budget = max(1, round(low - 1 + fraction * (top - low + 1)))
    truth, any_order = best_seconds(problem, budget, passes), best_seconds(problem, budget)
    try:
        solution = checkmate.solve(problem, budget, time_limit_s=20, passes=passes)
    except InfeasibleError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert any_order is None
        assert budget < refused.floor_bytes <= low
        return
    if any_order is None or not solution.fits:
        assert truth is None
        assert solution.status == "unsettled"
        assert solution.peak_bytes <= least_peak(problem, passes)[0]
        return
    assert solution.peak_bytes <= budget
    assert solution.bound_seconds <= any_order[0] * (1 + 1e-9)
    assert any_order[0] <= solution.seconds * (1 + 1e-9)
    if truth is not None:
        assert solution.seconds <= truth[0] * (1 + 1e-9)
    if solution.status == "optimal":
        assert solution.seconds == pytest.approx(any_order[0], rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(0, 1))
def test_the_judge_is_around_brute_force(problem: Problem, fraction: float) -> None:
    low, _ = least_peak(problem)
    keep_all = Schedule.keep_all(problem)
    budget = max(1, round(low + fraction * (simulate(problem, keep_all).peak_bytes - low)))
    truth = best_seconds(problem, budget)
    assert truth is not None
    below, above = checkmate.least_time_between(problem, budget, hint=keep_all, time_limit_s=10)
    assert below <= truth[0] * (1 + 1e-9) and truth[0] <= above * (1 + 1e-9)


@quick
@given(problems(), st.sampled_from([1, 2]))
def test_least_peak_equals_brute_force(problem: Problem, passes: int) -> None:
    schedule, floor = checkmate.minimum_peak(problem, time_limit_s=20, passes=passes)
    lowest, _ = least_peak(problem)
    assert floor <= lowest <= simulate(problem, schedule).peak_bytes <= least_peak(problem, passes)[0]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_brute_force_agrees_with_the_simulator(problem: Problem) -> None:
    peak, steps = least_peak(problem)
    assert simulate_steps(problem, steps).peak_bytes == peak
    found = best_seconds(problem, peak)
    assert found is not None
    line = simulate_steps(problem, found[1])
    assert line.peak_bytes <= peak
    assert line.seconds == pytest.approx(found[0])


def wide_step() -> Problem:
    """Op c is large; before d, the cheap small ``a`` is best made again after the chain b0 -> b1."""
    ops = (
        Op("a", (), (0,), 1.0),
        Op("b0", (), (1,), 1.0),
        Op("b1", (1,), (2,), 1.0),
        Op("c", (), (3,), 1.0),
        Op("d", (0, 2), (4,), 1.0),
    )
    sizes = (1, 3, 3, 6, 2)
    return Problem(ops, tuple(Value(op.name, n, i) for i, (op, n) in enumerate(zip(ops, sizes, strict=True))))


def test_one_pass_in_the_problems_order_is_a_loss() -> None:
    problem = wide_step()
    one, floor = checkmate.minimum_peak(problem, passes=1)
    assert simulate(problem, one).peak_bytes == least_peak(problem, 1)[0] == 7
    two, floor_of_two = checkmate.minimum_peak(problem, passes=2)
    assert simulate(problem, two).peak_bytes == least_peak(problem)[0] == 6
    assert floor == floor_of_two <= 6


@quick
@given(from_seeds(tense_problem), st.floats(0, 1))
def test_the_bound_over_all_orders_is_the_optimum(problem: Problem, fraction: float) -> None:
    low, _ = least_peak(problem)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    budget = round(low + fraction * (top - low))
    truth = best_seconds(problem, budget)
    assert truth is not None
    found = checkmate.solve(problem, budget, time_limit_s=20)
    assert found.fits
    assert found.bound_seconds == pytest.approx(truth[0], rel=1e-9)
    assert found.seconds == pytest.approx(truth[0], rel=1e-9)


def two_that_do_not_fit() -> Problem:
    """Before e, b and d fit one by one as they run again, and do not where what the other made is held."""
    ops = (
        Op("a", (), (0,), 1.25),
        Op("b", (0,), (1,), 0.5),
        Op("c", (1,), (2,), 0.75),
        Op("d", (0, 2), (3,), 0.25),
        Op("e", (1, 2, 3), (4,), 1.25),
        Op("f", (1, 4), (5,), 1.0),
    )
    sizes = (4, 3, 3, 2, 2, 2)
    return Problem(ops, tuple(Value(op.name, n, i) for i, (op, n) in enumerate(zip(ops, sizes, strict=True))))


def test_reruns_that_fit_only_one_by_one_are_cut_off() -> None:
    problem, budget = two_that_do_not_fit(), 11
    truth = best_seconds(problem, budget)
    assert truth is not None
    found = checkmate.solve(problem, budget, time_limit_s=20)
    assert found.bound_seconds == pytest.approx(truth[0])
    program = AnyOrder(problem)
    bursts = Bursts(program, budget)
    # Before e, with a and c carried in, b and d again: no way; with c again in place of d, there is one.
    assert bursts.cheapest(4, {0, 2}, {1, 3}, {1}) == Way(math.inf)
    assert bursts.cheapest(4, {0, 3}, {1, 2}, {1}) == Way(1.25, (1, 2))


@quick
@given(from_seeds(tense_problem), st.integers(0, 2**32))
def test_cuts_hold_of_every_schedule(problem: Problem, seed: int) -> None:
    """The fastest schedules at some budgets are points of the program; cuts of random points leave them."""
    rng, program = random.Random(seed), AnyOrder(problem)
    low, _ = least_peak(problem)
    budget = rng.randint(low, simulate(problem, Schedule.keep_all(problem)).peak_bytes)
    bursts = Bursts(program, budget)
    points = []
    for within in range(low, budget + 1):
        best = best_seconds(problem, within, passes=1)
        if best is not None:
            points.append(program.columns_of(Schedule.of(problem, best[1])))
    for _ in range(5):
        share = rng.random()
        chosen = [rng.random() < share for _ in range(program.columns)]
        for cut in bursts.cuts(chosen):
            for point in filter(None, points):
                # No schedule of one pass runs an op twice in a stage: nothing extra.
                assert sum(x * point[c] for c, x in cut.terms) >= cut.lower - 1e-9


def test_two_passes_lose_nothing_on_these_graphs() -> None:
    lossy = 0
    for seed in range(250):
        problem = random_problem(random.Random(seed))
        peak, _ = least_peak(problem)
        lossy += least_peak(problem, 1)[0] > peak
        assert least_peak(problem, 2)[0] == peak
        any_order, two = best_seconds(problem, peak), best_seconds(problem, peak, 2)
        assert any_order is not None
        assert two is not None
        assert two[0] == pytest.approx(any_order[0])
    assert 0 < lossy < 5


def test_a_cut_search_returns_its_best_plan_and_a_bound() -> None:
    problem = training_chain(layers=6, ops_per_layer=3)
    low, _ = checkmate.minimum_peak(problem, time_limit_s=3)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    budget = (simulate(problem, low).peak_bytes + top) // 2
    cut = checkmate.solve(problem, budget, time_limit_s=0.2)
    assert cut.peak_bytes <= budget
    assert problem.total_seconds <= cut.bound_seconds <= cut.seconds
    assert cut.status == ("optimal" if cut.gap_seconds == 0 else "feasible")
    full = checkmate.solve(problem, budget, time_limit_s=8)
    assert cut.bound_seconds <= full.seconds <= cut.seconds


def test_bytes_of_real_size_stay_within_the_budget_to_the_byte() -> None:
    rng = random.Random(3)
    for _ in range(6):
        small = training_chain(layers=3, ops_per_layer=2, seed=rng.randrange(10**6))
        values = tuple(
            Value(v.name, v.bytes * 10**8 + rng.randrange(99), v.producer, v.final) for v in small.values
        )
        problem = Problem(small.ops, values, turn=small.turn, resident_bytes=7 * 10**9)
        low, floor = checkmate.minimum_peak(problem, time_limit_s=20)
        peak = simulate(problem, low).peak_bytes
        assert floor <= peak
        at_peak = checkmate.solve(problem, peak, time_limit_s=20)
        assert at_peak.peak_bytes == peak
        assert not checkmate.solve(problem, max(floor, peak - 1), time_limit_s=20).fits or peak == floor
        with pytest.raises(InfeasibleError, match=f"at least {floor} are needed .1 more."):
            checkmate.solve(problem, floor - 1, time_limit_s=20)


def test_program_reads_schedules_back() -> None:
    problem = wide_step()
    schedule = Schedule(("a", "b0", "b1", "c", "b0", "b1", "a", "d"))
    assert Program(problem, 1).columns_of(schedule) is None
    program = Program(problem, 2)
    taken = program.columns_of(schedule)
    assert taken is not None
    assert program.schedule([taken.get(c, False) for c in range(program.columns)]) == schedule
    assert repr(program).startswith("Program('problem', 2 passes: ")
    with pytest.raises(ValueError, match="passes is 0, want at least 1"):
        Program(problem, 0)


@pytest.mark.nightly
def test_the_methods_that_scale_beside_the_optimum() -> None:
    """On graphs of 10 to 29 ops, from the least budget there is up.

    The search over windows is a heuristic: in nine of ten training graphs it should find the optimum, whether
    it starts from relaxations or from nothing, and in two of three general DAGs.  Where it does not, either
    the optimum is outside every template (it runs an op where no slot is) or no window was wide enough.
    The chain program knows only plans that save what a block needs until its backward; near the least
    budget that is often not enough, and at its finest, with a block per op, it is no better there.
    """
    rows = [
        row
        for problem in bench_exactness.graphs(5)
        for share, budget in bench_exactness.budgets(problem).items()
        if (row := bench_exactness.compare(problem, budget, share)) is not None
    ]
    training, general = ([r for r in rows if ("chain" in r.found_s) == chain] for chain in (True, False))
    assert min(len(training), len(general)) >= 10
    for row in rows:
        assert all(found is None or found >= row.optimum_s * (1 - 1e-9) for found in row.found_s.values())
        assert set(row.why.values()) <= {"windows", "no template", "blocks", "slots"}, str(row)
    for method in ("local search", "staged"):
        assert sum(method not in row.why for row in training) >= 0.9 * len(training), method
    assert sum("local search" not in row.why for row in general) >= 2 / 3 * len(general)
    roomy = [row for row in training if row.share >= 0.6]
    assert sum("chain" not in row.why for row in roomy) >= 0.7 * len(roomy)
    assert any("chain" in row.why for row in training)
