"""All budgets at once, and what renaming and other units leave as it is."""

from __future__ import annotations

import _thread
import math
import pickle
import random
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from solvers import InfeasibleError, Op, Problem, Solution, Value, frontier, minimum_peak, simulate, solve
from solvers.bounds import lower_bounds as bounds
from solvers.core.incumbent import Incumbent
from solvers.core.solution import with_floor
from solvers.portfolio import Methods
from solvers.staged import method as staged
from solvers.staged.program import StagedProgram
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, from_seeds, least_peak, tense_problem, training_chain

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def budgets_of(problem: Problem, count: int) -> list[int]:
    """From just below the floor to the peak of keeping everything."""
    floor, top = bounds.peak_floor(problem).bytes, keep_all_peak(problem)
    return [max(1, floor - 1), *(round(floor + k * (top - floor) / (count - 1)) for k in range(count))]


def random_dag(rng: random.Random, ops: int) -> Problem:
    """A DAG without a turn: each op reads one recent value and perhaps some old ones."""
    rows, values = [], []
    for i in range(ops):
        inputs = {rng.randrange(max(0, i - 3), i)} if i else set()
        inputs |= {rng.randrange(i) for _ in range(rng.choice([0, 0, 1, 2])) if i}
        rows.append(Op(f"op{i}", tuple(sorted(inputs)), (i,), rng.randint(1, 9) / 4))
        values.append(Value(f"v{i}", rng.randint(1, 30), i, rng.random() < 0.05))
    return Problem(tuple(rows), tuple(values), name=f"dag of {ops}")


LARGER = {
    "training chain": training_chain(layers=4, ops_per_layer=3),
    "skips": random_training_graph(3),
    "long skips": random_training_graph(7, layers=8),
    "dag of 30": random_dag(random.Random(1), 30),
    "dag of 60": random_dag(random.Random(2), 60),
}


@pytest.fixture(scope="module", params=LARGER)
def larger(request: pytest.FixtureRequest) -> tuple[Problem, dict[int, Solution | InfeasibleError]]:
    problem = LARGER[request.param]
    return problem, frontier(problem, budgets_of(problem, 5), time_limit_s=0.6)


Answers = tuple[Problem, dict[int, Solution | InfeasibleError]]


def test_answers_are_what_the_simulator_says(larger: Answers) -> None:
    problem, answers = larger
    names = [op.name for op in problem.ops]
    for budget, answer in answers.items():
        if isinstance(answer, InfeasibleError):
            assert answer.budget_bytes == budget < answer.floor_bytes
            continue
        line = simulate(problem, answer.schedule)
        assert (line.peak_bytes, line.seconds) == (answer.peak_bytes, answer.seconds)
        assert answer.budget_bytes == budget
        assert list(dict.fromkeys(answer.schedule.sequence)) == names
        assert (answer.status == "unsettled") == (line.peak_bytes > budget)
        assert problem.total_seconds <= answer.bound_seconds
        assert line.seconds - line.recompute_seconds == pytest.approx(problem.total_seconds)
        if answer.fits:
            assert answer.bound_seconds <= answer.seconds
            assert (answer.status == "optimal") == (
                answer.seconds - answer.bound_seconds <= 1e-9 * answer.seconds
            )


def test_more_memory_never_costs_more(larger: Answers) -> None:
    problem, answers = larger
    assert list(answers) == sorted(answers)
    solved = [answer for answer in answers.values() if isinstance(answer, Solution)]
    # On general DAGs so little time may find nothing between the floor and keeping everything.
    assert problem.turn is None or any(answer.recompute_seconds > 0 for answer in solved if answer.fits)
    assert solved[-1].recompute_seconds == 0 and solved[-1].status == "optimal"
    for less, more in pairwise(solved):
        assert more.bound_seconds <= less.bound_seconds
        if less.fits:
            assert more.fits and more.seconds <= less.seconds
    # A budget that is refused is below all that are not.
    refused = [b for b, answer in answers.items() if isinstance(answer, InfeasibleError)]
    assert refused == list(answers)[: len(refused)]
    # One is below the floor of a single first run, one at it, which a higher floor may exceed.
    assert len(refused) <= 2


