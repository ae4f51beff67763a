"""Tables as text: columns line up, and no line ends in spaces."""

from __future__ import annotations

import pytest

from planner.view.text import aligned

ROWS = [("name", "bytes", ""), ("a", "10", "x"), ("longer", "7", "")]


def test_columns_line_up() -> None:
    assert aligned(ROWS, "lrl") == ["name    bytes", "a          10  x", "longer      7"]
    assert aligned(ROWS, "rll", indent=2) == ["    name  bytes", "       a  10     x", "  longer  7"]


def test_a_rule_goes_under_the_head() -> None:
    assert aligned(ROWS, "lrl", ruled=True)[:2] == ["name    bytes", "------  -----  -"]
    assert aligned([], "lr", ruled=True) == []


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c", "d", "e")], "ll")
