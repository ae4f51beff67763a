#!/usr/bin/env bash
# Code compiled by inductor for sizes that vary clamps by the bound of the call that it was compiled at.
#
# torch.compile takes a float argument for a number of each call once it has changed.  Where a size has
# changed as well, and the float is a bound of clamp, the code that inductor writes on the CPU keeps the bound
# of the call at which it was compiled: later calls get values and gradients of that bound, and nothing is
# said.  A factor follows the argument, the aot_eager backend is right, and so is torch 2.15; 2.14.1 is not.
# To do: give such a bound as a tensor, or compile with dynamic=False.
#
# Run on 2026-12-01, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     largest value, bounds 1.00, 1.33, 1.67, 2.00
#     eager: 1.00, 1.33, 1.67, 2.00
#     aot_eager: 1.00, 1.33, 1.67, 2.00
#     inductor: 1.00, 1.33, 1.33, 1.33
#     as told

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
BOUNDS = [1 + i / 3 for i in range(4)]


def clamped(x, bound):
    return (x * bound).clamp(-bound, bound)


def largest(call):
    found = []
    for rows, bound in zip((32, 31, 17, 9), BOUNDS):
        x = torch.linspace(-9, 9, rows * 8).view(rows, 8).requires_grad_()
        y = call(x, bound)
        y.sum().backward()
        found.append(float(y.detach().max()))
    return found


def told(values):
    return ", ".join(f"{value:.2f}" for value in values)


print("largest value, bounds", told(BOUNDS))
found = {"eager": largest(clamped)}
for backend in ("aot_eager", "inductor"):
    torch._dynamo.reset()
    found[backend] = largest(torch.compile(clamped, backend=backend))
for name, values in found.items():
    print(f"{name}: {told(values)}")
right = told(found["eager"]) == told(found["aot_eager"]) == told(BOUNDS)
stale = told(found["inductor"]) == told([BOUNDS[0], BOUNDS[1], BOUNDS[1], BOUNDS[1]])
as_told = torch.__version__.startswith("2.13.0") and right and stale
print("as told" if as_told else "not as told")
sys.exit(0 if as_told else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
