"""The search in a process of its own: it betters what it is given, and does not outlive who asked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from solvers import Problem, Schedule, simulate, solve
from solvers.beside import SearchBeside
from tests.solver_graphs import training_chain

BEGIN = """
import math, os, time
from solvers import Schedule, simulate
from solvers.beside import SearchBeside
from tests.solver_graphs import training_chain
problem = training_chain(60, 4)
all_kept = Schedule.keep_all(problem)
beside = SearchBeside(problem, simulate(problem, all_kept).peak_bytes // 2, all_kept, time_limit_s=math.inf)
print(beside.process_id, flush=True)
time.sleep(2)
os._exit(1)  # as one that is killed goes: nothing is cleared up
"""


def _until(is_so: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """A limit for what hangs; nothing is judged by how long it took."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        if is_so():
            return True
        time.sleep(0.01)
    return False


def _tight(problem: Problem) -> tuple[int, Schedule]:
    """A budget, and a schedule that keeps to it and takes far more time than it must."""
    again = solve(problem, 2**60, solver="recompute_all").schedule
    return simulate(problem, again).peak_bytes, again


def test_what_it_finds_is_as_good_as_what_is_found_here() -> None:
    problem = training_chain(6, 3)
    budget, poor = _tight(problem)
    here = solve(problem, budget, time_limit_s=math.inf)
    assert here.seconds < simulate(problem, poor).seconds
    beside = SearchBeside(problem, budget, poor, time_limit_s=math.inf)
    assert _until(lambda: beside.is_over)
    assert beside.best is not None
    assert (beside.best.status, beside.best.peak_bytes <= budget) == (here.status, True)
    assert beside.best.seconds == pytest.approx(here.seconds, rel=1e-9)
    assert simulate(problem, beside.best.schedule).peak_bytes == beside.best.peak_bytes


def test_it_ends_when_it_is_told_to_and_when_nobody_holds_it() -> None:
    problem = training_chain(60, 4)
    keep = Schedule.keep_all(problem)
    half = simulate(problem, keep).peak_bytes // 2
    told = SearchBeside(problem, half, keep, time_limit_s=math.inf)
    told.end()
    assert _until(lambda: told.is_over)
    dropped = SearchBeside(problem, half, keep, time_limit_s=math.inf)
    process_id = dropped.process_id
    del dropped
    assert _until(lambda: not _runs(process_id))


def test_it_ends_with_the_process_that_began_it() -> None:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    began = subprocess.run(
        [sys.executable, "-c", BEGIN], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert began.returncode == 1, began.stderr
    assert _until(lambda: not _runs(int(began.stdout)))


def test_no_process_is_begun_where_there_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = training_chain(3, 3)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OSError, match="does not know its own executable"):
        SearchBeside(problem, 2**40, Schedule.keep_all(problem), time_limit_s=1.0)


def _runs(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
