"""One worker of the race: a family in a process of its own, its cells measured one after another.

    python -m tests.benchmarks.race '{"part": "race", "model": "unet", "group": "eager", ...}'

``bench_cuda`` starts it.  A process per family and kind of method gives honest reserved peaks (one
allocator, emptied between cells), survives what kills it (it is started again for the cells that are left),
and lets several plan and compile at once while only one measures.  Group "eager" has eager, the peers by
hand, greedy and our plans, which share one model and one capture; each compiled method is a group.

A cell that raises is a row with the error's first line, and the next cell goes on.  After an error that
leaves a CUDA context broken the worker ends with ``BROKEN`` and is started again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planner.checks.kernel_check import CASES, compare_kernels
from planner.costs.op_costs import graph_costs
from planner.costs.target import CostSource
from planner.errors import PlannerError
from planner.measure.step import held
from planner.options import Search
from planner.plan import Plan
from planner.solving.calibrate import calibrated
from planner.solving.priced import PricedStep, prepare
from tests.benchmarks import race_models
from tests.benchmarks.race_measure import Step, gradient_error, gradients, peak_of, settle, timed
from tests.benchmarks.race_methods import COMPILED, HAND_MADE, INDUCTOR_REASON
from tests.benchmarks.race_rows import Machine, Row, append, latest, machine_of, now, read
from tests.benchmarks.race_turns import TimeIsUp, Turns

__all__ = ["BROKEN", "GREEDY", "OURS", "Job", "Worker", "cells_of", "groups_of", "race_batch"]

BROKEN = 3  # exit code: the CUDA context cannot be used any more

# Our budgets, by what they are called, in the order of how much the verdicts need them.
OURS = ("all", "50%", "70%", "at hf", "at sac", "least", "1/3", "2/3")
GREEDY = ("50%", "70%")
CALIBRATED = ("50%",)  # run and planned again until what the allocator reserves fits, too

# What a peer's own code may raise.  Not KeyboardInterrupt, not SystemExit.
RAISED = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)
RAISED += (PlannerError, ArithmeticError)  # type: ignore[assignment]


@dataclass(frozen=True)
class Job:
    """What one worker does, as JSON on its command line.

    ``deadline``   in ``time.time()`` seconds: no cell begins that is not expected to end before it.
    ``turns``      folder of the locks that workers on one device share.
    ``batch``      sequences or images of a step; 0: the family's own.
    ``caps_gb``    part "batch": what the allocator may reserve.
    """

    part: str
    model: str
    group: str
    device: str
    dtype: str
    large: bool
    deadline: float
    results: str
    turns: str
    batch: int = 0
    steps: int = 12
    warm_up: int = 2
    solve_s: float = 4.0
    least_s: float = 6.0
    costs: CostSource = "auto"
    caps_gb: tuple[float, ...] = ()

    @classmethod
    def of(cls, text: str) -> Job:
        """From JSON; ``TypeError`` for names it does not know."""
        found = json.loads(text)
        return cls(**{**found, "caps_gb": tuple(found.get("caps_gb", ()))})

    def json(self) -> str:
        """What :meth:`of` reads."""
        return json.dumps(dataclasses.asdict(self))


def groups_of(part: str) -> tuple[str, ...]:
    """Groups of methods that are measured in one process."""
    return ("eager", *COMPILED) if part == "race" else ("all",)


def cells_of(group: str) -> list[tuple[str, str]]:
    """(method, label) of every cell of a group of the race, in the order measured."""
    if group != "eager":
        return [(group, "")]
    return [
        *((method, "") for method in HAND_MADE),
        *(("ours", label) for label in OURS),
        *(("ours-calibrated", label) for label in CALIBRATED),
        *(("greedy", label) for label in GREEDY),
        ("ours-inductor", ""),
    ]


def race_batch(full: int, device: torch.device) -> int:
    """The family's batch on a large GPU or a CPU, less of it on a GPU below 100 GB."""
    if device.type != "cuda":
        return full
    has_bytes = torch.cuda.get_device_properties(device).total_memory
    return max(1, int(full * min(1.0, has_bytes / 100e9)))


