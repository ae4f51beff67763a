"""The check on a GPU: what plans promise on a CPU to the byte, measured where memory is scarce.

For each model of the zoo: the eager step, the step of a plan that recomputes nothing, and planned
steps at parts of the eager peak.  Each gives one :class:`Row`, one line of JSON: allocated and
reserved peaks of the caching allocator against budget and prediction, seconds by CUDA events,
gradients, kernels.

CUDA kernels that add atomically (an embedding's backward) give other last bits each time, so
gradients are compared twice: as they come, beside the difference of two eager steps, and once more
with ``torch.use_deterministic_algorithms(True, warn_only=True)``, where they should be bit-equal.
Kernels are compared by name and count, those of :mod:`planner.checks.kernel_check`'s small modules too.
A model that cannot be measured, or for which no time is left, is told, and the others are measured.

On a CPU (``device="cpu"``) the same code runs with the CPU's means: allocated bytes by counting
storages, no reserved bytes, ops that make or change a storage in place of kernels.

Known weakness: what else the process holds on the device is subtracted as it stood before the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from planner.checks.demo import MISPREDICTED, Tell, prefixed
from planner.checks.kernel_check import CASES, compare_kernels, kernel_counts, kernels_differ
from planner.checks.trials import planned_copies, prepare_example, race
from planner.checks.zoo import MODELS, Example
from planner.costs.target import CostSource
from planner.devices.state import memory_of
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.measure.bits import StepRecord, compare, run_step
from planner.measure.peaks import cuda_step_peak, step_peak
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import PricedStep
from planner.view.text import aligned

__all__ = [
    "Check",
    "Row",
    "Settings",
    "append_rows",
    "checked_device",
    "held_by_others",
    "run",
    "settings_of",
]

# What building, planning or running a model may raise.
_RAISED = (PlannerError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

LARGE_DEVICE_BYTES = 40 * 10**9  # below it the published sizes' eager steps may not fit


@dataclass(frozen=True)
class Settings:
    """What to run where.

    ``fractions``  of what the eager step adds to what is resident.
    ``cases``      of :data:`planner.checks.kernel_check.CASES`.
    ``limit_s``    seconds after which no model begins that would take as long as the longest so far.
    """

    device: torch.device
    size: Literal["demo", "large"]
    models: tuple[str, ...] = tuple(MODELS)
    fractions: tuple[float, ...] = (0.75, 0.5)
    solve_s: float = 6.0
    least_s: float = 8.0
    steps: int = 8
    costs: CostSource = "profile"
    cases: tuple[str, ...] = tuple(CASES)
    limit_s: float = 520.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown or not self.models:
            raise ValueError(f"models must be among {', '.join(MODELS)}, got {', '.join(unknown) or 'none'}")

    @property
    def phases(self) -> int:
        """How often :func:`run` tells what it does."""
        return 4 * len(self.models) + 1


def checked_device(device: str) -> torch.device:
    """``device`` with its index; ``PlannerError`` if it is a CUDA device and cannot be used."""
    where = torch.device(device)
    if where.type != "cuda":
        return where
    if torch.version.cuda is None:
        raise PlannerError(
            f"there is no CUDA device for torch {torch.__version__}, which is built without CUDA; run this "
            "where there is a GPU and a torch with CUDA"
        )
    if not torch.cuda.is_available():
        raise PlannerError(
            f"there is no CUDA device that torch {torch.__version__} (CUDA {torch.version.cuda}) can use: "
            "see whether nvidia-smi shows a GPU, and what CUDA_VISIBLE_DEVICES says"
        )
    if where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if where.index >= torch.cuda.device_count():
        raise PlannerError(f"there is no {where}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return where


def held_by_others(device: torch.device) -> int:
    """Bytes of a CUDA device that neither are free nor belong to this process's tensors; 0 elsewhere.

    A context takes some hundreds of MB by itself: up to a GB counts as nothing.
    """
    memory = memory_of(device)
    return memory.others_bytes if memory is not None and memory.others_bytes > 10**9 else 0


def settings_of(device: str, *, size: str = "auto", quick: bool = False) -> Settings:
    """Settings for ``device``; raises ``PlannerError`` if it is a CUDA device and there is none."""
    where = checked_device(device)
    chosen: Literal["demo", "large"] = "large" if size == "large" else "demo"
    if size == "auto" and where.type == "cuda":
        has_bytes = torch.cuda.get_device_properties(where).total_memory
        chosen = "large" if has_bytes >= LARGE_DEVICE_BYTES else "demo"
    settings = Settings(where, chosen)
    if quick:
        settings = dataclasses.replace(
            settings,
            models=("resnet",),
            fractions=(0.5,),
            solve_s=0.5,
            least_s=0.5,
            steps=2,
            costs="roofline",
            cases=("attention",),
        )
    return settings


@dataclass(frozen=True)
class Row:
    """One measured step.  Bytes are of the whole step; ``None`` where a figure does not apply.

    ``method``             "eager", "keep_all" (a plan that recomputes nothing), "plan 50%", "plan least".
    ``reserved_bytes``     taken from the driver by the whole process.
    ``step_s``             median seconds of forward and backward; ``time_ratio`` over eager's.
    ``grad_rel_err``       largest max|a - b| / max|a| of a gradient against the eager step.
    ``eager_rel_err``      the same between two eager steps.
    ``deterministic_equal``  every bit of the step equal to eager's under deterministic algorithms.
    ``slack_bytes``        of the allocated ones, what the allocator gave beyond what was asked for.
    ``kernels_equal``      the same kernels as often as eager's (``keep_all`` only); ``kernels_differ``
                           says which not: name -> calls beyond eager's.
    """

    gpu: str
    driver: str
    torch: str
    commit: str
    date: str
    model: str
    size: str
    batch: str
    method: str
    budget_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int | None
    predicted_bytes: int | None
    resident_bytes: int
    step_s: float | None = None
    time_ratio: float | None = None
    grad_rel_err: float | None = None
    eager_rel_err: float | None = None
    deterministic_equal: bool | None = None
    kernels_equal: bool | None = None
    kernels_differ: dict[str, int] | None = None
    slack_bytes: int | None = None

    def json(self) -> str:
        """The row as one line of JSON; an infinite error is the text "inf"."""
        figures = dataclasses.asdict(self).items()
        told = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures}
        return json.dumps(told, allow_nan=False, default=str)

    def failures(self) -> list[str]:
        """What is wrong with this row."""
        found = []
        if self.budget_bytes is not None and self.allocated_bytes > self.budget_bytes:
            slack = f"; {self.slack_bytes} are the allocator's slack" if self.slack_bytes else ""
            found.append(
                f"allocated {self.allocated_bytes} over the budget of {self.budget_bytes} bytes{slack}"
            )
        predicted = self.predicted_bytes
        if (
            predicted is not None
            and abs(self.allocated_bytes - predicted) > MISPREDICTED * self.allocated_bytes
        ):
            found.append(f"allocated {self.allocated_bytes} bytes, predicted {predicted}")
        noise, apart = self.eager_rel_err or 0.0, self.grad_rel_err or 0.0
        if self.deterministic_equal is False and apart > noise:
            found.append(f"gradients differ from eager's by {apart:.1e}, two eager steps by {noise:.1e}")
        return [f"{self.model}, {self.method}: {what}" for what in found]


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append one line of JSON per row.  ``OSError`` if there is no such folder: none is made."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.json() + "\n" for row in rows)


@dataclass(frozen=True)
class Check:
    """All rows, what could not be measured and why, and how long it took.

    ``cases``  by name: calls of a planned step beyond eager's, none where the kernels are the same.
    """

    rows: tuple[Row, ...]
    seconds: float
    missing: tuple[str, ...] = ()
    cases: Mapping[str, dict[str, int]] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What went wrong, one line each."""
        return [*self.missing, *(line for row in self.rows for line in row.failures())]

    def __str__(self) -> str:
        parts = [self._table()] if self.rows else []
        if self.cases:
            same = [name for name, differ in self.cases.items() if not differ]
            parts.append(f"the same kernels as eager's in {len(same)} of {len(self.cases)} small modules")
            parts += [f"  {name}: {differ}" for name, differ in self.cases.items() if differ]
        return "\n".join(parts)

    def _table(self) -> str:
        first = self.rows[0]
        head = (
            "model", "method", "budget MB", "predicted MB", "allocated MB", "reserved MB", "step ms", "ratio",
            "gradients", "eager again", "deterministic", "kernels",
        )  # fmt: skip
        return "\n".join(
            [
                f"{first.gpu}, driver {first.driver}, torch {first.torch}, commit {first.commit}, "
                f"{first.size} sizes",
                "",
                *aligned([head, *map(_cells, self.rows)], "llrrrrrrrrll", ruled=True),
            ]
        )


