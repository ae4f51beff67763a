#!/usr/bin/env bash
# A profile that begins within another one leaves the outer one empty, what came before included.
#
# torch.profiler has one session.  A second profile() takes its place and reports its own events; the outer
# one then ends without an exception, without a single event, and with one line from C++ on stderr.  So what
# measures with the profiler (memory on a CPU has no other public counter) erases the user's own profile.
# To do: ask torch.autograd._profiler_enabled() first, and do not measure then.
#
# Run on 2026-11-30, 2 cores, Linux, Python 3.11:
#
#     torch 2.13.0+cpu
#     inner: aten::sinh
#     alone: aten::cosh aten::tan
#     around another: nothing
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
CPU = [torch.profiler.ProfilerActivity.CPU]


def seen(profile):
    """Which of the three calls a profile has."""
    found = {event.key for event in profile.key_averages()}
    return sorted(found & {"aten::cosh", "aten::sinh", "aten::tan"})


def profiled(within):
    """Two calls in a profile, and between them another one, in a profile of its own or not."""
    with torch.profiler.profile(activities=CPU) as outer:
        torch.ones(3).cosh()
        if within:
            with torch.profiler.profile(activities=CPU) as inner:
                torch.ones(3).sinh()
            print("inner:", *seen(inner))
        torch.ones(3).tan()
    return seen(outer)


alone, around = profiled(within=False), profiled(within=True)
print("alone:", *alone)
print("around another:", *(around or ["nothing"]))
as_told = torch.__version__.startswith("2.13.0") and alone == ["aten::cosh", "aten::tan"] and around == []
print("as told" if as_told else "not as told")
sys.exit(0 if as_told else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
