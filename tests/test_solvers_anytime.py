"""Searches that are watched, ended early, limited or repeated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from solvers import Problem, Schedule, Solution, frontier, minimum_peak, simulate, solve
from solvers.core.incumbent import ENOUGH, Incumbent
from tests import joint_graphs
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.signals import HEARD, IGNORING
from tests.solver_graphs import training_chain

ROOT = Path(__file__).parent.parent
# Nothing here measures a clock: where a search is ended, its limit is so far away that coming back shows it.
# `make test-nightly` measures how well limits are kept.
FAR_S = 3600.0


@pytest.fixture(scope="module")
def resnet() -> Problem:
    return joint_graphs.load("resnet50-b8x224")


def half(problem: Problem) -> int:
    return round(0.5 * keep_all_peak(problem))


def assert_only_gets_better(problem: Problem, budget: int, seen: list[Solution]) -> None:
    """Every report true, none worse than the one before, each better in something."""
    assert seen
    for solution in seen:
        line = simulate(problem, solution.schedule)
        assert (line.seconds, line.peak_bytes) == (solution.seconds, solution.peak_bytes)
        assert solution.budget_bytes == budget
        if solution.fits:
            assert solution.gap_seconds == pytest.approx(solution.seconds - solution.bound_seconds)
            assert solution.gap_seconds >= 0
    for before, after in pairwise(seen):
        assert after.bound_seconds >= before.bound_seconds or after.bound_seconds == after.seconds
        assert after.solve_seconds >= before.solve_seconds
        if before.fits:
            assert after.fits and after.seconds <= before.seconds
            assert after.gap_seconds <= before.gap_seconds
        else:
            assert after.fits or after.peak_bytes <= before.peak_bytes


@pytest.mark.parametrize("seed", range(3))
def test_reports_only_get_better(seed: int) -> None:
    problem = random_training_graph(seed, layers=6)
    budget = round(0.55 * keep_all_peak(problem))
    seen: list[Solution] = []
    best = solve(problem, budget, time_limit_s=4, seed=seed, progress=seen.append)
    assert_only_gets_better(problem, budget, seen)
    assert best.fits
    assert (best.seconds, best.schedule) == (seen[-1].seconds, seen[-1].schedule)
    assert best.bound_seconds == seen[-1].bound_seconds


def test_reports_of_a_real_graph(resnet: Problem) -> None:
    seen: list[Solution] = []
    solve(resnet, half(resnet), time_limit_s=6, progress=seen.append)
    assert_only_gets_better(resnet, half(resnet), seen)
    assert len({solution.solver for solution in seen}) > 1


def test_a_callback_that_returns_true_ends_the_search(resnet: Problem) -> None:
    seen: list[Solution] = []

    def enough(solution: Solution) -> bool:
        seen.append(solution)
        return solution.fits and solution.solver not in ("every_block", "sqrt", "recompute_all")

    best = solve(resnet, half(resnet), time_limit_s=FAR_S, progress=enough)
    assert best.fits and best.interrupted
    # What was in flight when the search was ended may still have come in, if it was better.
    assert best.seconds <= min(solution.seconds for solution in seen if solution.fits)


def test_a_callback_that_returns_true_at_once(resnet: Problem) -> None:
    best = solve(resnet, half(resnet), time_limit_s=FAR_S, progress=lambda _: True)
    assert best.interrupted and best.schedule != Schedule.keep_all(resnet)


def test_an_error_in_a_callback_comes_out() -> None:
    problem = random_training_graph(0)

    def broken(solution: Solution) -> None:
        raise LookupError(f"no place for {solution.solver}")

    with pytest.raises(LookupError, match="no place for"):
        solve(problem, half(problem) + 20, time_limit_s=5, progress=broken)


def test_frontier_hands_its_callback_on() -> None:
    problem = random_training_graph(0)
    top = keep_all_peak(problem)
    seen: list[Solution] = []
    frontier(problem, [0.7 * top, 0.9 * top], time_limit_s=1, progress=seen.append)
    assert {solution.budget_bytes for solution in seen} == {math.floor(0.7 * top), math.floor(0.9 * top)}


# Ctrl-C comes with the first plan that takes a search, so always in the middle of one.
INTERRUPTED = """
import json, os, signal, sys
from solvers import minimum_peak, simulate, solve
from solvers.core.incumbent import Incumbent
from tests import joint_graphs