class Worker:
    """A family on a device, what is known of it so far, and how a cell is measured and written."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)
        self.dtype: torch.dtype = getattr(torch, job.dtype)
        self.machine: Machine = machine_of(self.device, self.dtype)
        self.turns = Turns(Path(job.turns), job.deadline)
        known = latest(read(Path(job.results)), self.machine)
        self.rows = {row.cell: row for row in known if row.model == job.model}
        self.prepared_s = 0.0
        self.last_s = 0.0  # the cell before; the next one is taken to be as long
        self._failure: BaseException | None = None

    # -- the case ------------------------------------------------------------------------------

    @cached_property
    def case(self) -> race_models.Case:
        return race_models.build(self.job.model, self.device, self.dtype, large=self.job.large)

    @cached_property
    def batch(self) -> int:
        if self.job.model not in race_models.MODELS:  # the small modules of part "kernels"
            return 0
        family = race_models.MODELS[self.job.model]
        full = (family.large if self.job.large else family.small).batch
        return self.job.batch or race_batch(full, self.device)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.case.inputs(self.batch)

    @cached_property
    def resident_bytes(self) -> int:
        """Parameters, buffers, inputs."""
        tensors = held(self.case.model, self.inputs)
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    def step(self, run: nn.Module) -> Step:
        """The race's step, taken by calling ``run``."""
        return Step(self.case.model, run, self.inputs, self.case.loss_fn(self.batch), self.device)

    @cached_property
    def reference(self) -> dict[str, Tensor | None]:
        """Eager's gradients."""
        return gradients(self.step(self.case.model))

    @cached_property
    def prepared(self) -> PricedStep:
        """The captured and priced step; a second try after a failure fails at once, the same way."""
        if self._failure is not None:
            raise self._failure
        loss_fn = self.case.loss_fn(self.batch)
        try:
            with self.turns.shared():  # tracing takes the host's time alone, and most of it
                began = time.perf_counter()  # waiting is no part of planning
                made = prepare(self.case.model, self.inputs, loss_fn=loss_fn, costs="roofline")
                traced_s = time.perf_counter() - began
            with self.turns.alone():
                began = time.perf_counter()
                made = dataclasses.replace(made, costs=graph_costs(made.graph, self.job.costs))
                settle(self.device)
        except RAISED as error:
            self._failure = error
            raise
        self.prepared_s = traced_s + time.perf_counter() - began
        return dataclasses.replace(made, least_limit_s=self.job.least_s)

    # -- cells ---------------------------------------------------------------------------------

    def cell(self, method: str, label: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one cell unless it is on file; ``TimeIsUp`` if the time left is too short for it."""
        job = self.job
        if (job.part, job.model, method, label) in self.rows:
            return
        if self.turns.left_s < max(2.0, 1.2 * self.last_s):
            raise TimeIsUp
        print(f"> {job.part}\t{job.model}\t{method}\t{label}", flush=True)
        began = time.perf_counter()
        broken = False
        try:
            fields = measure()
        except RAISED as error:
            traceback.print_exc()
            broken = _breaks_the_context(error)
            fields = {"status": "error", "note": f"{type(error).__name__}: {_first_line(error)}"}
        self.last_s = time.perf_counter() - began
        self.write(method, label, fields)
        if broken:
            raise SystemExit(BROKEN)
        settle(self.device)

    def write(self, method: str, label: str, fields: dict[str, Any]) -> None:
        """Append a row, and remember it."""
        job = self.job
        common = dataclasses.asdict(self.machine) | {"date": now(), "part": job.part, "model": job.model}
        row = Row(**{**common, "batch": self.batch, "method": method, "label": label, **fields})
        append(Path(job.results), row)
        self.rows[row.cell] = row

    def figures(
        self, run: nn.Module, *, compiled: bool = False, beside: Callable[[], float] | None = None
    ) -> dict[str, Any]:
        """Peak, seconds and gradients of a step; ``beside`` times eager steps before and after it."""
        job, step = self.job, self.step(run)
        peak = peak_of(step, compiled=compiled)
        eager_s = [] if beside is None else [beside()]
        step_s = timed(step, steps=job.steps, warm_up=job.warm_up)
        if beside is not None:
            eager_s.append(beside())
        random = compiled and self.case.family.has_dropout
        error = None if random else gradient_error(step, self.reference)
        return {
            "allocated_bytes": peak.allocated_bytes,
            "reserved_bytes": peak.reserved_bytes,
            "resident_bytes": self.resident_bytes,
            "meter": peak.meter,
            "step_s": step_s,
            "eager_step_s": sum(eager_s) / len(eager_s) if eager_s else None,
            "steps": job.steps,
            "items_per_s": self.case.items(self.batch) / step_s,
            "unit": self.case.family.unit,
            "grad_rel_err": error,
            "note": "gradients not compared: inductor draws other random numbers" if random else "",
        }

    def by_hand(self, method: str) -> dict[str, Any]:
        """Eager, or a peer that wraps the model's own code."""
        with self.turns.alone(), HAND_MADE[method](self.case) as run:
            return {"setup_s": 0.0, **self.figures(run)}

    def compiled(self, method: str) -> dict[str, Any]:
        """torch.compile: several processes compile at once; one that runs out of memory so tries alone."""
        with self.turns.alone():
            _ = self.reference
            settle(self.device)
        try:
            return self._compiled(method, self.turns.shared())
        except torch.OutOfMemoryError:
            settle(self.device)
            return self._compiled(method, self.turns.alone())

    def _compiled(self, method: str, turn: AbstractContextManager[None]) -> dict[str, Any]:
        with COMPILED[method](self.case) as run:
            with turn:
                began = time.perf_counter()
                self.step(run).undone()
                settle(self.device)
                setup_s = time.perf_counter() - began
            with self.turns.alone():
                return {"setup_s": setup_s, **self.figures(run, compiled=True)}

    # -- plans ---------------------------------------------------------------------------------

    def budget_bytes(self, label: str) -> int:
        """What a budget's name stands for; ``ValueError`` if what it refers to was not measured."""
        if label == "all":
            return self.prepared.baseline.peak_bytes
        if label.startswith("at "):
            return self._allocated(label.removeprefix("at "))
        eager = self._allocated("eager")
        if label.endswith("%"):
            return self.resident_bytes + int(float(label[:-1]) / 100 * (eager - self.resident_bytes))
        least = self.prepared.minimum_peak_bytes
        part = {"least": 0.0, "1/3": 1 / 3, "2/3": 2 / 3}[label]
        return least + int(part * max(0, eager - least))

    def _allocated(self, method: str) -> int:
        row = self.rows.get((self.job.part, self.job.model, method, ""))
        if row is None or row.allocated_bytes is None:
            raise ValueError(f"the peak of {method} is not known, so no budget is made from it")
        return row.allocated_bytes

    def planned(self, method: str, label: str) -> dict[str, Any]:
        """Our plan at one budget: solved beside others, measured alone."""
        prepared = self.prepared
        solver = "greedy" if method == "greedy" else "keep_all" if label == "all" else "auto"
        budget = self.budget_bytes(label)
        began = time.perf_counter()
        if method == "ours-calibrated":
            with self.turns.alone():
                began = time.perf_counter()
                plan = calibrated(prepared, budget, search=Search(time_limit_s=self.job.solve_s))
                settle(self.device)
        else:
            plan = prepared.plan_bytes(budget, search=Search(solver, self.job.solve_s))
        with self.applied(plan) as run:
            setup_s = self.prepared_s + time.perf_counter() - began
            beside = None
            if label == "all":
                beside = self._eager_beside(plan)
            with self.turns.alone():
                found = self.figures(run, beside=beside)
        return {**found, **plan_fields(plan, budget), "setup_s": setup_s}

    def _eager_beside(self, plan: Plan) -> Callable[[], float]:
        """Times eager steps between planned ones."""
        model = self.case.model

        def time_eager() -> float:
            plan.restore(model)
            try:
                return timed(self.step(model), steps=self.job.steps, warm_up=1)
            finally:
                plan.apply(model)

        return time_eager

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[nn.Module]:
        """The model trains as planned while the context is open."""
        plan.apply(self.case.model)
        try:
            yield self.case.model
        finally:
            plan.restore(self.case.model)

    # -- the whole group -----------------------------------------------------------------------

    def race(self) -> None:
        """Every cell of the job's group, in order, until the time is up."""
        for method, label in cells_of(self.job.group):
            if method in HAND_MADE:
                self.cell(method, label, lambda method=method: self.by_hand(method))  # type: ignore[misc]
            elif method in COMPILED:
                self.cell(method, label, lambda method=method: self.compiled(method))  # type: ignore[misc]
            elif method == "ours-inductor":
                self.cell(method, label, lambda: {"status": "skipped", "note": INDUCTOR_REASON})
            else:
                self.cell(method, label, lambda m=method, at=label: self.planned(m, at))  # type: ignore[misc]

    def kernels(self) -> None:
        """The kernels of eager and planned steps of small modules."""
        for name in CASES:
            self.cell("ours", name, lambda name=name: self._kernels(name))  # type: ignore[misc]

    def _kernels(self, name: str) -> dict[str, Any]:
        with self.turns.alone():
            return {"kernels_differ": compare_kernels(name, self.device)}


def plan_fields(plan: Plan, budget: int) -> dict[str, Any]:
    """What a plan says of itself."""
    return {
        "budget_bytes": budget,
        "predicted_bytes": plan.peak_bytes,
        "predicted_step_s": plan.step_s * (1 + plan.overhead),
        "overhead": plan.overhead,
        "overhead_bound": plan.overhead_bound,
        "solver": plan.solver,
    }


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else ""


def _breaks_the_context(error: BaseException) -> bool:
    """Whether CUDA answers nothing more in this process: an illegal access, not a lack of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def main(text: str) -> int:
    """Run one job; 0 also if its time was up."""
    worker = Worker(Job.of(text))
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    try:
        if worker.job.part == "race":
            worker.race()
        elif worker.job.part == "kernels":
            worker.kernels()
        else:
            from tests.benchmarks.race_largest import largest_batches

            largest_batches(worker)
    except TimeIsUp:
        print("time is up", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
