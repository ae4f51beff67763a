"""Linear and mixed-integer programs, built in bulk and handed to HiGHS through OR-tools' MathOpt.

MathOpt's modelling layer makes one Python object per variable and per term, of the model and again of its
answer; the programs here have 10^4 to 10^5 nonzeros and are rebuilt after every round of rows, so the columns
and rows are kept in flat lists and become MathOpt's protocol message in one go (0.2 s for 30,000 x 60,000
with 180,000 nonzeros, a fifth of the time HiGHS then takes), and its answer is read from the message that it
is: under a profiler HiGHS is 95 % of the time of a window of local search, 2,000 columns, where it was 18 %.

Sources: Huangfu and Hall, "Parallelizing the dual revised simplex method" (2018), for HiGHS.
Weakness: every solve is a cold start; MathOpt does not pass HiGHS a basis or an incumbent.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from ortools.math_opt import model_pb2, result_pb2, solution_pb2, sparse_containers_pb2
from ortools.math_opt.core.python import solver
from ortools.math_opt.python import mathopt

__all__ = ["LinearAnswer", "LinearProgram"]

log = logging.getLogger(__name__)

_OPTIMAL = result_pb2.TERMINATION_REASON_OPTIMAL
_HAS_POINT = (_OPTIMAL, result_pb2.TERMINATION_REASON_FEASIBLE)
_FEASIBLE = solution_pb2.SOLUTION_STATUS_FEASIBLE


@dataclass(frozen=True, eq=False)
class LinearAnswer:
    """``x``: the best point found, shape (columns,), or ``None``; ``bound``: no objective is below it;
    ``optimal``: proved.

    ``reduced_costs``: per column, what a unit more of it costs; only of a relaxation solved to the end.
    """

    x: np.ndarray | None
    objective: float
    bound: float
    optimal: bool
    infeasible: bool
    reduced_costs: np.ndarray | None = None

    def __repr__(self) -> str:
        if self.infeasible:
            return "LinearAnswer(infeasible)"
        return f"LinearAnswer(objective {self.objective:.9g}, bound {self.bound:.9g}, optimal={self.optimal})"


# Seconds that an exit waits for programs in flight.
EXIT_S = 2.0


class _Door:
    """Lets threads into HiGHS, and none any more once Python exits.

    A thread that comes back from C++ while the interpreter is taken down is unwound there, which aborts the
    process.  So an exit waits a little for those that are inside, and holds back those that come then: they
    are daemons, and nobody waits for what they would find.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._closed, self._watched = 0, False, False

    def __enter__(self) -> None:
        with self._changed:
            if not self._watched:
                self._watched = True
                atexit.register(self._close)
            while self._closed:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside, timeout=EXIT_S)


_DOOR = _Door()


def _solved(
    model: model_pb2.ModelProto, parameters: mathopt.SolveParameters
) -> result_pb2.SolveResultProto | None:
    """HiGHS's answer; ``None`` where it was cut by the clock at a point that MathOpt's own checks refuse.

    This is what ``mathopt.solve`` does, but for its objects.  A status of its C++ side is an exception whose
    text ends in the status's name.
    """
    wanted = mathopt.ModelSolveParameters().to_proto()
    for unread in (wanted.dual_values_filter, wanted.quadratic_dual_values_filter):
        unread.filter_by_ids = True
    wanted.variable_values_filter.skip_zero_values = wanted.reduced_costs_filter.skip_zero_values = True
    try:
        with _DOOR:
            return solver.solve(
                model,
                mathopt.SolverType.HIGHS.value,
                mathopt.StreamableSolverInitArguments().to_proto(),
                parameters.to_proto(),
                wanted,
                None,
                mathopt.CallbackRegistration().to_proto(),
                None,
                None,
            )
    except Exception as error:
        if "[INTERNAL]" not in str(error):
            raise
        log.debug("HiGHS gave no usable answer: %s", error)
        return None


def _dense(vector: sparse_containers_pb2.SparseDoubleVectorProto, size: int) -> np.ndarray:
    """The vector with its zeros, shape (size,)."""
    out = np.zeros(size)
    out[np.array(vector.ids, dtype=np.int64)] = np.array(vector.values, dtype=float)
    return out


