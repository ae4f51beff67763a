"""What must hold of every solver on every problem: valid, within budget, never below the truth."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import InfeasibleError, Problem, ProblemError, Schedule, minimum_peak, simulate, solve
from solvers import bounds as lower_bounds
from solvers.baselines import BASELINES, greedy
from tests.solver_graphs import best_seconds, least_peak, problems, training_chain

METHODS = ("auto", "exact", "staged", "chain", "greedy", "recompute_all", "every_block", "sqrt")

any_graph = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def budget_between(problem: Problem, fraction: float) -> int:
    """From one byte below the least peak to the peak of keeping everything."""
    low, _ = least_peak(problem)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    return max(1, round(low - 1 + fraction * (top - low + 1)))


@pytest.mark.parametrize("solver", METHODS)
@any_graph
@given(problem=problems(), fraction=st.floats(0, 1))
def test_solvers_are_never_wrong(solver: str, problem: Problem, fraction: float) -> None:
    budget = budget_between(problem, fraction)
    truth = best_seconds(problem, budget)
    infeasible = lower_bounds.peak_floor(problem).bytes > budget
    trainable = problem.turn is not None and 2 <= problem.turn < len(problem)
    needs = {"every_block": False, "sqrt": problem.turn is not None, "chain": trainable}
    if not needs.get(solver, True) and not infeasible:
        with pytest.raises(ProblemError, match="needs"):
            solve(problem, budget, solver=solver)
        return
    try:
        solution = solve(problem, budget, solver=solver, time_limit_s=5)
    except InfeasibleError as refusal:
        refused: InfeasibleError | None = refusal
    else:
        refused = None
    if refused is not None or infeasible:
        assert refused is not None
        assert truth is None
        assert budget < refused.floor_bytes <= least_peak(problem)[0]
        return
    line = simulate(problem, solution.schedule)
    assert (line.seconds, line.peak_bytes) == (solution.seconds, solution.peak_bytes)
    assert (solution.status == "unsettled") == (line.peak_bytes > budget)
    assert line.peak_bytes >= least_peak(problem)[0]
    if solution.fits:
        assert truth is not None
        assert solution.seconds >= truth[0] - 1e-9
        assert solution.bound_seconds <= truth[0] * (1 + 1e-7) + 1e-9


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
@given(problem=problems())
def test_auto_and_minimum_peak_find_the_best_of_small_graphs(problem: Problem) -> None:
    least = minimum_peak(problem, time_limit_s=5)
    peak, _ = least_peak(problem, 2)
    assert least.budget_bytes == least.peak_bytes <= peak
    if peak > 0:
        solution = solve(problem, peak, time_limit_s=5)
        truth = best_seconds(problem, peak, 2)
        assert truth is not None
        assert solution.seconds <= truth[0] + 1e-9


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
