"""A schedule: which op runs at each step.  Frees follow from it and are never stored.

A value is computed anew each time its op runs.  Each copy dies after the last step that reads it
before the next copy is made; a final value never dies once computed.  That rule is optimal for
memory, so a schedule needs nothing but the sequence of ops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from solvers.core.problem import Problem, names_to_indices

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """``sequence``: op names in execution order; a repeated name is a recomputation."""

    sequence: tuple[str, ...]

    @classmethod
    def of(cls, problem: Problem, steps: Iterable[int]) -> Schedule:
        """From op positions."""
        return cls(tuple(problem.ops[i].name for i in steps))

    @classmethod
    def keep_all(cls, problem: Problem) -> Schedule:
        """Every op once, in the problem's order."""
        return cls(tuple(op.name for op in problem.ops))

    def steps(self, problem: Problem) -> list[int]:
        """Op positions, in execution order; ``ProblemError`` for a name the problem lacks."""
        return names_to_indices(problem, self.sequence)

    def times_recomputed(self) -> dict[str, int]:
        """How often each op runs beyond its first time; ops that run once are left out."""
        return {name: n - 1 for name, n in Counter(self.sequence).items() if n > 1}

    def __len__(self) -> int:
        return len(self.sequence)

    def __repr__(self) -> str:
        again = sum(self.times_recomputed().values())
        return f"Schedule({len(self.sequence)} steps, {again} of them recomputations)"
