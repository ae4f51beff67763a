#!/usr/bin/env bash
# The least memory budget of torch.compile has the peak of no budget at all.
#
# With torch._functorch.config.activation_memory_budget at 0 only the inputs are saved, as if the whole
# compiled region were one checkpoint; and one checkpoint saves nothing.  What the partitioner weighs is the
# saved tensors, not the peak: with none saved, the backward begins by running the whole forward again, and
# then holds all that was not saved.  Peak of the step: that of budget 1, for a whole forward more.  On the
# way down the peak falls to a quarter at 0.1, and is back at two thirds at 0.05.  Backend "aot_eager",
# which runs the graphs as they were cut.
# To do: take the peak as the measure, and do not expect that less budget is less memory.
#
# Run on 2026-11-29, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     budget 1.0: peak 44.2 MB
#     budget 0.5: peak 25.2 MB
#     budget 0.2: peak 15.3 MB
#     budget 0.1: peak 11.1 MB
#     budget 0.05: peak 30.0 MB
#     budget 0.0: peak 44.2 MB
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
from torch import nn
from torch._functorch import config
from torch.profiler import ProfilerActivity, profile


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def peak_mb(budget):
    """The most memory that one compiled step of eight blocks adds, in MB."""
    torch._dynamo.reset()
    config.activation_memory_budget = budget
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(8))), torch.randn(2048, 64)
    compiled = torch.compile(model, backend="aot_eager")

    def step():
        compiled(x).square().mean().backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most / 1e6


print("torch", torch.__version__)
peaks = {budget: peak_mb(budget) for budget in (1.0, 0.5, 0.2, 0.1, 0.05, 0.0)}
for budget, peak in peaks.items():
    print(f"budget {budget}: peak {peak:.1f} MB")
told = peaks[0.1] < 0.4 * peaks[1.0] and peaks[0.0] > 0.99 * peaks[1.0] and peaks[0.05] > 2 * peaks[0.1]
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
