"""The staged solver on the joint graphs of ``tests/data``: overhead, bound and seconds, as a table.

python -m tests.benchmarks.bench_solvers [time_limit_s]
"""

from __future__ import annotations

import sys

from solvers import bounds, staged
from tests.joint_graphs import NAMES, keep_all_peak, load

FRACTIONS = (0.9, 0.7, 0.5, 0.4)


def rows(time_limit_s: float) -> list[str]:
    """One line per graph and budget; overheads are percent of the step's time without recomputation."""
    lines = [f"{'graph':20} {'budget':>6} {'overhead %':>10} {'bound %':>8} {'seconds':>8}  status"]
    for name in NAMES:
        problem = load(name)
        top, percent = keep_all_peak(problem), problem.total_seconds / 100
        for fraction in FRACTIONS:
            budget = round(fraction * top)
            found = staged.solve(problem, budget, time_limit_s=time_limit_s)
            proved = bounds.time_bound(problem, budget, time_limit_s=time_limit_s) - problem.total_seconds
            overhead = found.recompute_seconds / percent if found.fits else float("nan")
            lines.append(
                f"{name:20} {fraction:6.2f} {overhead:10.2f} {proved / percent:8.2f} "
                f"{found.solve_seconds:8.2f}  {found.status}"
            )
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)) + "\n")
