"""How well a time limit is kept: wall-clock seconds of ``solve`` and ``minimum_peak`` beside the limit.

The exact method's too, which on graphs of this size is :func:`solvers.bounds.lower_bounds.time_bound`.

    python -m tests.benchmarks.bench_time_limits [GRAPH ...]

On graphs that take longer than the limit.  A limit is kept if the answer comes within a tenth of it, or
earlier with a status of ``optimal`` or a gap too small to go on for.  Prints a row per run and writes
``results/time_limits.json``; exit code 1 if a limit was overrun.  Needs two idle cores: other load counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from solvers import Problem, minimum_peak, read_problem, solve
from tests.joint_graphs import keep_all_peak

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "time_limits.json"
GRAPHS = ("resnet50-b64x224", "unet-b16x256", "whisper-small-b16", "internvl2-1b-b2x1792")
LIMITS_S = (2.0, 5.0)
OVERRUN = 0.1


def seconds(problem: Problem, limit_s: float, what: str) -> float:
    """Wall-clock seconds of one call with ``limit_s``."""
    budget = round(0.6 * keep_all_peak(problem))
    began = time.perf_counter()
    if what == "solve":
        solve(problem, budget, time_limit_s=limit_s)
    elif what == "exact":
        solve(problem, budget, solver="exact", time_limit_s=limit_s)
    else:
        minimum_peak(problem, time_limit_s=limit_s)
    return time.perf_counter() - began


def main(names: list[str]) -> int:
    rows = []
    for name in names:
        problem = read_problem(HERE / "graphs" / f"{name}.json.gz")
        for what in ("solve", "minimum_peak", "exact"):
            for limit_s in LIMITS_S:
                took_s = seconds(problem, limit_s, what)
                rows.append({"graph": name, "call": what, "limit_s": limit_s, "took_s": round(took_s, 3)})
                over = took_s / limit_s - 1
                print(f"{name:<22}{what:<13}{limit_s:>4g} s: {took_s:6.2f} s {over:+.1%}", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["took_s"] > (1 + OVERRUN) * row["limit_s"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(GRAPHS)))
