"""Bounds and floors: never above the truth, close to it, and where they meet a plan, an optimum."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from solvers import InfeasibleError, Op, Problem, Schedule, Value, simulate, solve
from solvers.bounds import lower_bounds as bounds
from solvers.bounds import refine as refining
from solvers.bounds.instants import InstantProgram
from solvers.bounds.refine import Refinement, emitted, pressure_instants, refine
from solvers.bounds.refine import solve as solve_by_refining
from solvers.core.facts import Facts
from solvers.core.linear import LinearAnswer, LinearProgram
from solvers.core.simulate import simulate_steps
from tests import joint_graphs
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, least_peak, random_problem, relaxed_recompute, training_chain


def truth_of(problem: Problem, budget: int) -> float:
    found = best_seconds(problem, budget)
    assert found is not None
    return found[0]


def share(problem: Problem, seconds: float) -> float:
    """Percent of a step."""
    return 100 * seconds / problem.total_seconds


def optimum(
    problem: Problem,
    instants: list[int],
    budget: int | None,
    *,
    bursts: Iterable[int] = (),
    inside: bool = True,
) -> float:
    """Least extra seconds (least bytes without a ``budget``) of the program, solved to the end."""
    top = keep_all_peak(problem)
    program = InstantProgram(
        Facts.of(problem), instants, budget, inside=inside, bursts=set(bursts), most_bytes=top
    )
    answer = program.lp.solve(time_limit_s=60, relative_gap=0.0)
    assert answer.optimal or answer.infeasible
    if answer.infeasible:
        return math.inf
    return answer.objective * (top if budget is None else program.unit_s)


@pytest.mark.parametrize("part", range(6))
def test_bounds_against_all_schedules_of_small_graphs(part: int) -> None:
    met = asked = floors = 0
    for seed in range(100 * part, 100 * part + 100):
        problem = random_problem(random.Random(seed), 6)
        low, _ = least_peak(problem)
        floor = bounds.proved_floor(problem, time_limit_s=20).bytes
        assert bounds.peak_floor(problem).bytes <= floor <= low
        floors += floor == low
        for budget in {low, (low + keep_all_peak(problem)) // 2}:
            truth = truth_of(problem, budget)
            bound = bounds.time_bound(problem, budget, time_limit_s=20)
            assert bound <= truth * (1 + 1e-7) + 1e-9
            instants = bounds.pressure_instants(problem, 1)
            relaxed = relaxed_recompute(problem, budget, instants, time_limit_s=5)
            assert problem.total_seconds + relaxed <= truth * (1 + 1e-7) + 1e-9
            asked += 1
            met += bound >= truth * (1 - 1e-5)
    # Where they fall short, several values of one burst are in memory together.
    assert met >= 0.94 * asked
    assert floors >= 94


@pytest.mark.parametrize("seed", range(60))
def test_every_row_holds_of_every_schedule(seed: int) -> None:
    """Whatever the instants and the rows asked for, the optimum stays below the best schedule."""
    rng = random.Random(seed)
    problem = random_problem(rng, 7)
    n = len(problem)
    low, _ = least_peak(problem)
    budget = rng.choice([low, (low + keep_all_peak(problem)) // 2])
    extra = truth_of(problem, budget) - problem.total_seconds
    for _ in range(4):
        instants = sorted(rng.sample(range(n), rng.randint(1, n)))
        bursts = {i for i in range(n) if rng.random() < 0.7}
        assert optimum(problem, instants, budget, bursts=bursts) <= extra * (1 + 1e-7) + 1e-9
        assert optimum(problem, instants, None, bursts=bursts) <= low * (1 + 1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_more_instants_and_less_budget_never_weaken(seed: int) -> None:
    problem = random_training_graph(seed, layers=4)
    low, top = bounds.proved_floor(problem).bytes, keep_all_peak(problem)
    order = random.Random(seed).sample(range(len(problem)), 6)
    budget = (2 * low + top) // 3
    values = [optimum(problem, sorted(order[:k]), budget, inside=False) for k in range(1, 7)]
    assert values == pytest.approx(sorted(values), rel=1e-6)
    assert values[-1] > values[0]
    instants = pressure_instants(problem, 4)
    values = [optimum(problem, instants, low + (top - low) * k // 6) for k in range(7)]
    assert values == pytest.approx(sorted(values, reverse=True), rel=1e-6)
    assert values[0] > values[-1] == 0


@pytest.mark.parametrize(("layers", "width", "seed"), [(3, 2, 0), (3, 2, 1), (3, 2, 2), (4, 1, 3), (2, 3, 3)])
def test_refining_proves_the_optimum_of_training_chains(layers: int, width: int, seed: int) -> None:
    chain = training_chain(layers, width, seed)
    assert chain.turn is not None
    pinned = [replace(op, recomputable=i < chain.turn) for i, op in enumerate(chain.ops)]
    problem = replace(chain, ops=tuple(pinned))
    low, _ = least_peak(problem)
    assert 0.97 * low <= bounds.proved_floor(problem).bytes <= low
    budget = (2 * low + keep_all_peak(problem)) // 3
    found = solve_by_refining(problem, budget, time_limit_s=30)
    assert found.status == "optimal"
    assert found.seconds == pytest.approx(truth_of(problem, budget))
    truth = truth_of(problem, low)
    assert 0.95 * truth <= bounds.time_bound(problem, low) <= truth * (1 + 1e-7)
    everywhere = range(len(problem))
    counted = bounds.time_bound(problem, low, counted=everywhere)
    assert 0.95 * truth <= counted <= truth * (1 + 1e-7)
    some = bounds.time_bound(problem, low, counted=everywhere[problem.turn :: 2])  # where memory counts
    assert (
        bounds.time_bound(problem, low, counted=[]) == problem.total_seconds <= some <= counted * (1 + 1e-6)
    )


def test_each_round_raises_the_bound_and_the_last_meets_the_plan() -> None:
    problem = joint_graphs.load("unet-d4c64-b4x256")
    budget = round(0.5 * keep_all_peak(problem))
    rounds: list[float] = []
    sizes: list[int] = []

    def learn(found: Refinement) -> None:
        rounds.append(found.bound)
        sizes.append(len(found.instants))

    found = refine(problem, budget, pressure_instants(problem, 1), time_limit_s=60, on_round=learn)
    assert rounds == sorted(rounds) and rounds[-1] > rounds[0]
    assert sizes == sorted(sizes)
    assert found.settled and found.steps is not None
    line = simulate_steps(problem, found.steps)
    assert line.peak_bytes <= budget
    assert line.recompute_seconds == found.best == pytest.approx(found.bound, rel=1e-5)
    assert share(problem, found.bound) > 13.2


@pytest.mark.parametrize(
    ("name", "fraction", "least"),
    [
        # percent of step time that is proved; one linear relaxation with one instant proves 1.6 of ResNet's
        ("bert-base-b16x256", 0.5, 9.5),
        ("resnet50-b8x224", 0.5, 7.7),
        ("unet-d4c64-b4x256", 0.7, 5.6),
        ("gpt2-b8x512", 0.7, 10.1),
    ],
)
def test_bounds_of_real_graphs_lie_below_every_plan(name: str, fraction: float, least: float) -> None:
    problem = joint_graphs.load(name)
    budget = round(fraction * keep_all_peak(problem))
    bound = bounds.time_bound(problem, budget, time_limit_s=30)
    assert share(problem, bound - problem.total_seconds) >= least
    for solver in ("greedy", "every_block", "sqrt", "chain", "staged"):
        solution = solve(problem, budget, solver=solver, time_limit_s=1)
        if solution.fits:
            assert bound <= solution.seconds * (1 + 1e-9)


def test_floors_of_real_graphs() -> None:
    for name in ("unet-d4c64-b4x256", "gpt2-b8x512"):
        # A schedule peaks at the sum over one op, so nothing is above it.
        problem = joint_graphs.load(name)
        assert bounds.proved_floor(problem, time_limit_s=0.5) == bounds.peak_floor(problem)
    problem = joint_graphs.load("resnet50-b8x224")
    top = keep_all_peak(problem)
    # The reruns before the last blocks' backward take more than any single op; a schedule is known at .2723.
    assert bounds.peak_floor(problem).bytes < 0.249 * top
    assert 0.265 * top < bounds.proved_floor(problem, time_limit_s=5).bytes < 0.2723 * top


def needs_a_burst(large: int) -> Problem:
    """``b`` must be dropped while ``eat`` runs, and to rerun it takes ``a`` of ``large`` bytes as well."""
    ops = (
        Op("a", (), (0,), 1.0),
        Op("b", (0,), (1,), 1.0),
        Op("wide", (), (2,), 1.0, recomputable=False),
        Op("eat", (2,), (3,), 1.0, recomputable=False),
        Op("end", (1, 3), (4,), 1.0, recomputable=False),
    )
    values = tuple(Value(f"v{k}", size, k) for k, size in enumerate((large, 4, 14, 9, 1)))
    return Problem(ops, values, turn=2)


def test_a_burst_row_raises_the_floor_and_proves_what_cannot_be() -> None:
    roomy, tight = needs_a_burst(10), needs_a_burst(12)
    for problem, low in ((roomy, 23), (tight, 25)):
        assert bounds.peak_floor(problem).bytes == 23
        assert least_peak(problem)[0] == bounds.proved_floor(problem).bytes == low
        assert optimum(problem, [3, 4], None) == pytest.approx(23)
        assert optimum(problem, [3, 4], None, bursts={0, 1}) == pytest.approx(low)
    assert bounds.time_bound(roomy, 23) == 7
    assert solve_by_refining(roomy, 23).status == "optimal"
    assert bounds.time_bound(tight, 24) == math.inf
    with pytest.raises(InfeasibleError):
        solve_by_refining(tight, 24)


def test_what_is_emitted_is_a_schedule_with_the_programs_cost() -> None:
    problem = random_training_graph(3)
    budget = round(0.6 * keep_all_peak(problem))
    instants = pressure_instants(problem, 3)
    program = InstantProgram(Facts.of(problem), instants, budget)
    answer = program.lp.solve(time_limit_s=30, relative_gap=0.0)
    assert answer.x is not None
    line = simulate_steps(problem, emitted(program, answer.x))
    assert line.recompute_seconds <= answer.objective * program.unit_s * (1 + 1e-6)
    position = np.flatnonzero(line.steps == instants[0])[0]
    assert line.live_bytes[position] <= budget


def test_values_that_weigh_little_are_left_out() -> None:
    rows = [
        {"name": "norm", "inputs": [], "outputs": ["h", "mean", "flag"], "seconds": 2.0},
        {"name": "relu", "inputs": ["h"], "outputs": ["y"], "seconds": 3.0},
        {"name": "loss", "inputs": ["y", "mean", "flag"], "outputs": ["z"], "seconds": 1.0},
    ]
    problem = Problem.build(rows, {"h": 8, "mean": 2, "flag": 0, "y": 8, "z": 1}, final=["z"])

    def counted(free_bytes: int) -> str:
        kept = Facts.of(problem, free_bytes).counted
        return " ".join(v.name for v, counts in zip(problem.values, kept, strict=True) if counts)

    assert counted(0) == counted(1) == "h mean y"
    assert counted(2) == counted(9) == "h y"
    assert counted(18) == ""


def test_degenerate_problems() -> None:
    empty = Problem((), (), resident_bytes=3)
    assert bounds.time_bound(empty, 3) == 0 and bounds.proved_floor(empty).bytes == 3
    one = Problem((Op("only", (), (0,), 2.0),), (Value("v", 5, 0),), turn=1)
    assert bounds.time_bound(one, 5) == 2.0 and bounds.time_bound(one, 4) == math.inf
    forward = replace(training_chain(2, 2), turn=None)
    for turn in (None, 0, len(forward)):
        problem = replace(forward, turn=turn)
        budget = keep_all_peak(problem) - 1
        assert (
            problem.total_seconds
            < bounds.time_bound(problem, budget)
            <= truth_of(problem, budget) * (1 + 1e-7)
        )


class RoundsOfASecond:
    """A clock that only programs move: each takes a second, however long it is given (which is noted)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s, self.given_s, lp = 0.0, list[float](), LinearProgram.solve

        def solve(program: LinearProgram, *, time_limit_s: float, **options: Any) -> LinearAnswer:
            self.now_s += 1.0
            self.given_s.append(time_limit_s)
            return lp(program, time_limit_s=60, **options)

        patch.setattr(LinearProgram, "solve", solve)
        patch.setattr(refining, "time", SimpleNamespace(perf_counter=lambda: self.now_s))


