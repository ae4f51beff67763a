"""What the machinery itself costs: a plan that recomputes nothing, beside the eager step.

    python tests/benchmarks/bench_overhead.py [TURNS]

Both train the same model in one process on one thread, taking turns.  The figure is the median over
turns of planned over eager CPU seconds: on one thread they are what the wall clock shows on an idle
machine, without what other processes take on a busy one.  Writes ``results/overhead.json``; exit code
1 if a model's ratio is above 1.03.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from planner.demo import aligned
from planner.trials import copies_of, prepare_example, race
from planner.zoo import MODELS

RESULTS = Path(__file__).parent / "results" / "overhead.json"
MOST = 1.03
TURNS = 21


def cpu_seconds_of(work: Callable[[], None], _: torch.device) -> float:
    """CPU seconds of this process while ``work`` runs."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _bench(name: str, turns: int) -> dict[str, Any]:
    example = MODELS[name]()
    prepared = prepare_example(example, "roofline")
    plan = prepared.plan_bytes(prepared.baseline.peak_bytes, solver="keep_all")
    runners = copies_of(example.model, [plan])
    ran = race(runners, example.inputs, example.loss_fn, steps=turns, clock=cpu_seconds_of)
    assert ran.losses[0] == ran.losses[1], f"{name}: the losses differ from eager's"
    return {
        "model": example.name,
        "ops": len(prepared.graph.ops),
        "eager_s": ran.step_s[0],
        "planned_s": ran.step_s[1],
        "ratio": ran.ratios[0],
        "turns": turns,
    }


def main(turns: int) -> int:
    torch.set_num_threads(1)
    rows = [_bench(name, turns) for name in MODELS]
    run = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    cells = [
        (
            r["model"],
            str(r["ops"]),
            *(f"{r[k] * 1e3:.1f}" for k in ("eager_s", "planned_s")),
            f"{r['ratio']:.4f}",
        )
        for r in rows
    ]
    print(f"A plan that recomputes nothing, CPU seconds of forward and backward, medians of {turns} turns\n")
    print("\n".join(aligned([("model", "ops", "eager ms", "planned ms", "ratio"), *cells], left=(0,))))
    print(f"\nmedian over models {statistics.median(r['ratio'] for r in rows):.4f}, at most {MOST} each")
    above = [r["model"] for r in rows if r["ratio"] > MOST]
    if above:
        print(f"FAILED above {MOST}: {', '.join(above)}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else TURNS))