@settings(quick, max_examples=settings.default.max_examples // 2)
@given(from_seeds(tense_problem))
def test_frontier_of_small_graphs_is_the_true_one(problem: Problem) -> None:
    low, top = least_peak(problem)[0], keep_all_peak(problem)
    answers = frontier(problem, [b for b in range(low - 1, top + 1) if b > 0], time_limit_s=math.inf)
    for budget, answer in answers.items():
        truth = best_seconds(problem, budget)
        if isinstance(answer, InfeasibleError):
            assert truth is None
        elif answer.fits:
            assert truth is not None
            assert truth[0] - 1e-9 <= answer.seconds
            of_class = best_seconds(problem, budget, 2)
            assert of_class is None or answer.seconds <= of_class[0] + 1e-9
        else:
            assert best_seconds(problem, budget, 2) is None


def test_budgets_may_repeat_come_in_any_order_and_have_fractions() -> None:
    problem = LARGER["training chain"]
    top = keep_all_peak(problem)
    answers = frontier(problem, [top, 0.8 * top, top + 5, top], time_limit_s=0.5)
    assert list(answers) == [math.floor(0.8 * top), top, top + 5]
    assert frontier(problem, []) == {}
    with pytest.raises(ValueError, match="want a finite number above 0"):
        frontier(problem, [0, top])
    with pytest.raises(TypeError, match="want a number of bytes"):
        frontier(problem, ["9"])  # type: ignore[list-item]


def test_what_methods_build_serves_other_budgets() -> None:
    """Kept programs give what fresh ones give."""
    problem = random_training_graph(4, layers=6)
    floor, top = bounds.peak_floor(problem).bytes, keep_all_peak(problem)
    budgets = [round(floor + f * (top - floor)) for f in (0.8, 0.5, 0.7)]
    kept = Methods(problem)
    for budget in budgets:
        again = solve(problem, budget, time_limit_s=1, methods=kept)
        assert again.fits and simulate(problem, again.schedule).peak_bytes <= budget


def renamed(problem: Problem) -> Problem:
    """Other names for ops and values, in another alphabetical order; groups stay apart."""
    n, m = len(problem), len(problem.values)
    groups = {group: f"g{len(problem) - k}" for k, group in enumerate({op.group: None for op in problem.ops})}
    groups[None] = None  # type: ignore[index]
    return replace(
        problem,
        ops=tuple(
            replace(op, name=f"x{n - i:04d}", group=groups[op.group]) for i, op in enumerate(problem.ops)
        ),
        values=tuple(replace(v, name=f"y{m - k:04d}") for k, v in enumerate(problem.values)),
    )


def in_other_units(problem: Problem, size: int, speed: float) -> Problem:
    """Bytes times ``size``, seconds times ``speed``."""
    return replace(
        problem,
        ops=tuple(
            replace(op, seconds=op.seconds * speed, workspace_bytes=op.workspace_bytes * size)
            for op in problem.ops
        ),
        values=tuple(replace(v, bytes=v.bytes * size) for v in problem.values),
        resident_bytes=problem.resident_bytes * size,
    )


SOME_DOZEN = [random_training_graph(seed, layers=3, width=2) for seed in range(4)]


@pytest.mark.parametrize("problem", [*SOME_DOZEN, LARGER["training chain"], LARGER["dag of 30"]])
def test_names_do_not_matter(problem: Problem) -> None:
    budget = round(0.75 * keep_all_peak(problem))
    other = renamed(problem)
    one = solve(problem, budget, time_limit_s=math.inf)
    two = solve(other, budget, time_limit_s=math.inf)
    assert one.recompute_seconds > 0
    assert two.schedule.steps(other) == one.schedule.steps(problem)
    assert (two.bound_seconds, two.status, two.solver) == (one.bound_seconds, one.status, one.solver)


@pytest.mark.parametrize("problem", SOME_DOZEN)
@pytest.mark.parametrize(("size", "speed"), [(2, 1.0), (1024, 1.0), (3 * 10**8, 1.0), (1, 2.0), (1, 1e-6)])
def test_units_do_not_matter(problem: Problem, size: int, speed: float) -> None:
    """The optimum of small graphs, and what is proved about it."""
    budget = round(0.75 * keep_all_peak(problem))
    one = solve(problem, budget, time_limit_s=math.inf)
    two = solve(in_other_units(problem, size, speed), budget * size, time_limit_s=math.inf)
    assert one.recompute_seconds > 0
    assert two.seconds == pytest.approx(one.seconds * speed, rel=1e-9)
    assert two.peak_bytes <= budget * size
    assert two.bound_seconds == pytest.approx(one.bound_seconds * speed, rel=1e-6)
    assert (
        bounds.peak_floor(in_other_units(problem, size, speed)).bytes
        == size * bounds.peak_floor(problem).bytes
    )


def test_resident_bytes_move_every_budget() -> None:
    problem = SOME_DOZEN[0]
    budget = round(0.75 * keep_all_peak(problem))
    one = solve(problem, budget, time_limit_s=math.inf)
    two = solve(replace(problem, resident_bytes=10**6), budget + 10**6, time_limit_s=math.inf)
    assert one.recompute_seconds > 0
    assert (two.seconds, two.peak_bytes) == (one.seconds, one.peak_bytes + 10**6)


def test_least_peak_of_larger_graphs_is_at_or_above_the_floor(larger: Answers) -> None:
    problem, answers = larger
    least = minimum_peak(problem, time_limit_s=2)
    assert least.peak_bytes == least.budget_bytes == simulate(problem, least.schedule).peak_bytes
    assert bounds.peak_floor(problem).bytes <= least.peak_bytes <= keep_all_peak(problem)
    for answer in answers.values():
        if isinstance(answer, InfeasibleError):
            assert answer.floor_bytes <= least.peak_bytes


def left_behind(methods: Methods, release: threading.Event) -> int:
    """A search that is not back by its limit, as it waits for ``release``; its budget."""
    budget = round(0.6 * keep_all_peak(methods.problem))
    solve(methods.problem, budget, time_limit_s=0.7, methods=methods)
    assert not release.is_set()
    return budget


def test_a_search_that_is_left_behind_does_not_share_what_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, cut, release = [], staged.Stages, threading.Event()

    def slowly(*args: Any) -> object:
        begun.append(threading.get_ident())
        if len(begun) == 1:
            release.wait()
        return cut(*args)

    monkeypatch.setattr(staged, "Stages", slowly)
    methods = Methods(random_training_graph(4, layers=6))
    budget = left_behind(methods, release)
    assert len(begun) == 1
    assert solve(methods.problem, budget + 9, time_limit_s=20, methods=methods).fits
    assert len(set(begun)) == 2
    release.set()


def test_a_search_that_is_left_behind_does_not_share_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is of one budget for as long as a search works on it."""
    busy: list[object] = []
    changed: list[bool] = []
    relax, release, judged = staged._relax, threading.Event(), threading.Semaphore(0)
    waiting = True

    def slowly(run: Incumbent, program: StagedProgram, seed: int) -> None:
        busy.append(program)
        if waiting:
            before = program.budget_bytes
            release.wait()
            changed.append(program.budget_bytes != before)
            judged.release()
        relax(run, program, seed)

    monkeypatch.setattr(staged, "_relax", slowly)
    methods = Methods(random_training_graph(4, layers=6))
    budget = left_behind(methods, release)
    waiting, early = False, len(busy)
    assert early
    assert solve(methods.problem, budget + 9, time_limit_s=20, methods=methods).fits
    release.set()
    for _ in range(early):
        judged.acquire()
    assert len({*map(id, busy)}) == len(busy) > early and changed == early * [False]


def test_programs_are_kept_for_the_next_budget() -> None:
    methods = Methods(random_training_graph(4, layers=6))
    top = keep_all_peak(methods.problem)
    kept = []
    for share in (0.8, 0.6):
        solve(methods.problem, share * top, time_limit_s=20, methods=methods)
        kept.append(methods._kept)
    assert kept[0] is kept[1] is not None


def test_the_floor_of_an_answer_is_the_highest_proved() -> None:
    """That of the least peak, proved by search, and not the one that takes no search."""
    problem = random_dag(random.Random(3), 60)
    cheap = bounds.peak_floor(problem).bytes
    proved = bounds.proved_floor(problem, time_limit_s=20, least_bytes=cheap + 2).bytes
    least = minimum_peak(problem, time_limit_s=4)
    assert cheap < proved <= least.floor_bytes <= least.peak_bytes
    below = solve(problem, keep_all_peak(problem))
    assert below.floor_bytes == cheap  # nothing had to be searched for


def test_what_one_budget_proves_holds_for_all() -> None:
    """The search at the lowest budget proves a floor that also refuses the next, and is in every answer."""
    problem = random_dag(random.Random(3), 60)
    cheap, top = bounds.peak_floor(problem).bytes, keep_all_peak(problem)
    answers = frontier(problem, [cheap - 1, cheap, top], time_limit_s=6)
    first, second, last = answers.values()
    assert isinstance(first, InfeasibleError) and isinstance(second, InfeasibleError)
    assert isinstance(last, Solution)
    assert first.floor_bytes == second.floor_bytes == last.floor_bytes > cheap
    assert pickle.loads(pickle.dumps(first)).floor_bytes == first.floor_bytes


@quick
@given(from_seeds(tense_problem))
def test_floors_of_small_graphs_are_below_every_schedule(problem: Problem) -> None:
    low, top = least_peak(problem)[0], keep_all_peak(problem)
    least = minimum_peak(problem, time_limit_s=math.inf)
    assert bounds.peak_floor(problem).bytes <= least.floor_bytes <= low
    for answer in frontier(problem, [max(1, low - 1), low, top], time_limit_s=math.inf).values():
        assert 0 < answer.floor_bytes <= low


def test_a_wrong_floor_is_an_error() -> None:
    problem = LARGER["training chain"]
    answer = solve(problem, keep_all_peak(problem))
    with pytest.raises(RuntimeError, match="no schedule peaks below"):
        with_floor(problem, answer, answer.peak_bytes + 1)


@pytest.mark.parametrize("ended", [True, False])
def test_a_listener_that_ends_a_search_ends_all(ended: bool) -> None:
    """No further budget is searched, and each has an answer that fits where any baseline or plan does."""
    problem = random_training_graph(7, layers=8)
    top = keep_all_peak(problem)
    budgets = [round(share * top) for share in (0.65, 0.75, 0.85, 1.0)]
    told: list[int] = []

    def listen(solution: Solution) -> bool:
        told.append(solution.budget_bytes)
        return ended and solution.fits

    answers = frontier(problem, budgets, time_limit_s=3600.0 if ended else 0.5, progress=listen)
    assert list(answers) == budgets and set(told) >= {budgets[0]}
    assert (set(told) == {budgets[0]}) == ended
    solved = [answer for answer in answers.values() if isinstance(answer, Solution)]
    assert len(solved) == 4 and all(answer.fits for answer in solved)
    assert [answer.interrupted for answer in solved] == [ended] * 4
    assert solved[-1].status == "optimal"
    for less, more in pairwise(solved):
        assert more.seconds <= less.seconds


def test_ctrl_c_ends_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heard while the first budget's search runs; the rest is answered without a search."""
    searched: list[int] = []
    search = Methods.search

    def interrupted(self: Methods, run: Incumbent, seed: int = 0) -> None:
        searched.append(run.budget_bytes)
        _thread.interrupt_main()
        time.sleep(0.5)  # the main thread is waiting, and hears it
        search(self, run, seed)

    monkeypatch.setattr(Methods, "search", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        problem = random_training_graph(7, layers=8)
        top = keep_all_peak(problem)
        answers = frontier(problem, [0.7 * top, 0.8 * top, top], time_limit_s=600)
        least = minimum_peak(problem, time_limit_s=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert searched == [math.floor(0.7 * top)]
    assert all(isinstance(answer, Solution) and answer.interrupted for answer in answers.values())
    assert not least.interrupted
