"""Planned steps at the peak of the library's own checkpointing, in a loop that lets go of the outputs.

    python -m tests.benchmarks.bench_outputs [MODEL ...]

The loop reads ``model(**batch).loss``, as trainers do, so the logits are gone when the backward begins.  For
each model, above: the step checkpointed by hand (the Hugging Face flag, or every block wrapped), its peak and
its extra FLOPs in that loop.  Then plans whose budget is that peak: with the outputs counted as held, counted
as released, and, for comparison, of a wrapper that returns the loss alone; and one with released outputs at
92 % of it.  Peaks are measured as each plan counts them and include what is resident; peaks and FLOPs are
exact.  Prints a table and writes ``results/outputs.json``.  Exit code 1 if

* a measured peak is not the predicted one, or the bits are not eager's;
* released outputs recompute more than 0.8 of the extra FLOPs by hand anywhere, or 0.5 in the median;
* they cost more predicted time than the wrapper's plan, beyond what a search leaves open;
* there is no plan at 92 % though the proved floor is below.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from planner.capture.outputs import LossFn
from planner.checks import zoo
from planner.costs.op_costs import graph_costs
from planner.devices.rates import DEVICES
from planner.errors import InfeasibleBudgetError
from planner.measure import compare, loss_of, run_step, step_flops, step_peak
from planner.options import OutputsMode, Search
from planner.plan import Plan
from planner.solving.priced import PricedStep, prepare
from planner.view.text import aligned
from tests.models import PEERS, Case
from tests.peer_steps import by_hand

RESULTS = Path(__file__).parent / "results" / "outputs.json"
SOLVE_S = 15.0
LEAST_S = 3.0
ANYWHERE, MEDIAN = 0.8, 0.5  # of the extra FLOPs by hand
LESS = 0.92  # of the peak by hand
OPEN = 0.0006  # of step time: a search ends this near to its bound


def _tokens(words: int, batch: int, length: int) -> Callable[[int], dict[str, Tensor]]:
    def make(seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, words, (batch, length), generator=random)
        return {"input_ids": ids, "labels": ids}

    return make


def _gpt2(words: int, width: int) -> Callable[[], nn.Module]:
    return lambda: zoo.gpt2(vocab_size=words, n_embd=width, n_layer=6, n_head=4, n_positions=256)


def _masked(words: int, width: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = hf.BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=4 * width,
        )
        return hf.BertForMaskedLM(config)

    return build


def _example(name: str, example: zoo.Example) -> Case:
    return Case(name, lambda: example.model, lambda seed: dict(example.inputs), example.loss_fn)


CASES: dict[str, Callable[[], Case]] = {
    "cross_encoder": lambda: _example("cross_encoder", zoo.cross_encoder_example()),
    "internvl": lambda: _example("internvl", zoo.internvl_example()),
    **{name: (lambda case=case: case) for name, case in PEERS.items()},  # type: ignore[misc]
    "gpt2-4096": lambda: Case("gpt2-4096", _gpt2(4096, 256), _tokens(4096, 4, 256)),
    "gpt2-50257": lambda: Case("gpt2-50257", _gpt2(50257, 64), _tokens(50257, 2, 128)),
    "bert-mlm-4096": lambda: Case("bert-mlm-4096", _masked(4096, 256), _tokens(4096, 4, 128)),
    "bert-mlm-30522": lambda: Case("bert-mlm-30522", _masked(30522, 64), _tokens(30522, 2, 128)),
    "bert-mlm-50257": lambda: Case("bert-mlm-50257", _masked(50257, 64), _tokens(50257, 2, 128)),
}


class LossAlone(nn.Module):
    """``model`` with its loss as the only output."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, **batch: Any) -> Tensor:
        loss = loss_of(self.model(**batch), self.loss_fn)
        assert loss is not None
        return loss


@dataclass(frozen=True)
class Row:
    """One way to run the step.  ``share``: of the extra FLOPs by hand; ``None``: no plan was found."""

    model: str
    way: str
    budget_bytes: int
    predicted_bytes: int | None
    peak_bytes: int | None
    extra_flops: int | None
    share: float | None
    overhead: float | None
    overhead_bound: float | None
    floor_bytes: int
    solve_s: float


def _priced(model: nn.Module, inputs: Any, loss_fn: LossFn | None, outputs: OutputsMode) -> PricedStep:
    step = prepare(model, inputs, loss_fn=loss_fn, costs="roofline", outputs=outputs)
    costs = graph_costs(step.graph, "roofline", rates=DEVICES["cpu"])  # the same on every machine
    return replace(step, costs=costs, least_limit_s=LEAST_S)


