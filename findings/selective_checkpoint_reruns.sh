#!/usr/bin/env bash
# Selective checkpointing runs a matrix product again that nobody reads.
#
# The backward of relu reads relu's output.  Save that (MUST_SAVE), and nothing in the backward needs the
# product before it: its input is the input of the block, and its output was wanted by relu alone.
# torch.utils.checkpoint runs it again all the same, since it replays the function op by op and only skips
# an op whose own output is saved: as many FLOPs as with nothing saved, for more memory.  To be rid of the
# product one has to save its output, which is then of no use but to be skipped, and relu's is made from it
# again.
# To do: save the outputs of dear ops, not the tensors that the backward reads.
#
# Run on 2026-11-29, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     no checkpointing: 6 products
#     nothing saved: 7 products
#     relu's output saved: 7 products
#     mm's output saved: 6 products
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import functools
import sys

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

N = 64
PRODUCT = 2 * N**3  # FLOPs
mm, relu = torch.ops.aten.mm.default, torch.ops.aten.relu.default
x, first, second = (torch.randn(N, N, requires_grad=True) for _ in range(3))


def block(x):
    return (x @ first).relu() @ second


def products(saved):
    """Matrix products in one step, forward and backward, with the outputs of the ops in ``saved`` saved."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.MUST_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with FlopCounterMode(display=False) as count:
        checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    return count.get_total_flops() / PRODUCT


with FlopCounterMode(display=False) as count:
    block(x).sum().backward()
plain = count.get_total_flops() / PRODUCT
ways = {"nothing": products(()), "relu's output": products((relu,)), "mm's output": products((mm,))}
print("torch", torch.__version__)
print(f"no checkpointing: {plain:.0f} products")
for name, count in ways.items():
    print(f"{name} saved: {count:.0f} products")
told = plain == 6 and list(ways.values()) == [7, 7, 6]
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
