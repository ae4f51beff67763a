"""All budgets of one problem at once: monotone by construction, from one model build.

Budgets are solved from the lowest up; each starts from the plan of the one below, which fits it too, so
more memory never costs more time.  A bound for one budget holds for every lower one, so bounds are
carried down.  The staged programs and the chain's tables of options are built once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from solvers.core.incumbent import Progress
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.solution import InfeasibleError, Solution, fits_better, solution_of
from solvers.fixed_order import checked_budget
from solvers.portfolio import Methods
from solvers.solve import solve

__all__ = ["frontier"]


def frontier(
    problem: Problem,
    budgets_bytes: Iterable[int | float],
    *,
    solver: str = "auto",
    time_limit_s: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    hint: Schedule | None = None,
) -> dict[int, Solution | InfeasibleError]:
    """The solution at each budget, in order of budget; an ``InfeasibleError`` where none can be.

    ``budgets_bytes`` are of the whole memory, ``problem.resident_bytes`` included; ``time_limit_s`` is
    seconds of search per budget; ``hint`` is a schedule to start from, such as that of the least peak.
    Among the solutions that fit, ``seconds`` never rises with the budget, and no bound does.  Raises as
    :func:`solvers.solve`.
    """
    methods = Methods(problem)
    answers: dict[int, Solution | InfeasibleError] = {}
    best = hint
    for budget in sorted(set(map(checked_budget, budgets_bytes))):
        try:
            found = solve(
                problem,
                budget,
                solver=solver,
                time_limit_s=time_limit_s,
                seed=seed,
                progress=progress,
                hint=best,
                methods=methods,
            )
        except InfeasibleError as error:
            answers[budget] = error
            continue
        if best is not None:
            # The methods asked for by name do not start from the hint.
            before = solution_of(problem, best, budget, solver="hint", bound_seconds=found.bound_seconds)
            found = before if fits_better(before, found) else found
        answers[budget] = found
        best = found.schedule
    bound_s = 0.0
    for budget, answer in reversed(answers.items()):
        if isinstance(answer, Solution):
            bound_s = max(bound_s, answer.bound_seconds)
            proved = solution_of(
                problem, answer.schedule, budget, solver=answer.solver, bound_seconds=bound_s
            )
            answers[budget] = replace(proved, solve_seconds=answer.solve_seconds)
    return answers
