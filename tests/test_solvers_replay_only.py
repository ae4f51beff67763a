"""Values held only where a reader of them runs again: counted as they are run, and proofs leave them out."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import (
    InfeasibleError,
    Op,
    Problem,
    ProblemError,
    Schedule,
    Solution,
    Value,
    frontier,
    minimum_peak,
    read_problem,
    simulate,
    solve,
    write_problem,
)
from solvers.bounds import lower_bounds
from solvers.bounds.pebbling import raised_floors
from solvers.core.simulate import simulate_steps
from solvers.exact import method as checkmate
from solvers.free_order import footprint_floor
from solvers.retention.bound import instants_bound
from tests.joint_graphs import keep_all_peak
from tests.solver_graphs import (
    best_seconds,
    from_seeds,
    least_peak,
    random_problem,
    tense_problem,
    training_chain,
    with_replay_only,
)
from tests.test_solvers_properties import budget_between

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def drawn(rng: random.Random) -> Problem:
    """A small graph of either kind with some values that only a replay needs."""
    return with_replay_only(rng.choice((random_problem, tense_problem))(rng), rng)


def dropout(state: int = 50, size: int = 10) -> Problem:
    """A state, an op that draws from it, one that uses what was drawn; the draw is the peak."""
    ops = (
        Op("x", (), (0,), 1.0),
        Op("state", (), (1,), 0.0, recomputable=False),
        Op("draw", (0, 1), (2,), 1.0),
        Op("between", (0,), (3,), 1.0),
        Op("use", (2, 3), (4,), 1.0),
    )
    sizes = (size, state, 2 * size, 3 * size, 1)
    values = tuple(Value(f"v{i}", s, i, i == 4, i == 1) for i, s in enumerate(sizes))
    return Problem(ops, values, name="dropout")


def test_a_state_counts_only_where_its_reader_runs_again() -> None:
    problem = dropout()
    plain = replace(problem, values=tuple(replace(v, replay_only=False) for v in problem.values))
    once, again = [0, 1, 2, 3, 4], [0, 1, 2, 3, 2, 4]
    assert simulate_steps(plain, once).live_bytes.tolist() == [10, 60, 80, 60, 51]
    assert simulate_steps(problem, once).live_bytes.tolist() == [10, 10, 30, 60, 51]
    assert (
        simulate_steps(problem, again).live_bytes.tolist()
        == simulate_steps(plain, again).live_bytes.tolist()
        == [10, 60, 80, 90, 110, 51]
    )


def test_as_run_and_relaxed() -> None:
    problem = dropout()
    assert problem.as_run([0, 1, 2, 3, 4]) is problem.as_run([]) is problem.relaxed
    assert [v.bytes for v in problem.relaxed.values] == [10, 0, 20, 30, 1]
    replayed = problem.as_run([0, 1, 2, 3, 2, 4])
    assert [v.bytes for v in replayed.values] == [10, 50, 20, 30, 1]
    assert not any(v.replay_only for p in (problem.relaxed, replayed) for v in p.values)
    assert replayed.relaxed is replayed and replayed.as_run([]) is replayed
    plain = training_chain(2, 2)
    assert plain.relaxed is plain and plain.as_run([0, 0]) is plain


@quick
@given(from_seeds(drawn), st.randoms(use_true_random=False))
def test_the_judge_counts_what_is_run(problem: Problem, rng: random.Random) -> None:
    """Some schedule, with reruns wherever they are possible: as of the problem that it is run as."""
    steps: list[int] = []
    for i in range(len(problem)):
        steps += [k for k in range(i) if problem.ops[k].recomputable and rng.random() < 0.3]
        steps.append(i)
    line, run = simulate_steps(problem, steps), problem.as_run(steps)
    as_run = simulate_steps(run, steps)
    assert line.live_bytes.tolist() == as_run.live_bytes.tolist()
    assert line.kept_bytes.tolist() == as_run.kept_bytes.tolist()
    assert (simulate_steps(problem.relaxed, steps).live_bytes <= line.live_bytes).all()
    for v, value in enumerate(problem.values):
        counts = not value.replay_only or any(steps.count(i) > 1 for i in problem.consumers[v])
        assert run.values[v].bytes == (value.bytes if counts else 0)


def test_what_fits_unplanned_needs_no_recomputation() -> None:
    """The state is at the peak if it is counted; it is not, and nothing has to run again."""
    problem = dropout()
    plain = replace(problem, values=tuple(replace(v, replay_only=False) for v in problem.values))
    top = keep_all_peak(problem)
    assert top == 60 < keep_all_peak(plain) == lower_bounds.peak_floor(plain).bytes
    answer = solve(problem, top, time_limit_s=math.inf)
    assert (answer.status, answer.recompute_seconds) == ("optimal", 0.0)
    with pytest.raises(InfeasibleError):
        solve(plain, top)
    assert minimum_peak(problem, time_limit_s=math.inf).peak_bytes == 60


@settings(quick, max_examples=2 * settings.default.max_examples)
@given(from_seeds(drawn), st.floats(0, 1))
def test_auto_against_all_schedules(problem: Problem, fraction: float) -> None:
    is_right("auto", problem, fraction)


@quick
@given(from_seeds(drawn), st.floats(0, 1), st.sampled_from(("exact", "instants", "retention", "greedy")))
def test_methods_against_all_schedules(problem: Problem, fraction: float, solver: str) -> None:
    is_right(solver, problem, fraction)


@quick
@given(from_seeds(drawn), st.floats(0, 1), st.sampled_from(("staged", "chain")))
def test_methods_of_training_graphs(problem: Problem, fraction: float, solver: str) -> None:
    n = len(problem)
    if n >= 4:
        is_right(solver, replace(problem, turn=n // 2), fraction)


def is_right(solver: str, problem: Problem, fraction: float) -> None:
    """No bound, floor or refusal is above what some schedule takes; what fits unplanned is kept."""
    budget = budget_between(problem, fraction)
    truth = best_seconds(problem, budget)
    low = least_peak(problem)[0]
    try:
        found = solve(problem, budget, solver=solver, time_limit_s=math.inf)
    except InfeasibleError as error:
        found, refused_below = None, error.floor_bytes
    if found is None:
        assert truth is None and budget < refused_below <= low
    else:
        line = simulate(problem, found.schedule)
        assert (line.seconds, line.peak_bytes) == (found.seconds, found.peak_bytes)
        assert truth is None or found.bound_seconds <= truth[0] * (1 + 1e-7) + 1e-9
        assert not found.fits or (truth is not None and truth[0] <= found.seconds + 1e-9)
    kept = solve(problem, max(1, keep_all_peak(problem)), solver=solver, time_limit_s=math.inf)
    assert solver == "greedy" or kept.status == "optimal"
    assert kept.recompute_seconds == 0


@pytest.mark.parametrize("seed", range(60, 70))
def test_the_bound_of_the_exact_program_counts_no_state(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound as it stands where time is up before a plan is found: from no plan at all."""
    monkeypatch.setattr(checkmate, "_best_of_class", lambda _problem, best, *_: best)
    problem = drawn(random.Random(seed))
    low, top = least_peak(problem)[0], keep_all_peak(problem)
    for budget in range(max(1, low), top):
        truth = best_seconds(problem, budget)
        hint = Schedule.keep_all(problem)
        found = checkmate.solve(problem, budget, time_limit_s=math.inf, hint=hint)
        assert truth is not None and found.bound_seconds <= truth[0] * (1 + 1e-7)