def bench(case: Case) -> list[Row]:
    """By hand, and planned at that step's peak and below."""
    model, inputs, loss_fn = case.build(), dict(case.make_inputs(0)), case.loss_fn  # type: ignore[arg-type]
    eager_flops = step_flops(model, inputs, loss_fn=loss_fn)
    record = run_step(model, inputs, loss_fn=loss_fn)
    hand = by_hand(case)
    peak = step_peak(hand, inputs, loss_fn=loss_fn, hold_outputs=False)
    hand_flops = step_flops(hand, inputs, loss_fn=loss_fn) - eager_flops
    if hand is model:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    rows = [Row(case.name, "by hand", peak, None, peak, hand_flops, 1.0, None, None, 0, 0.0)]

    def planned(way: str, step: PricedStep, budget_bytes: int) -> None:
        began = time.perf_counter()
        try:
            plan = step.plan_bytes(budget_bytes, Search(time_limit_s=SOLVE_S))
        except InfeasibleBudgetError as error:
            spent_s = time.perf_counter() - began
            nothing = (None, None, None, None, None, None)
            rows.append(Row(case.name, way, budget_bytes, *nothing, error.floor_bytes, spent_s))
            return
        spent_s = time.perf_counter() - began
        peak_bytes, flops = _measured(plan, step, inputs, None if way == "wrapper" else record)
        extra = flops - eager_flops
        figures = plan.overhead, plan.overhead_bound, plan.floor_bytes, spent_s
        found = plan.peak_bytes, peak_bytes, extra, extra / hand_flops
        rows.append(Row(case.name, way, budget_bytes, *found, *figures))

    released = _priced(model, inputs, loss_fn, "released")
    planned("released", released, peak)
    planned("wrapper", _priced(LossAlone(model, loss_fn), inputs, None, "held"), peak)
    planned("held", _priced(model, inputs, loss_fn, "held"), peak)
    planned(f"released, {LESS:.0%}", released, int(peak * LESS))
    return rows


def _measured(plan: Plan, step: PricedStep, inputs: Any, record: Any) -> tuple[int, int]:
    """Peak and FLOPs of the planned step, its outputs held as it counts them."""
    model, loss_fn = step.model, step.loss_fn
    held = [i for i, state in enumerate(plan.outputs.values()) if state == "held"]
    plan.apply(model)
    try:
        if record is not None:
            found = compare(record, run_step(model, inputs, loss_fn=loss_fn))
            assert found.equal, f"{plan.model_name}: {found}"
        peak = step_peak(model, inputs, loss_fn=loss_fn, hold_outputs=held)
        return peak, step_flops(model, inputs, loss_fn=loss_fn)
    finally:
        plan.restore(model)


def failures(rows: list[Row]) -> list[str]:
    """What the rows do not hold."""
    wrong = [
        f"{r.model}, {r.way}: {r.peak_bytes} bytes, predicted {r.predicted_bytes}"
        for r in rows
        if r.predicted_bytes is not None and r.predicted_bytes != r.peak_bytes
    ]
    shares = []
    for name in dict.fromkeys(r.model for r in rows):
        way = {r.way: r for r in rows if r.model == name}
        ours, wrapper, less = way["released"], way["wrapper"], way[f"released, {LESS:.0%}"]
        if ours.share is None or ours.overhead is None:
            wrong.append(f"{name}: no plan at the peak by hand")
            continue
        shares.append(ours.share)
        if ours.share > ANYWHERE:
            wrong.append(f"{name}: {ours.share:.2f} of the extra FLOPs by hand, want {ANYWHERE} at most")
        if wrapper.overhead is not None and ours.overhead > wrapper.overhead + OPEN:
            wrong.append(f"{name}: overhead {ours.overhead:.2%}, the wrapper's plan {wrapper.overhead:.2%}")
        if less.share is None and less.floor_bytes <= less.budget_bytes:
            wrong.append(f"{name}: no plan at {LESS:.0%}, floor {less.floor_bytes} <= {less.budget_bytes}")
    if shares and statistics.median(shares) > MEDIAN:
        wrong.append(f"median {statistics.median(shares):.2f} of the extra FLOPs by hand, want {MEDIAN}")
    return wrong


def _table(rows: list[Row]) -> list[str]:
    def shown(row: Row) -> tuple[str, ...]:
        none = row.peak_bytes is None
        if none:
            below = row.floor_bytes > row.budget_bytes
            why = f"floor {row.floor_bytes / 1e6:.2f}" if below else "none found"
            return (row.model, row.way, f"{row.budget_bytes / 1e6:.2f}", why, "", "", "", "")
        over = "" if row.overhead is None else f"{row.overhead:.2%}"
        bound = "" if row.overhead_bound is None else f"{row.overhead_bound:.2%}"
        exact = "" if row.predicted_bytes is None else str(row.peak_bytes - row.predicted_bytes)
        return (
            row.model, row.way, f"{row.budget_bytes / 1e6:.2f}", f"{row.peak_bytes / 1e6:.2f}", exact,
            f"{row.share:.2f}", over, bound,
        )  # fmt: skip

    head = ("model", "way", "budget MB", "peak MB", "off by", "of hand", "overhead", "bound")
    return aligned([head, *map(shown, rows)], "ll" + "r" * 6, ruled=True)


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    before = json.loads(RESULTS.read_text())["rows"] if names and RESULTS.exists() else []
    rows = [Row(**row) for row in before if row["model"] not in names]
    for name in names or CASES:
        rows += bench(CASES[name]())
        print("\n".join(_table([r for r in rows if r.model == name])), file=sys.stderr, flush=True)
        record = {"torch": torch.__version__, "solve_s": SOLVE_S, "rows": [vars(r) for r in rows]}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_table(rows)))
    wrong = failures(rows)
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
