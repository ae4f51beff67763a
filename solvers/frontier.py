"""All budgets of one problem at once: monotone by construction, from one model build.

Budgets are solved from the lowest up; each starts from the plan of the one below, which fits it too, so
more memory never costs more time.  A bound for one budget holds for every lower one, so bounds are
carried down.  The staged programs and the chain's tables of options are built once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from solvers.bounds.lower_bounds import PeakFloor
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
    Among the solutions that fit, ``seconds`` never rises with the budget, and no bound does.  All have the
    ``floor_bytes`` of the search that proved most.  Once ``progress`` returns ``True``, or after Ctrl-C, no
    search is begun: larger budgets are answered with the best schedule so far or a baseline.  Raises as
    :func:`solvers.solve`.
    """
    methods = Methods(problem)
    answers: dict[int, Solution | InfeasibleError] = {}
    best = hint
    interrupted = False
    for budget in sorted(set(map(checked_budget, budgets_bytes))):
        try:
            found = solve(
                problem,
                budget,
                # Once somebody ended a search, none is begun: what costs nothing has to do.
                solver="auto" if interrupted else solver,
                time_limit_s=0.0 if interrupted else time_limit_s,
                seed=seed,
                progress=None if interrupted else progress,
                hint=best,
                methods=methods,
            )
        except InfeasibleError as error:
            methods.raise_floor(error.floor_bytes, error.op_name)
            answers[budget] = error
            interrupted |= error.interrupted
            continue
        interrupted |= found.interrupted
        if best is not None:
            # The methods asked for by name do not start from the hint.
            before = solution_of(problem, best, budget, solver="hint", bound_seconds=found.bound_seconds)
            found = before if fits_better(before, found) else found
        answers[budget] = replace(found, interrupted=interrupted)
        best = found.schedule
    return _with_what_all_prove(problem, answers, methods.floor)


def _with_what_all_prove(
    problem: Problem, answers: dict[int, Solution | InfeasibleError], floor: PeakFloor
) -> dict[int, Solution | InfeasibleError]:
    """``answers``, by rising budget, with the bounds of all larger ones and the highest ``floor`` of all."""
    bound_s = 0.0
    proved: dict[int, Solution | InfeasibleError] = {}
    for budget, answer in reversed(answers.items()):
        if isinstance(answer, InfeasibleError) or (floor.bytes > budget and not answer.fits):
            proved[budget] = InfeasibleError(budget, floor.bytes, floor.op_name, answer.interrupted)
            continue
        bound_s = max(bound_s, answer.bound_seconds)
        proved[budget] = solution_of(
            problem,
            answer.schedule,
            budget,
            solver=answer.solver,
            bound_seconds=bound_s,
            solve_seconds=answer.solve_seconds,
            floor_bytes=floor.bytes,
            interrupted=answer.interrupted,
        )
    return dict(reversed(proved.items()))
