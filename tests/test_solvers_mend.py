"""Mending: what a window is asked for it gives, like places are found, and nothing ever gets worse."""

from __future__ import annotations

import math
import random
import time
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from solvers import Op, Problem, Value, simulate
from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import first_runs, just_in_time_steps
from solvers.core.simulate import simulate_steps
from solvers.search.local_search import Search, Window
from solvers.search.mend import mend
from solvers.search.repeats import Repeats, flat, reruns
from solvers.search.template import template_around
from solvers.search.template_program import TemplateProgram
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, from_seeds, least_peak, tense_problem

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Of a layer: what it keeps of its input (bytes), then two inner values that are made of it in turn.
STATE, INNER = 10, (30, 20)


def equal_layers(count: int) -> Problem:
    """``count`` like layers of three forward and four backward ops, between an input and a loss.

    What a layer's backward frees, the gradient of its weight takes: all layers are as tight.
    """
    ops: list[Op] = []
    values: list[Value] = []

    def op(name: str, reads: list[int], size: int, seconds: float) -> int:
        ops.append(Op(name, tuple(reads), (len(values),), seconds))
        values.append(Value(name, size, len(ops) - 1, final=name.startswith("dw")))
        return len(values) - 1

    state = op("embed", [], STATE, 1.0)
    kept = []
    for k in range(count):
        a = op(f"a{k}", [state], INNER[0], 2.0)
        b = op(f"b{k}", [a], INNER[1], 3.0)
        kept.append((state, a, b))
        state = op(f"out{k}", [state, b], STATE, 4.0)
    turn = len(ops)
    gradient = op("loss", [state], STATE, 1.0)
    for k in reversed(range(count)):
        state, a, b = kept[k]
        db = op(f"db{k}", [gradient, b], INNER[1], 5.0)
        da = op(f"da{k}", [db, a], INNER[0], 5.0)
        gradient = op(f"dx{k}", [gradient, da, state], STATE, 5.0)
        op(f"dw{k}", [gradient], STATE, 1.0)
    return Problem(tuple(ops), tuple(values), turn)


def schedule_of(problem: Problem, rng: random.Random) -> list[int]:
    """A schedule that drops some of the gaps there are, each made again just in time."""
    gaps = [(v, end) for v, readers in enumerate(problem.consumers) for end in readers]
    return just_in_time_steps(problem, [gap for gap in gaps if rng.random() < 0.4])


@pytest.mark.parametrize("seed", range(8))
def test_reruns_are_all_that_a_schedule_is_beside_the_order(seed: int) -> None:
    problem = random_training_graph(seed, layers=4)
    steps = schedule_of(problem, random.Random(seed))
    again = reruns(steps)
    assert len(again) == len(problem) + 1 and sum(map(len, again)) == len(steps) - len(problem)
    assert flat(again) == steps


def test_like_layers_are_found_and_what_is_read_there_is_shifted_too() -> None:
    problem = equal_layers(6)
    repeats, turn = Repeats(problem), problem.turn
    assert turn is not None
    assert repeats.share(6) == pytest.approx(24 / 25) and repeats.share(7) == 0.0
    third = problem.index("db3")
    shifts = repeats.shifts(third, third + 4)
    assert {problem.ops[third + s.behind].name for s in shifts} == {"db5", "db4", "db2", "db1", "db0"}
    for shift in shifts:
        for t in range(third, third + 4):
            # The gradient comes from behind the turn, and for the last layer from the loss.
            for u, v in zip(problem.ops[t].inputs, problem.ops[t + shift.behind].inputs, strict=True):
                if u < turn and problem.ops[u].name[0] in "ab":
                    assert repeats.moved([u], shift) == [v]
        assert repeats.moved([problem.index("a3"), third], shift)[1] == third + shift.behind
    assert repeats.shifts(0, turn) == []


def test_layers_that_grow_are_not_alike() -> None:
    problem = random_training_graph(3, layers=6)
    assert Repeats(problem).share(6) < 0.5


