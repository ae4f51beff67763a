"""Looking at a large plan: seconds of its text, page, table and pictures, and how large the page is.

    python -m tests.benchmarks.bench_display

The plan is that of a GPT2 of 114 narrow layers, whose step has some 9,000 ops, at 60 % of what keeping
everything takes.  Pictures are drawn to the last pixel.  Prints a table and writes ``results/display.json``;
exit code 1 if anything is over its limit: 0.2 s for texts and the page, 300 kB for the page, 3 s for a
picture.  Seconds are of this process's own work, so that other work on the machine does not count; the
first use of matplotlib and pandas, which imports them, does not count either.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from planner.checks import zoo
from planner.options import Search
from planner.solving.priced import PricedStep, prepare
from planner.view.plots import plot_frontier
from planner.view.text import aligned

RESULTS = Path(__file__).parent / "results" / "display.json"
LAYERS = 114
SHARE = 0.6  # of the keep-all peak
TEXT_S, PICTURE_S, PAGE_BYTES = 0.2, 3.0, 300_000


def deep_step(layers: int) -> PricedStep:
    """The captured step of a GPT2 of ``layers`` narrow layers."""
    model = zoo.gpt2(n_embd=32, n_layer=layers, n_head=2, n_positions=32, vocab_size=512)
    return prepare(model, zoo.token_batch(2, 32, 512), costs="roofline")


def bench(step: PricedStep, *, turns: int = 3) -> dict[str, Any]:
    """One record: sizes of the plan, and a row for each way to look at it."""
    import matplotlib.pyplot as plt

    budget = round(SHARE * step.baseline.peak_bytes)
    plan = step.plan_bytes(budget, search=Search("greedy"))
    curve = step.frontier([budget, step.baseline.peak_bytes], search=Search("greedy"))
    page = plan._repr_html_()

    def drawn(draw: Callable[[], Any]) -> Callable[[], None]:
        def look() -> None:
            draw().figure.canvas.draw()
            plt.close("all")

        return look

    looks: dict[str, tuple[Callable[[], Any], float]] = {
        "repr": (lambda: repr(plan), TEXT_S),
        "summary": (plan.summary, TEXT_S),
        "page": (plan._repr_html_, TEXT_S),
        "to_dataframe": (plan.to_dataframe, TEXT_S),
        "plot_memory": (drawn(plan.plot_memory), PICTURE_S),
        "plot_placements": (drawn(plan.plot_placements), PICTURE_S),
        "plot_graph": (drawn(lambda: plan.plot_graph("transformer.h.1")), PICTURE_S),
        "plot_frontier": (drawn(lambda: plot_frontier(curve, plan=plan)), PICTURE_S),
    }
    rows: list[dict[str, Any]] = [
        {"what": what, "seconds": round(_seconds(look, turns), 4), "limit": limit}
        for what, (look, limit) in looks.items()
    ]
    rows.append({"what": "size of the page", "bytes": len(page.encode()), "limit": PAGE_BYTES})
    return {
        "torch": torch.__version__,
        "matplotlib": mpl.__version__,
        "ops": plan.op_count,
        "steps": len(plan.sequence),
        "values": len(plan.placements),
        "rows": rows,
    }


def _seconds(look: Callable[[], Any], turns: int) -> float:
    """Least processor seconds of ``turns``, after one that does not count."""
    look()
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        look()
        seconds.append(time.process_time() - began)
    return min(seconds)


def failures(record: dict[str, Any]) -> list[str]:
    """What is over its limit."""
    over = [(r, r.get("seconds", r.get("bytes"))) for r in record["rows"]]
    return [f"{r['what']}: {found:,} of {r['limit']:,}" for r, found in over if found > r["limit"]]


def table(record: dict[str, Any]) -> list[str]:
    """Lines, one for each way to look."""
    cells = [
        (r["what"], f"{r['bytes'] / 1000:.0f} kB", f"{r['limit'] / 1000:.0f} kB")
        if "bytes" in r
        else (r["what"], f"{r['seconds']:.4f} s", f"{r['limit']:.1f} s")
        for r in record["rows"]
    ]
    return aligned([("", "took", "limit"), *cells], "lrr", ruled=True)


def main() -> int:
    mpl.use("Agg")
    record = bench(deep_step(LAYERS))
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"A plan of {record['ops']:,} ops in {record['steps']:,} steps, {record['values']:,} values:\n")
    print("\n".join(table(record)))
    wrong = failures(record)
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
