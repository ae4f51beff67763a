"""The exact method, for small graphs: an integer program, a plan, and a proof over every schedule.

Idea: Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization" (MLSys
2020, https://arxiv.org/abs/1910.02653); the programs, and how they differ from theirs, are in
:mod:`solvers.exact.program`.

The bound comes first, from the program that every schedule satisfies (first executions in the problem's
order; anything else in any order, any number of times).  Its answer is run in the problem's order and
simulated; if it fits, it is optimal among all schedules, and that is the usual case.  If not, the
program that is exact for schedules of ``passes`` passes finds the best of those.  A pass is a run of
recomputations in the problem's order; one pass per stage is Checkmate's class, and it does lose: on
random graphs of six ops in about 3 of 1000 cases (tests/test_solvers_exact.py has one of five ops), where
two passes lost in none.

Where plan and bound still differ, the first program's answer is looked at stage by stage, and is cut off
where its reruns do not fit together (:mod:`solvers.exact.bursts`), until it is a schedule, which then is
optimal among all, or time is up.

Optimal: when the plan meets the bound, which the status says.  Least time goes to HiGHS: on chains with
skips of 20, 40 and 60 ops it proves the optimum in 0.3, 1-3 and 7-20 s on one thread where CP-SAT on two
takes 0.5, 7-20+ and 20+ s and ends without a bound.  What HiGHS leaves open goes to CP-SAT, which finds
plans on tight general DAGs where HiGHS finds none.  HiGHS accepts rows off by 1e-6 of the budget; a plan
that the simulator finds over it is sought again at a budget smaller by that much, while the bound stays
the full budget's.  Least peak goes to CP-SAT, which proves it in 0.4, 1-7 and 7-20+ s on the same graphs.

Weakness: n^2 stages and ops; above some sixty ops the proof takes minutes, and above ``MOST_OPS`` the
answer is the greedy schedule with the bound of :mod:`solvers.bounds.lower_bounds`.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from solvers.baselines.greedy import greedy
from solvers.bounds.lower_bounds import peak_floor, time_bound
from solvers.core.linear import LinearAnswer, LinearProgram
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import simulate
from solvers.core.solution import OPTIMAL_RTOL, InfeasibleError, Solution, fits_better, solution_of
from solvers.exact.bursts import Bursts
from solvers.exact.program import AnyOrder, Program, Row

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["least_time_between", "minimum_peak", "solve"]

# For CP-SAT costs become integers; the dearest schedule of the class costs about this many units.
COST_UNITS = 2**46
# HiGHS may leave a row over its bound by this share of the budget.
ROW_TOLERANCE = 2e-6
# Share of the time left that each of the first steps may take.
SHARE = 0.6
# Above this many ops the programs take longer to write down than anyone waits.
MOST_OPS = 150
# Up to this many ops two passes cost little, and are the default.
TWO_PASS_OPS = 16


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 30.0,
    seed: int = 0,
    passes: int | None = None,
    hint: Schedule | None = None,
) -> Solution:
    """The fastest schedule found within ``budget_bytes``, with a bound on every schedule's seconds.

    Not cut by ``time_limit_s``, no schedule of ``passes`` passes per stage is faster (default: 2 up to
    ``TWO_PASS_OPS`` ops, else 1; there ``replay_only`` values count in every schedule), and none at all if
    the status is ``optimal``.  Cut, it is the best one found, ``hint`` included (default: the greedy
    schedule).

    Raises ``InfeasibleError`` if it is proved that no schedule fits; if only none was found, the answer is
    ``unsettled`` and its schedule the one of lowest peak.
    """
    started = time.perf_counter()

    def left_s() -> float:
        return max(0.1, started + time_limit_s - time.perf_counter())

    best = _judged(problem, greedy(problem, budget_bytes) if hint is None else hint, budget_bytes)
    if best.status == "optimal":
        return best
    if len(problem) > MOST_OPS:
        bound = time_bound(problem, budget_bytes, time_limit_s=left_s())
        return solution_of(problem, best.schedule, budget_bytes, solver="exact", bound_seconds=bound)
    answer, plan = _highs(AnyOrder(problem.relaxed), budget_bytes, SHARE * left_s(), seed)
    bound = problem.total_seconds if answer.infeasible else answer.bound
    best = _better(best, plan, problem)
    if not answer.infeasible and (not best.fits or best.seconds - bound > OPTIMAL_RTOL * best.seconds):
        best = _best_of_class(problem, best, SHARE * left_s(), seed, passes)
    # Cut by the clock, it would be solved anew with cuts, and cut again.
    if answer.optimal and (not best.fits or best.seconds - bound > OPTIMAL_RTOL * best.seconds):
        best, bound = _with_cuts(problem, best, bound, SHARE * left_s(), seed)
    if not best.fits:
        best = _refused_or_lowest(problem, best, left_s(), seed, passes)
    bound = min(bound, best.seconds) if best.fits else bound
    spent_s = time.perf_counter() - started
    return solution_of(
        problem,
        best.schedule,
        budget_bytes,
        solver="exact",
        bound_seconds=bound,
        solve_seconds=spent_s,
        floor_bytes=best.floor_bytes,
    )


def minimum_peak(
    problem: Problem,
    *,
    time_limit_s: float = 30.0,
    seed: int = 0,
    passes: int | None = None,
    hint: Schedule | None = None,
) -> tuple[Schedule, int]:
    """The schedule of lowest peak found, and bytes that no schedule's peak is below (proved).

    Within the time limit, the schedule is the lowest of its class (``passes`` as for :func:`solve`); where
    the two figures agree, it is the lowest of all.  Seconds are not looked at.
    """
    started = time.perf_counter()
    best = greedy(problem, 0) if hint is None else hint
    if not 0 < len(problem) <= MOST_OPS:
        return best, peak_floor(problem).bytes
    best, floor = _lowest(problem, AnyOrder(problem.relaxed), best, SHARE * time_limit_s, seed)
    if simulate(problem, best).peak_bytes > floor:
        left_s = time_limit_s - (time.perf_counter() - started)
        program = Program(problem, _default_passes(problem) if passes is None else passes)
        best, _ = _lowest(problem, program, best, left_s, seed)
    return best, floor


def least_time_between(
    problem: Problem, budget_bytes: int, *, hint: Schedule, time_limit_s: float = 30.0, seed: int = 0
) -> tuple[float, float]:
    """Seconds that no schedule within ``budget_bytes`` is below, and those of one; by CP-SAT alone.

    The second is infinite where nothing that fits was found.  Judges :func:`solve`, whose bound is HiGHS's.
    """
    found, bound = _cp_sat(AnyOrder(problem.relaxed), hint, budget_bytes, time_limit_s / 2, seed)
    plans = [hint, found]
    if found is None or not _judged(problem, found, budget_bytes).fits:
        program = Program(problem, _default_passes(problem))
        plans.append(_cp_sat(program, hint, budget_bytes, time_limit_s / 2, seed)[0])
    answers = [_judged(problem, plan, budget_bytes) for plan in plans if plan is not None]
    return bound, min((one.seconds for one in answers if one.fits), default=math.inf)


def _refused_or_lowest(
    problem: Problem, best: Solution, time_limit_s: float, seed: int, passes: int | None
) -> Solution:
    """Nothing that fits was found: prove in whole bytes that nothing does, or answer with the lowest peak."""
    lowest, floor = minimum_peak(
        problem, time_limit_s=time_limit_s, seed=seed, passes=passes, hint=best.schedule
    )
    if floor > best.budget_bytes:
        line = simulate(problem, lowest)
        op = problem.ops[int(line.steps[line.peak_step])]
        raise InfeasibleError(best.budget_bytes, floor, op.name)
    return solution_of(problem, lowest, best.budget_bytes, solver="exact", floor_bytes=floor)


def _best_of_class(
    problem: Problem, best: Solution, time_limit_s: float, seed: int, passes: int | None
) -> Solution:
    """The best of ``best`` and what HiGHS, then CP-SAT find among schedules of ``passes`` passes."""
    deadline = time.perf_counter() + time_limit_s

    def left_s() -> float:
        return max(0.1, deadline - time.perf_counter())

    program = Program(problem, _default_passes(problem) if passes is None else passes)
    budget = best.budget_bytes
    answer, plan = _highs(program, budget, SHARE * left_s(), seed)
    if plan is not None and not _judged(problem, plan, budget).fits:
        smaller, plan = _highs(program, math.floor(budget * (1 - ROW_TOLERANCE)), SHARE * left_s(), seed)
        answer = replace(answer, optimal=answer.optimal and smaller.optimal)
    best = _better(best, plan, problem)
    if not answer.infeasible and not (answer.optimal and best.fits):
        found, _ = _cp_sat(program, best.schedule, budget, left_s(), seed)
        best = _better(best, found, problem)
    return best


def _with_cuts(
    problem: Problem, best: Solution, bound_s: float, time_limit_s: float, seed: int
) -> tuple[Solution, float]:
    """``best`` and ``bound_s``, bettered by what ``AnyOrder`` answers with the cuts of its own answers."""
    deadline = time.perf_counter() + time_limit_s
    program = AnyOrder(problem.relaxed)
    linear, unit_s = _linear(program, best.budget_bytes)
    bursts, extra = Bursts(program, best.budget_bytes), dict[int, int]()
    while (left_s := deadline - time.perf_counter()) > 0:
        answer = linear.solve(time_limit_s=left_s, absolute_gap=1e-9, relative_gap=0.0, seed=seed)
        if answer.x is None or answer.infeasible:
            break
        bound_s = max(bound_s, _total_seconds(answer, problem, unit_s))
        chosen = [x > 0.5 for x in answer.x]
        cuts = list(bursts.cuts(chosen))
        if bursts.steps is not None:
            best = _better(best, Schedule.of(problem, bursts.steps), problem)
        if not cuts or (best.fits and best.seconds - bound_s <= OPTIMAL_RTOL * best.seconds):
            break
        for cut in cuts:
            columns = dict(cut.terms)
            if cut.priced:
                if cut.stage not in extra:
                    extra[cut.stage] = linear.column(1.0, upper=math.inf)
                columns[extra[cut.stage]] = unit_s
            scale = unit_s if cut.priced else 1.0
            linear.row(list(columns), [x / scale for x in columns.values()], lower=cut.lower / scale)
    return best, bound_s


def _better(best: Solution, plan: Schedule | None, problem: Problem) -> Solution:
    if plan is None:
        return best
    found = _judged(problem, plan, best.budget_bytes)
    return found if fits_better(found, best) else best


def _default_passes(problem: Problem) -> int:
    return 2 if len(problem) <= TWO_PASS_OPS else 1


def _judged(problem: Problem, schedule: Schedule, budget_bytes: int) -> Solution:
    return solution_of(problem, schedule, budget_bytes, solver="exact")


def _highs(
    program: Program, budget_bytes: int, time_limit_s: float, seed: int
) -> tuple[LinearAnswer, Schedule | None]:
    """Least time by HiGHS; the answer's bound is in total seconds.  Bytes are scaled by the budget."""
    problem = program.problem
    if any(not row.terms and row.upper + budget_bytes < 0 for row in program.memory):
        return LinearAnswer(None, math.inf, math.inf, False, True), None
    linear, unit_s = _linear(program, budget_bytes)
    answer = linear.solve(time_limit_s=time_limit_s, absolute_gap=1e-9, relative_gap=0.0, seed=seed)
    bound = _total_seconds(answer, problem, unit_s)
    found = None if answer.x is None else program.schedule([x > 0.5 for x in answer.x])
    return replace(answer, bound=bound), found


