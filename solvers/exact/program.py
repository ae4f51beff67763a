"""The integer programs of the exact method: columns and rows, without a budget and without a solver.

Time is cut into stages; stage t ends with the first execution of op t, and before it any earlier op may
run again.  ``R[s, i]``: op i runs again in stage s.  ``S[s, v]``: value v is carried into stage s.
Rows of both programs, p(v) being the op that makes v:

    (1)  S[s, v]  <= S[s-1, v] + R[s-1, p(v)]    what is carried was carried or made in the stage before
    (2)  R[s, k]  <= S[s, u] + R[s, p(u)]        k reads u, and finds it carried in or made in its stage
    (3)  1        <= S[t, u] + R[t, p(u)]        op t reads u
    (4)  bytes within the budget, in two ways below

and, where all of a schedule's order is told, S[s, v] + R[s, p(v)] <= 1: what is made again was not carried.

Sources: (1) to (3) are those of Jain et al., see below; (4), stages of several passes and ``AnyOrder`` are
ours.

:class:`Program` is exact for a class of schedules: within a stage, the recomputations form ``passes``
runs, each in the problem's order with every op at most once (one pass: the class of Jain et al.,
"Checkmate", MLSys 2020, https://arxiv.org/abs/1910.02653; with enough passes: every schedule whose first
executions keep the order).  Theirs is for one value per op and needs a product for every free; here ops may
have several outputs, workspace, pins and a recomputation cost of their own, final values never die, and frees
need no products: ``W[s, v, j]`` says that in stage s value v is still wanted when its reader j comes up, by j
or later.  What is alive when op k comes up in stage s is then

    sum over values made by ops before k of   bytes * W[s, v, first reader of v from k on]
  + sum over values made by k or later ops of bytes * S[s, v]

and a row demands that this, plus k's outputs and workspace if it runs, is within the budget.  The row
holds for every schedule of the class even where k does not run (then less is alive than at the step
before), so no big constants are needed and the linear relaxation stays tight.

:class:`AnyOrder` forgets in which order and how often ops run within a stage: every schedule whose first
executions keep the order is a feasible point of no greater cost.  When op k runs again, only what it
touches counts, and what is carried through the whole stage (``T[s, v]``: carried in and out, or wanted by
the stage's last op, and not made again).  At the stage's start and at its last op the count is complete.
Its optimum is a bound for all schedules, and its answer, run in the problem's order, is usually a
schedule within the budget, hence optimal among all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.simulate import simulate

__all__ = ["AnyOrder", "Program", "Row", "Stage"]


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
    """The program of one class: ``rows`` hold as they are, ``memory`` rows with the budget added.

    ``rerun[s, i]`` (R) and ``carried[s, v]`` (S) are columns; a missing key is a constant 0.
    """

    # Whether a value that is made again in a stage can be taken not to be carried into it.
    one_copy = True

    def __init__(self, problem: Problem, passes: int = 1) -> None:
        if passes < 1:
            raise ValueError(f"passes is {passes}, want at least 1")
        self.problem = problem
        self.passes = passes
        self.stages = [Stage(t, q == passes - 1) for t in range(len(problem)) for q in range(passes)]
        self.columns = 0
        self.rerun: dict[tuple[int, int], int] = {}
        self.carried: dict[tuple[int, int], int] = {}
        self.rows: list[Row] = []
        self.memory: list[Row] = []
        self._make_columns()
        for s in range(len(self.stages)):
            self._add_stage(s)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.problem.name!r}, {self.passes} passes: {self.columns} columns, "
            f"{len(self.rows)} rows, {len(self.memory)} memory rows)"
        )

    def _column(self) -> int:
        self.columns += 1
        return self.columns - 1

    def kept_always(self, v: int) -> bool:
        """Whether value ``v`` is resident from when it is made, whatever is chosen."""
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
                    (use_of_value[v] for v in problem.ops[i].outputs if not self.kept_always(v)), default=-1
                )
        for s, stage in enumerate(self.stages):
            for i in range(stage.limit):
                if use_of_op[i] >= stage.limit:
                    self.rerun[s, i] = self._column()
                for v in problem.ops[i].outputs:
                    if use_of_value[v] >= stage.limit and not self.kept_always(v):
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
                if again is not None and self.one_copy:
                    self._row([(1, here), (1, again)], 1)
                if previous is not None and not (previous.last and i == previous.limit):
                    self._row([(1, here), *self._minus(s - 1, v)], 0)
        runs = [k for k in range(stage.limit) if (s, k) in self.rerun]
        for k in runs:
            for v in self.needed(k):
                self._row([(1, self.rerun[s, k]), *self._minus(s, v)], 0)
        if stage.last:
            for v in self.needed(stage.limit):
                self._row(self._minus(s, v), -1)
        self._add_memory(s, runs)

    def needed(self, k: int) -> list[int]:
        """The inputs of op ``k`` that can be missing."""
        return [v for v in self.problem.counted_inputs[k] if not self.kept_always(v)]

    def _add_memory(self, s: int, runs: list[int]) -> None:
        """A row for each op that may run in stage ``s``: what is alive when it comes up, and what it adds."""
        problem, values, limit = self.problem, self.problem.values, self.stages[s].limit
        constant = self.constant_bytes(limit)
        spans = self._add_wanted(s)
        for k in (*runs, limit) if self.stages[s].last else runs:
            terms: list[tuple[int, int]] = []
            for v, readers, wanted in spans:
                if values[v].producer < k:  # type: ignore[operator]
                    column = wanted[bisect_left(readers, k)]
                else:
                    column = self.carried.get((s, v))
                if column is not None:
                    terms.append((values[v].bytes, column))
            added = problem.ops[k].workspace_bytes + sum(values[v].bytes for v in problem.ops[k].outputs)
            if k == limit:
                self.memory.append(Row(tuple(terms), -constant - added))
            else:
                self.memory.append(Row((*terms, (added, self.rerun[s, k])), -constant))

    def constant_bytes(self, limit: int) -> int:
        """What is resident throughout the stages of ``limit``: sources and the final values made before."""
        values = self.problem.values
        made = (v for op in self.problem.ops[:limit] for v in op.outputs)
        return self.problem.resident_bytes + sum(values[v].bytes for v in made if values[v].final)

    def _row(self, terms: Iterable[tuple[int, int]], upper: int) -> None:
        self.rows.append(Row(tuple(terms), upper))

    def _minus(self, s: int, v: int) -> list[tuple[int, int]]:
        """``-(carried into s or made in s)``, as terms."""
        columns = (self.carried.get((s, v)), self.rerun.get((s, self.problem.values[v].producer or 0)))
        return [(-1, column) for column in columns if column is not None]

    def _add_wanted(self, s: int) -> list[tuple[int, list[int], list[int | None]]]:
        """Per value of some bytes made before: it, its readers in stage ``s``, and what says it is wanted.

        The column at position q says so when the q-th reader comes up; one more says so after the last.
        """
        stage, spans = self.stages[s], []
        for i in range(stage.limit):
            for v in self.problem.ops[i].outputs:
                if self.kept_always(v) or not self.problem.values[v].bytes:
                    continue
                readers = [
                    j
                    for j in self.problem.consumers[v]
                    if (s, j) in self.rerun or (stage.last and j == stage.limit)
                ]
                later = self.carried.get((s + 1, v))
                wanted = [later]
                for j in reversed(readers):
                    column = self._column()
                    if j == stage.limit:
                        self._row([(-1, column)], -1)
                    else:
                        self._row([(1, self.rerun[s, j]), (-1, column)], 0)
                    if later is not None:
                        self._row([(1, later), (-1, column)], 0)
                    later = column
                    wanted.append(column)
                spans.append((v, readers, wanted[::-1]))
        return spans

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


class AnyOrder(Program):
    """The program that every schedule satisfies, hence a bound on all: ``T`` in place of ``W``."""

    one_copy = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, 1)

    def _add_memory(self, s: int, runs: list[int]) -> None:
        problem, values, limit = self.problem, self.problem.values, self.stages[s].limit
        constant = self.constant_bytes(limit)
        through = self._add_through(s)
        for k in runs:
            near = {*self.needed(k), *problem.ops[k].outputs}
            terms = [(values[v].bytes, column) for v, column in through.items() if v not in near]
            added = problem.ops[k].workspace_bytes + sum(values[v].bytes for v in near)
            self.memory.append(Row((*terms, (added, self.rerun[s, k])), -constant))
        start = [(values[v].bytes, column) for (_, v), column in self._carried_at(s)]
        self.memory.append(Row(tuple(start), -constant))
        needed = self.needed(limit)
        end = [
            (values[v].bytes, column)
            for (_, v), column in self._carried_at(s + 1)
            if v not in needed and v not in problem.ops[limit].outputs
        ]
        added = sum(values[v].bytes for v in (*needed, *problem.ops[limit].outputs))
        self.memory.append(Row(tuple(end), -constant - added - problem.ops[limit].workspace_bytes))

    def _carried_at(self, s: int) -> list[tuple[tuple[int, int], int]]:
        keys = ((s, v) for v in range(len(self.problem.values)))
        return [(key, self.carried[key]) for key in keys if key in self.carried]

    def _add_through(self, s: int) -> dict[int, int]:
        """``T[s, v]`` by value: at least carried in + carried out (1 if the last op reads v) - made - 1."""
        through: dict[int, int] = {}
        needed = self.needed(self.stages[s].limit)
        for (_, v), carried_in in self._carried_at(s):
            out = self.carried.get((s + 1, v))
            made = self.rerun.get((s, self.problem.values[v].producer or 0))
            if out is None and v not in needed:
                continue
            through[v] = self._column()
            terms = [(1, carried_in), (-1, through[v])]
            if made is not None:
                terms.append((-1, made))
            if v not in needed and out is not None:
                terms.append((1, out))
            self._row(terms, 0 if v in needed else 1)
        return through
