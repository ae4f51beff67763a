"""Rematerialization solvers over plain DAGs: numpy, networkx and OR-tools, never torch."""

from solvers.problem import Op, Problem, ProblemError, Value
from solvers.schedule import Schedule
from solvers.simulate import InvalidScheduleError, Timeline, simulate

__all__ = [
    "InvalidScheduleError",
    "Op",
    "Problem",
    "ProblemError",
    "Schedule",
    "Timeline",
    "Value",
    "simulate",
]
