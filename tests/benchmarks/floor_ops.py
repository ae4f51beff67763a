"""The op that each graph's floor is at, and how far the floor would fall if that op ran in slices.

    python -m tests.benchmarks.floor_ops

Of the graphs of ``bench_solvers``, by the sums of :func:`solvers.bounds.lower_bounds.peak_floor`: what must
be there when some op first runs.  An op in slices no longer has all of what it reads and makes at once; at
best it, and all others of its kind, hold nothing that matters, and the floor is at an op of another kind.
That is the column *without*: no slicing of that kind of op brings more.  *Without two* is the same without
the two kinds at the top.  The table is written to ``results/floor_ops.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from solvers import Problem
from solvers.core.facts import Facts
from tests.benchmarks.solver_jobs import graph_names, load_graph

__all__ = ["kind_of", "rows_of"]

TABLE = Path(__file__).parent / "results" / "floor_ops.md"


def kind_of(name: str) -> str:
    """The kernel of an op, from its name: ``mm_143`` is an ``mm``."""
    return re.sub(r"_?\d+$", "", name)


def rows_of(problem: Problem) -> Iterator[tuple[str, int, float]]:
    """Kinds of ops, from the floor down: op, bytes beside what is resident, its share of the floor."""
    needed = Facts.of(problem.relaxed).pressure - problem.resident_bytes
    kinds = np.array([kind_of(op.name) for op in problem.ops])
    left = np.ones(len(kinds), dtype=bool)
    while left.any():
        worst = int(np.where(left, needed, -1).argmax())
        yield problem.ops[worst].name, int(needed[worst]), float(needed[worst] / needed.max())
        left &= kinds != kinds[worst]


def _line(name: str) -> str:
    rows = rows_of(load_graph(name))
    (op, size, _), (next_op, _, without), (_, _, two) = (next(rows) for _ in range(3))
    return f"| {name} | {size / 1e6:.0f} | {op} | {without:.0%} | {next_op} | {two:.0%} |"


def main() -> int:
    """Write the table."""
    names = [name for name in graph_names() if not name.startswith(("traced/", "layered-"))]
    head = "| graph | floor MB | at | without | then at | without two |\n|---|---|---|---|---|---|"
    said = "Made by `python -m tests.benchmarks.floor_ops`; MB are beside what is resident.\n"
    TABLE.write_text("\n".join(["# The ops that floors are at\n", said, head, *map(_line, names)]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