def _linear(program: Program, budget_bytes: int) -> tuple[LinearProgram, float]:
    """``program`` for HiGHS, columns as they are there, and how many seconds are 1 in its objective."""
    problem = program.problem
    unit_s = max((op.again_s for op in problem.ops), default=0.0) or 1.0
    costs = {c: problem.ops[i].again_s / unit_s for (_, i), c in program.rerun.items()}
    binary = {*program.rerun.values(), *program.carried.values()}
    linear = LinearProgram()
    for c in range(program.columns):
        linear.column(costs.get(c, 0.0), integer=c in binary)
    for row in program.rows:
        linear.row([c for _, c in row.terms], [x for x, _ in row.terms], upper=row.upper)
    for row in program.memory:
        room = row.upper + budget_bytes
        linear.row(
            [c for _, c in row.terms], [x / budget_bytes for x, _ in row.terms], upper=room / budget_bytes
        )
    return linear, unit_s


def _total_seconds(answer: LinearAnswer, problem: Problem, unit_s: float) -> float:
    """What ``answer`` proves of every schedule's seconds."""
    if answer.optimal and answer.objective - answer.bound <= 1e-6 * max(1.0, answer.objective):
        return problem.total_seconds + answer.objective * unit_s
    return problem.total_seconds + max(0.0, answer.bound) * unit_s


