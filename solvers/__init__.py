"""Rematerialization solvers over plain DAGs: numpy, networkx and OR-tools, never torch."""

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
