#!/usr/bin/env bash
# The gradient of torch.prod has other last bits while a FLOP counter looks on.
#
# The backward of a product divides by each factor where none is zero, and multiplies the others where one is;
# which, eager finds out from the values.  Under a dispatch mode it does not look, and takes a formula that is
# right for both.  So FlopCounterMode, a memory tracker, or any mode of one's own that changes nothing,
# changes the gradient, by about one unit in the last place.  Whoever compares a measured step with an
# unmeasured one bit for bit sees a difference that no op of theirs made.
# To do: compare steps that were both measured or both not.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     prod under LooksOn: off by up to 4e-07 (relative)
#     prod under FlopCounterMode: off by up to 4e-07 (relative)
#     sum of logs under LooksOn: equal
#     sum of logs under FlopCounterMode: equal
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def gradient(op, mode=None):
    torch.manual_seed(0)
    x = torch.rand(64, 7, dtype=torch.float32).add(0.5).requires_grad_()
    with contextlib.nullcontext() if mode is None else mode:
        op(x).sum().backward()
    return x.grad


print("torch", torch.__version__)
found = {}
for name, op in (
    ("prod", lambda x: x.prod(0)),
    ("sum of logs", lambda x: x.log().sum(0).exp()),
):
    plain = gradient(op)
    again = torch.equal(gradient(op), plain)
    for mode in (LooksOn(), FlopCounterMode(display=False)):
        other = gradient(op, mode)
        off = float(((other - plain).abs() / plain.abs()).max())
        kind = type(mode).__name__
        found[name, kind] = again and torch.equal(other, plain), off
        same = "equal" if found[name, kind][0] else f"off by up to {off:.0e} (relative)"
        print(f"{name} under {kind}: {same}")
told = all(
    equal == (name == "sum of logs") and off < 1e-4 for (name, _), (equal, off) in found.items()
)
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
