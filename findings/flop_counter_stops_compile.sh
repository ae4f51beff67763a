#!/usr/bin/env bash
# A compiled model whose first call FlopCounterMode counts is never compiled, nor is any other of its class.
#
# torch.compile compiles at the first call.  If that call runs under torch.utils.flop_counter.FlopCounterMode
# (any dispatch mode that does not say otherwise does it), Dynamo leaves the code alone, as it must, and marks
# it as code to be left alone: every later call, without the mode, of this model and of new ones of its class,
# runs uncompiled for the rest of the process.  No warning, no log line, right results; only the backend is
# never asked.  Counting a step's FLOPs before training is what many scripts begin with.
# To do: count before torch.compile on the plain model of another process, or call the compiled model once
# before counting; torch._dynamo.reset() makes the code eligible again.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     counted: 0 graphs compiled
#     the same model, not counted: 0 graphs compiled
#     another of its class: 0 graphs compiled
#     another after a reset: 1 graphs compiled
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import contextlib
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

asked = []


def backend(graph, _):
    asked.append(graph)
    return graph.forward


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).relu()


def graphs_of(model, *, counted=False):
    """How many graphs the backend was given in one call of a compiled model."""
    before = len(asked)
    with FlopCounterMode(display=False) if counted else contextlib.nullcontext():
        model(torch.ones(2, 4))
    return len(asked) - before


print("torch", torch.__version__)
compiled = torch.compile(Model(), backend=backend)
found = [graphs_of(compiled, counted=True), graphs_of(compiled)]
found.append(graphs_of(torch.compile(Model(), backend=backend)))
torch._dynamo.reset()
found.append(graphs_of(torch.compile(Model(), backend=backend)))
names = ("counted", "the same model, not counted", "another of its class", "another after a reset")
for name, count in zip(names, found):
    print(f"{name}: {count} graphs compiled")
told = found == [0, 0, 0, 1]
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
