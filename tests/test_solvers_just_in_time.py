"""What must run again, in which order, and what nobody reads."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Op, Problem, Value
from solvers.core.just_in_time import first_runs, runs_again, trim
from tests.solver_graphs import problems


def diamond() -> Problem:
    """a feeds b and c; d reads both, c first."""
    ops = (
        Op("a", (), (0,), 1.0),
        Op("b", (0,), (1,), 1.0),
        Op("c", (0,), (2,), 1.0),
        Op("d", (2, 1), (3,), 1.0),
    )
    return Problem(ops, tuple(Value(op.name, 1, i) for i, op in enumerate(ops)))


def never(_: int) -> bool:
    return False


def test_inputs_come_first_in_the_order_in_which_they_are_read() -> None:
    problem = diamond()
    assert list(runs_again(problem, [3], never)) == [0, 2, 1, 3]
    assert list(runs_again(problem, [1, 2], never)) == [0, 1, 2]
    assert list(runs_again(problem, [3], {2}.__contains__)) == [0, 1, 3]
    assert list(runs_again(problem, [3], never, lambda i: i != 0)) == [2, 1, 3]
    assert list(runs_again(problem, [3], never, reads=[(), (), (), (1,)])) == [1, 3]
    assert list(runs_again(problem, [], never)) == []
    assert len(list(runs_again(problem, [3], never, most=2))) == 2


def test_what_the_caller_makes_meanwhile_counts() -> None:
    problem = diamond()
    made: set[int] = set()
    ran = []
    for i in runs_again(problem, [3], made.__contains__):
        ran.append(i)
        made.update((1, *problem.ops[i].outputs))
    assert ran == [0, 2, 3]


@settings(max_examples=200)
@given(problems(), st.randoms(use_true_random=False))
def test_all_that_is_needed_runs_and_nothing_else(problem: Problem, rng: random.Random) -> None:
    there = {v for v in range(len(problem.values)) if rng.random() < 0.4}
    wanted = rng.sample(range(len(problem.values)), min(2, len(problem.values)))
    ran = list(runs_again(problem, wanted, there.__contains__))
    assert len(set(ran)) == len(ran)
    made = set(there)
    for i in ran:
        assert made.issuperset(problem.counted_inputs[i])
        made.update(problem.ops[i].outputs)
    assert all(v in made or problem.values[v].producer is None for v in wanted)
    for i in ran:
        read = {u for j in ran for u in problem.counted_inputs[j]}
        assert any(v in read or v in wanted for v in problem.ops[i].outputs)


def test_first_runs_names_the_next_op_to_run_for_the_first_time() -> None:
    assert first_runs([0, 1, 0, 2, 1, 0, 3]) == [0, 1, 2, 2, 3, 3, 3]
    assert first_runs([1, 1, 0, 1]) == [1, 0, 0, 2]
    assert first_runs([]) == []


def trimmed_until_nothing_goes(problem: Problem, steps: list[int]) -> list[int]:
    """The definition: a recomputation that nobody reads before it is made again goes, over and over."""
    while True:
        made: dict[int, int] = {}
        read = [i not in steps[:s] for s, i in enumerate(steps)]
        for s, i in enumerate(steps):
            for v in problem.counted_inputs[i]:
                read[made[v]] = True
            made.update(dict.fromkeys(problem.ops[i].outputs, s))
        kept = [i for s, i in enumerate(steps) if read[s]]
        if kept == steps:
            return steps
        steps = kept


@settings(max_examples=200)
@given(problems(), st.randoms(use_true_random=False))
def test_trim_in_one_pass_is_trimming_until_nothing_goes(problem: Problem, rng: random.Random) -> None:
    steps: list[int] = []
    for t in range(len(problem)):
        steps += [rng.randrange(t) for _ in range(rng.randrange(3))] if t else []
        steps.append(t)
    assert trim(problem, steps) == trimmed_until_nothing_goes(problem, steps)
