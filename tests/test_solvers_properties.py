"""What must hold of every solver on every problem: valid, within budget, never below the truth."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import InfeasibleError, Problem, ProblemError, Schedule, minimum_peak, simulate, solve
from solvers.baselines.simple import BASELINES, greedy
from solvers.bounds import lower_bounds
from tests.joint_graphs import keep_all_peak
from tests.solver_graphs import (
    best_seconds,
    from_seeds,
    least_peak,
    problems,
    random_problem,
    tense_problem,
    training_chain,
)

any_graph = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# How many graphs each method is held against the best of all their schedules, at least nine of ten all
# different; half as many by day, ten times as many with ``--hypothesis-profile nightly``.
EXAMPLES = {
    "auto": 1_000,
    "minimum_peak": 200,
    "exact": 250,
    "staged": 100,
    "chain": 100,
    "greedy": 100,
    "recompute_all": 50,
    "every_block": 50,
    "sqrt": 50,
}
TIMES = settings.default.max_examples / settings.get_profile("default").max_examples


def budget_between(problem: Problem, fraction: float) -> int:
    """From one byte below the least peak to the peak of keeping everything."""
    low, _ = least_peak(problem)
    top = keep_all_peak(problem)
    return max(1, round(low - 1 + fraction * (top - low + 1)))


def suits(solver: str, problem: Problem) -> bool:
    """Whether ``solver`` can treat ``problem``; no op of these graphs has a group."""
    if solver == "every_block":
        return False
    turn, n = problem.turn, len(problem)
    least = {"chain": 2, "staged": 0}.get(solver)
    if least is not None:
        return turn is not None and least <= turn < n
    return turn is not None or solver != "sqrt"


@pytest.mark.parametrize("solver", EXAMPLES)
def test_every_method_against_all_schedules(solver: str) -> None:
    """Half of the graphs are such that recomputation lowers the peak; on the others most budgets are easy."""
    calls, graphs = 0, set[Problem]()

    @settings(any_graph, max_examples=round(EXAMPLES[solver] * TIMES), database=None)
    @given(st.one_of(from_seeds(random_problem), from_seeds(tense_problem)), st.floats(0, 1))
    def holds(problem: Problem, fraction: float) -> None:
        nonlocal calls
        calls += 1
        graphs.add(problem)
        if solver == "minimum_peak":
            least_peak_is_found(problem)
        else:
            is_never_wrong(solver, problem, budget_between(problem, fraction))

    holds()
    assert len(graphs) >= 0.9 * calls >= 0.9 * EXAMPLES[solver] * TIMES


def is_never_wrong(solver: str, problem: Problem, budget: int) -> None:
    """The answer of ``solver`` is what the simulator says it is, and as good as promised."""
    low, _ = least_peak(problem)
    truth = best_seconds(problem, budget)
    floor = lower_bounds.peak_floor(problem).bytes
    assert floor <= low
    if not suits(solver, problem) and floor <= budget:
        with pytest.raises(ProblemError, match="needs"):
            solve(problem, budget, solver=solver)
        return
    try:
        solution = solve(problem, budget, solver=solver, time_limit_s=math.inf)
    except InfeasibleError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert truth is None
        assert budget < refusal.floor_bytes <= low
        return
    assert floor <= budget
    line = simulate(problem, solution.schedule)
    assert (line.seconds, line.peak_bytes) == (solution.seconds, solution.peak_bytes)
    assert list(dict.fromkeys(solution.schedule.sequence)) == [op.name for op in problem.ops]
    assert (solution.status == "unsettled") == (line.peak_bytes > budget)
    assert line.peak_bytes >= low
    best_of_class = best_seconds(problem, budget, 2)
    if solver in ("auto", "exact"):
        assert solution.fits or best_of_class is None
    if not solution.fits:
        return
    assert truth is not None
    assert truth[0] - 1e-9 <= solution.seconds
    assert solution.bound_seconds <= truth[0] * (1 + 1e-7) + 1e-9
    if solution.status == "optimal":
        assert solution.seconds == pytest.approx(truth[0], rel=1e-8)
    if solver in ("auto", "exact") and best_of_class is not None:
        assert solution.seconds <= best_of_class[0] + 1e-9


def least_peak_is_found(problem: Problem) -> None:
    """The lowest peak of all, and then no more time than that peak takes."""
    least = minimum_peak(problem, time_limit_s=math.inf)
    assert least.peak_bytes == simulate(problem, least.schedule).peak_bytes == least.budget_bytes
    assert least_peak(problem)[0] <= least.peak_bytes <= least_peak(problem, 2)[0]
    truth = best_seconds(problem, least.peak_bytes)
    of_class = best_seconds(problem, least.peak_bytes, 2)
    assert truth is not None and truth[0] - 1e-9 <= least.seconds
    assert of_class is None or least.seconds <= of_class[0] + 1e-9


@any_graph
@given(problem=problems(), fraction=st.floats(0, 1))
def test_bounds_never_exceed_the_optimum(problem: Problem, fraction: float) -> None:
    peak, _ = least_peak(problem)
    assert lower_bounds.peak_floor(problem).bytes <= peak
    budget = budget_between(problem, fraction)
    truth = best_seconds(problem, budget)
    if truth is not None:
        assert lower_bounds.time_bound(problem, budget, time_limit_s=5) <= truth[0] * (1 + 1e-7) + 1e-9


@any_graph
@given(problem=problems(8), fraction=st.floats(0, 1))
def test_greedy_fits_or_has_the_lowest_peak_it_saw(problem: Problem, fraction: float) -> None:
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    line = simulate(problem, greedy(problem, round(fraction * top)))
    assert line.peak_bytes <= top
    if fraction == 1:
        assert line.recompute_seconds == 0


def test_baselines_on_a_training_chain() -> None:
    problem = training_chain(layers=10, ops_per_layer=4)
    top = simulate(problem, Schedule.keep_all(problem))
    lines = {name: simulate(problem, b.run(problem, top.peak_bytes // 2)) for name, b in BASELINES.items()}
    assert lines["keep_all"].recompute_seconds == 0
    for name in ("greedy", "every_block", "sqrt"):
        assert lines[name].peak_bytes < 0.6 * top.peak_bytes
        assert 0 < lines[name].recompute_seconds < 0.5 * problem.total_seconds
    assert lines["greedy"].seconds < min(lines["every_block"].seconds, lines["sqrt"].seconds)
    assert lines["recompute_all"].recompute_seconds > lines["every_block"].recompute_seconds


def test_more_budget_never_takes_longer() -> None:
    problem = training_chain(layers=4, ops_per_layer=2)
    low = minimum_peak(problem, time_limit_s=10).peak_bytes
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    seconds = []
    for budget in range(low, top + 1, max(1, (top - low) // 8)):
        solution = solve(problem, budget, solver="exact", time_limit_s=20)
        assert solution.status == "optimal"
        seconds.append(solution.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]
