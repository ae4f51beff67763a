"""Shaving: what a drop is said to do is what the simulator sees, and nothing ever gets worse."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from solvers import Op, Problem, Schedule, Value, simulate
from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import trim
from solvers.core.simulate import simulate_steps
from solvers.search import shave
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, from_seeds, least_peak, tense_problem

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tight(problem: Problem, share: float) -> Incumbent:
    """A search for a budget ``share`` of the way from the least peak known to the most."""
    low = max(v.bytes for v in problem.values)
    return Incumbent(problem, round(low + share * (keep_all_peak(problem) - low)))


@pytest.mark.parametrize("seed", range(12))
def test_drops_do_to_the_bytes_what_they_say(seed: int) -> None:
    problem = random_training_graph(seed, layers=4)
    run = tight(problem, 0.5)
    steps = list(range(len(problem)))
    line = run.line
    places = shave.Places(run, steps, line)
    drops = places.drops()
    assert drops
    for drop in drops:
        changed = [*steps[: drop.b], *drop.ops, *steps[drop.b :]]
        if trim(problem, changed) != changed:
            continue
        after = simulate_steps(problem, changed)
        expected = line.live_bytes.copy()
        expected[drop.a + 1 : drop.b] -= drop.size
        burst = line.kept_bytes[drop.b - 1] - drop.size + drop.burst
        assert after.live_bytes.tolist() == np.insert(expected, drop.b, burst).tolist()
        assert after.recompute_seconds - line.recompute_seconds == pytest.approx(drop.again_s)


@pytest.mark.parametrize("seed", range(12))
def test_drops_that_agree_add_up(seed: int) -> None:
    problem = random_training_graph(seed, layers=5)
    steps, rng = list(range(len(problem))), random.Random(seed)
    run = tight(problem, 0.3)
    drops = shave.Places(run, steps, run.line).drops()
    rng.shuffle(drops)
    chosen: list[shave._Drop] = []
    for drop in drops:
        if all(drop.agrees(other) for other in chosen):
            chosen.append(drop)
    assert len(chosen) >= 3
    expected = run.line.live_bytes.copy()
    changed = list(steps)
    for drop in sorted(chosen, key=lambda drop: -drop.b):
        expected[drop.a + 1 : drop.b] -= drop.size
        changed[drop.b : drop.b] = drop.ops
    if trim(problem, changed) == changed:
        after = simulate_steps(problem, changed)
        again = set(np.flatnonzero(np.diff(np.maximum.accumulate(changed), prepend=-1) == 0).tolist())
        assert [b for s, b in enumerate(after.live_bytes.tolist()) if s not in again] == expected.tolist()


@quick
@given(from_seeds(lambda rng: tense_problem(rng, 6)))
def test_never_worse_and_never_better_than_the_best(problem: Problem) -> None:
    low = least_peak(problem)[0]
    for budget in {low, (low + keep_all_peak(problem)) // 2}:
        run = Incumbent(problem, budget)
        before = run.best.over
        shave.shave(run, range(len(problem)), deadline=math.inf)
        assert run.best.over <= before
        simulate(problem, Schedule.of(problem, run.steps))
        truth = best_seconds(problem, budget)
        assert truth is not None and (not run.fits or run.total_s + run.recompute_s >= truth[0] - 1e-9)


def test_most_small_excesses_are_shaved() -> None:
    fit = 0
    for seed in range(20):
        problem = random_training_graph(seed, layers=6)
        run = Incumbent(problem, round(0.8 * keep_all_peak(problem)))
        shave.shave(run, range(len(problem)), deadline=math.inf)
        fit += run.fits
    assert fit >= 18


def gelu_backward() -> Problem:
    """h makes g; the gradient of g (pinned, as large) is made before an op that reads g again.

    In between there is an op whose workspace leaves no room to hold g.
    """
    ops = (
        Op("x", (), (0,), 1.0),
        Op("h", (0,), (1,), 1.0),
        Op("g", (1,), (2,), 1.0),
        Op("loss", (2,), (3,), 1.0, recomputable=False),
        Op("other", (3,), (4,), 1.0, 20, recomputable=False),
        Op("gradient of g", (4,), (5,), 1.0, recomputable=False),
        Op("gradient of weight", (2, 4), (6,), 1.0, recomputable=False),
        Op("gradient of h", (1, 5), (7,), 1.0, recomputable=False),
    )
    sizes = (1, 10, 10, 1, 1, 10, 1, 1)
    return Problem(ops, tuple(Value(f"v{i}", s, i) for i, s in enumerate(sizes)), turn=3, name="gelu")


def test_a_rerun_beside_a_gradient_is_hoisted_before_it() -> None:
    problem = gelu_backward()
    # g made again after its gradient has h, g and the gradient in memory at once: 30 bytes and more.
    late = [0, 1, 2, 3, 4, 5, 1, 2, 6, 1, 7]
    assert simulate_steps(problem, late).peak_bytes > 30
    run = Incumbent(problem, 25)
    shave.shave(run, late, deadline=math.inf)
    assert run.fits and run.solver == "shave"
    assert run.steps.index(2, 4) < run.steps.index(5)


def test_what_waits_for_a_recomputation_gives_way_to_what_that_made() -> None:
    # c waits while a is made again, for n to be made again from it; c takes 67 bytes of scratch, so it can be
    # made again at the end, but not while gb (8) is there, nor before ga (30) is gone.
    ops = (
        Op("x", (), (0,), 1.0),
        Op("c", (0,), (1,), 1.0, 67),
        Op("n", (1,), (2,), 1.0),
        Op("a", (2,), (3,), 1.0),
        Op("loss", (3,), (4,), 1.0, recomputable=False),
        Op("ga", (4,), (5,), 1.0, 20, recomputable=False),
        Op("gb", (3, 5), (6,), 1.0, recomputable=False),
        Op("gradient of weight", (2, 6), (7,), 1.0, recomputable=False),
        Op("gradient of c", (1, 7), (8,), 1.0, recomputable=False),
    )
    sizes = (1, 10, 10, 30, 1, 30, 8, 1, 1)
    problem = Problem(ops, tuple(Value(f"v{i}", s, i) for i, s in enumerate(sizes)), turn=4, name="norm")
    waiting = [0, 1, 2, 3, 4, 1, 5, 2, 3, 6, 2, 7, 8]
    assert simulate_steps(problem, waiting).peak_bytes > 79
    run = Incumbent(problem, 79)
    shave.shave(run, waiting, deadline=math.inf)
    assert run.fits and run.solver == "shave"
    assert run.steps.count(2) < waiting.count(2)


def test_a_deadline_ends_it_and_a_faster_plan_makes_it_give_up() -> None:
    problem = random_training_graph(3, layers=6)
    run = tight(problem, 0.4)
    shave.shave(run, run.steps, deadline=time.perf_counter() - 1)
    assert run.steps == list(range(len(problem)))
    best = tight(problem, 0.4)
    shave.shave(best, best.steps, deadline=math.inf)
    assert best.fits
    slow = [*range(problem.turn or 0), *range(problem.turn or 0), *range(problem.turn or 0, len(problem))]
    shave.shave(best, slow, deadline=math.inf)
    assert simulate_steps(problem, best.steps).recompute_seconds == best.recompute_s
