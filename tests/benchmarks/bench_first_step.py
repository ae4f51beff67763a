"""How long a training batch waits for its plan under ``planner.enable``, and what is found meanwhile.

    python -m tests.benchmarks.bench_first_step [SHARE ...]

A BERT of base size (12 layers of 768) that classifies 8 texts of 128 tokens, trained by SGD.  ``SHARE`` is
where the budget lies between the least for which a plan was found and the peak of the step as it is, at the
largest batch; 0 is 2 % above the least (0.5, 0.25 and 0 by default).  Batches of the same size come, then a
larger one, then two other shapes; then training goes on until nothing better is sought.  The wait of a batch
is from the call of the model to the first kernel of its planned forward: capture, search and program are in
it.  Wall-clock seconds: nothing else should run.

Prints a row per budget and writes ``results/first_step.json``; exit code 1 where the first batch waits for
more than 10 s, another for more than 3, a step's bits change with its plan, or its peak is over the budget.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import planner
from planner.costs.cache import VARIABLE
from planner.runtime import forward
from planner.view.text import aligned

RESULTS = Path(__file__).parent / "results" / "first_step.json"
SHARES = (0.5, 0.25, 0.0)
ABOVE_LEAST = 1.02
SHAPES = ((8, 128), (8, 128), (12, 128), (10, 96), (6, 112))
FIRST_S, OTHERS_S = 10.0, 3.0
SEARCH_S = 30.0
MOST_S = 90.0  # of training on until the search beside it has ended


@dataclass(frozen=True)
class Row:
    """One budget; ``share`` 0: just above the least.  Overheads are shares of step time, predicted."""

    share: float
    budget_bytes: int
    waits_s: tuple[float, ...]
    first_overhead: float
    last_overhead: float
    proved: float
    bettered: int
    peak_bytes: int
    bits_equal: bool

    @property
    def holds(self) -> bool:
        """Whether it is as it should be."""
        first, *others = self.waits_s
        return (
            first <= FIRST_S
            and max(others) <= OTHERS_S
            and self.bits_equal
            and self.peak_bytes <= self.budget_bytes
        )


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=8192)).train()


def batch(rows: int, length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows * length)
    return {
        "input_ids": torch.randint(8192, (rows, length), generator=random),
        "labels": torch.randint(2, (rows,), generator=random),
    }


class _Counts(logging.Handler):
    """How often a better plan was told of."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "has a better plan" in record.getMessage()


def _bits(trained: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of a step whose random numbers are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = trained(**inputs).loss
        loss.backward()
    seen = [loss.detach(), *(p.grad for p in trained.parameters() if p.grad is not None)]
    trained.zero_grad()
    return seen


def measured(share: float, budget_bytes: int) -> Row:
    """Train so, and look."""
    trained, told, waits = model(), _Counts(), []
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)  # the weights stay, and so do the bits
    planner.enable(trained, budget_bytes / 1e9, time_limit_s=SEARCH_S, now=True)
    began: list[float] = []
    run = forward.run_step

    def noted(*args: Any, **kwargs: Any) -> Any:
        began.append(time.perf_counter())
        return run(*args, **kwargs)

    log = logging.getLogger("planner")
    log.setLevel(logging.INFO)
    log.addHandler(told)
    with mock.patch.object(forward, "run_step", noted):
        for shape in SHAPES:
            inputs = batch(*shape)
            began.clear()
            asked = time.perf_counter()
            trained(**inputs).loss.backward()
            waits.append(round(began[0] - asked, 2))
            optimizer.step()
            optimizer.zero_grad()
    inputs = batch(*SHAPES[0])
    with_first = _bits(trained, inputs)
    first = planner.plan_of(trained)
    assert first is not None
    ends = time.perf_counter() + MOST_S
    seeking = vars(trained)["_planner_switch"]._plans._betterment
    while seeking.is_busy and time.perf_counter() < ends:
        _bits(trained, inputs)
    last = planner.plan_of(trained)
    assert last is not None
    equal = all(map(torch.equal, with_first, _bits(trained, inputs)))
    peak = planner.measure.step_peak(trained, inputs)
    log.removeHandler(told)
    return Row(
        share,
        budget_bytes,
        tuple(waits),
        first.overhead,
        last.overhead,
        last.overhead_bound,
        told.count,
        peak,
        equal,
    )


def main(shares: list[float]) -> int:
    os.environ[VARIABLE] = "0"  # every search from its start
    plan = planner.plan(
        model(), 1e3, batch(*SHAPES[2]), optimizer=torch.optim.SGD, time_limit_s=SEARCH_S, costs="roofline"
    )
    least, most = plan.minimum_peak_bytes, plan.baseline_peak_bytes
    rows = []
    for share in shares:
        budget = round(least + share * (most - least)) if share else round(ABOVE_LEAST * least)
        rows.append(measured(share, budget))
    table = [
        ["of the step", "budget MB", "waits s", "overhead", "in the end", "proved", "bettered", "peak MB"]
    ]
    for row in rows:
        figures = (row.first_overhead, row.last_overhead, row.proved)
        table.append(
            [
                f"{row.share:.0%}" if row.share else "least",
                f"{row.budget_bytes / 1e6:.1f}",
                ", ".join(map(str, row.waits_s)),
                *(f"{x:.2%}" for x in figures),
                str(row.bettered),
                f"{row.peak_bytes / 1e6:.1f}",
            ]
        )
    print("\n".join(aligned(table, "lrlrrrrr", ruled=True)))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({**versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(not all(row.holds for row in rows))


if __name__ == "__main__":
    sys.exit(main([float(x) for x in sys.argv[1:]] or list(SHARES)))
