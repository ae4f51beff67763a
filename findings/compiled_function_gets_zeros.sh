#!/usr/bin/env bash
# Under torch.compile a Function that asked not to be given zeros is given them, and a weight gets a gradient.
#
# set_materialize_grads(False) makes autograd hand None to a Function's backward where no gradient came, so
# that it can leave out work, or return None itself.  Dynamo reads the Function's forward, and drops the call:
# it traces the backward with zeros for what nobody read.  A parameter whose .grad eager leaves None gets
# zeros, which an optimizer with momentum or weight decay acts on; what the Function meant to leave out runs.
# Nothing is said.
# To do: break the graph before such a Function (torch.compiler.disable), or set such gradients to None again.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     eager: None
#     aot_eager: tensor([0., 0., 0.])
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
from torch.autograd import Function

print("torch", torch.__version__)


class Both(Function):
    """Of the second result's gradient it makes one for ``weight``, of none none."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.set_materialize_grads(False)
        return x * 2, weight * 3

    @staticmethod
    def backward(ctx, first, second):
        return None if first is None else first * 2, None if second is None else second * 3


def gradient(backend):
    """That of ``weight``, where nobody reads the second result."""
    torch._dynamo.reset()
    x, weight = torch.ones(3, requires_grad=True), nn.Parameter(torch.ones(3))
    step = lambda: Both.apply(x, weight)[0].sum()
    (step if backend is None else torch.compile(step, backend=backend))().backward()
    return weight.grad


eager, compiled = gradient(None), gradient("aot_eager")
print("eager:", eager)
print("aot_eager:", compiled)
is_zeros = compiled is not None and not compiled.any()
as_told = torch.__version__.startswith("2.13.0") and eager is None and is_zeros
print("as told" if as_told else "not as told")
sys.exit(0 if as_told else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