class LinearProgram:
    """Minimise a linear objective over columns within bounds, subject to ``lower <= row <= upper``."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.row_lower: list[float] = []
        self.row_upper: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._coefficient: list[float] = []

    def __repr__(self) -> str:
        return f"LinearProgram({len(self.cost)} columns, {self.rows} rows, {len(self._row)} nonzeros)"

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_lower)

    def column(
        self, cost: float = 0.0, *, lower: float = 0.0, upper: float = 1.0, integer: bool = False
    ) -> int:
        """Add a variable; returns its index."""
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(
        self,
        columns: Sequence[int],
        coefficients: Iterable[float],
        *,
        lower: float = -math.inf,
        upper: float = math.inf,
    ) -> int:
        """Add a constraint; ``columns`` must not repeat.  Returns its index."""
        r = len(self.row_lower)
        self._row.extend([r] * len(columns))
        self._column.extend(columns)
        self._coefficient.extend(coefficients)
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        return r

    def covered(self, column: int, by: Sequence[int]) -> None:
        """``column`` is at most the sum of ``by``: what is there was there or was made."""
        self.row([column, *by], [1.0] + [-1.0] * len(by), upper=0.0)

    def one_of(self, by: Sequence[int]) -> None:
        """The columns ``by`` sum to at least 1."""
        self.row(by, [1.0] * len(by), lower=1.0)

    def closure(
        self, values: Iterable[int], sources: Callable[[int], Sequence[int] | None], *, of: int | None = None
    ) -> None:
        """What reads ``values`` finds each of them: a row a value, in order.

        ``sources``  of a value: columns by which it is at hand; ``None`` if it surely is.
        ``of``       column of what reads them, which each value's sources cover; ``None``: it surely runs.

        With one instant these are the constraints of a closure in the graph (Picard, "Maximal closure of a
        graph", Management Science 1976); with one at every op, the dependency rows of Jain et al.,
        "Checkmate" (https://arxiv.org/abs/1910.02653).
        """
        for v in values:
            by = sources(v)
            if by is None:
                continue
            if of is None:
                self.one_of(by)
            else:
                self.covered(of, by)

    def solve(
        self,
        *,
        time_limit_s: float,
        relax: bool = False,
        absolute_gap: float | None = None,
        relative_gap: float | None = None,
        node_limit: int | None = None,
        seed: int = 0,
    ) -> LinearAnswer:
        """Hand the program to HiGHS, for at most ``time_limit_s`` seconds of the clock.

        ``relax`` drops integrality; ``absolute_gap`` and ``relative_gap`` stop a search that
        close to its bound (HiGHS stops at 1e-4 relative unless told otherwise); ``node_limit`` bounds the
        search tree.
        """
        if not self.cost:
            if any(low > 0 for low in self.row_lower) or any(high < 0 for high in self.row_upper):
                return LinearAnswer(None, math.inf, math.inf, False, True)
            return LinearAnswer(np.zeros(0), 0.0, 0.0, True, False)
        parameters = mathopt.SolveParameters(
            time_limit=timedelta(seconds=min(max(time_limit_s, 0.01), 1e6)),
            random_seed=seed,
            absolute_gap_tolerance=absolute_gap,
            relative_gap_tolerance=relative_gap,
            node_limit=node_limit,
        )
        result = _solved(self._proto(relax), parameters)
        if result is None:
            return LinearAnswer(None, math.inf, -math.inf, False, False)
        reason = result.termination.reason
        if reason == result_pb2.TERMINATION_REASON_INFEASIBLE:
            return LinearAnswer(None, math.inf, math.inf, False, True)
        x = reduced = None
        objective, n = math.inf, len(self.cost)
        if result.solutions:
            primal, dual = result.solutions[0].primal_solution, result.solutions[0].dual_solution
            if reason in _HAS_POINT and primal.feasibility_status == _FEASIBLE:
                x, objective = _dense(primal.variable_values, n), primal.objective_value
            if relax and dual.feasibility_status == _FEASIBLE:
                reduced = _dense(dual.reduced_costs, n)
        bound = result.termination.objective_bounds.dual_bound
        return LinearAnswer(x, objective, bound, reason == _OPTIMAL, False, reduced)

    def _proto(self, relax: bool) -> model_pb2.ModelProto:
        proto = model_pb2.ModelProto()
        n, m = len(self.cost), self.rows
        proto.variables.ids.extend(range(n))
        proto.variables.lower_bounds.extend(self.lower)
        proto.variables.upper_bounds.extend(self.upper)
        proto.variables.integers.extend([False] * n if relax else self.integer)
        priced = np.flatnonzero(self.cost)
        proto.objective.linear_coefficients.ids.extend(priced.tolist())
        proto.objective.linear_coefficients.values.extend(np.asarray(self.cost)[priced].tolist())
        proto.linear_constraints.ids.extend(range(m))
        proto.linear_constraints.lower_bounds.extend(self.row_lower)
        proto.linear_constraints.upper_bounds.extend(self.row_upper)
        # MathOpt wants the matrix sorted by row, then column.
        rows, columns = np.asarray(self._row, dtype=np.int64), np.asarray(self._column, dtype=np.int64)
        order = np.lexsort((columns, rows))
        proto.linear_constraint_matrix.row_ids.extend(rows[order].tolist())
        proto.linear_constraint_matrix.column_ids.extend(columns[order].tolist())
        proto.linear_constraint_matrix.coefficients.extend(
            np.asarray(self._coefficient, dtype=float)[order].tolist()
        )
        return proto