def test_enough_is_enough_and_the_clock_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = joint_graphs.load("resnet50-b8x224")
    budget = round(0.3 * keep_all_peak(problem))
    clock = RoundsOfASecond(monkeypatch)
    bound = bounds.time_bound(problem, budget, time_limit_s=3)
    assert len(clock.given_s) == 3 and all(given <= 3 - i for i, given in enumerate(clock.given_s))
    assert share(problem, bound - problem.total_seconds) > 10
    some = 1.05 * problem.total_seconds
    assert some <= bounds.time_bound(problem, budget, time_limit_s=60, enough_seconds=some) < bound * 1.01
    assert len(clock.given_s) == 3 + 1
    assert bounds.time_bound(problem, keep_all_peak(problem), time_limit_s=60) == problem.total_seconds
    assert bounds.time_bound(problem, budget, time_limit_s=0) >= problem.total_seconds


def test_a_plan_comes_back_where_nothing_fits_in_time() -> None:
    problem = joint_graphs.load("resnet50-b8x224")
    budget = round(0.27 * keep_all_peak(problem))
    found = solve_by_refining(problem, budget, time_limit_s=1)
    assert found.status == "unsettled"
    assert simulate(problem, Schedule(found.schedule.sequence)).peak_bytes == found.peak_bytes > budget