name, what = sys.argv[1:]
problem = joint_graphs.load(name)
budget = round(0.6 * joint_graphs.keep_all_peak(problem))
sent, offer = [], Incumbent.offer

def offer_and_interrupt(self, steps, solver):
    verdict = offer(self, steps, solver)
    if solver in ("staged", "chain", "local search") and not sent:
        sent.append(solver)
        os.kill(os.getpid(), signal.SIGINT)
    return verdict

Incumbent.offer = offer_and_interrupt
if what == "solve":
    best = solve(problem, budget, time_limit_s=3600)
else:
    best = minimum_peak(problem, time_limit_s=3600)
line = simulate(problem, best.schedule)
print(json.dumps({
    "sent": len(sent),
    "fits": best.fits,
    "as_simulated": (line.seconds, line.peak_bytes) == (best.seconds, best.peak_bytes),
    "lower": best.peak_bytes < joint_graphs.keep_all_peak(problem),
    "interrupted": best.interrupted,
}))
"""


@pytest.mark.parametrize(("name", "what"), [("unet-d4c64-b4x256", "solve"), ("gpt2-b8x512", "minimum_peak")])
def test_ctrl_c_returns_the_best_so_far(name: str, what: str) -> None:
    """In the middle of a search; the process ends soon after as well."""
    done = subprocess.run(
        [*IGNORING, sys.executable, "-c", HEARD + INTERRUPTED, name, what],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=FAR_S / 6,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["sent"] == 1
    assert answer["fits"] and answer["as_simulated"] and answer["lower"] and answer["interrupted"]
    assert "interrupted: answering with the best schedule so far" in done.stderr


@pytest.mark.parametrize("name", joint_graphs.NAMES)
def test_no_time_at_all_answers_with_a_baseline(name: str) -> None:
    problem = joint_graphs.load(name)
    names = ("keep_all", "recompute_all", "every_block", "sqrt")
    baselines = [solve(problem, half(problem), solver=baseline) for baseline in names]
    best = min((s for s in baselines if s.fits), key=lambda s: s.seconds)
    answer = solve(problem, half(problem), time_limit_s=0)
    assert (answer.seconds, answer.solver) == (best.seconds, best.solver)
    assert answer.status == "feasible"
    assert solve(problem, keep_all_peak(problem), time_limit_s=0).status == "optimal"


@pytest.mark.parametrize("limit_s", [0, 1e-9, 1e-3])
def test_hardly_any_time_is_no_error(limit_s: float) -> None:
    for problem in (random_training_graph(1), training_chain(2, 2), Problem((), ())):
        budget = max(1, round(0.8 * keep_all_peak(problem)))
        assert simulate(problem, solve(problem, budget, time_limit_s=limit_s).schedule).seconds >= 0
        least = minimum_peak(problem, time_limit_s=limit_s)
        assert least.fits and least.peak_bytes <= keep_all_peak(problem)


@pytest.mark.parametrize("solver", ["auto", "staged", "chain", "exact"])
def test_a_limit_ends_the_search(resnet: Problem, solver: str) -> None:
    """It comes back without having closed the gap, which would take minutes."""
    answer = solve(resnet, 0.3 * keep_all_peak(resnet), solver=solver, time_limit_s=0.5)
    assert answer.status != "optimal" and not answer.interrupted


def test_without_a_limit_the_search_ends_by_itself() -> None:
    for seed in range(3):
        problem = random_training_graph(seed, layers=3, width=2)
        budget = round(0.7 * keep_all_peak(problem))
        answer = solve(problem, budget, time_limit_s=math.inf, seed=seed)
        least = minimum_peak(problem, time_limit_s=math.inf, seed=seed)
        assert answer.fits and least.peak_bytes <= answer.peak_bytes
        assert answer.gap_seconds <= ENOUGH * problem.total_seconds


REPEATED = """
import hashlib, math, sys
from solvers import minimum_peak, solve
from tests.joint_graphs import keep_all_peak, random_training_graph

