#!/usr/bin/env bash
# A copy of a compiled model keeps the memory budget of the original, whatever budget it is compiled under.
#
# torch._functorch.config.activation_memory_budget is read when a graph is split, which is when it is first
# compiled.  Dynamo keeps compiled code with the code object of the forward, and a copy of a model has the
# same one: torch.compile of the copy, under another budget, finds code whose guards hold and runs that.  The
# config is in no guard, nothing is recompiled, nothing is said.  So a loop that compares budgets on copies of
# one model measures the first of them again and again.  Backend "aot_eager", which runs the graphs as they
# were cut.
# To do: torch.compiler.reset() before each, or a function of its own around each copy.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     budget 1.0: peak 44.2 MB
#     a copy, budget 0.1: peak 44.2 MB
#     a copy, budget 0.1, after a reset: peak 11.1 MB
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import copy
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


def peak_mb(model, budget):
    """The most memory that a step of ``model`` adds, in MB, compiled under ``budget``."""
    x = torch.randn(2048, 64)
    with config.patch(activation_memory_budget=budget):
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


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


print("torch", torch.__version__)
torch.manual_seed(0)
model = Model()
whole = peak_mb(model, 1.0)
of_a_copy = peak_mb(copy.deepcopy(model), 0.1)
torch._dynamo.reset()
afterwards = peak_mb(copy.deepcopy(model), 0.1)
print(f"budget 1.0: peak {whole:.1f} MB")
print(f"a copy, budget 0.1: peak {of_a_copy:.1f} MB")
print(f"a copy, budget 0.1, after a reset: peak {afterwards:.1f} MB")
told = of_a_copy > 0.98 * whole and afterwards < 0.5 * whole
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
