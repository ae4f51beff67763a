"""The staged program: valid, within budget, never below the bound, and close to it on real graphs."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from solvers import InfeasibleError, ProblemError, simulate, solve
from solvers.bounds import lower_bounds as bounds
from solvers.core.facts import Facts
from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import trim
from solvers.core.simulate import simulate_steps
from solvers.exact import method as checkmate
from solvers.staged import method as staged
from solvers.staged.orders import in_template_order, just_in_time
from solvers.staged.program import StagedProgram
from solvers.staged.stages import Stages, cut_by_groups, cut_evenly
from tests import joint_graphs
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, least_peak, random_problem, relaxed_recompute, training_chain


@pytest.mark.parametrize("seed", range(6))
def test_plan_is_valid_within_budget_and_above_the_bound(seed: int) -> None:
    problem = random_training_graph(seed)
    top = keep_all_peak(problem)
    floor = bounds.peak_floor(problem).bytes
    for fraction in (0.75, 0.35):
        budget = round(floor + fraction * (top - floor))
        solution = staged.solve(problem, budget, time_limit_s=0.7)
        line = simulate(problem, solution.schedule)
        assert (line.peak_bytes, line.seconds) == (solution.peak_bytes, solution.seconds)
        assert solution.fits
        bound = bounds.time_bound(problem, budget, time_limit_s=2)
        assert problem.total_seconds <= bound <= solution.seconds * (1 + 1e-9)
        assert solution.recompute_seconds > 0


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_exact_optimum(seed: int) -> None:
    problem = random_training_graph(seed, layers=3, width=2)
    budget = round(0.7 * keep_all_peak(problem))
    exact = checkmate.solve(problem, budget, time_limit_s=5)
    solution = staged.solve(problem, budget, time_limit_s=2)
    assert exact.fits and solution.fits
    assert exact.bound_seconds <= solution.seconds * (1 + 1e-9)
    assert solution.seconds <= exact.seconds + 0.02 * problem.total_seconds


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold_against_brute_force(seed: int) -> None:
    problem = random_problem(random.Random(seed), 7)
    low, _ = least_peak(problem)
    assert bounds.peak_floor(problem).bytes <= low
    top = keep_all_peak(problem)
    for budget in {low, (low + top) // 2}:
        truth = best_seconds(problem, budget)
        assert truth is not None
        n = len(problem)
        for instants in ([0], [n // 2], list(range(n))):
            found = relaxed_recompute(problem, budget, instants, time_limit_s=5)
            assert problem.total_seconds + found <= truth[0] * (1 + 1e-7) + 1e-9


def test_bound_is_reached_where_one_value_must_go() -> None:
    problem = training_chain(3, 2, seed=1)
    budget = keep_all_peak(problem) - 1
    bound = bounds.time_bound(problem, budget)
    truth = best_seconds(problem, budget)
    assert truth is not None
    assert problem.total_seconds < bound <= truth[0] * (1 + 1e-7)


@pytest.mark.parametrize(
    ("name", "fraction", "least", "most"),
    [
        # percent of step time: the proved bound, and the plan
        ("bert-base-b16x256", 0.9, 1.3, 1.8),
        ("bert-base-b16x256", 0.5, 9.5, 9.8),
        ("resnet50-b8x224", 0.5, 7.4, 8.6),
        ("unet-d4c64-b4x256", 0.5, 12.9, 14.5),
    ],
)
def test_real_graphs(name: str, fraction: float, least: float, most: float) -> None:
    problem = joint_graphs.load(name)
    budget = round(fraction * keep_all_peak(problem))
    percent = problem.total_seconds / 100
    # Relaxations and their roundings only: the same work on every machine, however slow.
    run = Incumbent(problem, budget)
    staged.Relaxations(problem).offer_plans(run)
    assert run.fits
    assert run.recompute_s / percent <= most
    instants = bounds.pressure_instants(problem, 12)
    bound = relaxed_recompute(problem, budget, instants, time_limit_s=300)
    assert least <= bound / percent <= run.recompute_s / percent


def test_a_looser_budget_never_costs_more() -> None:
    problem = joint_graphs.load("bert-base-b16x256")
    facts = Facts.of_one_backward(problem)
    top, previous = keep_all_peak(problem), math.inf
    for fraction in (0.3, 0.4, 0.6, 0.8, 0.95):
        program = StagedProgram(Stages(facts, cut_by_groups(facts, 8), 0), round(fraction * top))
        program.memory.add_first()
        answer = program.lp.solve(time_limit_s=10, relax=True)
        bound = relaxed_recompute(problem, round(fraction * top), [facts.turn + 10], time_limit_s=10)
        assert bound <= answer.objective * program.seconds_scale * (1 + 1e-6) <= previous * (1 + 1e-6)
        previous = answer.objective * program.seconds_scale
    assert simulate(problem, staged.solve(problem, top, time_limit_s=1).schedule).recompute_seconds == 0


@pytest.mark.parametrize("seed", range(6))
def test_memory_rows_equal_the_simulator(seed: int) -> None:
    """At every slot the program's bytes are those of the schedule emitted in its order."""
    problem = random_training_graph(seed)
    facts = Facts.of_one_backward(problem)
    budget = round(0.6 * keep_all_peak(problem))
    stages = Stages(facts, cut_evenly(facts, 4), 10)
    program = StagedProgram(stages, budget)
    while True:
        program.memory.add_first()
        answer = program.lp.solve(time_limit_s=10)
        if answer.x is None or not program.memory.add_violated(answer.x):
            break
    assert answer.x is not None
    choice = program.choice(answer.x)
    predicted = program.memory.bytes_at(np.round(answer.x))
    line = simulate_steps(problem, in_template_order(stages, choice))
    slots = list(range(facts.turn))
    for g, row in enumerate(stages.template):
        begin = int(program.offset[g + 1])
        slots += [begin + s for s, i in enumerate(row) if i >= facts.turn or i in choice.again[g]]
    assert len(slots) == len(line.steps)
    assert np.all(line.live_bytes <= predicted[slots])
    assert line.peak_bytes <= budget
    assert line.live_bytes.max() >= 0.9 * predicted[slots].max()


