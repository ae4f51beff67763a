"""One line of JSON per measured cell of the race, appended as soon as it is known.

A cell is (part, model, method, label) on one GPU, torch, dtype and commit, at one batch and cap.  What is on
file for the commit and GPU at hand is not measured again, so a run that was stopped goes on where it was.
The file is shared with ``python -m planner check-cuda``, whose lines have no ``part`` and are passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["NO_GPU", "RESULTS", "Machine", "Row", "append", "latest", "machine_of", "read"]

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "cuda.jsonl"
NO_GPU = "none (cpu)"

Status = Literal["ok", "error", "skipped"]


@dataclass(frozen=True)
class Machine:
    """Where and with what a run measures; the same for all its rows."""

    gpu: str
    driver: str
    torch: str
    commit: str
    dtype: str

    @property
    def is_cpu(self) -> bool:
        return self.gpu == NO_GPU


@dataclass(frozen=True)
class Row:
    """One cell.  A figure that was not measured is ``None``, never a guess.

    ``part``             "race", "batch" or "kernels".
    ``label``            which budget ("least", "at hf", "70%", ...), cap or case, where a method has several.
    ``batch``            sequences or images in a step; in part "batch" the largest that trained (0: none).
    ``status``, ``note`` "error" and its first line; "skipped" and the reason.
    ``budget_bytes``     the plan's budget; in part "batch" the cap on what the allocator may reserve.
    ``allocated_bytes``, ``reserved_bytes``  peaks of the whole process over one step; on a CPU the first is
                         counted as ``meter`` says, and the second is not known.
    ``resident_bytes``   parameters, buffers, inputs.
    ``predicted_bytes``, ``predicted_step_s``, ``overhead``, ``overhead_bound``  the plan's own.
    ``step_s``           median seconds of forward and backward over ``steps`` steps, after a warm-up.
    ``eager_step_s``     the same of eager steps run beside them.
    ``items_per_s``      tokens or images (``unit``) per second.
    ``setup_s``          seconds of planning or compiling.
    ``grad_rel_err``     largest max|a - b| / max|a| of a parameter's gradient against eager's from the same
                         seed; of "eager" itself: between two eager steps.
    ``failed_batch``     part "batch": the least batch seen to fail; ``tries``: how many were tried.
    ``kernels_differ``   part "kernels": calls beyond eager's, by kernel; empty where none differ.
    """

    gpu: str
    driver: str
    torch: str
    commit: str
    dtype: str
    date: str
    part: str
    model: str
    batch: int
    method: str
    label: str = ""
    status: Status = "ok"
    note: str = ""
    budget_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    resident_bytes: int | None = None
    predicted_bytes: int | None = None
    meter: str | None = None
    step_s: float | None = None
    eager_step_s: float | None = None
    predicted_step_s: float | None = None
    steps: int | None = None
    items_per_s: float | None = None
    unit: str | None = None
    setup_s: float | None = None
    overhead: float | None = None
    overhead_bound: float | None = None
    solver: str | None = None
    grad_rel_err: float | None = None
    failed_batch: int | None = None
    tries: int | None = None
    kernels_differ: dict[str, int] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                object.__setattr__(self, field.name, None)  # JSON has no infinity
                object.__setattr__(self, "note", f"{self.note}; {field.name} is {value}".lstrip("; "))

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return self.part, self.model, self.method, self.label

    @property
    def machine(self) -> Machine:
        return Machine(self.gpu, self.driver, self.torch, self.commit, self.dtype)

    def json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(path: Path, row: Row) -> None:
    """Add one line, whole: workers of one run share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(row.json() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All of the race's rows, in the order written; a line cut short by a crash is passed over."""
    if not path.exists():
        return []
    known = {field.name for field in dataclasses.fields(Row)}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found: Any = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and "part" in found:
            rows.append(Row(**{key: value for key, value in found.items() if key in known}))
    return rows


def latest(rows: Iterable[Row], machine: Machine | None = None) -> list[Row]:
    """The last row of each cell, of ``machine`` alone or of every GPU, dtype and torch for itself.

    Without ``machine`` rows of different commits stand in for each other, the newest wins.
    """
    found: dict[Any, Row] = {}
    for row in rows:
        if machine is None or row.machine == machine:
            key = (row.gpu, row.torch, row.dtype, *row.cell)
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """What every row says about where it was measured."""
    cuda = device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return Machine(
        torch.cuda.get_device_name(device) if cuda else NO_GPU,
        first_line(query) if cuda else "none",
        torch.__version__,
        _commit(),
        str(dtype).removeprefix("torch."),
    )


def _commit() -> str:
    """Short hash of the checkout, ``-dirty`` if anything but results differs from it."""
    commit = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = first_line(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!tests/benchmarks/results"]
    )
    return commit if commit == "unknown" or changed in ("", "unknown") else f"{commit}-dirty"


def first_line(command: Sequence[str]) -> str:
    """First line of what the command prints; "unknown" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""
