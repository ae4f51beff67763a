"""Fixed order on general DAGs: against brute force, against the exact method, and on layered DAGs."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import Problem, Schedule, simulate
from solvers import solve as solve_auto
from solvers.retention.bound import instants_bound, tight_instants
from solvers.retention.method import solve
from solvers.retention.program import RetentionProgram
from tests.benchmarks.layered import layered_dag
from tests.solver_graphs import best_seconds, least_peak, problems, random_problem, training_chain

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def layered(ops: int, seed: int) -> Problem:
    return Problem.from_networkx(layered_dag(ops, seed), name=f"layered-{ops}-{seed}")


def top_of(problem: Problem) -> int:
    return simulate(problem, Schedule.keep_all(problem)).peak_bytes


@quick
@given(problem=problems(), fraction=st.floats(0, 1))
def test_never_below_the_truth(problem: Problem, fraction: float) -> None:
    low, top = least_peak(problem)[0], top_of(problem)
    budget = max(1, round(low + fraction * (top - low)))
    truth = best_seconds(problem, budget)
    assert truth is not None
    solution = solve(problem, budget, time_limit_s=3)
    line = simulate(problem, solution.schedule)
    assert (line.seconds, line.peak_bytes) == (solution.seconds, solution.peak_bytes)
    assert solution.bound_seconds <= truth[0] * (1 + 1e-7) + 1e-9
    assert solution.fits == (line.peak_bytes <= budget)
    if solution.fits:
        assert solution.seconds >= truth[0] - 1e-9
    assert list(dict.fromkeys(solution.schedule.sequence)) == [op.name for op in problem.ops]


@quick
@given(problem=problems(), fraction=st.floats(0, 1))
def test_the_bound_in_whole_numbers_never_exceeds_the_optimum(problem: Problem, fraction: float) -> None:
    low, top = least_peak(problem)[0], top_of(problem)
    budget = max(1, round(low + fraction * (top - low)))
    truth = best_seconds(problem, budget)
    assert truth is not None
    assert problem.total_seconds <= instants_bound(problem, budget, time_limit_s=3) <= truth[0] + 1e-9


def test_most_small_graphs_are_solved_to_the_optimum() -> None:
    """The stages' bursts count for more than they take, so a few near the floor are not."""
    rng = random.Random(5)
    asked = met = 0
    for _ in range(400):
        problem = random_problem(rng, 6, rich=False)
        low, top = least_peak(problem)[0], top_of(problem)
        budget = max(1, (2 * low + top) // 3)
        truth = best_seconds(problem, budget)
        assert truth is not None
        if truth[0] > problem.total_seconds:
            solution = solve(problem, budget, time_limit_s=3)
            asked += 1
            met += solution.fits and solution.seconds <= truth[0] + 1e-9
    assert asked > 20
    assert met > 0.9 * asked, (met, asked)


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_a_layered_dag_is_solved_to_a_proved_optimum(share: float) -> None:
    problem = layered(50, 2)
    budget = int(share * top_of(problem))
    solution = solve(problem, budget, time_limit_s=30)
    exact = solve_auto(problem, budget, solver="exact", time_limit_s=30)
    assert solution.status == "optimal"
    assert solution.seconds <= exact.seconds + 1e-9
    assert exact.bound_seconds <= solution.seconds * (1 + 1e-7)
    assert solution.recompute_seconds > 0


def test_invariants_on_larger_graphs() -> None:
    problem = layered(120, 2)
    top = top_of(problem)
    seconds = []
    for share in (0.75, 0.85, 0.95):
        solution = solve(problem, int(share * top), time_limit_s=4)
        assert solution.fits
        assert solution.bound_seconds <= solution.seconds
        seconds.append(solution.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert solve(problem, top).recompute_seconds == 0


def test_a_hint_is_never_made_worse() -> None:
    problem = layered(50, 2)
    budget = int(0.8 * top_of(problem))
    best = solve(problem, budget, time_limit_s=20)
    again = solve(problem, budget, time_limit_s=0, hint=best.schedule)
    assert again.fits
    assert again.seconds <= best.seconds


def test_without_a_limit_a_seed_gives_one_answer() -> None:
    problem = layered(40, 3)
    budget = int(0.8 * top_of(problem))
    one, other = (solve(problem, budget, time_limit_s=float("inf"), seed=7) for _ in range(2))
    assert one.schedule == other.schedule
    assert one.bound_seconds == other.bound_seconds


def test_training_graphs_are_taken_too() -> None:
    problem = training_chain(layers=6, ops_per_layer=3)
    solution = solve(problem, int(0.6 * top_of(problem)), time_limit_s=10)
    assert solution.fits
    assert 0 < solution.recompute_seconds < 0.4 * problem.total_seconds


def test_the_program_counts_as_the_simulator_does() -> None:
    """Every value kept across every gap and nothing run again is what keeping everything takes."""
    problem = layered(40, 3)
    live = simulate(problem, Schedule.keep_all(problem)).live_bytes
    candidates = [(op.inputs[0], t) for t, op in enumerate(problem.ops) if op.inputs]
    program = RetentionProgram(problem, int(0.8 * live.max()), candidates)
    x = np.zeros(len(program.linear.cost))
    for v, readers in enumerate(problem.consumers):
        for stage in range(v + 1, (v, *readers)[-1] + 1):
            column = program.kept_into(v, stage)
            if column is not None and column >= 0:
                x[column] = 1.0
    assert x.sum() > 10
    assert program.use_bytes(x).tolist() == live.tolist()


def test_instants_lie_where_memory_is_too_much() -> None:
    problem = layered(120, 2)
    live = simulate(problem, Schedule.keep_all(problem)).live_bytes
    budget = int(0.8 * live.max())
    instants = tight_instants(problem, budget, 5)
    assert instants == sorted(set(instants))
    assert len(instants) == 5
    assert all(live[t] > budget for t in instants)
    assert int(live.argmax()) in instants
    assert tight_instants(problem, int(live.max()), 5) == []
