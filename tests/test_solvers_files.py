"""Problems in files: what is written is what is read, the same bytes each time, and clear refusals."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from solvers import Op, Problem, ProblemError, Value, read_problem, write_problem
from tests import joint_graphs
from tests.solver_graphs import random_problem


def every_field() -> Problem:
    """A problem in which no field has its default."""
    values = (Value("batch", 5), Value("é", 7, 0), Value("loss", 2**50, 1, True), Value("second", 0, 1))
    ops = (
        Op("f", (0,), (1,), 0.1, 3, 0.25, True, "layer"),
        Op("g", (1, 0), (2, 3), 1 / 3, 0, None, False, None),
    )
    return Problem(ops, values, turn=1, resident_bytes=12, name="all fields")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read(seed: int, tmp_path: Path) -> None:
    problem = random_problem(random.Random(seed), 9)
    for p in (problem, replace(problem, turn=len(problem) // 2, resident_bytes=99), every_field()):
        write_problem(p, tmp_path / "p.json.gz")
        found = read_problem(str(tmp_path / "p.json.gz"))
        assert found == p  # seconds to the last bit
        assert (found.name, found.turn, found.resident_bytes) == (p.name, p.turn, p.resident_bytes)


def test_the_same_problem_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gz", tmp_path / "two.gz"
    write_problem(every_field(), one)
    write_problem(read_problem(one), two)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[4:10] == b"\x00\x00\x00\x00\x02\xff"  # no time, no operating system


def test_an_empty_problem(tmp_path: Path) -> None:
    empty = Problem((), (), name="nothing")
    write_problem(empty, tmp_path / "p.gz")
    assert read_problem(tmp_path / "p.gz") == empty


def _edited(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "edited.json.gz"
    write_problem(every_field(), path)
    data = json.loads(gzip.decompress(path.read_bytes()))
    for key, value in changes.items():
        place, *column = key.split("__")
        if column and value is None:
            del data[place][column[0]]
        elif column:
            data[place][column[0]] = value
        elif value is None:
            del data[place]
        else:
            data[place] = value
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "else"}, "not a problem"),
        ({"ops": None}, "'ops' is missing"),
        ({"ops__seconds": None}, "'seconds' is missing"),
        ({"values__bytes": [1]}, "'bytes' does not have the 4 entries"),
        ({"ops__colour": [1, 2]}, "unknown column 'colour'"),
        ({"ops__seconds": [1.0, -1.0]}, "seconds=-1.0"),
        ({"ops__name": ["f", "f"]}, "two ops are called 'f'"),
        ({"ops__outputs": [[1], [2, 9]]}, "outside 0..3"),
        ({"ops__inputs": [[3], [1]]}, "before it is made"),
        ({"ops__inputs": [3, 4]}, "not iterable"),
        ({"values__bytes": [5, 7, 1.5, 0]}, "bytes=1.5"),
        ({"ops": []}, "edited.json.gz"),
        ({"turn": 7}, "turn is 7"),
    ],
)
def test_malformed_files_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=says) as caught:
        read_problem(_edited(tmp_path, **changes))
    assert "edited.json.gz" in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_what_is_no_such_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "p.json.gz"
    write_problem(every_field(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ProblemError, match=r"p\.json\.gz"):
        read_problem(path)
    path.write_bytes(gzip.compress(b"[1, 2"))
    with pytest.raises(ProblemError, match="not gzip-compressed JSON"):
        read_problem(path)
    with pytest.raises(FileNotFoundError):
        read_problem(tmp_path / "absent")


@pytest.mark.parametrize("name", [*joint_graphs.NAMES, *joint_graphs.LARGE])
def test_traced_graphs_pin_their_backward(name: str) -> None:
    problem = joint_graphs.load(name)
    assert problem.turn is not None
    assert all(op.recomputable == (i < problem.turn) for i, op in enumerate(problem.ops))
