"""Planned steps beside the Hugging Face flag and hand-wrapped blocks: memory, FLOPs, time.

    python tests/benchmarks/bench_peers.py

Four models at the sizes other tools were measured at.  For each: the eager step, the step
checkpointed by hand (see ``tests.peer_steps``), and planned steps at that step's own measured peak,
below it down to the least feasible, and above it.  Writes ``results/peers.json``; exit code 1 if

* at the flag's own measured peak a plan recomputes more than 0.6 of the flag's extra FLOPs (GPT2,
  BERT), or its least peak is not below the flag's;
* wrapping every block is not dominated (ResNet, ConvNeXt): at its peak or below, a plan recomputes
  no more FLOPs.

Peaks and FLOPs are exact.  Plans minimise roofline seconds, which are the same on every machine; with
profiled ones (the default elsewhere) they recompute more FLOPs and fewer slow elementwise kernels where
that is faster.  Times are medians over a few turns on one thread, and carry noise.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from planner.checks.trials import race
from planner.view.text import aligned
from tests.models import PEERS
from tests.peer_steps import BLOCKS, Peer, by_hand, measured_plan, peer

RESULTS = Path(__file__).parent / "results" / "peers.json"
FLAG_SHARE = 0.6
STEPS = 6
SOLVE_S = 8.0


def _budgets(case: Peer) -> dict[str, int]:
    """Bytes above what is resident, by what they are called."""
    least_bytes = case.prepared.minimum_peak_bytes - case.resident_bytes
    hand_bytes, eager_bytes = case.by_hand.peak_bytes, case.eager_peak_bytes
    return {
        "least": least_bytes,
        "between least and by hand": (least_bytes + hand_bytes) // 2,
        "peak by hand": hand_bytes,
        "a third of the way to eager": hand_bytes + (eager_bytes - hand_bytes) // 3,
        "two thirds": hand_bytes + 2 * (eager_bytes - hand_bytes) // 3,
    }


def _bench(name: str) -> list[dict[str, Any]]:
    case = peer(name)
    hand = "blocks wrapped" if name in BLOCKS else "HF flag"
    plans = {k: case.plan(b, time_limit_s=SOLVE_S) for k, b in _budgets(case).items() if b > 0}
    runners = [copy.deepcopy(case.model), by_hand(case.case)]
    for plan in plans.values():
        runners.append(plan.apply(copy.deepcopy(case.model)))
    ran = race(runners, case.inputs, steps=STEPS)
    ratios = (1.0, *ran.ratios)
    rows: list[dict[str, Any]] = [
        {"method": "eager", "peak_bytes": case.eager_peak_bytes, "extra_flops": 0},
        {"method": hand, "peak_bytes": case.by_hand.peak_bytes, "extra_flops": case.by_hand.extra_flops},
    ]
    for label, plan in plans.items():
        found = measured_plan(case, plan)
        rows.append(
            {
                "method": f"plan, {label}",
                "budget_bytes": plan.budget_bytes - case.resident_bytes,
                "predicted_bytes": plan.peak_bytes - case.resident_bytes,
                "peak_bytes": found.peak_bytes,
                "extra_flops": found.extra_flops,
                "overhead": plan.overhead,
                "overhead_bound": plan.overhead_bound,
                "solver": plan.solver,
                "solve_s": plan.solve_s,
            }
        )
    for row, step_s, ratio in zip(rows, ran.step_s, ratios, strict=True):
        row |= {"model": name, "step_s": step_s, "time_ratio": ratio, "eager_flops": case.eager_flops}
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows of one model do not hold."""
    name, (_, hand, *plans) = rows[0]["model"], rows
    at_hand = next(r for r in plans if r["method"] == "plan, peak by hand")
    least = min(r["peak_bytes"] for r in plans)
    share = at_hand["extra_flops"] / hand["extra_flops"]
    found = [f"{name}: {r['method']} over its budget" for r in plans if r["peak_bytes"] > r["budget_bytes"]]
    found += [f"{name}: {r['method']} mispredicted" for r in plans if r["peak_bytes"] != r["predicted_bytes"]]
    allowed = 1.0 if name in BLOCKS else FLAG_SHARE
    if share > allowed:
        found.append(f"{name}: {share:.2f} of the extra FLOPs of {hand['method']}, want {allowed} at most")
    if least >= hand["peak_bytes"]:
        found.append(f"{name}: least peak {least} is not below {hand['peak_bytes']}")
    return found


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = (
        "model", "method", "budget MB", "peak MB", "extra FLOPs", "of hand", "step time", "planned", "bound",
    )  # fmt: skip
    hand = {r["model"]: r["extra_flops"] for r in rows if r["method"] in ("HF flag", "blocks wrapped")}
    cells = []
    for r in rows:
        planned = "budget_bytes" in r
        cells.append(
            (
                r["model"],
                r["method"],
                f"{r['budget_bytes'] / 1e6:.2f}" if planned else "",
                f"{r['peak_bytes'] / 1e6:.2f}",
                f"{r['extra_flops'] / r['eager_flops']:.1%}",
                f"{r['extra_flops'] / hand[r['model']]:.2f}",
                f"{r['time_ratio']:.3f}x",
                f"{1 + r['overhead']:.3f}x" if planned else "",
                f">= {1 + r['overhead_bound']:.3f}x" if planned else "",
            )
        )
    return aligned([head, *cells], "ll" + "r" * (len(head) - 2), ruled=True)


def main() -> int:
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name in PEERS:
        found = _bench(name)
        rows += found
        wrong += failures(found)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}, indent=1) + "\n")
    print(
        "Peaks above parameters, buffers and inputs; FLOPs and seconds against the eager step; one thread.\n"
    )
    print("\n".join(_table(rows)))
    print(f"\ntotal {time.perf_counter() - began:.0f} s")
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
