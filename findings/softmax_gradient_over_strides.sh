#!/usr/bin/env bash
# The derivative of a softmax, written over a gradient that is not contiguous, is wrong, without an error.
#
# Given such a gradient, torch's op with a result of its own is right.  The same op told to leave its result
# in that gradient (grad_input=) walks rows as if they lay one after the other.  Over a contiguous one the two
# agree to the bit.  A pass that turns calls into their forms in place meets this where its fake tensors say
# "contiguous" and the real ones are not, at dimensions of size 1 for instance.
# To do: write over it only where the strides are known for certain.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     contiguous: off by 0.0
#     turned: off by 0.83
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
derivative = torch.ops.aten._softmax_backward_data
torch.manual_seed(0)
output = torch.randn(4, 3, 5, 7).softmax(-1)


def furthest(gradient):
    """How far the two forms are apart."""
    right = derivative.default(gradient, output, -1, torch.float32)
    written = gradient.clone()  # keeps strides
    derivative.out(written, output, -1, torch.float32, grad_input=written)
    return float((right - written).abs().max())


contiguous = torch.randn(4, 3, 5, 7)
turned = contiguous.transpose(1, 2).contiguous().transpose(1, 2)
print(f"contiguous: off by {furthest(contiguous)}")
print(f"turned: off by {furthest(turned):.2f}")
as_told = torch.__version__.startswith("2.13.0") and furthest(contiguous) == 0.0 and furthest(turned) > 0.1
print("as told" if as_told else "not as told")
sys.exit(0 if as_told else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