def test_trim_removes_only_what_nobody_reads() -> None:
    problem = training_chain(2, 2)
    steps = list(range(len(problem)))
    useless = [*steps[: problem.turn], 0, 1, *steps[problem.turn :]]
    assert trim(problem, [*useless, 2]) != [*useless, 2]
    stages = Stages(Facts.of_one_backward(problem), (problem.turn,), 0)
    nothing_kept = staged.Choice((frozenset(),), (frozenset(),))
    emitted = just_in_time(stages, nothing_kept)
    assert trim(problem, emitted) == emitted
    assert trim(problem, steps) == steps


def test_budget_below_the_floor_is_refused() -> None:
    problem = random_training_graph(0)
    floor = bounds.peak_floor(problem)
    with pytest.raises(InfeasibleError, match=floor.op_name):
        solve(problem, floor.bytes - 1, solver="staged")
    assert bounds.time_bound(problem, floor.bytes - 1) == math.inf


def test_resident_bytes_shift_every_budget() -> None:
    problem = random_training_graph(1)
    budget = round(0.7 * keep_all_peak(problem))
    shifted = replace(problem, resident_bytes=1000)
    one = staged.solve(problem, budget, time_limit_s=2)
    other = staged.solve(shifted, budget + 1000, time_limit_s=2)
    assert other.peak_bytes <= budget + 1000
    assert other.seconds == pytest.approx(one.seconds, rel=0.02)
    assert bounds.peak_floor(shifted).bytes == bounds.peak_floor(problem).bytes + 1000


@pytest.mark.parametrize("turn", [None, 44])
def test_graphs_without_a_backward_are_refused(turn: int | None) -> None:
    problem = replace(random_training_graph(2), turn=turn)
    assert turn in (None, len(problem))
    with pytest.raises(ProblemError, match=r"random2: the staged program needs problem.turn and ops"):
        staged.solve(problem, keep_all_peak(problem))


@pytest.mark.parametrize("seed", range(4))
def test_integral_answers_plan_where_no_rounding_fits(seed: int) -> None:
    problem = random_training_graph(seed, layers=3, width=2)
    low, _ = checkmate.minimum_peak(problem, time_limit_s=3)
    budget = round(0.8 * simulate(problem, low).peak_bytes + 0.2 * keep_all_peak(problem))
    run = Incumbent(problem, budget, deadline=time.perf_counter() + 20)
    staged.Relaxations(problem).offer_integral(run, time_limit_s=3)
    exact = checkmate.solve(problem, budget, time_limit_s=5)
    # Stages of several ops hold what the later of them read, so its best may be another's second.
    assert run.fits
    assert simulate_steps(problem, run.steps).peak_bytes <= budget
    assert exact.bound_seconds <= (run.total_s + run.recompute_s) * (1 + 1e-9)
    assert run.recompute_s <= exact.recompute_seconds + 0.1 * problem.total_seconds


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_stages_are_halved_until_what_they_hold_fits(share: float) -> None:
    problem = random_training_graph(1)
    budget = bounds.peak_floor(problem).bytes * (1 + share) - problem.resident_bytes
    program = staged._cut_to_fit(Facts.of_one_backward(problem), 8, budget)
    ends = (*program.stages.first[1:], len(problem))
    for g, (start, end) in enumerate(zip(program.stages.first, ends, strict=True)):
        held = program.memory.base[program.offset[g + 1] : program.offset[g + 2]].max()
        assert held <= budget or end - start == 1


def test_without_a_time_limit_no_integers_are_asked_for() -> None:
    problem = random_training_graph(0)
    run = Incumbent(problem, bounds.peak_floor(problem).bytes)
    before = run.steps
    staged.Relaxations(problem).offer_integral(run, time_limit_s=math.inf)
    assert run.steps == before