def _cells(row: Row) -> tuple[str, ...]:
    def mb(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.2f}"

    def relative(error: float | None) -> str:
        return "-" if error is None else "equal" if error == 0 else f"{error:.1e}"

    def truth(value: bool | None) -> str:
        return "-" if value is None else "equal" if value else "DIFFER"

    differ = row.kernels_differ or {}
    kernels = truth(row.kernels_equal) + (f": {sum(map(abs, differ.values()))} calls" if differ else "")
    return (
        row.model,
        row.method,
        mb(row.budget_bytes),
        mb(row.predicted_bytes),
        mb(row.allocated_bytes),
        mb(row.reserved_bytes),
        "-" if row.step_s is None else f"{row.step_s * 1e3:.1f}",
        "-" if row.time_ratio is None else f"{row.time_ratio:.3f}",
        relative(row.grad_rel_err),
        relative(row.eager_rel_err),
        truth(row.deterministic_equal),
        kernels,
    )


def run(
    settings: Settings, tell: Tell | None = None, found: Callable[[Sequence[Row]], None] | None = None
) -> Check:
    """Check every model; ``tell`` hears of each of ``settings.phases`` phases as it begins.

    ``found`` is given the rows of a model as soon as they are measured.
    """
    began = time.perf_counter()
    say = tell or (lambda phase: None)
    if settings.device.type == "cuda":  # read when cuBLAS starts; deterministic products need it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows: list[Row] = []
    missing: list[str] = []
    cases: dict[str, dict[str, int]] = {}
    longest_s = 0.0
    for key in settings.models:
        start_s = time.perf_counter() - began
        if start_s + longest_s > settings.limit_s:
            missing.append(f"{key}: not begun, {start_s:.0f} s had passed; run it with --models {key}")
            continue
        say(f"{key}: build")
        try:
            mine = _rows_of(MODELS[key](settings.device, size=settings.size), settings, prefixed(say, key))
        except _RAISED as error:
            missing.append(f"{key}: {_reason(error, settings)}")
        else:
            rows += mine
            if found is not None:
                found(mine)
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        longest_s = max(longest_s, time.perf_counter() - began - start_s)
    say("kernels")
    for name in settings.cases:
        try:
            cases[name] = compare_kernels(name, settings.device)
        except _RAISED as error:
            missing.append(f"kernels of {name}: {_reason(error, settings)}")
    return Check(tuple(rows), time.perf_counter() - began, tuple(missing), cases)


