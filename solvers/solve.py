"""The front door: one call, every method, one kind of answer.

``auto`` keeps everything if that fits (nothing can be faster), refuses a budget below the proved
floor, hands small graphs to the exact program and large ones to the staged program and the chain
dynamic program, and returns the best plan that any of them found, judged by the simulator, with
the best bound that any of them proved.

A time limit is a limit: a method that is cut returns the best plan it has, its bound, and the
status ``feasible`` (or ``unsettled``, if nothing that fits was found).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from numbers import Real

from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.simulate import simulate
from solvers.solution import InfeasibleError, Solution, fits_better, solution_of

__all__ = ["EXACT_OPS", "SOLVERS", "minimum_peak", "solve"]

log = logging.getLogger(__name__)

SOLVERS = ("auto", "exact", "staged", "chain", "keep_all", "recompute_all", "greedy", "every_block", "sqrt")

# Up to this many ops, ``auto`` asks the exact method: on training chains of 37 ops it proves the optimum in
# 0.2 to 3 s for budgets away from the floor, and nearer to it still has the better bound.
EXACT_OPS = 40
# Up to this many ops it asks no other.
ALONE_OPS = 16
# On larger graphs ``auto`` asks no further method about a gap below this share of the step.
CLOSE_ENOUGH = 1e-3
# Share of the time that ``auto`` spends on the bound of a larger graph: it says when to stop.
BOUND_SHARE = 0.25


def solve(
    problem: Problem,
    budget_bytes: int | float,
    *,
    solver: str = "auto",
    time_limit_s: float = 30.0,
    seed: int = 0,
) -> Solution:
    """The fastest schedule of ``problem`` found whose peak is within ``budget_bytes``.

    ``budget_bytes`` includes ``problem.resident_bytes``; a fraction of a byte is dropped.
    ``solver`` is one of ``SOLVERS``.  The baselines (``keep_all`` to ``sqrt``) answer with their one
    schedule whether it fits or not; only ``greedy`` looks at the budget.

    Raises ``InfeasibleError`` if it is proved that no schedule fits, ``TypeError`` or ``ValueError``
    for a budget, time limit or solver name that makes no sense, and ``ProblemError`` if the solver
    named cannot treat this problem (``chain``, ``every_block`` and ``sqrt`` need a training graph,
    with ``problem.turn``).
    """
    budget = checked_budget(budget_bytes)
    limit_s = checked_time_limit(time_limit_s)
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, want one of {', '.join(SOLVERS)}")
    started = time.perf_counter()
    refuse_below_floor(problem, budget)
    if solver == "auto":
        solution = _auto(problem, budget, started + limit_s, seed)
    else:
        solution = _run(problem, budget, solver, limit_s, seed)
    solution = replace(solution, solve_seconds=time.perf_counter() - started)
    log.debug("%s: %r", problem.name, solution)
    return solution


def minimum_peak(problem: Problem, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The schedule of lowest peak that is found: by the exact method on small graphs, else the best of all.

    Its ``budget_bytes`` is its own ``peak_bytes``: the least budget that is known to be feasible.
    Its seconds are not minimised; ``solve`` at that budget does so.
    """
    from solvers import bounds
    from solvers.baselines import BASELINES

    limit_s = checked_time_limit(time_limit_s)
    started = time.perf_counter()
    floor = bounds.peak_floor(problem).bytes
    best = Schedule.keep_all(problem), "keep_all"
    lowest = simulate(problem, best[0])

    def offer(schedule: Schedule, name: str) -> None:
        nonlocal best, lowest
        line = simulate(problem, schedule)
        if (line.peak_bytes, line.seconds) < (lowest.peak_bytes, lowest.seconds):
            best, lowest = (schedule, name), line

    for name, baseline in BASELINES.items():
        if lowest.peak_bytes > floor and baseline.suits(problem):
            offer(baseline.run(problem, floor), name)
    names = _methods(problem)
    for k, name in enumerate(names):
        if lowest.peak_bytes > floor:
            left_s = started + limit_s - time.perf_counter()
            found = _lowest_of(problem, name, max(0.1, left_s / (len(names) - k)), seed, best[0])
            offer(found, name)
    spent_s = time.perf_counter() - started
    return solution_of(problem, best[0], lowest.peak_bytes, solver=best[1], solve_seconds=spent_s)


def _lowest_of(problem: Problem, method: str, limit_s: float, seed: int, hint: Schedule) -> Schedule:
    """The schedule of lowest peak by one method; ``hint`` is the lowest so far."""
    if method == "exact":
        from solvers import checkmate

        return checkmate.minimum_peak(problem, time_limit_s=limit_s, seed=seed, hint=hint)[0]
    if method == "staged":
        from solvers import staged

        return staged.minimum_peak(problem, time_limit_s=limit_s, seed=seed).schedule
    from solvers import chain

    return chain.minimum_peak(problem, time_limit_s=limit_s, seed=seed).schedule


def _methods(problem: Problem) -> list[str]:
    """What ``auto`` tries on this problem, in order; greedy and keep-all come before."""
    names = ["exact"] if len(problem) <= EXACT_OPS else []
    if len(problem) > ALONE_OPS:
        names.append("staged")
        if problem.turn is not None and 2 <= problem.turn < len(problem):
            names.append("chain")
    return names


def _auto(problem: Problem, budget: int, deadline: float, seed: int) -> Solution:
    """The methods in turn, until one's plan is as good as the bound, which on large graphs comes first."""
    from solvers import baselines, bounds

    best = baselines.solve(problem, budget, "keep_all")
    bound = best.bound_seconds

    def left_s() -> float:
        return max(0.1, deadline - time.perf_counter())

    names = ["greedy", *_methods(problem)]
    enough_s = 0.0 if "exact" in names else CLOSE_ENOUGH * problem.total_seconds
    if best.status != "optimal" and "exact" not in names:
        bound = bounds.time_bound(problem, budget, time_limit_s=BOUND_SHARE * left_s())
    for k, name in enumerate(names):
        if best.fits and best.gap_seconds <= enough_s:
            break
        found = _run(problem, budget, name, left_s() / (len(names) - k), seed)
        bound = max(bound, found.bound_seconds)
        best = found if fits_better(found, best) else best
        best = solution_of(problem, best.schedule, budget, solver=best.solver, bound_seconds=bound)
    return best


def _run(problem: Problem, budget: int, solver: str, limit_s: float, seed: int) -> Solution:
    """One method by its name; modules load when they are first asked for."""
    from solvers import baselines

    if solver in baselines.BASELINES:
        return baselines.solve(problem, budget, solver)
    if solver == "exact":
        from solvers import checkmate

        return checkmate.solve(problem, budget, time_limit_s=limit_s, seed=seed)
    if solver == "staged":
        from solvers import staged

        return staged.solve(problem, budget, time_limit_s=limit_s, seed=seed)
    from solvers import chain

    return chain.solve(problem, budget, time_limit_s=limit_s, seed=seed)


def refuse_below_floor(problem: Problem, budget_bytes: int) -> None:
    """``InfeasibleError`` if the proved floor of ``problem`` exceeds ``budget_bytes``."""
    from solvers import bounds

    floor = bounds.peak_floor(problem)
    if floor.bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, floor.bytes, floor.op_name)


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
    if math.isnan(time_limit_s) or time_limit_s <= 0:
        raise ValueError(f"time_limit_s is {time_limit_s!r}, want a number above 0")
    return float(time_limit_s)
