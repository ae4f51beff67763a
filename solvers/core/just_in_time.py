"""From decisions to a sequence: run the ops in order and recompute what is missing just in time.

Between two uses of a value in the problem's order lies a *gap*, named by the value and by the op
that ends it: ``(v, b)`` is the gap of value ``v`` that ends where op ``b`` reads it, and
``(v, len(problem))`` the one after its last use.  A value whose gap is dropped is not kept across
it.  Decisions are a set of dropped gaps; everything else follows.

The rule is the same for every DAG.  When an op is about to run and one of its inputs is not at
hand, the ops needed to make it again run just before, each at most once, in the problem's order.
What they make is at hand until the current *stage* ends (a stage is a run of consecutive ops; by
default each op is one), and beyond it only across gaps that are not dropped.  The gap after a
value's last use costs nothing unless a recomputation reads the value there, so a value that is kept
there is kept exactly as long as recomputations need it.  Final values are never dropped.

Ops that run once are never charged twice: a forward op that only the backward reads runs when its
turn comes, like any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from solvers.core.problem import Problem, ProblemError
from solvers.core.schedule import Schedule

__all__ = [
    "Gap",
    "can_be_dropped",
    "gaps_of_values",
    "just_in_time",
    "just_in_time_steps",
    "runs_of_groups",
    "trim",
]

Gap = tuple[int, int]


def just_in_time(
    problem: Problem, dropped: Collection[Gap], *, stage_of: Sequence[int] | None = None
) -> Schedule:
    """The schedule that keeps every value except across the gaps in ``dropped``.

    ``dropped``   gaps ``(value, op that ends it)``; those of sources, of final values and of values
                  that a pinned op makes are ignored, for such values stay.
    ``stage_of``  stage number of each op, nondecreasing; ``None``: each op is a stage of its own.

    The result is always valid.  Work is linear in its length.
    """
    return Schedule.of(problem, just_in_time_steps(problem, dropped, stage_of=stage_of))


def just_in_time_steps(
    problem: Problem, dropped: Collection[Gap], *, stage_of: Sequence[int] | None = None
) -> list[int]:
    """``just_in_time`` as op positions."""
    ops, values, reads = problem.ops, problem.values, problem.counted_inputs
    gone = _ends_of_dropped_gaps(problem, dropped)
    stages = range(len(ops)) if stage_of is None else stage_of
    if len(stages) != len(ops):
        raise ValueError(f"stage_of has {len(stages)} entries for {len(ops)} ops")
    # ends[v]: the op that ends the gap v is in now; touched[v]: the stage that last made or read v.
    uses = [(*readers, len(ops)) for readers in problem.consumers]
    position = [0] * len(values)
    touched = [-1] * len(values)
    steps: list[int] = []

    def missing(v: int, stage: int) -> bool:
        return touched[v] != stage and v in gone and uses[v][position[v]] in gone[v]

    def make_again(wanted: Iterable[int], stage: int) -> None:
        todo: set[int] = set()
        stack = [v for v in wanted if missing(v, stage)]
        while stack:
            i = values[stack.pop()].producer
            if i is not None and i not in todo:
                todo.add(i)
                stack.extend(u for u in reads[i] if missing(u, stage))
        for i in sorted(todo):
            steps.append(i)
            for v in (*reads[i], *ops[i].outputs):
                touched[v] = stage

    for t, op in enumerate(ops):
        make_again(reads[t], stages[t])
        steps.append(t)
        for v in reads[t]:
            position[v] += 1
            touched[v] = stages[t]
        for v in op.outputs:
            touched[v] = stages[t]
    return steps


def _ends_of_dropped_gaps(problem: Problem, dropped: Collection[Gap]) -> dict[int, set[int]]:
    """``dropped`` by value, without the gaps that cannot be dropped."""
    gone: dict[int, set[int]] = {}
    for v, end in dropped:
        if can_be_dropped(problem, v):
            gone.setdefault(v, set()).add(end)
    return gone


def can_be_dropped(problem: Problem, v: int) -> bool:
    """Whether value ``v`` may die and be made again: not a source, not final, not made by a pinned op."""
    value = problem.values[v]
    return value.producer is not None and not value.final and problem.ops[value.producer].recomputable


def gaps_of_values(problem: Problem, values: Iterable[int]) -> set[Gap]:
    """What it means to drop whole ``values`` of a training graph: every gap that ends in the backward.

    That is the gap across the turn, those between their uses in the backward, and the one after
    the last use, so that recomputations do not find the value either.  With ``stage_of``, uses in
    one stage share a copy.  Raises ``ProblemError`` if the problem has no turn.
    """
    turn = turn_of(problem, "dropping whole values")
    gaps: set[Gap] = set()
    for v in values:
        ends = (*problem.consumers[v], len(problem))
        gaps.update((v, end) for end in ends[bisect_left(ends, turn) :])
    return gaps


def runs_of_groups(problem: Problem) -> list[int]:
    """A stage number per op: a new stage wherever ``Op.group`` changes, and at the turn.

    Ops without a group continue the run they stand in.
    """
    stages: list[int] = []
    stage, label = 0, None
    for i, op in enumerate(problem.ops):
        if i == problem.turn and i:
            stage, label = stage + 1, op.group
        elif op.group is not None and op.group != label:
            stage, label = stage + (label is not None), op.group
        stages.append(stage)
    return stages


def turn_of(problem: Problem, what: str) -> int:
    """``problem.turn``; ``ProblemError`` naming ``what`` needs it if it is ``None``."""
    if problem.turn is None:
        raise ProblemError(f"{problem.name}: {what} needs problem.turn, the number of forward ops")
    return problem.turn


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
