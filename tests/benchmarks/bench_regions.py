"""What regions cost: steps that one graph holds, cut into regions, beside the one graph and plain Dynamo.

    python tests/benchmarks/bench_regions.py [TURNS] [MODEL ...]

By model of the demo: predicted overhead and bound at budgets of 75 and 50 % of what the step adds, as one
graph and in regions; bits and peak of the step in regions, measured.  Then the glue alone: CPU seconds of a
step in regions with nothing recomputed over those of the eager step and of
``torch.compile(backend="aot_eager")``, all three taking turns, medians over turns.

Writes ``results/regions.json``; exit code 1 if a step is not bit-equal, or over its budget, or measured more
than 1 % from what was predicted, or costs more than 1 point beyond one graph, or a ratio is above 1.03.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from planner.checks.trials import eager_step, prepare_example, race, trial
from planner.checks.zoo import MODELS, Example
from planner.options import Search
from planner.solving.in_regions import JoinedStep, step_in_regions
from planner.view.text import aligned
from tests.benchmarks.bench_overhead import cpu_seconds_of

RESULTS = Path(__file__).parent / "results" / "regions.json"
SHARES = (0.75, 0.5)  # of what the step adds at its peak
MOST_POINTS, MOST_OFF, MOST_RATIO = 0.01, 0.01, 1.03
LIMIT_S = 10.0
TURNS = 15


def _planned(example: Example, step: JoinedStep) -> list[dict[str, Any]]:
    one = prepare_example(example, "roofline")
    eager = eager_step(example, one)
    resident_bytes = one.memory.total_bytes
    rows = []
    for share in SHARES:
        budget_bytes = resident_bytes + int(share * (one.baseline_peak_bytes - resident_bytes))
        search = Search(time_limit_s=LIMIT_S)
        whole, parts = (of.plan_bytes(budget_bytes, search) for of in (one, step))
        seen = trial(parts, example, eager)
        rows.append(
            {
                "share": share,
                "budget_bytes": budget_bytes,
                "predicted_bytes": parts.peak_bytes,
                "measured_bytes": seen.peak_bytes,
                "equal": seen.comparison.equal,
                "overhead": parts.overhead,
                "bound": parts.overhead_bound,
                "one_graph_overhead": whole.overhead,
                "one_graph_bound": whole.overhead_bound,
            }
        )
    return rows


def _glue(example: Example, step: JoinedStep, turns: int) -> dict[str, float]:
    """Seconds of a step with nothing recomputed, over eager's and over those of Dynamo's own cut."""
    keep_all = step.plan_bytes(step.baseline_peak_bytes, Search("keep_all"))
    runners = [copy.deepcopy(example.model) for _ in range(2)]
    runners[1].forward = torch.compile(runners[1].forward, backend="aot_eager")
    keep_all.apply(example.model)
    try:
        ran = race(
            [*runners, example.model], example.inputs, example.loss_fn, steps=turns, clock=cpu_seconds_of
        )
    finally:
        keep_all.restore(example.model)
    return {
        "eager_s": ran.step_s[0],
        "regions_s": ran.step_s[2],
        "over_eager": ran.ratios[1],
        "over_aot_eager": ran.ratios[1] / ran.ratios[0],
    }


def _bench(example: Example, turns: int) -> dict[str, Any]:
    example.model.train()
    step = step_in_regions(
        example.model, dict(example.inputs), loss_fn=example.loss_fn, costs="roofline",
        search=Search(time_limit_s=LIMIT_S),
    )  # fmt: skip
    row = {"model": example.name, "calls": len(step.record.calls), "plans": _planned(example, step)}
    return row | _glue(example, step, turns)


def _fails(row: dict[str, Any]) -> bool:
    return row["over_aot_eager"] > MOST_RATIO or any(
        not plan["equal"]
        or plan["measured_bytes"] > plan["budget_bytes"]
        or abs(plan["measured_bytes"] - plan["predicted_bytes"]) > MOST_OFF * plan["predicted_bytes"]
        or plan["overhead"] > plan["one_graph_overhead"] + MOST_POINTS
        for plan in row["plans"]
    )


def main(turns: int, names: list[str]) -> int:
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    rows = []
    for name in names:
        torch.manual_seed(0)
        rows.append(_bench(MODELS[name](), turns))
        print(f"{name}: {'FAILED' if _fails(rows[-1]) else 'ok'}", file=sys.stderr)
    run = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    cells = [
        (
            row["model"],
            str(row["calls"]),
            f"{plan['share']:.0%}",
            *(f"{plan[k] / 1e6:.2f}" for k in ("budget_bytes", "predicted_bytes", "measured_bytes")),
            "yes" if plan["equal"] else "NO",
            *(f"{plan[k]:.2%}" for k in ("overhead", "bound", "one_graph_overhead", "one_graph_bound")),
            *(f"{row[k]:.3f}" for k in ("over_eager", "over_aot_eager")),
        )
        for row in rows
        for plan in row["plans"]
    ]
    head = (
        "model", "calls", "at", "budget MB", "predicted", "measured", "equal", "overhead", "bound",
        "one graph", "bound", "x eager", "x aot_eager",
    )  # fmt: skip
    print("\n".join(aligned([head, *cells], "lrrrrrlrrrrrr", ruled=True)))
    return 1 if any(map(_fails, rows)) else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    count = int(given.pop(0)) if given and given[0].isdigit() else TURNS
    sys.exit(main(count, given or list(MODELS)))