def _reason(error: BaseException, settings: Settings) -> str:
    """Why something could not be measured, in a line."""
    what = next(iter(str(error).splitlines()), "")
    if not isinstance(error, torch.OutOfMemoryError):
        return what if isinstance(error, PlannerError) else f"{type(error).__name__}: {what}"
    return (
        f"{settings.size} size does not fit on {settings.device}: {what} Other processes and contexts hold "
        f"{held_by_others(settings.device) / 1e9:.1f} GB of it; take --size demo, or fewer --models"
    )


def _rows_of(example: Example, settings: Settings, say: Tell) -> list[Row]:
    """One model: eager, keep-all, and the planned steps."""
    say("capture and price")
    prepared = dataclasses.replace(prepare_example(example, settings.costs), least_limit_s=settings.least_s)
    eager = _peak(example, prepared)
    say("solve")
    plans = _plans(prepared, eager[0], settings)
    say("measure")
    reference = _Reference.of(example, settings.device)
    runners = planned_copies(example.model, list(plans.values()))
    ran = race(runners, example.inputs, example.loss_fn, steps=settings.steps)
    del runners
    start = Row(
        **_where(settings),
        model=example.name,
        batch=_batch_of(example),
        method="eager",
        budget_bytes=None,
        allocated_bytes=eager[0],
        reserved_bytes=eager[1],
        slack_bytes=eager[2],
        predicted_bytes=None,
        resident_bytes=prepared.resident.total_bytes,
        step_s=ran.step_s[0],
        time_ratio=1.0,
        eager_rel_err=reference.noise,
    )
    rows = [start]
    for k, (method, plan) in enumerate(plans.items()):
        plan.apply(example.model)
        try:
            allocated_bytes, reserved_bytes, slack_bytes = _peak(example, prepared)
            rows.append(
                dataclasses.replace(
                    start,
                    method=method,
                    budget_bytes=None if method == "keep_all" else plan.budget_bytes,
                    predicted_bytes=plan.peak_bytes,
                    step_s=ran.step_s[k + 1],
                    time_ratio=ran.ratios[k],
                    allocated_bytes=allocated_bytes,
                    reserved_bytes=reserved_bytes,
                    slack_bytes=slack_bytes,
                    **reference.judge(example, settings.device, kernels=method == "keep_all"),
                )
            )
        finally:
            plan.restore(example.model)
    return rows


