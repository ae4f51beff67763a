"""The largest batch that trains under a cap on memory, for each method of the race.

On CUDA the cap is on what the caching allocator may reserve (``set_per_process_memory_fraction``); the
context's own share, some hundreds of MB, comes on top.  On a CPU the peak is measured and held against the
cap.  A batch trains if two steps with plain SGD run.  Our plans are made for the cap; where the allocator
cannot serve what a plan counts on (fragmentation), the same batch is planned to 96 and 92 % of it.

The search starts from a guess: memory grows by the row, so the peak measured in the race foretells the
batch.  From there it goes up by eighths (doubles, where nothing was measured) until a batch fails, or down
until one trains, and halves the difference until that is 1/32 of the batch or the tries are used up.  The
row has both ends: the largest batch that trained and the least that failed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planner.errors import InfeasibleBudgetError
from planner.measure.step import backward, forward, held, undone
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import prepare
from tests.benchmarks.race import RAISED, Worker
from tests.benchmarks.race_measure import Step, gradient_error, gradients, peak_of, settle
from tests.benchmarks.race_methods import COMPILED, HAND_MADE, Method
from tests.benchmarks.race_turns import TimeIsUp

__all__ = ["Found", "labels_of", "largest", "largest_batches"]

MOST_TRIES = 8
MOST_COMPILED_TRIES = 3  # each compiles anew
PLANNED = ("ours",)
TO_COMPILE = ("compile", "compile-budget-0.5")
SHARES = (1.0, 0.96, 0.92)


@dataclass(frozen=True)
class Found:
    """The answer of a search: ``batch`` trained (0: none), ``failed`` is the least that did not."""

    batch: int
    failed: int | None
    tries: int


def largest(trains: Callable[[int], bool], guess: int, *, informed: bool, most_tries: int) -> Found:
    """The largest batch for which ``trains``, which is taken to be monotonic, searched from ``guess``."""
    low, high, tries = 0, math.inf, 0
    batch = max(1, guess)
    while tries < most_tries:
        tries += 1
        if trains(batch):
            low = max(low, batch)
        else:
            high = min(high, batch)
        if high - low <= max(1, low // 32):
            break
        if high == math.inf:
            batch = low + max(1, low // 8 if informed else low)
        elif low == 0:
            batch = int(high) - max(1, int(high) // 8) if informed else int(high) // 2
            if batch < 1:
                break
        else:
            batch = (low + int(high)) // 2
    return Found(low, None if high == math.inf else int(high), tries)


def labels_of(caps_gb: tuple[float, ...]) -> list[str]:
    """How caps are called in rows."""
    return [f"{cap:g} GB" for cap in caps_gb]


def methods_of(device: torch.device) -> list[str]:
    """In the order of how much the comparison needs them; compiled ones only where compiling pays."""
    return ["ours", *HAND_MADE, *(TO_COMPILE if device.type == "cuda" else ())]


def largest_batches(worker: Worker) -> None:
    """Every cap and method of a family, until the time is up."""
    for label, cap_gb in zip(labels_of(worker.job.caps_gb), worker.job.caps_gb, strict=True):
        for method in methods_of(worker.device):
            worker.cell(method, label, _Search(worker, method, int(cap_gb * 1e9)))


class _Search:
    """One method under one cap."""

    def __init__(self, worker: Worker, method: str, cap_bytes: int) -> None:
        self.worker, self.method, self.cap_bytes = worker, method, cap_bytes
        self.fields: dict[str, Any] = {}
        self.failed_with = ""
        self.best: tuple[Plan, Step] | None = None  # of our largest batch

    def __call__(self) -> dict[str, Any]:
        worker, device = self.worker, self.worker.device
        if device.type == "cuda":
            has_bytes = torch.cuda.get_device_properties(device).total_memory
            if self.cap_bytes > has_bytes:
                return {"status": "skipped", "note": f"the GPU has {has_bytes / 1e9:.0f} GB"}
        began = time.perf_counter()
        guess = self.guess()
        most = MOST_COMPILED_TRIES if self.method in COMPILED else MOST_TRIES
        found = largest(self.trains, guess or worker.batch, informed=guess is not None, most_tries=most)
        note = "" if found.failed is not None else "the tries were used up before a batch failed"
        if self.best is not None:
            self._compare(*self.best)
        return {
            **self.fields,
            "batch": found.batch,
            "failed_batch": found.failed,
            "tries": found.tries,
            "budget_bytes": self.cap_bytes,
            "note": note or self.failed_with,
            "setup_s": time.perf_counter() - began,
            "unit": worker.case.family.unit,
        }

    def guess(self) -> int | None:
        """The batch at which the race's measured peak, grown by the row, would meet the cap."""
        worker = self.worker
        label = "least" if self.method in PLANNED else ""
        row = worker.rows.get(("race", worker.job.model, self.method, label))
        if row is None or not row.allocated_bytes:
            return None
        fixed = 2 * sum(p.nbytes for p in worker.case.model.parameters())  # and their gradients
        per_row = (row.allocated_bytes - fixed) / row.batch
        return max(1, int((self.cap_bytes - fixed) / per_row)) if per_row > 0 else None

    def trains(self, batch: int) -> bool:
        """Whether two steps of ``batch`` run under the cap."""
        worker = self.worker
        if worker.turns.left_s < 0:
            raise TimeIsUp
        inputs = worker.case.inputs(batch)
        loss_fn = worker.case.loss_fn(batch)
        step = Step(worker.case.model, worker.case.model, inputs, loss_fn, worker.device)
        if self.method not in PLANNED:
            return self._fits(step, {**HAND_MADE, **COMPILED}[self.method], batch)
        resident = sum(t.nbytes for t in held(worker.case.model, inputs))
        if resident >= self.cap_bytes:
            return False
        with worker.turns.shared():  # roofline costs run nothing on the device
            made = prepare(worker.case.model, inputs, loss_fn=loss_fn, costs="roofline")
        prepared = dataclasses.replace(made, least_limit_s=worker.job.least_s)
        for share in SHARES:
            try:
                plan = prepared.plan_bytes(
                    int(share * self.cap_bytes), search=Search(time_limit_s=worker.job.solve_s)
                )
            except InfeasibleBudgetError as error:
                self.failed_with = str(error)[:200]
                return False
            self.failed_with = ""
            if self._fits(step, lambda _, plan=plan: worker.applied(plan), batch):  # type: ignore[misc]
                self.fields |= {"predicted_bytes": plan.peak_bytes, "overhead": plan.overhead}
                self.best = (plan, step)
                return True
        return False

    def _compare(self, plan: Plan, step: Step) -> None:
        """The largest planned step's gradients against eager's, which no cap holds back here."""
        worker = self.worker
        with worker.turns.alone():
            try:
                reference = gradients(step)
            except RAISED as error:
                if not _is_memory(error):
                    raise
                self.failed_with = "eager's gradients of this batch do not fit on the device"
            else:
                with worker.applied(plan):
                    self.fields["grad_rel_err"] = gradient_error(step, reference)
            settle(worker.device)

    def _fits(self, step: Step, method: Method, batch: int) -> bool:
        worker = self.worker
        with worker.turns.alone(), _capped(worker.device, self.cap_bytes):
            try:
                with method(worker.case) as run:
                    found = self._train(Step(step.model, run, step.inputs, step.loss_fn, step.device))
            except RAISED as error:
                if not _is_memory(error):
                    raise
                self.failed_with = str(error).splitlines()[0][:200]
                found = None
            settle(worker.device)
        if found is None or found["allocated_bytes"] > self.cap_bytes:
            return False
        self.fields |= found | {"items_per_s": worker.case.items(batch) / found["step_s"]}
        return True

    def _train(self, step: Step) -> dict[str, Any]:
        """Two steps with an optimizer that keeps nothing, the second one timed; its peaks."""
        if step.device.type != "cuda":
            peak = peak_of(step)
            began = time.perf_counter()
            step.undone()
            return {"allocated_bytes": peak.allocated_bytes, "step_s": time.perf_counter() - began}
        optimizer = torch.optim.SGD(step.model.parameters(), lr=0.0, foreach=False)
        stream = torch.cuda.current_stream(step.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with undone(step.model, step.inputs):
            for turn in range(2):
                if turn:
                    begin.record(stream)
                backward(forward(step.run, step.inputs, step.loss_fn))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            end.record(stream)
            torch.cuda.synchronize(step.device)
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(step.device),
            "reserved_bytes": torch.cuda.max_memory_reserved(step.device),
            "step_s": begin.elapsed_time(end) / 1e3,
        }


class _capped:
    """While open, the allocator may not reserve more; elsewhere than on CUDA nothing happens."""

    def __init__(self, device: torch.device, cap_bytes: int) -> None:
        self.device, self.cap_bytes = device, cap_bytes

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            settle(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            has_bytes = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(self.cap_bytes / has_bytes, self.device)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text
