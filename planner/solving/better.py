"""Better plans, sought in another process while the model trains by the one it has.

In: a plan that was made in a few seconds, with the step it was made from.  Out: the same plan bettered, when
the search has found enough to be worth a new program; its bits are the same, since all that differs is which
values are kept and which are made again.

One search at a time: plans wait for the one before them.  ``solvers.beside`` is the process.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections import deque
from dataclasses import dataclass

from planner.options import Search
from planner.plan import Plan
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from solvers.beside import SearchBeside
from solvers.core.incumbent import ENOUGH

__all__ = ["FIRST_S", "Betterment"]

log = logging.getLogger(__name__)

# Seconds of search that a training batch waits for its first plan; the rest goes on beside the training.
# By judgement: what is found by then on the graphs of tests/benchmarks is feasible, and usually near to best.
FIRST_S = 3.0

# Of a step's time: what a better plan must save while its search goes on, since each is a new program.
WORTH = 0.005


@dataclass(frozen=True, eq=False)
class _Asked:
    plan: weakref.ref[Plan]
    step: BudgetedStep
    search: Search  # for what is left
    whole: Search  # as it was asked for


class Betterment:
    """Seeks better plans than those asked for, one after the other.

    Both calls come from the thread that trains and take microseconds, but where a better plan is at hand.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Asked] = deque()
        self._now: _Asked | None = None
        self._beside: SearchBeside | None = None
        self._is_possible = True

    @property
    def is_busy(self) -> bool:
        """Whether a search is going on, or waits."""
        return self._now is not None or bool(self._waiting)

    def ask(self, plan: Plan, search: Search) -> bool:
        """Whether a better plan than ``plan``, which was made here, is sought from here on.

        For what is left of ``search.time_limit_s``; not where nothing is to be gained.
        """
        step, left_s = plan._origin, search.time_limit_s - plan.solve_s
        if not isinstance(step, BudgetedStep) or not self._is_possible:
            return False
        if plan.overhead - plan.overhead_bound <= ENOUGH or left_s <= 0:
            return False
        asked = _Asked(
            weakref.ref(plan), step, dataclasses.replace(search, time_limit_s=left_s, progress=None), search
        )
        self._waiting.append(asked)
        self._go_on()
        return self._is_possible

    def of(self, plan: Plan) -> Plan | None:
        """``plan`` bettered, with what is proved by now; ``None`` where it is not, or not yet worth it."""
        asked, beside = self._now, self._beside
        if asked is not None and asked.plan() is None:  # nobody trains by it any more
            self._end_this()
        if asked is None or beside is None or asked.plan() is not plan:
            return None
        is_over = beside.is_over
        if beside.best is None and not is_over:
            return None
        better = self._better(plan, asked, beside, is_over)
        if is_over:
            self._end_this()
        elif better is not None:
            self._now = dataclasses.replace(asked, plan=weakref.ref(better))
        return better

    def end(self) -> None:
        """Seek nothing more."""
        self._waiting.clear()
        self._end_this()

    def _end_this(self) -> None:
        if self._beside is not None:
            self._beside.end()
        self._now = self._beside = None
        self._go_on()

    def _better(self, plan: Plan, asked: _Asked, beside: SearchBeside, is_over: bool) -> Plan | None:
        step = asked.step
        found, total_s = beside.best, step.problem.total_seconds
        if found is None or not total_s:
            return None
        saved = (1.0 + plan.overhead) - found.seconds / total_s
        proved = found.bound_seconds / total_s - 1.0 - plan.overhead_bound
        if saved < WORTH and not (is_over and (saved > 0 or proved > 0)):
            return None
        execution = step.execution_of(found.schedule)
        if saved <= 0 or execution.peak_bytes > plan.budget_bytes:
            if proved <= 0:
                return None
            bound = min(plan.overhead, max(plan.overhead_bound, found.bound_seconds / total_s - 1.0))
            return dataclasses.replace(plan, overhead_bound=bound)
        bound_s = min(found.seconds, max(found.bound_seconds, total_s * (1.0 + plan.overhead_bound)))
        solve_s = plan.solve_s + found.solve_seconds
        answer = Answer(
            plan.budget_bytes, execution, bound_s, found.floor_bytes, found.seconds, found.solver, solve_s
        )
        if is_over:  # for the next process, which asks for the first plan again
            step.keep(answer, asked.whole)
        better = step.plan_of(answer)
        log.info(
            "%s has a better plan: overhead %.2f%% -> %.2f%% (proved >= %.2f%%, gap %.2f points), %.0f s of "
            "search beside the training",
            plan.model_name,
            100 * plan.overhead,
            100 * better.overhead,
            100 * better.overhead_bound,
            100 * better.gap,
            found.solve_seconds,
        )
        return better

    def _go_on(self) -> None:
        """Begin the next search, if none is going on."""
        while self._now is None and self._waiting:
            asked = self._waiting.popleft()
            plan = asked.plan()
            hint = None if plan is None else asked.step.schedule_of(plan)
            if plan is None or hint is None:
                continue
            run = asked.step.execution_of(hint)
            slack_bytes = max(
                0, run.peak_bytes - run.timeline.peak_bytes
            )  # an allocator's; of like schedules alike
            try:
                self._beside = SearchBeside(
                    asked.step.problem,
                    plan.budget_bytes - slack_bytes,
                    hint,
                    time_limit_s=asked.search.time_limit_s,
                    solver=asked.search.solver,
                )
            except OSError as error:
                log.info("no better plans are sought beside the training: %s", error)
                self._is_possible = False
                self._waiting.clear()
                return
            self._now = asked
