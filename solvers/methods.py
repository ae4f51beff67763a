"""The registry: every method by its name, what it needs, and how it is run.

A new method is a module with a function ``solve(problem, budget_bytes, *, time_limit_s, seed)`` and a row in
``METHODS``.  By its row it can be asked for by name, and with a ``share`` it is one of those that ``auto``
asks.  The rows without one are baselines, and methods that ``portfolio`` knows better: by their parts, from
one another's plans, or never, where another does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from solvers.baselines import simple as baselines
from solvers.bounds import refine
from solvers.chain import method as chain
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.solution import Solution
from solvers.exact import method as exact
from solvers.retention import method as retention
from solvers.staged import method as staged

__all__ = ["METHODS", "SOLVERS", "Method", "has_backward", "suits_all"]


def suits_all(_problem: Problem) -> bool:
    """Any problem."""
    return True


def has_backward(problem: Problem) -> bool:
    """A turn, two ops at least before it and one after it."""
    return problem.turn is not None and 2 <= problem.turn < len(problem)


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    ``run``    ``(problem, budget_bytes, time_limit_s, seed)`` to the best it finds, with what it proves; it
               raises ``InfeasibleError`` if it proves that nothing fits, ``ProblemError`` for a problem that
               does not suit.
    ``suits``  whether it can treat a problem.
    ``needs``  the same in words; empty: any problem.
    ``plan``   its schedule alone, for methods that answer at once.
    ``share``  of the time left that ``auto`` gives it, 0 to 1, after all that it asks by itself.
    """

    name: str
    run: Callable[[Problem, int, float, int], Solution]
    suits: Callable[[Problem], bool] = suits_all
    needs: str = ""
    plan: Callable[[Problem, int], Schedule] | None = None
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self.name}: share is {self.share!r}, want 0..1")
        if (self.suits is suits_all) != (not self.needs):
            raise ValueError(f"{self.name}: say in words what it needs, if it does not suit every problem")


def _baseline(name: str, needs: str = "") -> Method:
    """The row of a baseline, which answers at once whatever the time limit."""
    baseline = baselines.BASELINES[name]

    def run(problem: Problem, budget_bytes: int, _time_limit_s: float, _seed: int) -> Solution:
        return baselines.solve(problem, budget_bytes, name)

    return Method(name, run, baseline.suits if needs else suits_all, needs, baseline.run)


_TURN = "problem.turn"

_ROWS = (
    Method("exact", lambda p, b, limit_s, seed: exact.solve(p, b, time_limit_s=limit_s, seed=seed)),
    Method("instants", lambda p, b, limit_s, _seed: refine.solve(p, b, time_limit_s=limit_s)),
    Method(
        "staged",
        lambda p, b, limit_s, seed: staged.solve(p, b, time_limit_s=limit_s, seed=seed),
        lambda p: p.turn is not None and p.turn < len(p),
        f"{_TURN}, and ops after it",
    ),
    Method(
        "chain",
        lambda p, b, limit_s, seed: chain.solve(p, b, time_limit_s=limit_s, seed=seed),
        has_backward,
        f"{_TURN}, two ops before it and one after it",
    ),
    Method("retention", lambda p, b, limit_s, seed: retention.solve(p, b, time_limit_s=limit_s, seed=seed)),
    _baseline("keep_all"),
    _baseline("recompute_all"),
    _baseline("greedy"),
    _baseline("every_block", f"{_TURN}, and Op.group on forward ops"),
    _baseline("sqrt", _TURN),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}

# What ``solvers.solve`` takes as ``solver``.
SOLVERS = ("auto", *METHODS)
