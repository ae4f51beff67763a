"""Rows of bytes made on demand: what they count, where they are made, and what retargeting does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from solvers.core.linear import LinearProgram
from solvers.core.memory_rows import MemoryRows


def three_columns() -> tuple[LinearProgram, MemoryRows, list[int]]:
    """Twelve slots in two stretches: 5 bytes always; 10 with a, 20 with b or c, 8 with the larger of them."""
    lp = LinearProgram()
    a, b, c = (lp.column(-1.0) for _ in range(3))
    rows = MemoryRows(lp, (0, 6, 12), 25.0, unit_bytes=25.0)
    rows.always(0, 12, 5)
    rows.put(2, 4, 10, (a,))
    rows.put(3, 8, 20, (b, c))
    rows.put(8, 10, 8, (b, c), adds=False)
    rows.put(4, 4, 99, (a,))
    return lp, rows, [a, b, c]


def test_bytes_are_constants_sums_and_largest() -> None:
    _, rows, _ = three_columns()
    assert rows.bytes_at(np.array([1.0, 0.0, 0.0])).tolist() == [5, 5, 15, 15, *8 * [5]]
    assert rows.bytes_at(np.array([0.0, 0.5, 0.25])).tolist() == [5, 5, 5, *5 * [20], 9, 9, 5, 5]
    assert rows.bytes_at(np.array([0.0, 1.0, 1.0])).tolist() == [5, 5, 5, *5 * [25], 13, 13, 5, 5]


def test_rows_are_made_where_a_point_is_over_and_once() -> None:
    lp, rows, columns = three_columns()
    rows.add_first()
    assert (len(rows), lp.rows) == (2, 2)  # the first slot of each stretch: all constants are alike
    x = np.ones(len(lp.cost))
    assert rows.add_violated(x) == 1  # slot 3: 35 of 25; what is 25 is not over
    assert rows.add_violated(x) == 0
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None
    assert 10 * answer.x[columns[0]] + 20 * (answer.x[columns[1]] + answer.x[columns[2]]) <= 20 + 1e-6


def test_a_larger_of_several_gets_one_column() -> None:
    lp, rows, columns = three_columns()
    before = len(lp.cost)
    assert rows.add(8) and rows.add(9) and not rows.add(9)
    assert len(lp.cost) == before + 1
    rows.retarget(9.0)  # 5 + 8 * larger <= 9
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None
    assert max(answer.x[columns[1:]]) == pytest.approx(0.5)


def test_an_excess_takes_up_what_is_over_in_its_range() -> None:
    lp = LinearProgram()
    column, excess = lp.column(-10.0), lp.column(1.0, upper=math.inf)
    rows = MemoryRows(
        lp, (0, 4), np.array([5.0, 5.0, 100.0, 100.0]), unit_bytes=5.0, excess=(excess, range(1))
    )
    rows.put(0, 3, 15, (column,))
    rows.add(0)
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None and answer.x.tolist() == pytest.approx([1.0, 2.0])
    assert rows.add_violated(answer.x) == 1  # slot 1 has no excess
    answer = lp.solve(time_limit_s=1.0)
    assert answer.x is not None and answer.x[column] == pytest.approx(1 / 3)
