"""The exact program, for small graphs: every way to recompute within a class, and a proof.

Idea: Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization" (MLSys
2020).  Time is cut into stages; stage t ends with the first execution of op t, and before it any
earlier op may run again.  ``R[s, i]``: op i runs again in stage s.  ``S[s, v]``: value v is carried
into stage s.  Theirs is for one value per op and needs a product for every free; here ops may have
several outputs, workspace, pins and a recomputation cost of their own, final values never die, and
frees need no products: ``W[s, v, j]`` says that in stage s value v is still wanted when its reader j
comes up, by j or later.  What is alive when op k comes up in stage s is then

    sum over values made by ops before k of   bytes * W[s, v, first reader of v from k on]
  + sum over values made by k or later ops of bytes * S[s, v]

and a row demands that this, plus k's outputs and workspace if it runs, is within the budget.  The row
holds for every valid schedule even where k does not run (then less is alive than at the step before),
so no big constants are needed and the relaxation stays tight.

Exact for this class: first executions in the problem's order; within a stage, the recomputations form
``passes`` runs, each in the problem's order with every op at most once.  ``passes=1`` is Checkmate's
class.  Every schedule whose first executions keep the order belongs to the class of some number of
passes, and one pass does lose: where a value is wanted both early and late in a long recomputation,
running its op twice can lower the peak (tests/test_solvers_exact.py has the smallest example; on random
graphs of six ops it happens in well under one case in a hundred).  Bounds are proved for the class.

Least time goes to HiGHS: on chains with skips of 20, 40 and 60 ops it proves the optimum in 0.3, 1-3 and
7-20 s on one thread where CP-SAT on two takes 0.5, 7-20+ and 20+ s and ends without a bound.  What
HiGHS leaves open at three quarters of the time goes to CP-SAT, which finds plans on tight general DAGs
where HiGHS finds none.  HiGHS accepts rows off by 1e-6 of the budget; a plan that the simulator finds
over it is sought again at a budget smaller by that much, while the bound stays the full budget's.  Least peak
goes to CP-SAT, which proves it in 0.4, 1-7 and 7-20+ s on the same graphs.  Weakness: n^2 stages and
ops; above some sixty ops the proof takes minutes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ortools.sat.python import cp_model

from solvers.greedy import greedy
from solvers.linear import LinearAnswer, LinearProgram
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.simulate import simulate
from solvers.solution import OPTIMAL_RTOL, Solution, fits_better, solution_of

__all__ = ["Program", "minimum_peak", "solve"]

# For CP-SAT costs become integers; the dearest schedule of the class costs about this many units.
COST_UNITS = 2**46
# HiGHS may leave a row over its bound by this share of the budget.
ROW_TOLERANCE = 2e-6
# Share of the time that HiGHS gets before CP-SAT takes over.
HIGHS_SHARE = 0.75
# Up to this many ops two passes cost little, and are the default.
TWO_PASS_OPS = 16


@dataclass(frozen=True)
class Stage:
    """Reruns of ops before ``limit``; then, in the ``last`` of its passes, the first run of ``limit``."""

    limit: int
    last: bool


@dataclass(frozen=True)
class Row:
    """``sum(coefficient * column) <= upper``."""

    terms: tuple[tuple[int, int], ...]
    upper: int


class Program:
    """The columns and rows for one problem, without a budget: ``memory`` rows bound what is alive.

    ``rerun[s, i]`` and ``carried[s, v]`` are columns (see the module); a missing key is a constant 0.
    """

    def __init__(self, problem: Problem, passes: int = 1) -> None:
        if passes < 1:
            raise ValueError(f"passes is {passes}, want at least 1")
        self.problem = problem
        self.passes = passes
        self.stages = [Stage(t, q == passes - 1) for t in range(len(problem)) for q in range(passes)]
        self.columns = 0
        self.rerun: dict[tuple[int, int], int] = {}
        self.carried: dict[tuple[int, int], int] = {}
        self.wanted: dict[tuple[int, int, int], int] = {}
        self.rows: list[Row] = []
        self.memory: list[Row] = []
        self._make_columns()
        for s in range(len(self.stages)):
            self._add_stage(s)

    def __repr__(self) -> str:
        return (
            f"Program({self.problem.name!r}, {self.passes} passes: {self.columns} columns, "
            f"{len(self.rows)} rows, {len(self.memory)} memory rows)"
        )

    def _column(self) -> int:
        self.columns += 1
        return self.columns - 1

    def _kept_always(self, v: int) -> bool:
        value = self.problem.values[v]
        return value.producer is None or value.final

    def _make_columns(self) -> None:
        problem = self.problem
        # The last op before which running op i again, or carrying value v, can be of use.
        use_of_op = [-1] * len(problem)
        use_of_value = [-1] * len(problem.values)
        for i in range(len(problem) - 1, -1, -1):
            for v in problem.ops[i].outputs:
                use_of_value[v] = max((max(j, use_of_op[j]) for j in problem.consumers[v]), default=-1)
            if problem.ops[i].recomputable:
                use_of_op[i] = max(
                    (use_of_value[v] for v in problem.ops[i].outputs if not self._kept_always(v)), default=-1
                )
        for s, stage in enumerate(self.stages):
            for i in range(stage.limit):
                if use_of_op[i] >= stage.limit:
                    self.rerun[s, i] = self._column()
                for v in problem.ops[i].outputs:
                    if use_of_value[v] >= stage.limit and not self._kept_always(v):
                        self.carried[s, v] = self._column()

    def _add_stage(self, s: int) -> None:
        problem, stage = self.problem, self.stages[s]
        previous = self.stages[s - 1] if s else None
        for i in range(stage.limit):
            again = self.rerun.get((s, i))
            for v in problem.ops[i].outputs:
                here = self.carried.get((s, v))
                if here is None:
                    continue
                if again is not None:
                    self._row([(1, here), (1, again)], 1)
                if previous is not None and not (previous.last and i == previous.limit):
                    self._row([(1, here), *self._minus(s - 1, v)], 0)
        self._add_wanted(s)
        runs = [k for k in range(stage.limit) if (s, k) in self.rerun]
        for k in runs:
            for v in problem.counted_inputs[k]:
                if not self._kept_always(v):
                    self._row([(1, self.rerun[s, k]), *self._minus(s, v)], 0)
            self._memory_row(s, k)
        if stage.last:
            for v in problem.counted_inputs[stage.limit]:
                if not self._kept_always(v):
                    self._row(self._minus(s, v), -1)
            self._memory_row(s, stage.limit)

    def _row(self, terms: Iterable[tuple[int, int]], upper: int) -> None:
        self.rows.append(Row(tuple(terms), upper))

    def _minus(self, s: int, v: int) -> list[tuple[int, int]]:
        """``-(carried into s or made in s)``, as terms."""
        columns = (self.carried.get((s, v)), self.rerun.get((s, self.problem.values[v].producer or 0)))
        return [(-1, column) for column in columns if column is not None]

    def _readers(self, s: int, v: int) -> list[int]:
        """The ops that may read ``v`` in stage ``s``, ascending."""
        stage = self.stages[s]
        return [
            j for j in self.problem.consumers[v] if (s, j) in self.rerun or (stage.last and j == stage.limit)
        ]

    def _add_wanted(self, s: int) -> None:
        for v, value in enumerate(self.problem.values):
            producer = value.producer
            if producer is None or self._kept_always(v) or producer >= self.stages[s].limit:
                continue
            later = self.carried.get((s + 1, v)) if s + 1 < len(self.stages) else None
            for j in reversed(self._readers(s, v)):
                column = self._column()
                self.wanted[s, v, j] = column
                if j == self.stages[s].limit:
                    self._row([(-1, column)], -1)
                else:
                    self._row([(1, self.rerun[s, j]), (-1, column)], 0)
                if later is not None:
                    self._row([(1, later), (-1, column)], 0)
                later = column

    def _memory_row(self, s: int, k: int) -> None:
        """What is alive when op ``k`` comes up in stage ``s``, and what it adds."""
        problem, values = self.problem, self.problem.values
        terms: list[tuple[int, int]] = []
        constant = problem.resident_bytes
        for v, value in enumerate(values):
            if value.producer is None or value.producer >= self.stages[s].limit or not value.bytes:
                continue
            if value.final:
                constant += value.bytes
                continue
            column = self.carried.get((s, v))
            if value.producer < k:
                reader = next((j for j in self._readers(s, v) if j >= k), None)
                column = self.carried.get((s + 1, v)) if reader is None else self.wanted[s, v, reader]
            if column is not None:
                terms.append((value.bytes, column))
        added = problem.ops[k].workspace_bytes + sum(values[v].bytes for v in problem.ops[k].outputs)
        if k == self.stages[s].limit:
            constant += added
        else:
            terms.append((added, self.rerun[s, k]))
        self.memory.append(Row(tuple(terms), -constant))

    def schedule(self, chosen: Sequence[bool]) -> Schedule:
        """The sequence in which the columns of ``chosen`` that are reruns are taken."""
        steps: list[int] = []
        for s, stage in enumerate(self.stages):
            steps.extend(i for i in range(stage.limit) if (s, i) in self.rerun and chosen[self.rerun[s, i]])
            if stage.last:
                steps.append(stage.limit)
        return Schedule.of(self.problem, steps)

    def columns_of(self, schedule: Schedule) -> dict[int, bool] | None:
        """``rerun`` and ``carried`` as ``schedule`` has them; ``None`` if it is outside the class."""
        hint = dict.fromkeys((*self.rerun.values(), *self.carried.values()), False)
        line = simulate(self.problem, schedule)
        steps = line.steps.tolist()
        live: set[int] = set()
        run: list[list[int]] = [[]]
        firsts = 0
        alive_before: list[frozenset[int]] = [frozenset()]
        for s, i in enumerate(steps):
            if i < firsts and run[-1] and i <= run[-1][-1]:
                run.append([])
                alive_before.append(frozenset(live))
            run[-1].append(i)
            live.update(self.problem.ops[i].outputs)
            live.difference_update(line.frees[s])
            if i == firsts:
                if len(run) > self.passes:
                    return None
                skip = self.passes - len(run)
                for q in range(self.passes):
                    stage = firsts * self.passes + q
                    ops = run[q - skip] if q >= skip else []
                    for v in alive_before[max(q - skip, 0)]:
                        if (stage, v) in self.carried:
                            hint[self.carried[stage, v]] = True
                    for k in ops:
                        if (stage, k) in self.rerun:
                            hint[self.rerun[stage, k]] = True
                firsts += 1
                run, alive_before = [[]], [frozenset(live)]
        return hint


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    time_limit_s: float = 30.0,
    seed: int = 0,
    passes: int | None = None,
    hint: Schedule | None = None,
) -> Solution:
    """The fastest schedule of the class within ``budget_bytes``, with the bound proved for the class.

    ``passes`` names the class (default: 2 up to ``TWO_PASS_OPS`` ops, else 1).  ``hint`` is a schedule to
    fall back on (default: the greedy one).  Cut by ``time_limit_s``, the best schedule found is returned,
    the hint included.  If no schedule of the class fits, the answer is ``unsettled``, with the schedule
    of lowest peak.
    """
    started = time.perf_counter()

    def left_s() -> float:
        return max(0.1, started + time_limit_s - time.perf_counter())

    best = _judged(problem, greedy(problem, budget_bytes) if hint is None else hint, budget_bytes)
    if best.status == "optimal":
        return best
    program = Program(problem, _default_passes(problem) if passes is None else passes)
    bound, none_fits = problem.total_seconds, False
    for target in (budget_bytes, math.floor(budget_bytes * (1 - ROW_TOLERANCE))):
        answer, plan = _highs(program, target, HIGHS_SHARE * left_s(), seed)
        if target == budget_bytes:
            bound, none_fits = max(bound, answer.bound), answer.infeasible
        if plan is None:
            break
        found = _judged(problem, plan, budget_bytes)
        best = found if fits_better(found, best) else best
        if found.fits:
            break
    if none_fits and not best.fits:
        passes = program.passes
        lowest, _ = minimum_peak(problem, time_limit_s=left_s(), seed=seed, passes=passes, hint=best.schedule)
        best = _judged(problem, lowest, budget_bytes)
    elif not none_fits and best.seconds - bound > OPTIMAL_RTOL * best.seconds:
        found, closed = _cp_sat(program, budget_bytes, left_s(), seed, best)
        best = found if fits_better(found, best) else best
        bound = best.seconds if closed and best.fits else bound
    bound = min(bound, best.seconds) if best.fits else problem.total_seconds
    spent_s = time.perf_counter() - started
    return solution_of(
        problem, best.schedule, budget_bytes, solver="exact", bound_seconds=bound, solve_seconds=spent_s
    )


def minimum_peak(
    problem: Problem,
    *,
    time_limit_s: float = 30.0,
    seed: int = 0,
    passes: int | None = None,
    hint: Schedule | None = None,
) -> tuple[Schedule, int]:
    """The schedule of lowest peak in the class, and a proved lower bound in bytes on that peak.

    The two agree if the search ended within ``time_limit_s``.  Seconds are not looked at.
    """
    started = time.perf_counter()
    best = greedy(problem, 0) if hint is None else hint
    top = simulate(problem, best).peak_bytes
    if not len(problem):
        return best, top
    program = Program(problem, _default_passes(problem) if passes is None else passes)
    search = _Search(program, time_limit_s - (time.perf_counter() - started), seed, best)
    peak = search.model.new_int_var(0, top, "peak")
    search.model.add_hint(peak, top)
    search.keep_within(peak)
    search.model.minimize(peak)
    status = search.run()
    if status == cp_model.INFEASIBLE:
        # The hint is outside the class, and lower than anything in it.
        return best, top
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = search.schedule()
        best = found if simulate(problem, found).peak_bytes < top else best
    floor = max(0, math.ceil(search.solver.best_objective_bound - 1e-6))
    return best, min(floor, simulate(problem, best).peak_bytes)


def _default_passes(problem: Problem) -> int:
    return 2 if len(problem) <= TWO_PASS_OPS else 1


def _judged(problem: Problem, schedule: Schedule, budget_bytes: int) -> Solution:
    return solution_of(problem, schedule, budget_bytes, solver="exact")


def _highs(
    program: Program, budget_bytes: int, time_limit_s: float, seed: int
) -> tuple[LinearAnswer, Schedule | None]:
    """Least time by HiGHS; the answer's bound is in total seconds.  Bytes are scaled by the budget."""
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
    answer = linear.solve(time_limit_s=time_limit_s, absolute_gap=1e-9, relative_gap=0.0, seed=seed)
    bound = problem.total_seconds + max(0.0, answer.bound) * unit_s
    if answer.optimal and answer.objective - answer.bound <= 1e-6 * max(1.0, answer.objective):
        bound = problem.total_seconds + answer.objective * unit_s
    found = None if answer.x is None else program.schedule([x > 0.5 for x in answer.x])
    return replace(answer, bound=bound), found


