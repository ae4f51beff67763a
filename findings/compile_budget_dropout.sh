#!/usr/bin/env bash
# torch.compile with a memory budget below 1 trains a model with dropout on wrong gradients, without a word.
#
# torch._functorch.config.activation_memory_budget says what share of the activations to keep; the rest is
# recomputed in the backward.  Dropout's random draw is recomputed too, from another state of the generator:
# the backward goes through another mask than the forward did.  Outputs and loss are eager's to the bit, so
# nothing shows but that training goes badly; without dropout the gradients are right.  Known to PyTorch
# (issue 190758), open at the time.  Default backend or not: "aot_eager" is taken here since it needs no
# compiler and draws what eager draws, "inductor" does so from a budget of 0.5 down.
# To do: compare gradients with eager's under one seed before trusting a budget.
#
# Run on 2026-11-29, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     dropout 0.0, budget 1.0: equal output, gradients 0 % off
#     dropout 0.0, budget 0.9: equal output, gradients 0 % off
#     dropout 0.0, budget 0.5: equal output, gradients 0 % off
#     dropout 0.0, budget 0.0: equal output, gradients 0 % off
#     dropout 0.5, budget 1.0: equal output, gradients 0 % off
#     dropout 0.5, budget 0.9: equal output, gradients 56 % off
#     dropout 0.5, budget 0.5: equal output, gradients 60 % off
#     dropout 0.5, budget 0.0: equal output, gradients 62 % off
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


def gradients(dropout, budget=None):
    """The output and all gradients of one step in one vector each; eager without a budget."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [(nn.Linear(64, 64), nn.GELU(), nn.Dropout(dropout)) for _ in range(4)]
    model = nn.Sequential(*(part for layer in layers for part in layer))
    x = torch.randn(256, 64)
    step = model
    if budget is not None:
        config.activation_memory_budget = budget
        step = torch.compile(model, backend="aot_eager")
    torch.manual_seed(1)
    out = step(x)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


print("torch", torch.__version__)
off = {}
for dropout in (0.0, 0.5):
    out, right = gradients(dropout)
    for budget in (1.0, 0.9, 0.5, 0.0):
        ours, gradient = gradients(dropout, budget)
        off[dropout, budget] = float((gradient - right).norm() / right.norm())
        same = "equal" if torch.equal(ours, out) else "other"
        percent = 100 * off[dropout, budget]
        print(f"dropout {dropout}, budget {budget}: {same} output, gradients {percent:.0f} % off")
wrong = {key for key, error in off.items() if error > 0.3}
told = wrong == {(0.5, 0.9), (0.5, 0.5), (0.5, 0.0)}
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
