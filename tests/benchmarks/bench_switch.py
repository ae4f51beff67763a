"""The checkpointing switch as the library has it, and the same switch planned: peak and FLOPs of a step.

    python -m tests.benchmarks.bench_switch [cross_encoder] [internvl]

For each model one step as a loop runs it (the whole model, its loss, the backward; no optimizer): switch
off; on; and on after ``planner.enable`` at three budgets: just what the library's switch takes, half way
from there to the step with the switch off, and the least there is a plan for.  Peaks are counted by the
meter of live storages, FLOPs while the step runs; both are exact.  Prints a table and writes
``results/switch.json``.  Exit code 1 if, given the peak of the library's switch, a planned step takes more
memory or more FLOPs than it did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from planner.checks import zoo
from planner.measure import step_flops, step_peak

RESULTS = Path(__file__).parent / "results" / "switch.json"
SOLVE_S = 20.0
EXAMPLES = {"cross_encoder": zoo.cross_encoder_example, "internvl": zoo.internvl_example}


class Case:
    """A model, its switch, and one training step through the model's front door."""

    def __init__(self, name: str) -> None:
        self.example = EXAMPLES[name]()
        self.model: nn.Module = self.example.whole or self.example.model
        self.model.train()

    def step(self) -> None:
        """Forward, loss, backward; gradients are gone afterwards."""
        torch.manual_seed(0)
        inputs = dict(self.example.inputs)
        if self.example.whole is None:
            self.model(**inputs).loss.backward()
        else:
            assert self.example.loss_fn is not None
            outputs = _Logits(self.model(inputs)["scores"])
            self.example.loss_fn(outputs).backward()
        self.model.zero_grad(set_to_none=True)

    def measured(self) -> tuple[int, int]:
        """Peak bytes and FLOPs, of a second step: the first one plans."""
        self.step()
        return step_peak(self.step), step_flops(self.step)


class _Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def _least_gb(case: Case) -> float:
    try:
        _planned(case, 1e-3)
    except planner.InfeasibleBudgetError as error:
        return error.minimum_bytes * 1.002 / 1e9
    raise AssertionError("a megabyte is enough for this model")


def _planned(case: Case, budget_gb: float) -> tuple[int, int]:
    planner.enable(case.model, budget_gb, time_limit_s=SOLVE_S)
    case.model.gradient_checkpointing_enable()
    try:
        return case.measured()
    finally:
        planner.disable(case.model)


def bench(name: str) -> list[dict[str, Any]]:
    """One row per way to run the step."""
    case = Case(name)
    off_bytes, off_flops = case.measured()
    case.model.gradient_checkpointing_enable()
    on_bytes, on_flops = case.measured()
    for module in case.model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    rows: list[dict[str, Any]] = []

    def add(way: str, budget_gb: float | None, peak: int, flops: int) -> None:
        extra = flops / off_flops - 1
        rows.append(
            {"model": name, "way": way, "budget_gb": budget_gb, "peak_bytes": peak, "extra_flops": extra}
        )

    add("switch off", None, off_bytes, off_flops)
    add("switch on", None, on_bytes, on_flops)
    budgets: list[tuple[str, Callable[[], float]]] = [
        ("planned, half way", lambda: (on_bytes + off_bytes) / 2e9),
        ("planned, at the switch's peak", lambda: (on_bytes - 1) / 1e9),
        ("planned, least", lambda: _least_gb(case)),
    ]
    for way, budget in budgets:
        budget_gb = budget()
        add(way, budget_gb, *_planned(case, budget_gb))
    return rows


def main(names: list[str]) -> int:
    rows = [row for name in names or list(EXAMPLES) for row in bench(name)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| model | gradient checkpointing | budget MB | peak MB | extra FLOPs |\n|---|---|---|---|---|")
    for row in rows:
        budget = "" if row["budget_gb"] is None else f"{row['budget_gb'] * 1e3:.1f}"
        print(
            f"| {row['model']} | {row['way']} | {budget} | {row['peak_bytes'] / 1e6:.1f} "
            f"| {row['extra_flops']:+.1%} |"
        )
    worse = 0
    for name in {row["model"] for row in rows}:
        ways = {row["way"]: row for row in rows if row["model"] == name}
        stock, ours = ways["switch on"], ways["planned, at the switch's peak"]
        worse += ours["peak_bytes"] >= stock["peak_bytes"] or ours["extra_flops"] > stock["extra_flops"]
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