def _cp_sat(
    program: Program, best: Schedule, budget_bytes: int, time_limit_s: float, seed: int
) -> tuple[Schedule | None, float]:
    """Least time by CP-SAT, from ``best``: the plan, if it finds one, and a bound in seconds."""
    problem = program.problem
    search = _Search(program, time_limit_s, seed, best)
    search.keep_within(budget_bytes)
    most_s = math.fsum(op.again_s for op in problem.ops) * len(program.stages)
    units = COST_UNITS / most_s if most_s else 1.0
    costs = {c: round(problem.ops[i].again_s * units) for (_, i), c in program.rerun.items()}
    search.model.minimize(sum(x * search.at[c] for c, x in costs.items()))
    found = search.schedule() if search.run() else None
    # A cost is off by half a unit at most, and each column is taken once.
    proved = max(0.0, search.solver.best_objective_bound - len(costs) / 2) / units
    return found, problem.total_seconds + (proved if math.isfinite(proved) else 0.0)


def _lowest(
    problem: Problem, program: Program, best: Schedule, time_limit_s: float, seed: int
) -> tuple[Schedule, int]:
    """The lower of ``best`` and the plan of least peak by CP-SAT, and its bound on the program's peak.

    ``program`` may be of ``problem.relaxed``, and the bound then is; the lower is so in ``problem``.
    """
    top = simulate(program.problem, best).peak_bytes
    search = _Search(program, time_limit_s, seed, best)
    peak = search.model.new_int_var(0, top, "peak")
    search.model.add_hint(peak, top)
    search.keep_within(peak)
    search.model.minimize(peak)
    if search.run():
        found = search.schedule()
        best = min(best, found, key=lambda schedule: simulate(problem, schedule).peak_bytes)
    # Where the program counts more than ``best`` takes, it may have no answer, and then no bound.
    proved = search.solver.best_objective_bound
    bound = math.ceil(proved - 1e-6) if math.isfinite(proved) else 0
    return best, min(max(bound, 0), simulate(problem, best).peak_bytes)


