"""What the machinery itself costs: a plan that recomputes nothing, beside the eager step.

    python tests/benchmarks/bench_overhead.py [TURNS]

Both train the same model in one process on one thread, taking turns.  The figure is the median over
turns of planned over eager CPU seconds: on one thread they are what the wall clock shows on an idle
machine, without what other processes take on a busy one.

Each model twice: at the demo's size, and so narrow that its kernels take next to nothing and the seconds
are those of the host, which is what a small batch waits for on a GPU.

Writes ``results/overhead.json``; exit code 1 if a ratio is above 1.03, or above 1.1 for the host alone.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from planner.checks.trials import planned_copies, prepare_example, race
from planner.checks.zoo import MODELS, Example, ResNet, UNet, gpt2, internvl, internvl_batch, token_batch
from planner.options import Search
from planner.view.text import aligned

RESULTS = Path(__file__).parent / "results" / "overhead.json"
MOST, MOST_OF_HOST = 1.03, 1.1
TURNS = 21
HOST_TURNS = 15  # for one of the demo's


def _narrow_bert() -> Example:
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32
    )
    return Example("BERT", transformers.BertForMaskedLM(config), token_batch(2, 8, 64))


def _narrow_internvl() -> Example:
    tower = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**tower, "num_hidden_layers": 6, "num_key_value_heads": 1, "vocab_size": 64}
    model = internvl(image=16, patch=4, vision={**tower, "num_hidden_layers": 6}, text=text)
    return Example("InternVL", model, internvl_batch(2, 8, 64, image=16, patch=4))


def _narrow_gpt2() -> Example:
    model = gpt2(vocab_size=64, n_embd=16, n_layer=12, n_head=2, n_positions=8)
    return Example("GPT2", model, token_batch(2, 8, 64))


def _narrow_resnet() -> Example:
    inputs = {"pixels": torch.randn(2, 3, 32, 32), "labels": torch.randint(4, (2,))}
    return Example("ResNet-50", ResNet(width=1, classes=4), inputs)


def _narrow_unet() -> Example:
    inputs = {"pixels": torch.randn(2, 3, 16, 16), "masks": torch.randint(4, (2, 16, 16))}
    return Example("U-Net", UNet(width=1, classes=4), inputs)


NARROW = (_narrow_bert, _narrow_internvl, _narrow_gpt2, _narrow_resnet, _narrow_unet)


def cpu_seconds_of(work: Callable[[], None], _: torch.device) -> float:
    """CPU seconds of this process while ``work`` runs."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _bench(example: Example, turns: int, most: float) -> dict[str, Any]:
    example.model.train()
    prepared = prepare_example(example, "roofline")
    plan = prepared.plan_bytes(prepared.baseline.peak_bytes, search=Search("keep_all"))
    runners = planned_copies(example.model, [plan])
    ran = race(runners, example.inputs, example.loss_fn, steps=turns, clock=cpu_seconds_of)
    assert ran.losses[0] == ran.losses[1], f"{example.name}: the losses differ from eager's"
    return {
        "model": example.name,
        "host_only": most == MOST_OF_HOST,
        "ops": len(prepared.graph.ops),
        "eager_s": ran.step_s[0],
        "planned_s": ran.step_s[1],
        "ratio": ran.ratios[0],
        "most": most,
        "turns": turns,
    }


def main(turns: int) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [_bench(MODELS[name](), turns, MOST) for name in MODELS]
    rows += [_bench(build(), HOST_TURNS * turns, MOST_OF_HOST) for build in NARROW]
    run = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    cells = [
        (
            r["model"] + ", host only" * r["host_only"],
            str(r["ops"]),
            *(f"{r[k] * 1e3:.1f}" for k in ("eager_s", "planned_s")),
            f"{r['ratio']:.4f}",
            f"{r['most']:.2f}",
        )
        for r in rows
    ]
    print("A plan that recomputes nothing, CPU seconds of forward and backward, medians over turns\n")
    print(
        "\n".join(
            aligned(
                [("model", "ops", "eager ms", "planned ms", "ratio", "aim"), *cells], "lrrrrr", ruled=True
            )
        )
    )
    above = [row[0] for row, r in zip(cells, rows, strict=True) if r["ratio"] > r["most"]]
    if above:
        print(f"FAILED, above its aim: {', '.join(above)}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else TURNS))
