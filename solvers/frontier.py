"""All budgets of one problem at once: monotone by construction, from one model build.

Budgets are solved from the lowest up; each starts from the plan of the one below, which fits it too, so
more memory never costs more time.  A bound for one budget holds for every lower one, so bounds are
carried down.  The staged programs and the chain's tables of options are built once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from solvers.incumbent import Progress
from solvers.portfolio import Methods
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.solution import InfeasibleError, Solution, solution_of
from solvers.solve import solve

__all__ = ["frontier"]


def frontier(
    problem: Problem,
    budgets_bytes: Iterable[int | float],
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Solution | InfeasibleError]:
    """The solution at each budget, in order of budget; an ``InfeasibleError`` where none can be.

    ``time_limit_s`` is per budget.  Among the solutions that fit, ``seconds`` and ``bound_seconds`` never
    rise with the budget.  Raises as :func:`solvers.solve`.
    """
    methods = Methods(problem)
    answers: dict[int, Solution | InfeasibleError] = {}
    hint: Schedule | None = None
    for budget in sorted(set(budgets_bytes)):
        try:
            found = solve(
                problem,
                budget,
                time_limit_s=time_limit_s,
                seed=seed,
                progress=progress,
                hint=hint,
                methods=methods,
            )
        except InfeasibleError as error:
            answers[error.budget_bytes] = error
            continue
        answers[found.budget_bytes] = found
        hint = found.schedule
    bound_s = 0.0
    for budget, answer in reversed(answers.items()):
        if isinstance(answer, Solution):
            bound_s = max(bound_s, answer.bound_seconds)
            proved = solution_of(
                problem, answer.schedule, budget, solver=answer.solver, bound_seconds=bound_s
            )
            answers[budget] = replace(proved, solve_seconds=answer.solve_seconds)
    return answers
