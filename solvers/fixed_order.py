"""Everything for a given order: the best schedule within a budget, and the schedule of least peak.

``auto`` keeps everything if that fits (nothing can be faster), refuses a budget below the proved floor,
and otherwise asks every method that suits (``portfolio``), on two cores, for the best plan it can find,
judged by the simulator, and the best bound it can prove.

The search runs in a thread of its own, so that the time limit and Ctrl-C are heard while a linear program
runs.  One that is still in a linear program when its time is up is left to end by itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

from solvers.bounds.lower_bounds import PeakFloor
from solvers.core.incumbent import ENDS_AT, Incumbent, Progress
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import InvalidScheduleError
from solvers.core.solution import InfeasibleError, Solution, solution_of, with_floor
from solvers.methods import METHODS
from solvers.portfolio import Methods

__all__ = ["checked_budget", "checked_time_limit", "minimum_peak", "refuse_below", "solve"]

log = logging.getLogger(__name__)

# Both by judgement.

# A search that is not back this long after its limit is left behind, with the best it had.
PATIENCE = 1.05
# Share of the time that looks for the least peak; the rest makes the schedule of that peak faster.
LEAST_SHARE = 0.7


def solve(
    problem: Problem,
    budget: int,
    *,
    solver: str = "auto",
    limit_s: float = 30.0,
    seed: int = 0,
    progress: Progress | None = None,
    hint: Schedule | None = None,
    methods: Methods | None = None,
) -> Solution:
    """As :func:`solvers.solve` for the problem's own order, of arguments that were checked.

    ``budget`` in bytes, ``limit_s`` in seconds.
    """
    started = time.perf_counter()
    methods = methods or Methods(problem)
    refuse_below(methods.floor, budget)
    if solver == "auto":
        run = Incumbent(problem, budget, deadline=started + ENDS_AT * limit_s, progress=progress)
        if hint is not None:
            with contextlib.suppress(InvalidScheduleError):  # of another problem with ops of these names
                run.offer(hint.steps(problem), "hint")
        methods.offer_cheapest(run)
        if not run.done:
            search = methods.search
            _interruptible(lambda: search(run, seed), run, started + PATIENCE * limit_s)
        solution, interrupted = run.solution(), run.interrupted
    else:
        solution, interrupted = METHODS[solver].run(problem, budget, limit_s, seed), False
        methods.raise_floor(solution.floor_bytes)
    if math.isinf(solution.bound_seconds):
        methods.raise_floor(budget + 1)
    floor = methods.floor
    if not solution.fits:
        refuse_below(floor, budget, interrupted=interrupted)
    solution = replace(
        with_floor(problem, solution, floor.bytes), solve_seconds=time.perf_counter() - started
    )
    log.debug("%s: %r", problem.name, solution)
    return solution


def minimum_peak(
    problem: Problem, *, time_limit_s: float = 30.0, seed: int = 0, fast: bool = True
) -> Solution:
    """The schedule of lowest peak that is found, then, if ``fast``, made as fast as that peak allows.

    ``time_limit_s`` is seconds for both.  The answer's ``budget_bytes`` is its own ``peak_bytes``: the least
    budget that is known to be feasible.  Its ``floor_bytes`` say how low it may be at best.
    """
    limit_s = checked_time_limit(time_limit_s)
    started = time.perf_counter()
    methods = Methods(problem)
    first = Incumbent(problem, 0, deadline=started + LEAST_SHARE * limit_s)
    if not len(problem):
        top = first.peak_bytes
        return solution_of(problem, Schedule(()), top, solver="keep_all", floor_bytes=top)
    _interruptible(
        lambda: methods.lower(first, seed), first, started + (LEAST_SHARE + PATIENCE - 1) * limit_s
    )
    least = first.lowest
    run = Incumbent(problem, least.peak_bytes, deadline=started + ENDS_AT * limit_s)
    run.offer(least.steps, least.solver)
    if fast and not first.stopped and not run.done:
        _interruptible(lambda: methods.search(run, seed), run, started + PATIENCE * limit_s)
    return replace(
        with_floor(problem, run.solution(), methods.floor.bytes),
        interrupted=first.interrupted or run.interrupted,
        solve_seconds=time.perf_counter() - started,
    )


def _interruptible(work: Callable[[], object], run: Incumbent, give_up_at: float) -> None:
    """Do ``work`` in a thread, so that Ctrl-C is heard while a linear program runs; then ``run`` is stopped.

    A thread that is still in a linear program by ``give_up_at`` (or at Ctrl-C) is left to end on its own.
    """
    failure: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, name="solvers", daemon=True)
    try:
        thread.start()
        while thread.is_alive() and time.perf_counter() < give_up_at:
            thread.join(min(0.2, max(0.001, give_up_at - time.perf_counter())))
    except KeyboardInterrupt:
        log.warning("interrupted: answering with the best schedule so far")
        run.interrupt()
    if thread.is_alive():
        run.stop()
    if failure:
        raise failure[0]


def refuse_below(floor: PeakFloor, budget_bytes: int, *, interrupted: bool = False) -> None:
    """``InfeasibleError`` if the proved ``floor`` exceeds ``budget_bytes``."""
    if floor.bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, floor.bytes, floor.op_name, interrupted)


def checked_budget(budget_bytes: float) -> int:
    """``budget_bytes`` as an int; ``TypeError`` or ``ValueError`` if it makes no sense."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, Real):
        raise TypeError(f"budget_bytes is {budget_bytes!r}, want a number of bytes")
    if not math.isfinite(budget_bytes) or budget_bytes <= 0:
        raise ValueError(f"budget_bytes is {budget_bytes!r}, want a finite number above 0")
    return math.floor(budget_bytes)


def checked_time_limit(time_limit_s: object) -> float:
    """``time_limit_s`` as a float; ``TypeError`` or ``ValueError`` if it makes no sense."""
    if isinstance(time_limit_s, bool) or not isinstance(time_limit_s, Real):
        raise TypeError(f"time_limit_s is {time_limit_s!r}, want a number of seconds")
    if math.isnan(time_limit_s) or time_limit_s < 0:
        raise ValueError(f"time_limit_s is {time_limit_s!r}, want a number >= 0")
    return float(time_limit_s)
