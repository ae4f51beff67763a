"""Which model families can be planned as they are: a small model of each, at half of its memory.

    python -m tests.benchmarks.bench_families [NAME ...]

Each model's step is captured with its own loss (DPT, which has none here, with the mean square of its
depth), planned for half of what the step adds to what is resident, or for the least budget where that is
more, and verified: outputs, gradients, buffers and random state bit for bit, the measured peak to the byte.
A family whose step is not one graph is planned in regions, whose peak is to be within a hundredth below the
predicted one.  The models are tiny: what is shown is whether, not how fast.  Writes ``results/families.json``
and
``results/families.md`` when run for all; exit code 1 if a plan differs from eager or breaks its budget.
A family that is refused is no failure, and its row says why.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from planner.errors import PlannerError
from planner.options import Search
from planner.solving.in_regions import captured_as, step_in_regions
from planner.solving.priced import prepare
from tests.benchmarks.families import FAMILIES

RESULTS = Path(__file__).parent / "results"
SOLVE_S = 4.0


@dataclass(frozen=True)
class Row:
    """``verdict`` is "equal", "differs" or "refused"; bytes are above what is resident.

    ``regions``  calls of them; 0: the step is one graph.
    """

    family: str
    model: str
    verdict: str
    regions: int | None = None
    ops: int | None = None
    eager_kb: float | None = None
    plan_kb: float | None = None
    overhead: float | None = None
    proved: float | None = None
    seconds: float | None = None
    note: str = ""


def _loss_of_depth(outputs: Any) -> torch.Tensor:
    return outputs.predicted_depth.pow(2).mean()


def row_of(family: str) -> Row:
    """Plan and verify one family."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family]()
    name = type(model).__name__
    loss_fn = _loss_of_depth if name == "DPTForDepthEstimation" else None
    began = time.perf_counter()
    try:
        how: dict[str, Any] = {
            "loss_fn": loss_fn, "costs": "roofline", "search": Search(time_limit_s=SOLVE_S)
        }  # fmt: skip
        step = captured_as(
            "auto", lambda: prepare(model, batch, **how), lambda: step_in_regions(model, batch, **how)
        )
    except PlannerError as error:
        return Row(family, name, "refused", note=_reason(error))
    rest = step.problem.resident_bytes
    eager = step.baseline.peak_bytes
    budget = max(step.minimum_peak_bytes, rest + (eager - rest) // 2)
    plan = step.plan_bytes(budget, search=Search(time_limit_s=SOLVE_S))
    seconds = time.perf_counter() - began
    try:
        report = plan.verify()
    except PlannerError as error:  # its step is another at this budget, which may be the least there is
        return Row(family, name, "differs", len(plan.regions), len(step.graph.ops), note=str(error))
    lowest = report.predicted_peak_bytes * (0.99 if plan.regions else 1)
    exact = report.ok and lowest <= report.peak_bytes <= report.predicted_peak_bytes
    return Row(
        family,
        name,
        "equal" if exact else "differs",
        len(plan.regions),
        len(step.graph.ops),
        (eager - rest) / 1e3,
        (plan.peak_bytes - rest) / 1e3,
        100 * plan.overhead,
        100 * plan.overhead_bound,
        seconds,
        "" if exact else str(report).replace("\n", "; "),
    )


def _reason(error: PlannerError) -> str:
    """The line of the model that stopped the capture, without the folder it is in."""
    text = str(error)
    start, end = text.find("("), text.find("needs the value of a tensor")
    return f"reads a tensor's value: {text[start + 1 : end].strip(') ')}" if 0 < start < end else text


def main(names: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    rows = []
    for family in names or FAMILIES:
        rows.append(row_of(family))
        print(rows[-1], flush=True)
    table = pd.DataFrame(map(dataclasses.asdict, rows))
    counts = table["verdict"].value_counts().to_dict()
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(table)} families: {summary}")
    if set(FAMILIES) <= set(table["family"]):
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        run = {**versions, "rows": json.loads(table.to_json(orient="records", double_precision=2))}
        (RESULTS / "families.json").write_text(json.dumps(run, indent=1) + "\n")
        (RESULTS / "families.md").write_text(_page(table, versions, summary))
    return int("differs" in counts)


def _page(table: pd.DataFrame, versions: dict[str, str], summary: str) -> str:
    shown = table.drop(columns=["note"]).round(1).astype({"ops": "Int64", "regions": "Int64"}).astype(object)
    shown = shown.where(shown.notna(), "")
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()]
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    notes = "".join(f"* {r.family}: {r.note}\n" for r in table.itertuples() if r.note)
    return (
        "# Model families\n\nMade by `python -m tests.benchmarks.bench_families`; do not edit. "
        f"torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{len(table)} families: {summary}.\n\n{body}\n\n{notes}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
