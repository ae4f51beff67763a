#!/usr/bin/env bash
# A fake tensor made of a whole or a double number tells its value since torch 2.14; one of float32 does not.
#
# FakeTensorMode runs a program on tensors that have sizes and no values: for a memory estimate, or a trace.
# A program that reads one (.item(), an if) used to be told so by an error.  Now a mode notes, for a tensor
# of one element that it makes a fake of, the number that was in it if that is an integer or a float64, and
# .item() answers with that.  So the same program runs, by the values of the tensors at hand, with int64, and
# raises with float32; a recording of it is of one way through an if, and nothing guards that.
# To do: ask the fake for its values only where an answer by the batch at hand is meant; elsewhere set the
# note that torch keeps (item_memo) to None.
#
# Run on 2026-12-01, 2 cores, Linux, Python 3.11:
#
#     torch 2.14.1+cu130
#     torch.int64: 3
#     torch.float64: 3.0
#     torch.float32: refused: DataDependentOutputException
#     written over before: refused: DataDependentOutputException
#     as told

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

print("torch", torch.__version__)


def read(dtype, is_written=False):
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.tensor(3, dtype=dtype))
    try:
        with mode:
            if is_written:
                fake.add_(1)
            return str(fake.item())
    except Exception as error:
        return "refused: " + type(error).__name__


found = {dtype: read(dtype) for dtype in (torch.int64, torch.float64, torch.float32)}
for dtype, said in found.items():
    print(f"{dtype}: {said}")
written = read(torch.int64, is_written=True)
print("written over before:", written)
told = list(found.values()) == ["3", "3.0", "refused: DataDependentOutputException"]
as_told = torch.__version__.startswith("2.14.1") and told and written == found[torch.float32]
print("as told" if as_told else "not as told")
sys.exit(0 if as_told else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
