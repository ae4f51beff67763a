"""Every solver's answer on real graphs at many budgets, beside what people do without a solver.

    python -m tests.benchmarks.bench_solvers [--graphs NAME ...] [--budgets 0.5 floor+2% ...]
                                             [--time-limit SECONDS] [--again] [--table-only]
                                             [--before CHECKOUT]

Graphs: training steps of real models at real sizes (``tests/benchmarks/graphs.py``), the six of an
earlier prototype (``traced/...``) and random layered DAGs (``tests/benchmarks/layered.py``).

Budgets.  Parameters, buffers and inputs are resident whatever is decided, so a budget is a share of what
the step adds to them when nothing is recomputed: activations, gradients and held outputs at their peak.
90, 70, 50, 40, 35, 25 and 20 %, and 20, 10, 5 and 2 % above the proved floor of those bytes; 90 and 80 %
for layered DAGs, in the given order and in free order.  Budgets below the least that any plan was found for
are left out.

``--before`` computes the plans of a checkout of another commit instead, on its own copies of the graphs; they
stand in the table beside this one's.

Each row is a process of its own (``tests/benchmarks/solver_jobs.py``).  Rows are written to
``results/solvers.json`` as they come, each with the run it is from: commit, date, machine, versions.  A
row that is there already for the same solvers and the same time limit is not computed again, so a run
that was broken off goes on where it stopped.  ``results/solvers.md`` is made from the JSON.  What does not
hold of the graphs asked for is told line by line, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from solvers import Problem
from solvers.bounds.lower_bounds import peak_floor
from tests.benchmarks.solver_jobs import Job, graph_names, keep_all_bytes, load_graph
from tests.benchmarks.solver_table import PROTOTYPE, checks, markdown

__all__ = ["jobs_of", "main"]

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results" / "solvers.json"
TABLE = RESULTS.with_suffix(".md")

SHARES = ("0.9", "0.7", "0.5", "0.4", "0.35")
EDGE_SHARES = ("0.25", "0.2")
LAYERED_SHARES = ("0.9", "0.8")
ABOVE_FLOOR = ("floor+20%", "floor+10%", "floor+5%", "floor+2%")
NEAR_FLOOR = ABOVE_FLOOR[-1]
TRAINING_LIMIT_S = 10.0
EDGE_LIMIT_S = 30.0
LEAST_LIMIT_S = 25.0
PACKAGES = ("numpy", "networkx", "ortools", "torch")


def time_limit_of(graph: str, label: str) -> float:
    """Seconds that a solver has for one budget of ``graph``; without a ``label``, for its least peak."""
    if not graph.startswith("layered-"):
        return TRAINING_LIMIT_S if label in SHARES else EDGE_LIMIT_S
    return 60.0 if int(graph.split("-")[1]) <= 500 else 180.0


def budget_bytes_of(label: str, graph: str, problem: Problem, floor_bytes: int) -> int:
    """Bytes of a budget by its label, ``resident_bytes`` included."""
    resident = problem.resident_bytes
    if label in ABOVE_FLOOR:
        percent = 100 + int(label.removeprefix("floor+").removesuffix("%"))
        return resident + -(-percent * (floor_bytes - resident) // 100)
    return resident + round(float(label) * keep_all_bytes(graph, problem))


def first_jobs_of(graph: str, time_limit_s: float | None) -> list[Job]:
    """The rows of one graph that no budget has: the least peak, which proves the floor too, and baselines."""
    limit_s = time_limit_s or time_limit_of(graph, "")
    return [Job("least", graph, min(limit_s, LEAST_LIMIT_S)), Job("baselines", graph, limit_s)]


def jobs_of(
    graph: str, problem: Problem, labels: Sequence[str], time_limit_s: float | None, floor_bytes: int
) -> list[Job]:
    """The rows of one graph's budgets; ``labels`` empty means all of its kind.

    Budgets below ``floor_bytes``, the proved floor, are left out here; those below the least found, when it
    is known.
    """
    jobs = []
    layered = graph.startswith("layered-")
    for label in LAYERED_SHARES if layered else (*SHARES, *EDGE_SHARES, *_published(graph), *ABOVE_FLOOR):
        budget_bytes = budget_bytes_of(label, graph, problem, floor_bytes)
        if (labels and label not in labels) or budget_bytes < floor_bytes:
            continue
        limit_s = time_limit_s or time_limit_of(graph, label)
        jobs.append(Job("greedy", graph, limit_s, label, budget_bytes))
        jobs.append(Job("plan", graph, limit_s, label, budget_bytes))
        if layered:
            jobs.append(Job("plan", graph, limit_s, label, budget_bytes, "free"))
    return jobs


def _published(graph: str) -> list[str]:
    """Shares at which the earlier prototype has a figure, beyond the usual ones."""
    return [share for share in PROTOTYPE.get(graph, {}) if share not in (*SHARES, *EDGE_SHARES)]


def computed(job: Job, root: Path = ROOT) -> dict[str, Any]:
    """The row of ``job`` from a process of its own, in the checkout ``root``; what went wrong, if it did."""
    command = [sys.executable, "-m", "tests.benchmarks.solver_jobs", json.dumps(asdict(job))]
    most_s = 120 + 3 * job.time_limit_s
    try:
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=most_s, check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(job), "status": "hung", "error": f"killed after {most_s:.0f} s"}
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return {**asdict(job), "status": "crashed", "error": f"exit code {ran.returncode}: {last}"}
    return json.loads(ran.stdout.splitlines()[-1])


def code_of_solvers(root: Path = ROOT) -> str:
    """Hash of what is measured: the solvers' sources and the graphs are the same if it is."""
    digest = hashlib.sha256()
    for path in sorted((root / "solvers").rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def this_run(root: Path = ROOT) -> dict[str, Any]:
    """Commit of the checkout, date, machine and versions."""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "commit": asked.stdout.strip() or None,
        "solvers": code_of_solvers(root),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


class Results:
    """The JSON file: ``runs`` and, by key, ``rows`` that name the run they are from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": {}}
        self.runs: list[dict[str, Any]] = data["runs"]
        self.rows: dict[str, dict[str, Any]] = data["rows"]
        self._run: int | None = None

    def row(self, job: Job) -> dict[str, Any] | None:
        """The row of ``job``, of whatever run."""
        return self.rows.get(job.key)

    def is_of(self, job: Job) -> bool:
        """Whether there is a row of ``job``, of whatever solvers, for the same budget."""
        row = self.rows.get(job.key)
        return row is not None and row["budget_bytes"] == job.budget_bytes

    def is_current(self, job: Job, code: str) -> bool:
        """Whether the row is there, from the same solvers, the same limit and the same budget."""
        row = self.rows.get(job.key)
        return (
            row is not None
            and self.runs[row["run"]]["solvers"] == code
            and all(row[field] == getattr(job, field) for field in ("time_limit_s", "budget_bytes"))
        )

    def add(self, job: Job, row: dict[str, Any], run: dict[str, Any]) -> None:
        """File ``row`` and write the file; runs that no row is from any more are dropped."""
        if self._run is None:
            self.runs.append(run)
            self._run = len(self.runs) - 1
        self.rows[job.key] = {**row, "run": self._run}
        used = sorted({r["run"] for r in self.rows.values()})
        number = {old: new for new, old in enumerate(used)}
        self.runs = [self.runs[old] for old in used]
        self.rows = {key: {**r, "run": number[r["run"]]} for key, r in self.rows.items()}
        self._run = number[self._run]
        self.path.parent.mkdir(exist_ok=True)
        data = {"runs": self.runs, "rows": dict(sorted(self.rows.items()))}
        self.path.write_text(json.dumps(data, indent=1) + "\n")


def measure(names: Sequence[str], labels: Sequence[str], limit_s: float | None, again: bool) -> Iterator[str]:
    """Compute what is missing; one line per row."""
    results, run = Results(RESULTS), this_run()
    for graph in names:
        problem = load_graph(graph)
        for first in (True, False):
            least = results.row(Job("least", graph, 0.0)) or {}
            floor = max(least.get("floor_bytes") or 0, peak_floor(problem).bytes)
            for job in (
                first_jobs_of(graph, limit_s) if first else jobs_of(graph, problem, labels, limit_s, floor)
            ):
                below = (least.get("peak_bytes") or 0) > job.budget_bytes
                if job.budget and job.order == "fixed" and job.budget != NEAR_FLOOR and below:
                    continue
                # Who asks for some budgets asks for their plans; what stands beside them is there or is made.
                beside = bool(labels) and job.kind != "plan" and results.is_of(job)
                if not beside and (again or not results.is_current(job, run["solvers"])):
                    row = computed(job)
                    results.add(job, row, run)
                    yield _line(job, row)


def measure_before(
    names: Sequence[str], labels: Sequence[str], limit_s: float | None, checkout: Path
) -> Iterator[str]:
    """The plans of another commit's solvers for the same budgets, as rows of the kind ``before``."""
    results, run = Results(RESULTS), this_run(checkout)
    for graph in names:
        problem = load_graph(graph)
        least = results.row(Job("least", graph, 0.0)) or {}
        floor = max(least.get("floor_bytes") or 0, peak_floor(problem).bytes)
        for job in jobs_of(graph, problem, labels, limit_s, floor):
            if job.kind == "plan" and job.order == "fixed":
                before = replace(job, kind="before")
                results.add(before, {**computed(job, checkout), "kind": "before"}, run)
                yield _line(before, results.rows[before.key])


def _line(job: Job, row: dict[str, Any]) -> str:
    figures = [f"{row[k]:.2f} {k}" for k in ("overhead", "bound", "gap") if row.get(k) is not None]
    rest = [str(row[k]) for k in ("status", "error") if row.get(k)]
    return f"{job.key:60} {' '.join(figures)} {' '.join(rest)} {row.get('seconds', 0):.1f} s"


def chosen(wanted: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are wanted: by name, else by how they start; ``None`` wants all."""
    if wanted is None:
        return list(names)
    starts = tuple(w for w in wanted if w not in names)
    return [n for n in names if n in wanted or (starts and n.startswith(starts))]


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, write the table, and say what does not hold; exit code 1 if anything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--graphs", nargs="+", metavar="NAME", help="graphs whose names start with one of these"
    )
    parser.add_argument("--budgets", nargs="+", metavar="SHARE", default=[], help="0.5, floor+2%%, ...")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="per budget; default by graph")
    parser.add_argument("--again", action="store_true", help="compute rows that are there already")
    parser.add_argument("--table-only", action="store_true", help="only make the table from the JSON")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="plans of another commit's solvers")
    given = parser.parse_args(arguments)
    names = chosen(given.graphs, graph_names())
    if not names:
        parser.error(f"no graph is called {' or '.join(given.graphs)}; there are {', '.join(graph_names())}")
    if given.before is not None:
        lines = measure_before(names, given.budgets, given.time_limit, given.before)
    else:
        lines = measure(names, given.budgets, given.time_limit, given.again)
    for line in () if given.table_only else lines:
        print(line, flush=True)
    results = Results(RESULTS)
    TABLE.write_text(markdown(results.runs, results.rows))
    failed = [c for c in checks(results.rows) if not c.met and c.row.split("|")[0] in names]
    for check in failed:
        print(f"not met: {check.claim}: {' '.join(filter(None, check.row.split('|')))}: {check.figure}")
    print(f"{TABLE.relative_to(ROOT)}: {len(results.rows)} rows, {len(failed)} claims not met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
