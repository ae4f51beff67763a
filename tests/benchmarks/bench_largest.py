"""How large a batch fits the memory in which the step as it is trains a small one.

    python -m tests.benchmarks.bench_largest [CASE ...]

For each model, in the memory that its step as it is takes with a few examples: the largest batch as it is,
with every block checkpointed, and with a plan, each with its predicted speed; which bound stopped the plan's;
and the peaks that were measured, of the plan at its largest batch and of the library's own checkpointing (its
flag, or every block wrapped) at the largest that is simulated for it and at the plan's.  The loop lets go of
outputs before the backward, as trainers do.  Cases named ``h100-`` are planned for an H100, for 72 GB of it,
from models without memory, at published sizes; nothing of them is measured.

Prints a table and writes ``results/largest.json``.  Exit code 1 if

* a planned step's measured peak is not the predicted one, or above the budget;
* a plan's largest batch is smaller than one without a plan;
* at one more neither a proved floor is above the budget nor it is said that no plan was found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import planner
from planner.capture.outputs import LossFn
from planner.checks import zoo
from planner.measure import step_peak
from planner.view.text import aligned

RESULTS = Path(__file__).parent / "results" / "largest.json"
SOLVE_S = 5.0
H100_GB = 72.0


@dataclass(frozen=True)
class Sized:
    """A model with a batch of any size; ``few``: as many as the step as it is sets the budget with."""

    build: Callable[[], nn.Module]
    make_batch: Callable[[int], Mapping[str, Tensor]]
    few: int
    block: str = ""  # class of the blocks that are wrapped by hand; "": the model has a flag
    make_loss: Callable[[int], LossFn] | None = None


@dataclass(frozen=True)
class Row:
    """One case.  Bytes are peaks of the whole step; ``None`` where nothing is measured or known.

    ``estimate_s``, ``search_s``  seconds of :func:`planner.estimate` and :func:`planner.largest_batch`.
    ``by_hand_bytes``             measured with the library's checkpointing at ``blocks``; ``_at_plans``: at
                                  the plan's batch.
    ``unmetered_bytes``           of targets that the loss holds, which a plan counts and the meter does not.
    """

    case: str
    budget_bytes: int
    as_it_is: int | None
    blocks: int | None
    largest: int
    fastest: int
    overhead: float
    overhead_bound: float
    examples_per_s: Mapping[str, float]
    stopped_by: str
    stop: str
    predicted_bytes: int
    measured_bytes: int | None
    unmetered_bytes: int
    by_hand_bytes: int | None
    by_hand_bytes_at_plans: int | None
    traces: int
    estimate_s: float
    search_s: float


def _rows_of(inputs: Mapping[str, Any]) -> Callable[[int], Mapping[str, Tensor]]:
    """As many rows as asked for, those of a batch over and over."""

    def make(n: int) -> dict[str, Tensor]:
        return {k: v[torch.arange(n) % len(v)] for k, v in inputs.items() if isinstance(v, Tensor)}

    return make


def _tokens(words: int, length: int) -> Callable[[int], Mapping[str, Tensor]]:
    def make(n: int) -> dict[str, Tensor]:
        ids = torch.randint(0, words, (n, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids}

    return make


def _pair_loss(n: int) -> LossFn:
    target = (torch.arange(n) % 2).float()
    return lambda out: nn.functional.binary_cross_entropy_with_logits(out.logits.squeeze(-1), target)


def _example(example: zoo.Example, few: int, **more: Any) -> Sized:
    return Sized(lambda: example.model, _rows_of(example.inputs), few, **more)


def _on_meta(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def without_memory() -> nn.Module:
        with torch.device("meta"):
            return build().train()

    return without_memory


CASES: dict[str, Callable[[], Sized]] = {
    "cross-encoder": lambda: _example(zoo.cross_encoder_example(), 4, make_loss=_pair_loss),
    "gpt2": lambda: Sized(
        lambda: zoo.gpt2(vocab_size=4096, n_embd=256, n_layer=6, n_head=4, n_positions=256).train(),
        _tokens(4096, 256),
        2,
    ),
    "internvl": lambda: _example(zoo.internvl_example(), 2),
    "resnet": lambda: _example(zoo.resnet_example(), 4, block="Bottleneck"),
    "h100-gpt2": lambda: Sized(
        _on_meta(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False))), _tokens(50257, 1024), 8
    ),
    "h100-bert-large": lambda: Sized(
        _on_meta(
            lambda: hf.BertForMaskedLM(
                hf.BertConfig(
                    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
                )
            )
        ),
        _tokens(30522, 512),
        8,
    ),
}


def bench(name: str, case: Sized) -> Row:
    """The case's figures."""
    elsewhere = name.startswith("h100-")
    model = case.build()
    few = case.make_batch(case.few)
    loss_fn = None if case.make_loss is None else case.make_loss(case.few)
    how: dict[str, Any] = (
        {"costs": "H100", "optimizer": torch.optim.AdamW} if elsewhere else {"costs": "roofline"}
    )
    began = time.perf_counter()
    estimated = planner.estimate(model, few, loss_fn=loss_fn, outputs="released", **how)
    estimate_s = time.perf_counter() - began
    budget_gb = H100_GB if elsewhere else estimated.unplanned_peak_bytes / 1e9
    began = time.perf_counter()
    found = planner.largest_batch(
        model,
        budget_gb,
        case.make_batch,
        make_loss=case.make_loss,
        outputs="released",
        time_limit_s=SOLVE_S,
        **how,
    )
    search_s = time.perf_counter() - began
    others = {other.name: other for other in found.others}
    as_it_is, blocks = others.get("the step as it is"), others.get("every block checkpointed")
    measured = by_hand = by_hand_there = None
    if not elsewhere:
        found.plan.apply(model)
        measured = _peak(model, case, found.batch)
        found.plan.restore(model)
        checkpointed_by_hand(model, case.block)
        by_hand = None if blocks is None else _peak(model, case, blocks.batch)
        by_hand_there = _peak(model, case, found.batch)
    speeds = {p.batch: p.examples_per_s for p in found.points}
    return Row(
        case=name,
        budget_bytes=found.budget_bytes,
        as_it_is=None if as_it_is is None else as_it_is.batch,
        blocks=None if blocks is None else blocks.batch,
        largest=found.batch,
        fastest=found.fastest,
        overhead=found.plan.overhead,
        overhead_bound=found.plan.overhead_bound,
        examples_per_s={
            **{way: other.examples_per_s for way, other in others.items()},
            "largest": speeds[found.batch],
            "fastest": speeds[found.fastest],
        },
        stopped_by=found.stop.by,
        stop=found.stop.words,
        predicted_bytes=found.plan.peak_bytes,
        measured_bytes=measured,
        unmetered_bytes=0 if case.make_loss is None else 4 * found.batch,
        by_hand_bytes=by_hand,
        by_hand_bytes_at_plans=by_hand_there,
        traces=found.traces,
        estimate_s=estimate_s,
        search_s=search_s,
    )


