#!/usr/bin/env bash
# A compiled depthwise convolution has its gradient from operands that are copied into rows.
#
# Inductor 2.13 has a lowering of its own for gradients of convolutions.  It wants the input and the gradient
# of the output in the order in which the gradient of the weight lies, and that of a depthwise weight, with
# one channel to a group, lies in rows whatever its operands do.  So a ConvNeXt block, whose pictures have
# their channels last, copies both before each gradient, one of them to (N, H, C, W), and a CPU takes its slow
# kernel: compiling makes such a step slower than eager.  A backward that recomputes a convolution
# (activation_memory_budget=0.25) is laid out as a whole, and escapes.
# To do: time the compiled step of a model with depthwise convolutions beside eager on a CPU.
#
# Run on 2026-12-01, 2 cores, Linux, Python 3.11 (times are of this machine, one thread):
#
#     torch 2.13.0+cpu
#     eager: gradient of the output (18816, 1, 1344, 96), input (18816, 1, 1344, 96)
#     compiled: gradient of the output (18816, 196, 14, 1), input (18816, 14, 1344, 1)
#     a step takes 1.84 of eager's time
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import re
import sys
import time

import torch
from torch import nn
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
torch.manual_seed(0)
WIDTH, SIDE = 96, 14
LAST = (SIDE * SIDE * WIDTH, 1, SIDE * WIDTH, WIDTH)


class Mix(nn.Module):
    """The part of a ConvNeXt block that mixes within channels."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)

    def forward(self, x):
        mixed = self.mix(self.before(x).permute(0, 3, 1, 2))
        return self.after(mixed.permute(0, 2, 3, 1)).square().mean()


class Strides(TorchDispatchMode):
    """Of the operands of the gradient."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.found = [tuple(x.stride()) for x in args[:2]]
        return func(*args, **(kwargs or {}))


def written(code):
    """Of the buffers that generated code hands to it."""
    names = re.search(r"convolution_backward\.default\((\w+), (\w+),", code).groups()
    made = r"{} = empty_strided_cpu\(\(.*?\), \((.*?)\)"
    return [tuple(map(int, re.search(made.format(n), code)[1].split(","))) for n in names]


def seconds(call):
    def once():
        began = time.process_time()
        call(x).backward()
        return time.process_time() - began

    return min(once() for _ in range(30))


model, x = Mix(), torch.randn(8, SIDE, SIDE, WIDTH)
with Strides() as eager:
    model(x).backward()
call = torch.compile(model)
_, codes = run_fw_bw_and_get_code(lambda: call(x))
compiled = written(codes[-1])

print("torch", torch.__version__)
print(f"eager: gradient of the output {eager.found[0]}, input {eager.found[1]}")
print(f"compiled: gradient of the output {compiled[0]}, input {compiled[1]}")
print(f"a step takes {seconds(call) / seconds(model):.2f} of eager's time")
rows = (WIDTH * SIDE * SIDE, SIDE * SIDE, SIDE, 1)
told = eager.found == [LAST, LAST] and compiled[0] == rows and compiled[1] not in (rows, LAST)
print("as told" if told else "NOT as told")
sys.exit(not told)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