def _plans(prepared: PricedStep, eager_bytes: int, settings: Settings) -> dict[str, Plan]:
    """Plans by method; a budget that no plan fits is left out, since the least one is there."""
    resident_bytes = prepared.resident.total_bytes
    plans = {"keep_all": prepared.plan_bytes(prepared.baseline.peak_bytes, search=Search("keep_all"))}
    budgets = {
        f"plan {f:.0%}": resident_bytes + int(f * (eager_bytes - resident_bytes)) for f in settings.fractions
    }
    for method, budget in {**budgets, "plan least": prepared.minimum_peak_bytes}.items():
        with contextlib.suppress(InfeasibleBudgetError):
            plans[method] = prepared.plan_bytes(budget, search=Search(time_limit_s=settings.solve_s))
    return plans


# -------------------------------------------------------------------------------------- measuring


def _peak(example: Example, prepared: PricedStep) -> tuple[int, int | None, int | None]:
    """Allocated bytes of the whole step; reserved ones and slack where there is an allocator."""
    resident_bytes = prepared.resident.total_bytes
    model, inputs, loss_fn = example.model, example.inputs, example.loss_fn
    device = next(model.parameters()).device
    if device.type != "cuda":
        above_bytes = step_peak(model, inputs, loss_fn=loss_fn, include_resident=False)
        return resident_bytes + above_bytes, None, None
    peak = cuda_step_peak(model, inputs, loss_fn=loss_fn)
    resident_bytes += prepared.memory.constant_bytes + prepared.memory.slack_bytes - peak.resident_bytes
    return resident_bytes + peak.allocated_bytes, peak.reserved_bytes, peak.slack_bytes


@dataclass(frozen=True, eq=False)
class _Reference:
    """The eager step's gradients, as they come and under deterministic algorithms, and its kernels."""

    record: StepRecord
    deterministic: StepRecord
    kernels: Counter[str]
    noise: float

    @classmethod
    def of(cls, example: Example, device: torch.device) -> _Reference:
        record = _record(example)
        again = _record(example)
        with _deterministic():
            deterministic = _record(example)
        noise = compare(record, again).gradients.max_relative
        return cls(record, deterministic, kernel_counts(example, device), noise)

    def judge(self, example: Example, device: torch.device, *, kernels: bool) -> dict[str, Any]:
        """The figures of the step as the model takes it now."""
        found = compare(self.record, _record(example)).gradients.max_relative
        with _deterministic():
            equal = compare(self.deterministic, _record(example)).equal
        out: dict[str, Any] = {"grad_rel_err": found, "deterministic_equal": equal}
        if kernels:
            differ = kernels_differ(self.kernels, kernel_counts(example, device))
            out |= {"kernels_equal": not differ, "kernels_differ": differ}
        return out


def _record(example: Example) -> StepRecord:
    """On the host: on the device it would lie between the measured steps' blocks."""
    return run_step(example.model, example.inputs, loss_fn=example.loss_fn).on_host()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# ------------------------------------------------------------------------------------- where it ran


def _where(settings: Settings) -> dict[str, Any]:
    cuda = settings.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(settings.device) if cuda else "none (CPU)",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if cuda
        else "none",
        "torch": torch.__version__,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": settings.size,
    }


def _output(command: Sequence[str]) -> str:
    """First line of what the command prints; "unknown" if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else "unknown"


def _batch_of(example: Example) -> str:
    """Variants of the inputs: ``input_ids 8x1024``."""
    shapes = {
        k: "x".join(map(str, v.shape)) for k, v in example.inputs.items() if isinstance(v, torch.Tensor)
    }
    return ", ".join(f"{k} {s}" for k, s in shapes.items())
