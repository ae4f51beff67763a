"""The race on a GPU: every peer and our plans, one step each, measured; largest batches; kernels; a verdict.

    python -m tests.benchmarks.bench_cuda                      all parts, at most nine minutes
    python -m tests.benchmarks.bench_cuda --part race          one part; what is on file is not measured again
    python -m tests.benchmarks.bench_cuda --part table         only the table and the verdicts, from the file
    python -m tests.benchmarks.bench_cuda --part plots         only the pictures
    python -m tests.benchmarks.bench_cuda --device cpu         the same harness, small sizes, float32

Parts: ``kernels`` (the kernels of an eager step and of a planned one that recomputes nothing), ``race``
(peaks, seconds, gradients of every method), ``batch`` (the largest batch under 24, 48 and 80 GB).  Each
result is appended to ``results/cuda.jsonl`` as soon as it is known.  A part stops at its share of
``--limit-s`` and says what it left out; the next call goes on there, as long as commit, GPU and torch are
the same.

Exit codes: 0 everything measured held; 1 something did not; 2 it could not run (no GPU, bad arguments).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from planner.checks.cuda_check import checked_device, held_by_others
from planner.errors import PlannerError
from tests.benchmarks.race import Job, cells_of, groups_of
from tests.benchmarks.race_largest import labels_of, methods_of
from tests.benchmarks.race_methods import COMPILED
from tests.benchmarks.race_models import MODELS
from tests.benchmarks.race_plots import draw
from tests.benchmarks.race_rows import RESULTS, ROOT, Machine, Row, append, latest, machine_of, now, read
from tests.benchmarks.race_table import markdown, table, verdicts

HELD, FAILED, CANNOT = 0, 1, 2

PARTS = ("kernels", "race", "batch")
ENDS = {"kernels": 0.12, "race": 0.75, "batch": 1.0}  # of the limit, where all parts run
GRACE_S = 12.0  # a worker that has not ended this long after its deadline is stopped
MOST_RESTARTS = 6
COMPILED_ON_CPU = ("gpt2-medium", "unet")  # a minute each


@dataclass
class Run:
    """A worker process: its job, what it said it began last, how often it was started again."""

    job: Job
    restarts: int = 0
    process: subprocess.Popen[str] | None = None
    began: tuple[str, str, str, str] | None = None
    said: list[str] = field(default_factory=list)

    def start(self, log: Path) -> None:
        """Start the worker in a process group of its own; its standard error goes to ``log``."""
        environment = {**os.environ, "PYTHONPATH": _with_root(os.environ.get("PYTHONPATH"))}
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        command = [sys.executable, "-m", "tests.benchmarks.race", self.job.json()]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("> "):
                part, model, method, label = line[2:].rstrip("\n").split("\t")
                self.began = (part, model, method, label)
                print(f"  {model}: {method} {label}".rstrip(), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the worker and what it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _with_root(path: str | None) -> str:
    return os.pathsep.join([str(ROOT), *([path] if path else [])])


def run_jobs(jobs: Sequence[Job], machine: Machine, *, at_once: int, log: Path) -> list[Job]:
    """Run the jobs, ``at_once`` of them side by side; returns those that were not started in time."""
    waiting = [Run(job) for job in jobs]
    running: list[Run] = []
    while waiting or running:
        while waiting and len(running) < at_once and time.time() < waiting[0].job.deadline - 5:
            running.append(waiting.pop(0))
            running[-1].start(log)
        if not running:
            break
        time.sleep(0.2)
        for run in list(running):
            assert run.process is not None
            code = run.process.poll()
            if code is None:
                if time.time() > run.job.deadline + GRACE_S:
                    run.stop()
                    running.remove(run)
                continue
            running.remove(run)
            if code != 0 and _goes_on(run, machine, code):
                waiting.insert(0, replace_run(run))
    return [run.job for run in waiting]


def replace_run(run: Run) -> Run:
    """The same job, started once more."""
    return Run(run.job, run.restarts + 1)


def _goes_on(run: Run, machine: Machine, code: int) -> bool:
    """Write down the cell during which a worker died; whether to start it again for the others."""
    job = run.job
    if run.began is None:  # it died before its first cell, and would again
        print(f"bench_cuda: the worker for {job.model}, {job.group} ended with code {code}", file=sys.stderr)
        return False
    part, model, method, label = run.began
    if run.began not in {row.cell for row in latest(read(Path(job.results)), machine)}:
        append(
            Path(job.results),
            Row(
                gpu=machine.gpu,
                driver=machine.driver,
                torch=machine.torch,
                commit=machine.commit,
                dtype=machine.dtype,
                date=now(),
                part=part,
                model=model,
                batch=job.batch,
                method=method,
                label=label,
                status="error",
                note=f"the process ended with code {code} while this was measured",
            ),
        )
    return run.restarts < MOST_RESTARTS


# ------------------------------------------------------------------------------------------- parts


def wanted(part: str, model: str, group: str, caps: tuple[float, ...], device: torch.device) -> set[str]:
    """Cells of a job, as ``method label``."""
    if part == "race":
        return {f"{method} {label}".strip() for method, label in cells_of(group)}
    if part == "kernels":
        from planner.checks.kernel_check import CASES

        return {f"ours {name}" for name in CASES}
    return {f"{method} {label}" for method in methods_of(device) for label in labels_of(caps)}


def jobs_of(part: str, base: Job, models: Sequence[str], groups: Sequence[str]) -> list[Job]:
    """Jobs of a part, those first that the verdicts need most."""
    if part == "kernels":
        return [replace(base, part=part, model="kernels", group="all")]
    found = [
        replace(base, part=part, model=model, group=group)
        for group in groups_of(part)
        if part != "race" or group in groups
        for model in models
    ]
    if torch.device(base.device).type == "cuda":
        return found
    return [job for job in found if job.group not in COMPILED or job.model in COMPILED_ON_CPU]


def missing(jobs: Sequence[Job], machine: Machine, device: torch.device) -> list[str]:
    """What of the jobs is not on file for this machine."""
    out = []
    for job in jobs:
        rows = [row for row in latest(read(Path(job.results)), machine) if row.part == job.part]
        done = {f"{row.method} {row.label}".strip() for row in rows if row.model == job.model}
        left = wanted(job.part, job.model, job.group, job.caps_gb, device) - done
        out += [f"{job.part}: {job.model}: {cell}" for cell in sorted(left)]
    return out


def measure(given: argparse.Namespace, device: torch.device, machine: Machine) -> list[str]:
    """Run the parts asked for; returns what was left out."""
    parts = PARTS if given.part == "all" else (given.part,)
    began = time.time()
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        log = given.results.with_suffix(".log") if given.keep_log else Path(folder) / "stderr.log"
        for part in parts:
            end = began + given.limit_s * (ENDS[part] if given.part == "all" else 1.0) - GRACE_S / 2
            base = Job(
                part=part,
                model="",
                group="",
                device=str(device),
                dtype=machine.dtype,
                large=given.size == "large",
                deadline=end,
                results=str(given.results.resolve()),
                turns=folder,
                batch=given.batch,
                steps=given.steps,
                solve_s=given.solve_s,
                least_s=1.5 * given.solve_s,
                caps_gb=tuple(given.caps_gb),
            )
            jobs = jobs_of(part, base, given.models, given.groups)
            todo = [job for job in jobs if missing([job], machine, device)]
            print(f"{part}: {len(todo)} of {len(jobs)} jobs to run", file=sys.stderr)
            run_jobs(todo, machine, at_once=given.jobs, log=log)
            left_out += missing(jobs, machine, device)
        if log.exists() and given.verbose:
            sys.stderr.write(log.read_text())
    return left_out


def report(given: argparse.Namespace, machine: Machine | None) -> int:
    """Print the table and the verdicts of this machine, or of all in the file; the exit code."""
    rows = latest(read(given.results), machine)
    if not rows:
        print(f"bench_cuda: no rows in {given.results}", file=sys.stderr)
        return CANNOT
    failed = False
    for gpu, torch_version, dtype in dict.fromkeys((r.gpu, r.torch, r.dtype) for r in rows):
        mine = [r for r in rows if (r.gpu, r.torch, r.dtype) == (gpu, torch_version, dtype)]
        commits = ", ".join(dict.fromkeys(r.commit for r in mine))
        print(f"\n{gpu}, driver {mine[0].driver}, torch {torch_version}, {dtype}, commit {commits}\n")
        print("\n".join(table(mine)))
        print()
        for verdict in verdicts(mine):
            failed = failed or verdict.failed
            print(f"{verdict.word:<20} {verdict.claim}: {verdict.model}: {verdict.figures}".rstrip(": "))
    given.results.with_suffix(".md").write_text(
        markdown(latest(read(given.results))) + "\n", encoding="utf-8"
    )
    return FAILED if failed else HELD


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench_cuda", description=__doc__, formatter_class=raw)
    parser.add_argument("--part", choices=(*PARTS, "all", "table", "plots"), default="all")
    parser.add_argument("--device", default="cuda", help="cuda[:N] or cpu (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--groups", nargs="+", choices=groups_of("race"), default=list(groups_of("race")))
    parser.add_argument("--size", choices=("large", "small"), help="default: large on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--batch", type=int, default=0, help="default: the family's own")
    parser.add_argument("--caps-gb", nargs="+", type=float, help="default: 24 48 80 on a GPU")
    parser.add_argument("--limit-s", type=float, default=530.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="workers side by side (default: 7 on a GPU, 1 on a CPU)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default: %(default)s)")
    parser.add_argument("--solve-s", type=float, default=4.0, help="seconds a budget (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--verbose", action="store_true", help="show what the workers said")
    parser.add_argument("--keep-log", action="store_true", help="keep that beside the results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    given = _parser().parse_args(arguments)
    if given.part == "table":
        return report(given, None)
    if given.part == "plots":
        written = draw(latest(read(given.results)), given.results.parent)
        print("\n".join(map(str, written)))
        return HELD if written else CANNOT
    try:
        device = checked_device(given.device)
    except (PlannerError, RuntimeError) as error:
        print(f"bench_cuda: {error}", file=sys.stderr)
        return CANNOT
    cuda = device.type == "cuda"
    given.size = given.size or ("large" if cuda else "small")
    given.caps_gb = given.caps_gb or ([24.0, 48.0, 80.0] if cuda else [0.1])
    given.jobs = given.jobs or (7 if cuda else 1)
    dtype = getattr(torch, given.dtype or ("bfloat16" if cuda else "float32"))
    machine = machine_of(device, dtype)
    others = held_by_others(device)
    if others > 0:
        told = f"other processes hold {others / 1e9:.1f} GB of {device}; seconds and what fits are theirs too"
        print(f"bench_cuda: {told}", file=sys.stderr)
    began = time.time()
    left_out = measure(given, device, machine)
    code = report(given, machine)
    print(f"\n{time.time() - began:.0f} s; results in {given.results}")
    if left_out:
        print(f"left out, {len(left_out)} cells; run again to go on:")
        print("\n".join(f"  {cell}" for cell in left_out))
    return code


if __name__ == "__main__":
    sys.exit(main())
