"""Every picture that is committed, drawn again: ``make pictures``.

    python -m tests.benchmarks.pictures [--out notebooks]

``memory.png``      a GPT2 and a U-Net of the demo at half of what their steps add to the memory at rest.
``placements.png``  BERT-large, 24 layers, 16 sequences of 512 tokens in bfloat16, at the same share;
                    captured without its memory.

Costs are rooflines of devices on file, a desktop's CPU and what an H100 attains, so that plans are alike on
every machine.  Exit code 1 if a picture is larger than 150 kB.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from planner import Plan
from planner.checks import demo
from planner.checks.zoo import MODELS
from planner.costs.op_costs import graph_costs
from planner.devices.rates import DEVICES, Device
from planner.options import Search
from planner.solving.priced import prepare
from tests.benchmarks.graphs import ATTAINED_H100, GRAPHS, without_memory

SHARE = 0.5
MOST_BYTES = 150_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "notebooks")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sizes = {path.name: path.stat().st_size for path in (draw(out) for draw in PICTURES)}
    for name, size in sizes.items():
        print(f"{out / name}: {size / 1000:.0f} kB")
    return int(any(size > MOST_BYTES for size in sizes.values()))


def memory(out: Path) -> Path:
    """Memory over the step, before and after."""
    examples = [MODELS[name]("cpu") for name in ("gpt2", "unet")]
    path = demo.draw([_half(e.model, e.inputs, DEVICES["cpu"]) for e in examples], out)
    assert path is not None
    return path


def placements(out: Path) -> Path:
    """Model depth against time."""
    model, inputs = without_memory(GRAPHS["bert-large-b16x512"])
    plan = _half(model, inputs, ATTAINED_H100)
    figure = Figure(figsize=(12.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    plan.plot_placements(figure.subplots())
    path = out / "placements.png"
    figure.savefig(path, dpi=100)
    return path


PICTURES: tuple[Callable[[Path], Path], ...] = (memory, placements)


def _half(model: nn.Module, inputs: Mapping[str, Any], rates: Device) -> Plan:
    """The plan for memory at rest and half of what the step adds to it."""
    step = prepare(model, inputs, costs="roofline")
    step = dataclasses.replace(step, costs=graph_costs(step.graph, "roofline", rates=rates))
    at_rest = step.resident.total_bytes
    return step.plan_bytes(
        at_rest + round(SHARE * (step.baseline.peak_bytes - at_rest)), search=Search(time_limit_s=10.0)
    )


if __name__ == "__main__":
    sys.exit(main())
