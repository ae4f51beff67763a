"""Floors of a window: never above the truth, equal to it where the window holds everything."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import InfeasibleError, Op, Problem, Value, solve
from solvers.bounds import lower_bounds as bounds
from solvers.bounds.pebbling import raised_floors, window_floor
from solvers.core.facts import Facts
from tests.solver_graphs import from_seeds, least_peak, random_problem, tense_problem

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(from_seeds(lambda rng: rng.choice([random_problem, tense_problem])(rng, 6)), st.data())
def test_no_window_has_a_floor_above_the_least_peak(problem: Problem, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(problem) - 1))
    end = data.draw(st.integers(begin + 1, len(problem)))
    most = data.draw(st.integers(0, 8))
    floor = window_floor(problem, Facts.of(problem), begin, end, most)
    assert floor.tracked <= most and begin <= floor.op < end
    assert floor.bytes <= least_peak(problem)[0]


def backward_of(sizes: list[int], gradient: int) -> Problem:
    """A chain of forward ops, and for each a pinned backward op that reads what it made and a gradient."""
    n = len(sizes)
    ops = [Op(f"f{i}", (i - 1,) if i else (), (i,), 1.0) for i in range(n)]
    values = [Value(f"v{i}", size, i) for i, size in enumerate(sizes)]
    for k, i in enumerate(reversed(range(n))):
        reads = (i, n + k - 1) if k else (i,)
        ops.append(Op(f"b{i}", reads, (n + k,), 1.0, recomputable=False))
        values.append(Value(f"g{i}", gradient, n + k))
    return Problem(tuple(ops), tuple(values), turn=n, name="chain")


def test_a_window_of_the_whole_backward_has_the_true_floor() -> None:
    higher = 0
    for seed in range(40):
        rng = random.Random(seed)
        problem = backward_of([rng.randint(1, 9) for _ in range(4)], rng.randint(1, 9))
        floor = window_floor(problem, Facts.of(problem), problem.turn or 0, len(problem), 4).bytes
        truth = least_peak(problem)[0]
        in_forward = bounds.peak_floor(replace(problem, turn=None)).bytes
        assert truth == max(floor, in_forward)
        higher += floor > bounds.peak_floor(problem).bytes
    assert higher >= 5


def test_a_floor_by_hand() -> None:
    # To make v1 (9) again, v0 (9) must be there: 18, and beside a gradient (4), 22, unless v1 was kept since
    # before that was made; with four ops there is no room for it.
    short = backward_of([9, 9, 1], 4)
    assert bounds.peak_floor(short).bytes == bounds.proved_floor(short).bytes == least_peak(short)[0] == 18
    larger = backward_of([9, 9, 9, 9], 4)
    floor, truth = bounds.peak_floor(larger).bytes, least_peak(larger)[0]
    assert (floor, truth) == (18, 22)
    assert max(found.bytes for found in raised_floors(larger)) == truth == bounds.proved_floor(larger).bytes


def test_floors_only_rise_and_stop_at_the_deadline() -> None:
    problem = backward_of([3, 9, 2, 8, 5, 7, 4, 9], 6)
    floors = [floor.bytes for floor in raised_floors(problem)]
    assert floors and floors == sorted(set(floors))
    assert floors[0] >= bounds.peak_floor(problem).bytes
    assert list(raised_floors(problem, deadline=-math.inf)) == []


def test_solve_names_the_floor_that_a_window_proves() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        problem = backward_of([rng.randint(1, 9) for _ in range(45)], rng.randint(1, 9))
        best = max(floor.bytes for floor in raised_floors(problem))
        if best > bounds.peak_floor(problem).bytes:
            break
    with pytest.raises(InfeasibleError) as refused:
        solve(problem, best - 1, time_limit_s=20)
    assert bounds.peak_floor(problem).bytes <= refused.value.budget_bytes < refused.value.floor_bytes <= best
    assert refused.value.op_name in {op.name for op in problem.ops}


def test_the_turn_is_looked_at_where_many_later_ops_are_tighter() -> None:
    alone = backward_of([9, 9, 9, 9], 4)
    highest = max(found.bytes for found in raised_floors(alone))
    assert highest == 22
    ops, values = list(alone.ops), list(alone.values)
    for size in (*40 * [1], *20 * [10]):  # each of the last reads as much as it makes, 20 in all
        reads, v = (len(values) - 1,), len(values)
        ops.append(Op(f"t{v}", reads, (v,), 1.0, recomputable=False))
        values.append(Value(f"t{v}", size, v))
    problem = replace(alone, ops=tuple(ops), values=tuple(values))
    assert bounds.peak_floor(problem).bytes == 20
    assert max(found.bytes for found in raised_floors(problem)) == highest