def _cp_sat(
    program: Program, budget_bytes: int, time_limit_s: float, seed: int, best: Solution
) -> tuple[Solution, bool]:
    """Least time by CP-SAT, from ``best``; the better of the two, and whether it is proved optimal."""
    problem = program.problem
    search = _Search(program, time_limit_s, seed, best.schedule)
    search.keep_within(budget_bytes)
    most_s = math.fsum(op.again_s for op in problem.ops) * len(program.stages)
    units = COST_UNITS / most_s if most_s else 1.0
    costs = {c: round(problem.ops[i].again_s * units) for (_, i), c in program.rerun.items()}
    search.model.minimize(sum(x * search.at[c] for c, x in costs.items()))
    status = search.run()
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return best, False
    found = _judged(problem, search.schedule(), budget_bytes)
    return (found if fits_better(found, best) else best), status == cp_model.OPTIMAL


class _Search:
    """A ``Program`` as a CP-SAT model."""

    def __init__(self, program: Program, time_limit_s: float, seed: int, hint: Schedule) -> None:
        self.program = program
        self.model = cp_model.CpModel()
        self.at = [self.model.new_bool_var("") for _ in range(program.columns)]
        self.solver = cp_model.CpSolver()
        self.solver.parameters.max_time_in_seconds = max(0.05, time_limit_s)
        self.solver.parameters.random_seed = seed % 2**31
        self.solver.parameters.num_workers = min(8, os.cpu_count() or 1)
        for row in program.rows:
            self._add(row, row.upper)
        for column, taken in (program.columns_of(hint) or {}).items():
            self.model.add_hint(self.at[column], taken)

    def _add(self, row: Row, upper: cp_model.LinearExprT) -> None:
        columns = [self.at[c] for _, c in row.terms]
        self.model.add(cp_model.LinearExpr.weighted_sum(columns, [x for x, _ in row.terms]) <= upper)

    def keep_within(self, budget: cp_model.LinearExprT) -> None:
        """Bound every memory row by ``budget``, a number or a variable."""
        for row in self.program.memory:
            self._add(row, budget + row.upper)

    def run(self) -> cp_model.CpSolverStatus:
        return self.solver.solve(self.model)

    def schedule(self) -> Schedule:
        return self.program.schedule([self.solver.boolean_value(x) for x in self.at])