@pytest.mark.parametrize("seed", range(10))
def test_what_a_window_may_do_without_is_weighed_with_all_else(seed: int) -> None:
    """The cheapest of all choices of slots and of values to be without, by looking at every one."""
    rng = random.Random(seed)
    problem = equal_layers(2)
    turn, n = problem.turn, len(problem)
    assert turn is not None
    steps = list(range(n))
    first = [0, turn, turn + 1, turn + 5]
    allowed = [(), (), (1, 2, 4, 5), ()]
    template = template_around(problem, steps, first, allowed, {2})
    optional = [s for s, required in enumerate(template.required) if not required]
    inside = range(template.starts[2], template.ends[2])
    # The first layer's values wait all through the second one's backward.
    waiting = {v: rng.choice([1.5, 2.5, 6.0]) for v in (0, 1, 2)}
    least = max(int(v.bytes) for v in problem.values)
    budget = rng.randrange(least, keep_all_peak(problem))
    limit = np.full(len(template), 10**6)
    limit[inside.start : inside.stop] = budget

    def cost(used: set[int], gone: set[int]) -> float:
        chosen = [s for s in range(len(template)) if template.required[s] or s in used]
        line = simulate_steps(problem, [template.slots[s] for s in chosen])
        less = sum(problem.values[v].bytes for v in gone)
        over = any(s in inside and b - less > budget for s, b in zip(chosen, line.live_bytes, strict=True))
        return math.inf if over else line.recompute_seconds + sum(waiting[v] for v in gone)

    best = math.inf
    for bits in product((False, True), repeat=len(optional) + len(waiting)):
        used = {s for s, bit in zip(optional, bits, strict=False) if bit}
        gone = {v for v, bit in zip(waiting, bits[len(optional) :], strict=True) if bit}
        best = min(best, cost(used, gone))
    program = TemplateProgram(template, limit)
    columns = {v: program.without(v, inside, seconds) for v, seconds in waiting.items()}
    program.memory.add_first()
    while True:
        answer = program.lp.solve(time_limit_s=10, absolute_gap=0.0)
        if answer.x is None or not program.memory.add_violated(answer.x):
            break
    if answer.x is None:
        assert answer.infeasible and best == math.inf
    else:
        assert answer.objective * program.seconds_scale == pytest.approx(best)
        assert set(columns) >= {v for v, column in columns.items() if answer.x[column] > 0.5}


@pytest.mark.parametrize("seed", range(6))
def test_a_window_that_fits_makes_nothing_worse_elsewhere(seed: int) -> None:
    problem = random_training_graph(seed, layers=5)
    turn = problem.turn
    assert turn is not None
    run = Incumbent(problem, round(0.8 * keep_all_peak(problem)))
    window = Window(turn, turn + 6, 6)
    found = Search(run, 0).fitting(window, run.steps, run.line, [], math.inf)
    if found is None:
        return
    line = simulate_steps(problem, found[0])
    place = {i: s for s, i in reversed(list(enumerate(found[0])))}
    assert max(line.live_bytes[place[turn] : place[turn + 5] + 1]) <= run.budget_bytes
    assert line.peak_bytes <= max(run.budget_bytes, run.peak_bytes)


def test_equal_layers_are_mended_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a schedule that is above the budget in every layer, with the windows of a few."""
    windows: list[Window] = []
    fitting = Search.fitting

    def counted(self: Search, window: Window, *rest: Any) -> tuple[list[int], list[int]] | None:
        windows.append(window)
        return fitting(self, window, *rest)

    monkeypatch.setattr(Search, "fitting", counted)
    problem = equal_layers(8)
    turn = problem.turn
    assert turn is not None
    # All that is inner runs again in its own layer's backward, and stays there to its end.
    inner = {f"{x}{k}" for x in "ab" for k in range(8)}
    dropped = [
        (v, end)
        for v, readers in enumerate(problem.consumers)
        if problem.values[v].name in inner
        for end in readers
        if end >= turn
    ]
    stage_of = [0] * (turn + 1) + [1 + k // 4 for k in range(4 * 8)]
    steps = just_in_time_steps(problem, dropped, stage_of=stage_of)
    top = simulate_steps(problem, steps).peak_bytes
    run = Incumbent(problem, top - STATE)
    live = simulate_steps(problem, steps).live_bytes
    over = {first for first, b in zip(first_runs(steps), live, strict=True) if b > run.budget_bytes}
    assert len(over) >= 8
    mended = mend(run, steps, deadline=math.inf, layer=4)
    line = simulate_steps(problem, mended)
    assert line.peak_bytes <= top - STATE and run.fits
    assert 0 < len(windows) <= 4
    assert line.recompute_seconds <= simulate_steps(problem, steps).recompute_seconds + 8 * 5.0


@quick
@given(from_seeds(lambda rng: tense_problem(rng, 6)))
def test_never_worse_and_never_better_than_the_best(problem: Problem) -> None:
    low = least_peak(problem)[0]
    for budget in {low, (low + keep_all_peak(problem)) // 2}:
        run = Incumbent(problem, budget)
        before = run.best.over
        steps = mend(run, run.steps, deadline=math.inf)
        assert simulate_steps(problem, steps).seconds > 0 and run.best.over <= before
        if run.fits:
            best = best_seconds(problem, budget)
            assert best is not None and run.best.line.seconds >= best[0] * (1 - 1e-9)


def test_it_ends_when_time_is_up() -> None:
    problem = random_training_graph(1, layers=8)
    run = Incumbent(problem, round(0.4 * keep_all_peak(problem)))
    steps = mend(run, run.steps, deadline=time.perf_counter() - 1)
    assert steps == list(range(len(problem)))
    assert simulate(problem, run.solution().schedule).peak_bytes == keep_all_peak(problem)
