"""Templates: a long sequence of steps of which a schedule is a part.

A template lists slots that are *required*, every op's first run among them, and between them *optional*
ones: places where an op may run again.  Every sub-sequence that holds the required slots and makes what
it reads before it reads it is a schedule, and the cheapest one within a budget is a mixed-integer program
(:mod:`solvers.search.template_program`).  So a template is a neighbourhood: all the schedules one is willing
to look at.

Templates are made around a schedule, which stays a sub-sequence of its own template.  The first runs
are cut into contiguous *stages*; for each stage a set of ops says what may run again in it, and each of
those ops gets one slot there, placed as late as a just-in-time executor would: before the first step of
the stage that reads what it makes, inputs first.  What the schedule recomputes in a stage that is not
opened stays required.  Around the schedule that recomputes nothing this is a template of the whole
problem; around a good one, with few stages opened, it is a neighbourhood for local search.

Sources: ours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from solvers.core.just_in_time import first_runs, runs_again
from solvers.core.problem import Problem

__all__ = ["Template", "template_around"]


@dataclass(frozen=True, eq=False)
class Template:
    """``slots``: an op position per slot; ``required``: whether it always runs, as first runs do.

    ``starts``   the slot at which each stage begins, ascending, the first 0.
    ``of_step``  the slot of each step of the schedule that the template was made around.
    """

    problem: Problem
    slots: tuple[int, ...]
    required: tuple[bool, ...]
    starts: tuple[int, ...]
    of_step: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.required) < len(self.problem) or len(self.slots) != len(self.required):
            raise ValueError(
                f"{len(self.slots)} slots, {sum(self.required)} of {len(self.required)} required, "
                f"for {len(self.problem)} ops"
            )

    def __len__(self) -> int:
        return len(self.slots)

    def __repr__(self) -> str:
        optional = len(self.slots) - sum(self.required)
        return f"Template({len(self.slots)} slots, {optional} optional, {len(self.starts)} stages)"

    @property
    def ends(self) -> tuple[int, ...]:
        """One past each stage's last slot."""
        return (*self.starts[1:], len(self.slots))


def template_around(
    problem: Problem,
    steps: Sequence[int],
    first: Sequence[int],
    allowed: Sequence[Collection[int]],
    opened: Collection[int],
) -> Template:
    """The template whose stages begin at the ops ``first`` (ascending, the first 0) around ``steps``.

    ``steps`` is a valid schedule as op positions with first runs in the problem's order.  ``allowed[g]``
    are the ops that may run again in stage ``g`` besides the recomputations of ``steps``, and these may be
    left out in the stages ``opened``.  A step that runs again belongs to the stage of the first run that
    follows it.
    """
    reads = problem.counted_inputs
    finals = {v for v, value in enumerate(problem.values) if value.final}
    ends = (*first[1:], len(problem))
    stage_of = np.repeat(np.arange(len(first)), np.diff((*first, len(problem)))).tolist()
    slots: list[int] = []
    required: list[bool] = []
    starts = [0]
    of_step: list[int] = []
    made = set(finals)  # what has a slot in this stage, or is there for good
    stage = pending = 0

    def may_run(i: int) -> bool:
        return i < pending and i in allowed[stage]

    for i, pending in zip(steps, first_runs(steps), strict=True):
        while stage < stage_of[min(pending, len(problem) - 1)]:
            stage += 1
            made = set(finals)
            starts.append(len(slots))
        if allowed[stage]:
            for again in runs_again(problem, reads[i], made.__contains__, may_run):
                slots.append(again)
                required.append(False)
                made.update(problem.ops[again].outputs)
        of_step.append(len(slots))
        slots.append(i)
        required.append(i == pending or stage not in opened)
        if i != pending:
            made.update(problem.ops[i].outputs)
    if len(starts) != len(ends):
        raise ValueError(f"steps reach {len(starts)} of {len(ends)} stages")
    return Template(problem, tuple(slots), tuple(required), tuple(starts), tuple(of_step))
