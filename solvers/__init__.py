"""Rematerialization solvers over plain DAGs: numpy, networkx and OR-tools, never torch.

In: a ``Problem``, ops in order, the bytes of their values, and a budget in bytes.  Out: a ``Solution``, the
schedule, what the one simulator says of it, a bound on the seconds and a floor on the bytes of every other.
Raises ``InfeasibleError`` where it is proved that nothing fits, ``ProblemError`` for a malformed problem.

``solve`` checks arguments; ``fixed_order`` and ``free_order`` do what they ask; ``frontier`` does so for many
budgets; ``methods`` is the registry and ``portfolio`` the order in which ``auto`` asks what is in it.
"""

from solvers.core.files import read_problem, write_problem
from solvers.core.problem import Op, Problem, ProblemError, Value
from solvers.core.schedule import Schedule
from solvers.core.simulate import InvalidScheduleError, Timeline, simulate
from solvers.core.solution import InfeasibleError, Solution, Status, solution_of
from solvers.fixed_order import minimum_peak
from solvers.frontier import frontier
from solvers.methods import SOLVERS
from solvers.solve import solve

__all__ = [
    "SOLVERS",
    "InfeasibleError",
    "InvalidScheduleError",
    "Op",
    "Problem",
    "ProblemError",
    "Schedule",
    "Solution",
    "Status",
    "Timeline",
    "Value",
    "frontier",
    "minimum_peak",
    "read_problem",
    "simulate",
    "solution_of",
    "solve",
    "write_problem",
]