words = hashlib.sha256()
for graph in (random_training_graph(5, layers=3), random_training_graph(6, layers=4)):
    budget = round(0.7 * keep_all_peak(graph))
    found = solve(graph, budget, time_limit_s=math.inf, seed=int(sys.argv[1]))
    assert found.fits and found.recompute_seconds > 0
    words.update(repr((found.schedule.sequence, found.bound_seconds, found.solver)).encode())
print(words.hexdigest())
"""


def repeated(hash_seed: int, seed: int = 3) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [sys.executable, "-c", REPEATED, str(seed)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=FAR_S,
        check=True,
    ).stdout


def test_same_seed_same_schedule_whatever_else_runs() -> None:
    """In processes that hash names differently, and with every core busy."""
    quiet = repeated(0)
    spin = "while True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        loud = repeated(12345)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert quiet == loud
    assert len(quiet.split()) == 1


def test_offers_are_ranked_by_bytes_over_the_budget_then_seconds_then_peak() -> None:
    problem = training_chain(3, 2)
    top = keep_all_peak(problem)
    run = Incumbent(problem, top - 1)
    assert not run.fits and not run.settled and run.solver == "keep_all"
    keep_all = list(range(len(problem)))
    useless = [0, *keep_all]
    assert not run.offer(useless, "hand").taken
    assert run.offer(keep_all, "hand").peak_bytes == top
    assert (run.lowest.peak_bytes, run.solver) == (top, "keep_all")
    dropped = solve(problem, top - 1).schedule.steps(problem)
    assert run.offer(dropped, "hand").taken and run.fits
    assert repr(run).startswith("Incumbent(")
    assert not run.offer(keep_all, "hand").taken
    run.raise_bound(run.total_s + run.recompute_s)
    run.raise_bound(0.0)
    assert run.settled and run.done and run.gap_s == 0
    assert run.solution().status == "optimal"
    run.stop()
    assert run.left_s == 0


def test_what_is_read_of_an_incumbent_is_of_one_moment() -> None:
    """An offer that comes in while another thread reads changes nothing of what that thread has."""
    problem = training_chain(3, 2)
    top = keep_all_peak(problem)
    run = Incumbent(problem, top - 1)
    better = solve(problem, top - 1).schedule.steps(problem)
    run.offer(list(range(len(problem))), "keep_all")
    run.offer([0, *range(len(problem))], "once more")
    starts = iter(run.starts.values())
    next(starts)
    run.offer(list(range(len(problem))), "and again")
    assert len(list(starts)) == 1
    near, best, lowest = iter(run.near), run.best, run.lowest
    assert run.offer(better, "another method").taken
    assert all(offer.peak_bytes == top for offer in near)
    assert len(best.steps) == len(best.line.steps) == len(problem) and best.solver == "keep_all"
    assert (lowest.steps, lowest.peak_bytes) == (best.steps, best.line.peak_bytes)
    assert run.best.steps == better and run.best.line.steps.tolist() == better
    assert run.lowest.steps == better and len(run.starts) == 4


def test_a_hint_that_is_no_schedule_of_this_problem_is_left_aside() -> None:
    """A plan of a like step in which two ops have changed places."""
    problem = training_chain(4, 2)
    order = list(Schedule.keep_all(problem).sequence)
    order[0], order[1] = order[1], order[0]
    budget = half(problem) + keep_all_peak(problem) // 4
    found = solve(problem, budget, time_limit_s=5.0, hint=Schedule(tuple(order)))
    assert found.seconds == solve(problem, budget, time_limit_s=5.0).seconds
