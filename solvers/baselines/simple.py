"""What people do without a solver.  Every method here answers at once, and proves nothing.

``keep_all``       every op once: the fastest schedule there is, at the highest peak.
``recompute_all``  keep only what cannot be made again; everything else is made again for each stage
                   that reads it.  Any DAG.  Note that it need not have the lowest peak.
``greedy``         drop the value that frees most bytes per recomputed second at the current peak, simulate,
                   and go on until the peak fits; then take back what turns out not to be needed.  Any
                   DAG.  On uniform transformer layers it is close to the optimum; it looks at one peak at
                   a time, so skips and budgets near the floor defeat it.
``every_block``    what the gradient-checkpointing flag of a model library does: keep the inputs of each
                   repeated block (``Op.group``), and when the backward reaches a block, run its forward
                   once more.  Needs ``Problem.turn``.
``sqrt``           Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016,
                   https://arxiv.org/abs/1604.06174): the same with about sqrt(n) segments of equal bytes, cut
                   where few bytes are open.  Needs ``Problem.turn``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from solvers.baselines.greedy import greedy
from solvers.core.just_in_time import Gap, can_be_dropped, just_in_time, runs_of_groups, turn_of
from solvers.core.problem import Problem, ProblemError
from solvers.core.schedule import Schedule
from solvers.core.solution import Solution, solution_of

__all__ = ["BASELINES", "Baseline", "every_block", "greedy", "keep_all", "recompute_all", "solve", "sqrt"]

# Above this many ops, stages of one op would make ``recompute_all`` quadratically long.
SINGLE_OP_STAGES = 400


def solve(problem: Problem, budget_bytes: int, name: str) -> Solution:
    """The baseline called ``name``; its bound is the time of a run without recomputation.

    Raises ``KeyError`` for another name and ``ProblemError`` if the baseline needs a turn.
    """
    schedule = BASELINES[name].run(problem, budget_bytes)
    return solution_of(problem, schedule, budget_bytes, solver=name)


def keep_all(problem: Problem) -> Schedule:
    """Every op once."""
    return Schedule.keep_all(problem)


def recompute_all(problem: Problem) -> Schedule:
    """Nothing is kept from the forward for the backward but what a pinned op made.

    With a turn, each stage of the backward (a run of ops of one ``Op.group``; without groups, one op)
    makes what it reads again.  Without one, the same holds for every op of the graph.  Large graphs
    without groups are cut into about sqrt(n) stages.  Final values never die.
    """
    first = 0 if problem.turn is None else problem.turn
    dropped: set[Gap] = {
        (v, end)
        for v, readers in enumerate(problem.consumers)
        for end in (*readers, len(problem))
        if end >= first
    }
    return just_in_time(problem, dropped, stage_of=_stages(problem))


def _stages(problem: Problem) -> Sequence[int] | None:
    """Stages by group if there are groups; single ops if they are few; else about sqrt(n) of equal length."""
    if any(op.group is not None for op in problem.ops):
        return runs_of_groups(problem)
    if len(problem) <= SINGLE_OP_STAGES:
        return None
    length = math.isqrt(len(problem))
    return [i // length for i in range(len(problem))]


def every_block(problem: Problem) -> Schedule:
    """Keep the values that enter or leave each block; run a block's forward again when the backward needs it.

    A block is the set of forward ops that share an ``Op.group``.  Ops without a group are kept, as are
    final values, what pinned ops make, and whatever another block or the rest of the model reads.

    Raises ``ProblemError`` without a turn or without groups.
    """
    turn = turn_of(problem, "every_block")
    labels = [op.group for op in problem.ops[:turn]]
    number = {label: k for k, label in enumerate(dict.fromkeys(x for x in labels if x is not None))}
    if not number:
        raise ProblemError(f"{problem.name}: every_block needs Op.group on the forward ops")
    return _segments(problem, [None if x is None else number[x] for x in labels])


def sqrt(problem: Problem) -> Schedule:
    """About sqrt(n) segments of equal bytes over the n forward ops, whatever their groups.

    Each cut is moved, by at most a quarter of a segment, to where the fewest bytes are open.  Values that
    cross a cut are kept.  Raises ``ProblemError`` without a turn.
    """
    turn = turn_of(problem, "sqrt")
    made = [sum(problem.values[v].bytes for v in op.outputs) for op in problem.ops[:turn]]
    segments = max(1, round(math.sqrt(turn)))
    open_bytes = _open_bytes(problem, turn)
    cuts: list[int] = []
    total, sofar = sum(made), 0
    for i, size in enumerate(made):
        sofar += size
        if len(cuts) + 1 < segments and sofar * segments >= total * (len(cuts) + 1):
            reach = max(1, turn // segments // 4)
            low = max(i + 1 - reach, cuts[-1] + 1 if cuts else 1)
            near = range(low, max(low, min(i + 1 + reach, turn)) + 1)
            cuts.append(min(near, key=lambda k: (open_bytes[min(k, turn) - 1], abs(k - i - 1))))
    segment_of: list[int | None] = [sum(cut <= i for cut in cuts) for i in range(turn)]
    return _segments(problem, segment_of)


def _open_bytes(problem: Problem, turn: int) -> list[int]:
    """For each forward op, the bytes that it or an earlier op made and a later forward op reads."""
    change = [0] * (turn + 1)
    for v, readers in enumerate(problem.consumers):
        producer = problem.values[v].producer
        last = max((i for i in readers if i < turn), default=-1)
        if producer is not None and producer < last:
            change[producer] += problem.values[v].bytes
            change[last] -= problem.values[v].bytes
    for i in range(turn):
        change[i + 1] += change[i]
    return change[:turn]


def _segments(problem: Problem, segment_of: Sequence[int | None]) -> Schedule:
    """Run each segment of the forward again, once and whole, when the backward first reads inside it.

    A segment is run from its first op to the last one whose value the backward reads, as
    ``torch.utils.checkpoint`` does; pinned ops are left out and their values kept.
    """
    turn, ops = len(segment_of), problem.ops
    inner: dict[int, int] = {}
    last_needed: dict[int, int] = {}
    for v, readers in enumerate(problem.consumers):
        i = problem.values[v].producer
        segment = segment_of[i] if i is not None and i < turn else None
        if i is None or segment is None or not can_be_dropped(problem, v):
            continue
        if any(k < turn and segment_of[k] != segment for k in readers):
            continue
        inner[v] = segment
        if readers and readers[-1] >= turn:
            last_needed[segment] = max(last_needed.get(segment, -1), i)
    members: dict[int, list[int]] = {}
    for i, segment in enumerate(segment_of):
        if segment is not None and ops[i].recomputable and i <= last_needed.get(segment, -1):
            members.setdefault(segment, []).append(i)
    steps = list(range(turn))
    done: set[int] = set()
    for t in range(turn, len(ops)):
        for segment in sorted({inner[v] for v in ops[t].inputs if v in inner} - done):
            steps.extend(members[segment])
            done.add(segment)
        steps.append(t)
    return Schedule.of(problem, steps)


@dataclass(frozen=True)
class Baseline:
    """A named method: ``run(problem, budget_bytes)``, for problems that have what it needs."""

    run: Callable[[Problem, int], Schedule]
    needs_turn: bool = False
    needs_groups: bool = False

    def suits(self, problem: Problem) -> bool:
        """Whether ``run`` accepts ``problem``."""
        forward = problem.ops[: problem.turn]
        return (problem.turn is not None or not self.needs_turn) and (
            not self.needs_groups or any(op.group is not None for op in forward)
        )


BASELINES: dict[str, Baseline] = {
    "keep_all": Baseline(lambda problem, _budget: keep_all(problem)),
    "recompute_all": Baseline(lambda problem, _budget: recompute_all(problem)),
    "greedy": Baseline(greedy),
    "every_block": Baseline(
        lambda problem, _budget: every_block(problem), needs_turn=True, needs_groups=True
    ),
    "sqrt": Baseline(lambda problem, _budget: sqrt(problem), needs_turn=True),
}
