"""Bytes that no choice changes, against what schedules do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, simulate
from solvers.baselines import simple
from solvers.core.facts import Facts, spanned
from solvers.core.simulate import simulate_steps
from tests.joint_graphs import random_training_graph
from tests.solver_graphs import problems


def first_run_bytes(problem: Problem, steps: list[int]) -> np.ndarray:
    """Live bytes while each op runs for the first time, shape (n,)."""
    line = simulate_steps(problem, steps)
    where = {i: s for s, i in reversed(list(enumerate(steps)))}
    return np.array([line.live_bytes[where[i]] for i in range(len(problem))])


@settings(max_examples=100)
@given(problems())
def test_no_schedule_has_less_than_the_pressure(problem: Problem) -> None:
    facts = Facts.of(problem)
    steps = simple.recompute_all(problem).steps(problem)
    assert (first_run_bytes(problem, steps) >= facts.pressure).all()
    assert (facts.entering <= facts.staying).all()
    assert all(not facts.counted[v] for v, value in enumerate(problem.values) if value.final)


def test_what_one_backward_makes_is_no_choice() -> None:
    problem = random_training_graph(3)
    facts = Facts.of_one_backward(problem)
    assert facts.decided and all((problem.values[v].producer or 0) < facts.turn for v in facts.decided)
    live = simulate(problem, simple.keep_all(problem)).live_bytes
    there = np.zeros(len(problem), dtype=np.int64)
    for v in facts.decided:  # what keeping everything has beside the bytes of no choice
        first, last = problem.values[v].producer or 0, problem.consumers[v][-1]
        there[first : last + 1] += problem.values[v].bytes
    scratch = np.array([op.workspace_bytes for op in problem.ops])
    assert (facts.staying + scratch + there).tolist() == live.tolist()
    assert (facts.pressure >= Facts.of(problem).pressure).all()


def test_one_backward_needs_a_turn() -> None:
    problem = Problem(random_training_graph(1).ops, random_training_graph(1).values)
    with pytest.raises(ValueError, match="needs a turn"):
        Facts.of_one_backward(problem)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))))
def test_spans_add_up(spans: list[tuple[int, int, int]]) -> None:
    spans = [(min(a, b), max(a, b), size) for a, b, size in spans]
    expected = [sum(size for a, b, size in spans if a <= t <= b) for t in range(6)]
    assert spanned(6, spans).tolist() == expected