@quick
@given(from_seeds(drawn))
def test_no_plan_beats_a_bound_of_more_memory(problem: Problem) -> None:
    low, top = least_peak(problem)[0], keep_all_peak(problem)
    answers = frontier(problem, [b for b in range(low - 2, top + 1) if b > 0], time_limit_s=math.inf)
    solved = [answer for answer in answers.values() if isinstance(answer, Solution)]
    for plan in solved:
        for other in solved:
            if plan.peak_bytes <= other.budget_bytes:
                assert other.bound_seconds <= plan.seconds * (1 + 1e-9)
    for answer in answers.values():
        if isinstance(answer, InfeasibleError):
            assert answer.floor_bytes <= low


@quick
@given(from_seeds(drawn))
def test_floors_are_below_every_schedule(problem: Problem) -> None:
    low = least_peak(problem)[0]
    assert lower_bounds.peak_floor(problem).bytes <= low
    assert lower_bounds.proved_floor(problem, time_limit_s=1e6).bytes <= low
    assert all(floor.bytes <= low for floor in raised_floors(problem))
    assert footprint_floor(problem)[0] <= low
    assert minimum_peak(problem, time_limit_s=math.inf).peak_bytes >= low


@quick
@given(from_seeds(drawn), st.floats(0, 1))
def test_bounds_are_below_every_schedule(problem: Problem, fraction: float) -> None:
    budget = budget_between(problem, fraction)
    truth = best_seconds(problem, budget)
    if truth is not None:
        for bound in (lower_bounds.time_bound, instants_bound):
            assert bound(problem, budget, time_limit_s=1e6) <= truth[0] * (1 + 1e-7) + 1e-9


@quick
@given(from_seeds(drawn), st.floats(0, 1))
def test_in_any_order(problem: Problem, fraction: float) -> None:
    budget = max(budget_between(problem, fraction), footprint_floor(problem)[0])
    found = solve(problem, budget, order="free", time_limit_s=0.05)
    line = simulate(problem, found.schedule)
    assert (line.seconds, line.peak_bytes) == (found.seconds, found.peak_bytes)
    assert found.bound_seconds <= found.seconds


def test_files_and_graphs_carry_the_flag(tmp_path: Path) -> None:
    problem, plain = dropout(), training_chain(2, 2)
    for one in (problem, plain):
        write_problem(one, tmp_path / "p.gz")
        assert read_problem(tmp_path / "p.gz") == one
        columns = json.loads(gzip.decompress((tmp_path / "p.gz").read_bytes()))["values"]
        assert ("replay_only" in columns) == (one is problem)  # others are written as they always were
        again = Problem.from_networkx(one.to_networkx())
        assert [v.replay_only for v in again.values] == [v.replay_only for v in one.values]
    rows = [{"name": "a", "inputs": [], "outputs": ["s"], "seconds": 1.0}]
    assert Problem.build(rows, {"s": 3}, replay_only=["s"]).values == (Value("s", 3, 0, replay_only=True),)


def test_what_is_final_is_held_in_any_case() -> None:
    with pytest.raises(ProblemError, match="'v' is final and replay_only"):
        Problem((Op("a", (), (0,), 1.0),), (Value("v", 1, 0, final=True, replay_only=True),))


def test_an_order_holds_no_state() -> None:
    """Permuted, the graph keeps the flags, and no order counts what no replay reads."""
    problem = dropout()
    found = solve(problem, 60, order="free", time_limit_s=5)
    assert (found.status, found.recompute_seconds) == ("optimal", 0.0)
    assert Schedule.keep_all(problem).steps(problem) == [0, 1, 2, 3, 4]
