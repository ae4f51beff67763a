"""Schedules on disk: the same step under the same budget is not searched for again by the next process.

In: a problem, a budget and a search.  Out: the answer of an earlier search, or ``None``.  A rerun of a
script, another rank, a notebook's second cell then pay for the capture alone.  Kept are plans, the least
peak, each budget of a frontier, proofs that nothing fits, and what was found beside a training; a plan made
of one says on which day it was searched for.

One JSON file each in the folder of measured costs (:mod:`planner.costs.cache`, whose variable switches both
off).  Its name says all that a schedule depends on but for seconds: ops, what they read and make, bytes,
order, what is resident, the budget, the method, and the source of the solvers.  What is served is proved
anew or cheap to check:

* the schedule is run through the simulator, so that it is one and fits, whatever the file says;
* a search of less time than is asked for now is no answer, but where the search starts;
* a CPU is measured in each process, so seconds differ a little.  Where every op takes at least a share
  ``a`` of what it took then, recomputing takes at least ``a`` times what it was proved to take, and that is
  the bound that holds now.  Where it leaves more open than the earlier one did, by :data:`LOOSER` of the
  step, the schedule is again only where the search starts;
* that nothing fits is taken only where it was proved.

Files that are not whole are ignored with one line in the log.  The :data:`MOST` that were used last stay.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import solvers
from planner.costs.cache import folder
from planner.files import write_whole
from planner.memory.execution import Execution
from planner.options import Search
from planner.solving.fit import EQUAL, Answer
from solvers import Problem, Schedule

__all__ = ["KeptSchedule", "Recalled", "never_rising"]

log = logging.getLogger(__name__)

_FORMAT, _VERSION = "rematplan.schedule", 2
WORTH_S = 0.1  # of search; what takes less is searched for again
LOOSER = 0.005  # of the step's seconds
MOST = 512  # files; of a large model each has some 100 kB


class Recalled(NamedTuple):
    """What an earlier search left: an ``answer`` for the budget, or a schedule to start from (``hint``)."""

    answer: Answer | None = None
    hint: Schedule | None = None


@dataclass(frozen=True)
class KeptSchedule:
    """The place of one schedule on disk, of a ``problem`` within ``budget_bytes``; ``None``: its least."""

    problem: Problem
    budget_bytes: int | None
    path: Path

    @classmethod
    def of(
        cls, problem: Problem, budget_bytes: int | None, search: Search, aim: str = "fastest"
    ) -> KeptSchedule | None:
        """Where it lies, ``aim`` being what was searched for; ``None`` where nothing is kept."""
        where = folder()
        if where is None:
            return None
        name = hashlib.sha256(_told(problem, budget_bytes, search, aim).encode()).hexdigest()[:40]
        return cls(problem, budget_bytes, where / f"plan-{name}.json")

    def recall(self, search: Search, execute: Callable[[Schedule], Execution]) -> Recalled:
        """What was kept, run by ``execute`` and judged at the seconds of now."""
        schedule = None
        try:
            record = _checked(json.loads(self.path.read_text(encoding="utf-8")), len(self.problem))
            if record["sequence"] is None:
                found: Answer | None = self._nothing_fits(record)
            else:
                schedule = Schedule(tuple(self.problem.ops[i].name for i in record["sequence"]))
                found = self._judged(record, execute(schedule), search)
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
        if found is None:
            return Recalled(hint=schedule)
        if not (found.fits or found.is_infeasible):
            return Recalled()  # of an allocator that hands out more than the last one did
        told = "not searched for again: an answer was found on %s, in %.3g s: %s"
        log.info(told, found.searched_on, found.solve_seconds, self.path)
        _touch(self.path)
        return Recalled(found)

    def _nothing_fits(self, record: dict[str, Any]) -> Answer:
        """The proof of an earlier process; ``ValueError`` where it is none."""
        floor_bytes = record["floor_bytes"]
        if self.budget_bytes is None or floor_bytes <= self.budget_bytes:
            raise ValueError(f"a floor of {floor_bytes} bytes forbids nothing")
        return _answer(record, self.budget_bytes, None, math.inf, math.inf)

    def _judged(self, record: dict[str, Any], ran: Execution, search: Search) -> Answer | None:
        """``ran`` as an answer, without an execution where it does not fit; ``None``: search on."""
        is_least = self.budget_bytes is None
        budget_bytes = ran.peak_bytes if self.budget_bytes is None else self.budget_bytes
        if ran.peak_bytes > budget_bytes:
            return _answer(record, budget_bytes, None, 0.0, math.inf)
        now, then = self._seconds(), record["seconds"]
        share = min((b / a for a, b in zip(then, now, strict=True) if a > 0), default=1.0)
        total_s = self.problem.total_seconds
        seconds = total_s + ran.timeline.recompute_seconds
        recompute_s, proved_s = record["recompute_s"], record["proved_recompute_s"]
        if is_least and ran.peak_bytes > record["peak_bytes"]:
            proved_s = 0.0  # it was proved of the peak of then
        bound_s = min(seconds, total_s + share * proved_s)
        open_then, open_now = (recompute_s - proved_s) / record["total_s"], (seconds - bound_s) / total_s
        as_good = open_now <= open_then + LOOSER
        is_best = recompute_s <= proved_s * EQUAL and not (
            is_least and ran.peak_bytes > record["floor_bytes"]
        )
        if not (as_good and (search.time_limit_s <= record["limit_s"] or is_best)):
            return None
        return _answer(record, budget_bytes, ran, bound_s, seconds)

    def keep(self, answer: Answer, search: Search) -> None:
        """Leave ``answer`` for others, if it took long; what cannot be written is let go."""
        ran, limit_s, total_s = answer.execution, search.time_limit_s, self.problem.total_seconds
        if answer.interrupted or answer.solve_seconds < WORTH_S or math.isinf(limit_s):
            return
        if ran is None and not answer.is_infeasible:
            return
        record = {
            "sequence": None if ran is None else ran.timeline.steps.tolist(),
            "seconds": self._seconds(),
            "total_s": total_s,
            "recompute_s": 0.0 if ran is None else ran.timeline.recompute_seconds,
            "proved_recompute_s": 0.0 if ran is None else max(0.0, answer.bound_seconds - total_s),
            "peak_bytes": 0 if ran is None else ran.peak_bytes,
            "floor_bytes": answer.floor_bytes,
            "limit_s": limit_s,
            "solver": answer.solver,
            "solve_s": answer.solve_seconds,
            "searched_on": f"{datetime.now(timezone.utc):%Y-%m-%d}",
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


def _told(problem: Problem, budget_bytes: int | None, search: Search, aim: str = "fastest") -> str:
    """All that a schedule depends on, but for seconds."""
    ops = [
        (op.name, op.inputs, op.outputs, op.workspace_bytes, op.recomputable, op.group, op.reuses)
        for op in problem.ops
    ]
    values = [(v.bytes, v.producer, v.final, v.replay_only) for v in problem.values]
    whole = problem.turn, problem.resident_bytes, budget_bytes, aim, search.solver, _source()
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
    if len(record["seconds"]) != ops or not all(0 <= i < ops for i in record["sequence"] or ()):
        raise ValueError("it is of other ops")
    return record


def _answer(
    record: Mapping[str, Any], budget_bytes: int, ran: Execution | None, bound_s: float, seconds: float
) -> Answer:
    return Answer(
        budget_bytes,
        ran,
        bound_s,
        record["floor_bytes"],
        seconds,
        record["solver"],
        record["solve_s"],
        searched_on=record["searched_on"],
    )


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        log.debug("%s: %s", path, error)


def _forget_the_oldest(where: Path) -> None:
    files = sorted(where.glob("plan-*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-MOST]:
        path.unlink(missing_ok=True)


def never_rising(answers: Iterable[Answer]) -> dict[int, Answer]:
    """``answers``, by rising budget, found apart: a plan serves every larger budget, a bound every lower."""
    found: list[Answer] = []
    best: Answer | None = None
    for answer in answers:
        if best is not None and best.seconds < answer.seconds and not answer.is_infeasible:
            bound_s = min(answer.bound_seconds, best.seconds)
            answer = replace(best, budget_bytes=answer.budget_bytes, bound_seconds=bound_s)
        best = answer if answer.fits else best
        found.append(answer)
    bound_s = 0.0
    proved: dict[int, Answer] = {}
    for answer in reversed(found):
        if not answer.is_infeasible:
            bound_s = max(bound_s, answer.bound_seconds)
            answer = replace(answer, bound_seconds=min(bound_s, answer.seconds))
        proved[answer.budget_bytes] = answer
    return dict(reversed(proved.items()))
