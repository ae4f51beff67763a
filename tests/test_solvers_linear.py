"""The door to HiGHS: what comes back when MathOpt itself fails."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ortools.math_opt.python import mathopt

from solvers.core import linear
from solvers.core.linear import LinearProgram

ROOT = Path(__file__).parent.parent


def program(cost: float = 1.0) -> LinearProgram:
    """Minimise ``cost * x`` for 0.5 <= x."""
    lp = LinearProgram()
    x = lp.column(cost)
    lp.row([x], [1.0], lower=0.5)
    return lp


def refused(words: str) -> Any:
    """What OR-tools does with a status of its C++ side."""

    class StatusNotOk(Exception):
        pass

    def solve(*_: Any, **__: Any) -> None:
        raise StatusNotOk(words)

    return solve


def test_an_answer_that_mathopt_refuses_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens to relaxations that the clock cuts; the search then goes on with what it has."""
    assert program().solve(time_limit_s=1.0).objective == pytest.approx(0.5)
    monkeypatch.setattr(
        linear.solver, "solve", refused("basis is dual feasible, but the dual is not [INTERNAL]")
    )
    answer = program().solve(time_limit_s=1.0)
    assert answer.x is None and not answer.optimal and not answer.infeasible
    assert (answer.objective, answer.bound) == (math.inf, -math.inf)


def test_any_other_status_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.solver, "solve", refused("lower_bounds: NaN [INVALID_ARGUMENT]"))
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        program().solve(time_limit_s=1.0)


def test_what_ortools_truly_refuses_is_an_error() -> None:
    lp = program(math.nan)
    with pytest.raises(Exception, match=r"\[INVALID_ARGUMENT\]"):
        lp.solve(time_limit_s=1.0)


@pytest.mark.parametrize("relax", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_answer_is_what_mathopts_own_objects_say(seed: int, relax: bool) -> None:
    """Point, bound and reduced costs, of covers with a limit on their weight; some have no answer."""
    rng = random.Random(seed)
    lp = LinearProgram()
    columns = [lp.column(rng.uniform(-1.0, 3.0), integer=True) for _ in range(8)]
    for _ in range(6):
        lp.one_of(rng.sample(columns, 2))
    lp.row(columns, [rng.uniform(0.5, 2.0) for _ in columns], upper=rng.uniform(2.0, 9.0))
    answer = lp.solve(time_limit_s=10.0, relax=relax)
    model = mathopt.Model.from_model_proto(lp._proto(relax))
    result = mathopt.solve(model, mathopt.SolverType.HIGHS)
    assert answer.infeasible == (result.termination.reason == mathopt.TerminationReason.INFEASIBLE)
    if answer.infeasible:
        return
    variables = list(model.variables())
    assert answer.optimal and answer.x is not None
    assert answer.x.tolist() == result.variable_values(variables)
    assert answer.objective == result.objective_value()
    assert answer.bound == result.termination.objective_bounds.dual_bound
    assert (answer.reduced_costs is None) == (not relax)
    if answer.reduced_costs is not None:
        assert answer.reduced_costs.tolist() == result.reduced_costs(variables)


LEFT_BEHIND = """
import random, threading
from solvers.core.linear import LinearProgram

rng, lp, begun = random.Random(0), LinearProgram(), threading.Event()
columns = [lp.column(rng.uniform(1, 3), integer=True) for _ in range(120)]
for _ in range(200):
    lp.one_of(rng.sample(columns, 3))

def work():
    while True:
        begun.set()
        lp.solve(time_limit_s=0.03)

threading.Thread(target=work, daemon=True).start()
begun.wait()
"""


def test_a_search_that_is_left_behind_does_not_abort_the_exit() -> None:
    """A thread that comes back from C++ into an interpreter that is taken down would."""
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_program_without_columns_is_no_better_than_its_rows() -> None:
    lp = LinearProgram()
    lp.row([], [], lower=-1.0, upper=0.0)
    assert lp.solve(time_limit_s=1.0).optimal
    lp.row([], [], upper=-1.0)
    assert lp.solve(time_limit_s=1.0).infeasible


def test_a_closure_covers_what_reads_and_is_left_out_where_nothing_can_miss() -> None:
    """0 is kept or made again, 1 is surely there, 2 must be made: the dearer way is taken only if need be."""
    lp = LinearProgram()
    kept, made, again = lp.column(3.0), lp.column(1.0), lp.column(2.0)
    sources = {0: [kept, made], 1: None, 2: [again]}
    lp.closure([0, 1, 2], sources.__getitem__)
    assert lp.rows == 2
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None and answer.x.tolist() == [0.0, 1.0, 1.0]
    reader = lp.column(-10.0)
    lp.closure([0, 1], {0: [kept], 1: None}.__getitem__, of=reader)
    assert lp.rows == 3
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None and answer.x.tolist() == [1.0, 0.0, 1.0, 1.0]
