"""Schedules on disk: the same step under the same budget is not searched for again by the next process.

In: a problem, a budget and a search.  Out: the answer of an earlier search, or ``None``.  A rerun of a
script, another rank, a notebook's second cell then pay for the capture alone.

One JSON file each in the folder of measured costs (:mod:`planner.costs.cache`, whose variable switches both
off).  Its name says all that a schedule depends on but for seconds: ops, what they read and make, bytes,
order, what is resident, the budget, the method, and the source of the solvers.  What is served is proved
anew or cheap to check:

* the schedule is run through the simulator, so that it is one and fits, whatever the file says;
* a search of less time than is asked for now is no answer, but where the search starts;
* a CPU is measured in each process, so seconds differ a little.  Where every op takes at least a share
  ``a`` of what it took then, recomputing takes at least ``a`` times what it was proved to take, and that is
  the bound that holds now.  Where it leaves more open than the earlier one did, by :data:`LOOSER` of the
  step, the schedule is again only where the search starts.

Files that are not whole are ignored with one line in the log.  The :data:`MOST` that were used last stay.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import solvers
from planner.costs.cache import folder
from planner.files import write_whole
from planner.memory.execution import Execution
from planner.options import Search
from planner.solving.fit import EQUAL, Answer
from solvers import Problem, Schedule

__all__ = ["KeptSchedule", "Recalled"]

log = logging.getLogger(__name__)

_FORMAT, _VERSION = "rematplan.schedule", 1
WORTH_S = 1.0  # of search; what takes less is searched for again
LOOSER = 0.005  # of the step's seconds
MOST = 256  # files; of a large model each has some 100 kB


class Recalled(NamedTuple):
    """What an earlier search left: an ``answer`` for the budget, or a schedule to start from (``hint``)."""

    answer: Answer | None = None
    hint: Schedule | None = None


@dataclass(frozen=True)
class KeptSchedule:
    """The place of one schedule on disk, of a ``problem`` within ``budget_bytes``."""

    problem: Problem
    budget_bytes: int
    path: Path

    @classmethod
    def of(cls, problem: Problem, budget_bytes: int, search: Search) -> KeptSchedule | None:
        """Where it lies; ``None`` where nothing is kept."""
        where = folder()
        if where is None:
            return None
        name = hashlib.sha256(_told(problem, budget_bytes, search).encode()).hexdigest()[:40]
        return cls(problem, budget_bytes, where / f"plan-{name}.json")

    def recall(self, search: Search, execute: Callable[[Schedule], Execution]) -> Recalled:
        """What was kept, run by ``execute`` and judged at the seconds of now."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            record = _checked(content, len(self.problem))
            schedule = Schedule(tuple(self.problem.ops[i].name for i in record["sequence"]))
            execution = execute(schedule)
        except FileNotFoundError:
            return Recalled()
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            LookupError,
            RecursionError,
        ) as error:
            log.warning("%s is ignored, it is no schedule of this step: %s", self.path, error)
            return Recalled()
        if execution.peak_bytes > self.budget_bytes:
            return Recalled()  # of an allocator that hands out more than the last one did
        now, then = self._seconds(), record["seconds"]
        share = min((b / a for a, b in zip(then, now, strict=True) if a > 0), default=1.0)
        total_s = self.problem.total_seconds
        seconds = total_s + execution.timeline.recompute_seconds
        recompute_s, proved_s = record["recompute_s"], record["proved_recompute_s"]
        bound_s = min(seconds, total_s + share * proved_s)
        open_then, open_now = (recompute_s - proved_s) / record["total_s"], (seconds - bound_s) / total_s
        as_good = open_now <= open_then + LOOSER
        as_long = search.time_limit_s <= record["limit_s"] or recompute_s <= proved_s * EQUAL
        if not (as_good and as_long):
            return Recalled(hint=schedule)
        log.info("the schedule is one that was found before, in %.3g s: %s", record["solve_s"], self.path)
        _touch(self.path)
        return Recalled(
            Answer(
                self.budget_bytes,
                execution,
                bound_s,
                record["floor_bytes"],
                seconds,
                record["solver"],
                record["solve_s"],
            )
        )

    def keep(self, answer: Answer, search: Search) -> None:
        """Leave ``answer`` for others, if it took long; what cannot be written is let go."""
        ran = answer.execution
        limit_s = search.time_limit_s
        if ran is None or answer.interrupted or answer.solve_seconds < WORTH_S or math.isinf(limit_s):
            return
        total_s = self.problem.total_seconds
        record = {
            "sequence": ran.timeline.steps.tolist(),
            "seconds": self._seconds(),
            "total_s": total_s,
            "recompute_s": ran.timeline.recompute_seconds,
            "proved_recompute_s": max(0.0, answer.bound_seconds - total_s),
            "floor_bytes": answer.floor_bytes,
            "limit_s": limit_s,
            "solver": answer.solver,
            "solve_s": answer.solve_seconds,
        }
        content = {"format": _FORMAT, "version": _VERSION, "sum": _sum(record), "schedule": record}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(content))
            _forget_the_oldest(self.path.parent)
        except OSError as error:
            log.warning("a schedule is not kept in %s: %s", self.path, error)

    def _seconds(self) -> list[float]:
        return [op.again_s for op in self.problem.ops]


def _told(problem: Problem, budget_bytes: int, search: Search) -> str:
    """All that a schedule depends on, but for seconds."""
    ops = [
        (op.name, op.inputs, op.outputs, op.workspace_bytes, op.recomputable, op.group, op.reuses)
        for op in problem.ops
    ]
    values = [(v.bytes, v.producer, v.final, v.replay_only) for v in problem.values]
    whole = problem.turn, problem.resident_bytes, budget_bytes, search.solver, _source()
    return json.dumps((_VERSION, whole, ops, values))


@functools.cache
def _source() -> str:
    """The source of the solvers, as a digest."""
    digest = hashlib.sha256()
    root = Path(solvers.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _checked(content: Any, ops: int) -> dict[str, Any]:
    if (content["format"], content["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
    record: dict[str, Any] = content["schedule"]
    if content["sum"] != _sum(record):
        raise ValueError("it is not as it was written")
    if len(record["seconds"]) != ops or not all(0 <= i < ops for i in record["sequence"]):
        raise ValueError("it is of other ops")
    return record


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        log.debug("%s: %s", path, error)


def _forget_the_oldest(where: Path) -> None:
    files = sorted(where.glob("plan-*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-MOST]:
        path.unlink(missing_ok=True)