class _Search:
    """A ``Program`` as a CP-SAT model."""

    def __init__(self, program: Program, time_limit_s: float, seed: int, hint: Schedule) -> None:
        from ortools.sat.python import cp_model  # which imports pandas

        self.program, self.sat = program, cp_model
        self.model = cp_model.CpModel()
        self.at = [self.model.new_bool_var("") for _ in range(program.columns)]
        self.solver = cp_model.CpSolver()
        self.solver.parameters.max_time_in_seconds = max(0.05, time_limit_s)
        self.solver.parameters.random_seed = seed % 2**31
        self.solver.parameters.num_workers = min(8, os.cpu_count() or 1)
        # Else Ctrl-C is the process's end from the first solve on: CP-SAT takes the signal and never
        # gives it back to Python.
        self.solver.parameters.catch_sigint_signal = False
        for row in program.rows:
            self._add(row, row.upper)
        for column, taken in (program.columns_of(hint) or {}).items():
            self.model.add_hint(self.at[column], taken)

    def _add(self, row: Row, upper: cp_model.LinearExprT) -> None:
        columns = [self.at[c] for _, c in row.terms]
        self.model.add(self.sat.LinearExpr.weighted_sum(columns, [x for x, _ in row.terms]) <= upper)

    def keep_within(self, budget: cp_model.LinearExprT) -> None:
        """Bound every memory row by ``budget``, a number or a variable."""
        for row in self.program.memory:
            self._add(row, budget + row.upper)

    def run(self) -> bool:
        """Search; whether there is a plan."""
        return self.solver.solve(self.model) in (self.sat.OPTIMAL, self.sat.FEASIBLE)

    def schedule(self) -> Schedule:
        return self.program.schedule([self.solver.boolean_value(x) for x in self.at])
