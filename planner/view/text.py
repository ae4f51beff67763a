"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], sides: str, *, indent: int = 0, ruled: bool = False) -> list[str]:
    """A line per row, two spaces between columns, none at a line's end.

    ``sides``   a letter per column: "l" sets it to the left, "r" to the right.
    ``indent``  spaces before each line.
    ``ruled``   a rule goes under the first row.

    Raises ``ValueError`` for a row of another length.
    """
    widths = [max((len(row[k]) for row in rows), default=0) for k in range(len(sides))]
    lines = [" " * indent + "  ".join(_cells(row, widths, sides)).rstrip() for row in rows]
    if ruled and lines:
        lines.insert(1, " " * indent + "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]


def _cells(row: Sequence[str], widths: Sequence[int], sides: str) -> list[str]:
    return [
        cell.ljust(width) if side == "l" else cell.rjust(width)
        for cell, width, side in zip(row, widths, sides, strict=True)
    ]
