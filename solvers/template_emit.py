"""From a point of a template program to a sequence of steps, and its polish.

Two orders are emitted and the simulator picks: the template's, which is what the program's rows of
bytes describe, and just in time, where every recomputation runs right before the first step that needs
it and what nobody needs never runs.  Both repair what a rounded point leaves out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from solvers.problem import Problem
from solvers.template import Template

__all__ = ["in_order", "just_in_time", "trim"]


def in_order(template: Template, kept: Sequence[Collection[int]], used: Sequence[bool]) -> list[int]:
    """Steps of the used slots in the template's order; ``kept`` as from ``TemplateProgram.kept``."""
    problem, slots = template.problem, template.slots
    steps: list[int] = []
    resident = _Resident(problem)
    for g, (a, b) in enumerate(zip(template.starts, template.ends, strict=True)):
        resident.enter(kept[g])
        for s in range(a, b):
            if used[s]:
                resident.run(slots[s], steps)
    return steps


def just_in_time(template: Template, kept: Sequence[Collection[int]]) -> list[int]:
    """Steps of the required slots, each preceded by what it lacks."""
    problem, slots, required = template.problem, template.slots, template.required
    steps: list[int] = []
    resident = _Resident(problem)
    for g, (a, b) in enumerate(zip(template.starts, template.ends, strict=True)):
        resident.enter(kept[g])
        for s in range(a, b):
            if required[s]:
                resident.run(slots[s], steps)
    return steps


class _Resident:
    """The values at hand while a schedule is written."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.values: set[int] = set()
        self._stay = {
            v
            for v, value in enumerate(problem.values)
            if value.producer is not None and (value.final or not problem.ops[value.producer].recomputable)
        }

    def enter(self, kept: Collection[int]) -> None:
        """A stage begins: what is not kept is gone, but for what cannot be made again."""
        self.values = {v for v in self.values if v in kept or v in self._stay}

    def run(self, op: int, steps: list[int]) -> None:
        """Append ``op``, and before it the recomputations it needs."""
        problem, values = self.problem, self.values
        stack = [(op, iter(problem.counted_inputs[op]))]
        while stack:
            i, inputs = stack[-1]
            for v in inputs:
                p = problem.values[v].producer
                if p is not None and v not in values:
                    stack.append((p, iter(problem.counted_inputs[p])))
                    break
            else:
                stack.pop()
                steps.append(i)
                values.update(problem.ops[i].outputs)


def trim(problem: Problem, steps: Sequence[int]) -> list[int]:
    """Leave out recomputations none of whose outputs is read before it is made again."""
    ran: set[int] = set()
    first = [not (i in ran or ran.add(i)) for i in steps]  # type: ignore[func-returns-value]
    wanted: set[int] = set()
    kept: list[int] = []
    for i, required in zip(reversed(steps), reversed(first), strict=True):
        outputs = problem.ops[i].outputs
        if required or any(v in wanted for v in outputs):
            kept.append(i)
            wanted.difference_update(outputs)
            wanted.update(problem.counted_inputs[i])
    kept.reverse()
    return kept
