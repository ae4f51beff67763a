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

Sources: ours; the walk is a depth-first topological sort of what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from solvers.core.problem import Problem, ProblemError
from solvers.core.schedule import Schedule

__all__ = [
    "Gap",
    "can_be_dropped",
    "first_runs",
    "just_in_time",
    "just_in_time_steps",
    "runs_again",
    "runs_of_groups",
    "trim",
    "turn_of",
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
    ops, reads = problem.ops, problem.counted_inputs
    gone = _ends_of_dropped_gaps(problem, dropped)
    stages = range(len(ops)) if stage_of is None else stage_of
    if len(stages) != len(ops):
        raise ValueError(f"stage_of has {len(stages)} entries for {len(ops)} ops")
    # ends[v]: the op that ends the gap v is in now; touched[v]: the stage that last made or read v.
    uses = [(*readers, len(ops)) for readers in problem.consumers]
    position = [0] * len(problem.values)
    touched = [-1] * len(problem.values)
    steps: list[int] = []

    stage = 0

    def at_hand(v: int) -> bool:
        return touched[v] == stage or v not in gone or uses[v][position[v]] not in gone[v]

    for t, op in enumerate(ops):
        stage = stages[t]
        for i in sorted(runs_again(problem, reads[t], at_hand)):
            steps.append(i)
            for v in (*reads[i], *ops[i].outputs):
                touched[v] = stage
        steps.append(t)
        for v in reads[t]:
            position[v] += 1
            touched[v] = stage
        for v in op.outputs:
            touched[v] = stage
    return steps


def runs_again(
    problem: Problem,
    wanted: Iterable[int],
    at_hand: Callable[[int], bool],
    may_run: Callable[[int], bool] | None = None,
    *,
    reads: Sequence[Sequence[int]] | None = None,
    most: int | None = None,
) -> Iterator[int]:
    """Ops that must run again to have the values ``wanted``, each once, inputs before what reads them.

    ``at_hand``  whether a value needs no run; asked when its turn comes, so that what the caller makes of
                 the ops yielded so far counts.
    ``may_run``  whether an op may run again (default: any); of one that may not, nothing is asked for.
    ``reads``    per op, the values that are looked at (default: ``problem.counted_inputs``).
    ``most``     no more ops than this are asked for (default: no end); of more, some are then missing.

    Depth first, with a stack of its own: the values of an op in order, and behind them, as ``~op``, the op
    itself.  Linear in the ops yielded and their inputs.
    """
    values = problem.values
    reads = problem.counted_inputs if reads is None else reads
    asked: set[int] = set()
    stack = list(wanted)[::-1]
    while stack:
        v = stack.pop()
        if v < 0:
            yield ~v
        elif not at_hand(v):
            i = values[v].producer
            if i is None or i in asked or len(asked) == most or not (may_run is None or may_run(i)):
                continue
            asked.add(i)
            stack.append(~i)
            stack.extend(reads[i][::-1])


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


def first_runs(steps: Sequence[int]) -> list[int]:
    """Per step, the op that is the next to run for the first time: the step's own where it is such a run.

    After the last first run it is the number of ops.  A step that runs again belongs to the stage of this op.
    """
    order = list(dict.fromkeys(steps))
    order.append(len(order))
    following: list[int] = []
    k = 0
    for i in steps:
        following.append(order[k])
        k += i == order[k]
    return following


def trim(problem: Problem, steps: Sequence[int]) -> list[int]:
    """Leave out recomputations none of whose outputs is read before it is made again."""
    wanted: set[int] = set()
    kept: list[int] = []
    for i, first in zip(reversed(steps), reversed(first_runs(steps)), strict=True):
        outputs = problem.ops[i].outputs
        if i == first or any(v in wanted for v in outputs):
            kept.append(i)
            wanted.difference_update(outputs)
            wanted.update(problem.counted_inputs[i])
    kept.reverse()
    return kept