def _peak(model: nn.Module, case: Sized, size: int) -> int:
    loss_fn = None if case.make_loss is None else case.make_loss(size)
    return step_peak(model, case.make_batch(size), loss_fn=loss_fn, hold_outputs=False)


def checkpointed_by_hand(model: nn.Module, block: str) -> None:
    """The model's own flag, or each block of a class wrapped, in place."""
    from torch.utils.checkpoint import checkpoint

    if not block:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return
    for each in [m for m in model.modules() if type(m).__name__ == block]:
        each.forward = lambda *args, own=each.forward: checkpoint(own, *args, use_reentrant=False)  # type: ignore[method-assign]


def failures(rows: list[Row]) -> list[str]:
    """What is not as promised."""
    found = []
    for row in rows:
        expected = row.predicted_bytes - row.unmetered_bytes
        if row.measured_bytes is not None and row.measured_bytes != expected:
            found.append(f"{row.case}: measured {row.measured_bytes} bytes, predicted {expected}")
        if row.predicted_bytes > row.budget_bytes:
            found.append(f"{row.case}: {row.predicted_bytes} bytes are above the budget")
        for way, size in (("as it is", row.as_it_is), ("with every block checkpointed", row.blocks)):
            if size is not None and size > row.largest:
                found.append(f"{row.case}: {size} fit {way}, {row.largest} with a plan")
        if row.stopped_by not in ("floor", "search"):
            found.append(f"{row.case}: stopped by {row.stopped_by}")
    return found


def table(rows: list[Row]) -> str:
    """The rows as text."""
    cells = [
        ("case", "budget GB", "as it is", "every block", "plan", "overhead (proved)", "fastest",
         "examples/s: as it is", "every block", "plan's fastest", "stopped by", "by hand there / budget",
         "estimate s", "search s"),
    ]  # fmt: skip
    for row in rows:
        speed = row.examples_per_s
        there = row.by_hand_bytes_at_plans
        cells.append(
            (
                row.case, f"{row.budget_bytes / 1e9:.4g}", str(row.as_it_is or "-"), str(row.blocks or "-"),
                str(row.largest), f"{row.overhead:.1%} ({row.overhead_bound:.1%})", str(row.fastest),
                f"{speed.get('the step as it is', 0):.4g}", f"{speed.get('every block checkpointed', 0):.4g}",
                f"{speed['fastest']:.4g}", row.stopped_by,
                "" if there is None else f"{there / row.budget_bytes:.2f}",
                f"{row.estimate_s:.1f}", f"{row.search_s:.0f}",
            )
        )  # fmt: skip
    return "\n".join(aligned(cells, "l" + "r" * 9 + "lrrr", ruled=True))


def main(names: list[str]) -> int:
    """Run the cases named, or all; returns the exit code."""
    known = (
        {}
        if not names or not RESULTS.exists()
        else {r["case"]: r for r in json.loads(RESULTS.read_text())["rows"]}
    )
    rows = []
    for name in names or CASES:
        rows.append(bench(name, CASES[name]()))
        print(table(rows[-1:]), flush=True)
    known |= {row.case: asdict(row) for row in rows}
    merged = [Row(**known[name]) for name in CASES if name in known]
    record = {"torch": torch.__version__, "solve_s": SOLVE_S, "rows": [asdict(row) for row in merged]}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(merged)}")
    found = failures(merged)
    print("\n".join(f"FAILED {line}" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
