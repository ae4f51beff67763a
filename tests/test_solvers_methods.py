"""The registry: a row is all that a method needs to be asked for by name, and by ``auto``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import solvers
from solvers import SOLVERS, Problem, ProblemError, Solution, solution_of, solve
from solvers.baselines.simple import BASELINES, greedy
from solvers.bounds.lower_bounds import peak_floor
from solvers.methods import METHODS, Method, has_backward
from solvers.portfolio import Methods
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import training_chain

FOLDER = Path(solvers.__file__).parent


def test_every_name_has_a_row_of_its_own() -> None:
    assert ("auto", *METHODS) == SOLVERS
    assert all(method.name == name for name, method in METHODS.items())
    assert [name for name, method in METHODS.items() if method.plan is not None] == list(BASELINES)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_suits_is_treated_and_the_rest_refused(method: Method) -> None:
    """Without a turn, without groups, without a backward, and with them all."""
    whole = training_chain(2, 2)
    ungrouped = replace(whole, ops=tuple(replace(op, group=None) for op in whole.ops))
    for problem in (whole, ungrouped, replace(whole, turn=None), replace(whole, turn=len(whole))):
        top = keep_all_peak(problem)
        if method.suits(problem):
            assert method.run(problem, top, 1.0, 0).schedule.steps(problem)
        else:
            assert method.needs
            with pytest.raises(ProblemError, match=r"needs|backward"):
                method.run(problem, top - 1, 1.0, 0)


def test_a_row_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="say in words"):
        Method("x", METHODS["exact"].run, has_backward)
    with pytest.raises(ValueError, match="share is 2"):
        Method("x", METHODS["exact"].run, share=2)


def test_a_row_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is in no other place of ``solvers/``: by its name, and beside what ``auto`` knows."""
    asked: list[int] = []

    def run(problem: Problem, budget_bytes: int, time_limit_s: float, seed: int) -> Solution:
        asked.append(budget_bytes)
        assert time_limit_s > 0
        schedule = greedy(problem, budget_bytes)
        return solution_of(problem, schedule, budget_bytes, solver="added", floor_bytes=claimed)

    monkeypatch.setitem(METHODS, "added", Method("added", run, share=0.5))
    # What auto would ask before leaves nothing to be found on graphs as small as this.
    monkeypatch.setattr(Methods, "_search", lambda *_: None)
    problem = random_training_graph(3)
    claimed = peak_floor(problem).bytes + 1
    budget = round(0.8 * keep_all_peak(problem))
    for solver in ("added", "auto"):
        answer = solve(problem, budget, solver=solver, time_limit_s=600)
        assert (answer.solver, answer.fits, answer.floor_bytes) == ("added", True, claimed)
    assert asked == [budget, budget]
    with pytest.raises(ValueError, match=r"want one of auto, exact, .*, sqrt, added"):
        solve(problem, budget, solver="another")


def imports_of(path: Path) -> Iterator[str]:
    """Files of ``solvers/`` that ``path`` imports, in whatever way but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("solvers."):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                target = FOLDER.parent / (str(name).replace(".", "/") + ".py")
                if target.exists():
                    yield str(target.relative_to(FOLDER))


def test_no_file_imports_itself_back_and_none_lazily() -> None:
    files = {str(path.relative_to(FOLDER)): set(imports_of(path)) for path in FOLDER.rglob("*.py")}
    assert "solve.py" in files and "core/problem.py" in files["solve.py"]
    assert len([name for name in files if "/" not in name]) <= 8
    left = dict(files)
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}
    for path in FOLDER.rglob("*.py"):  # what others take seconds to import may be, where it is used
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        own = [node for node in imports if node.level or (node.module or "").split(".")[0] == "solvers"]
        assert all(node.col_offset == 0 for node in own), path
