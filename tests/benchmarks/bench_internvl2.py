"""InternVL2-1B at its published size, planned without its memory: seconds and peak RSS of every stage.

    python -m tests.benchmarks.bench_internvl2

The model is that of ``planner.examples.internvl2`` (24 layers of InternViT at 448 pixels, 24 of Qwen2),
built from fake tensors in bfloat16; the step is two rows of six tiles and 1792 tokens each, with AdamW, and
would take 28 GB.  Costs are a roofline of a device that attains what an H100 does (``ATTAINED_H100``).

Budgets are the memory at rest and a share of what the step adds to it.  Prints a table and writes
``results/internvl2.json``; the RSS is that of the process, torch and transformers included.  Exit code 1 if
a budget has no plan.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import planner
from planner.costs.op_costs import graph_costs
from planner.examples.internvl2 import SHAPES, internvl2
from planner.options import Search
from planner.solving.priced import prepare
from tests.benchmarks.graphs import ATTAINED_H100, without_memory

RESULTS = Path(__file__).parent / "results" / "internvl2.json"
SHARES = (0.7, 0.5, 0.4)
SOLVE_S = 30.0
ROWS, TILES, TEXT = 2, 6, 256


def step_1b() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and its largest batch."""
    shape = SHAPES["1b"]
    length = TILES * shape.tokens_per_tile + TEXT
    ids, labels, mask = (torch.zeros(ROWS, length, dtype=torch.long) for _ in range(3))
    pixels = torch.zeros(ROWS * TILES, 3, shape.image, shape.image)
    return internvl2(shape), {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }


def peak_rss_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench() -> dict[str, Any]:
    """One record: the stages up to the problem, then one row per budget."""
    imported_bytes = peak_rss_bytes()
    began = time.perf_counter()
    model, inputs = without_memory(step_1b)
    built = time.perf_counter()
    step = prepare(model, inputs, optimizer=torch.optim.AdamW, costs="roofline")
    step = dataclasses.replace(step, costs=graph_costs(step.graph, "roofline", rates=ATTAINED_H100))
    at_rest = step.resident.total_bytes
    adds = step.baseline.peak_bytes - at_rest
    captured = time.perf_counter()
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ops": len(step.graph.ops),
        "keep_all_peak_bytes": step.baseline.peak_bytes,
        "at_rest_bytes": at_rest,
        "imported_peak_rss_bytes": imported_bytes,
        "build_seconds": round(built - began, 2),
        "capture_seconds": round(captured - built, 2),
        "capture_peak_rss_bytes": peak_rss_bytes(),
        "plans": [],
    }
    for share in SHARES:
        began = time.perf_counter()
        row: dict[str, Any] = {"share": share, "budget_bytes": at_rest + round(share * adds)}
        try:
            plan = step.plan_bytes(row["budget_bytes"], search=Search(time_limit_s=SOLVE_S))
            row |= {
                "peak_bytes": plan.peak_bytes,
                "overhead": plan.overhead,
                "overhead_bound": plan.overhead_bound,
                "status": plan.status,
            }
        except planner.InfeasibleBudgetError as error:
            row |= {"status": "infeasible", "minimum_bytes": error.minimum_bytes}
        row |= {"seconds": round(time.perf_counter() - began, 2), "peak_rss_bytes": peak_rss_bytes()}
        record["plans"].append(row)
    return record


def table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown, one per budget."""
    lines = [
        "| budget GB | peak GB | overhead | proved bound | s to plan | peak RSS GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["plans"]:
        found = ["none", "", ""]
        if "peak_bytes" in row:
            shares = f"{row['overhead']:.2%}", f"{row['overhead_bound']:.2%}"
            found = [f"{row['peak_bytes'] / 1e9:.2f}", *shares]
        cells = [
            f"{row['budget_bytes'] / 1e9:.2f}",
            *found,
            f"{row['seconds']:.1f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    record = bench()
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"InternVL2-1B: {record['parameters'] / 1e6:.0f} M parameters, {record['ops']} ops, "
        f"{record['keep_all_peak_bytes'] / 1e9:.1f} GB if nothing is recomputed; built in "
        f"{record['build_seconds']} s, captured in {record['capture_seconds']} s\n"
    )
    print("\n".join(table(record)))
    return int(any("peak_bytes" not in row for row in record["plans"]))


if __name__ == "__main__":
    sys.exit(main())
