"""The front door: one call, every method, one kind of answer.

Arguments are checked here, and what they ask is done by ``fixed_order`` or ``free_order``.

A search can be ended at any moment, by its time limit, by Ctrl-C or by its ``progress`` callback, and
then answers with the best plan there is, its bound, and the status ``feasible`` (or ``unsettled``, if
nothing that fits was found).  Without a time limit (``math.inf``) it ends when no method finds anything
better, and the same seed gives the same answer.
"""

from __future__ import annotations

from typing import Literal

from solvers.core.incumbent import Progress
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.solution import Solution
from solvers.fixed_order import checked_budget, checked_time_limit
from solvers.fixed_order import solve as solve_fixed
from solvers.free_order import solve as solve_free
from solvers.methods import METHODS
from solvers.portfolio import Methods

__all__ = ["solve"]


def solve(
    problem: Problem,
    budget_bytes: int | float,
    *,
    solver: str = "auto",
    order: Literal["fixed", "free"] = "fixed",
    time_limit_s: float = 30.0,
    seed: int = 0,
    progress: Progress | None = None,
    hint: Schedule | None = None,
    methods: Methods | None = None,
) -> Solution:
    """The fastest schedule of ``problem`` found whose peak is within ``budget_bytes``.

    ``budget_bytes``  includes ``problem.resident_bytes``; a fraction of a byte is dropped.
    ``solver``        one of ``solvers.SOLVERS``.  The baselines (``keep_all`` to ``sqrt``) answer with their
                      one schedule whether it fits or not; only ``greedy`` looks at the budget.
    ``order``         ``fixed``: first executions keep the problem's order.  ``free``: they may be permuted,
                      which lowers both peak and time (see ``free_order``); bounds and floors are then those
                      of any order.
    ``time_limit_s``  0 answers with the best of the baselines that take no search; ``math.inf`` searches
                      until nothing better is found.
    ``progress``      called with a ``Solution`` (``seconds``, ``bound_seconds``, ``gap_seconds``) whenever
                      the plan or the bound gets better, from the searching thread; returning ``True``
                      ends the search (``auto`` only).
    ``hint``          a schedule to start from (``auto`` only).
    ``methods``       ``Methods(problem)`` of an earlier call, to build nothing twice (``auto`` only).

    Raises ``InfeasibleError`` if it is proved that no schedule fits, ``TypeError`` or ``ValueError``
    for a budget, time limit, order or solver name that makes no sense, and ``ProblemError`` if the solver
    named cannot treat this problem (``chain``, ``staged``, ``every_block`` and ``sqrt`` need a training
    graph, with ``problem.turn``).
    """
    budget = checked_budget(budget_bytes)
    limit_s = checked_time_limit(time_limit_s)
    if solver != "auto" and solver not in METHODS:
        raise ValueError(f"solver is {solver!r}, want one of auto, {', '.join(METHODS)}")
    if order not in ("fixed", "free"):
        raise ValueError(f"order is {order!r}, want 'fixed' or 'free'")
    if order == "free":
        return solve_free(problem, budget, time_limit_s=limit_s, seed=seed)
    return solve_fixed(
        problem,
        budget,
        solver=solver,
        limit_s=limit_s,
        seed=seed,
        progress=progress,
        hint=hint,
        methods=methods,
    )
