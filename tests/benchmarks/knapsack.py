"""torch.compile's memory budget on a graph of ours: its knapsack, its min cut, its one recomputation.

What torch's partitioner does with ``activation_memory_budget`` (``torch/_functorch/partitioners.py``,
2.13), restated on storages:

1. *Items* are the ops it will not recompute of its own accord: matrix products, convolutions,
   attention, random ops, and reductions to less than a quarter of what they read.  An item weighs the
   bytes of its outputs and is worth its seconds (torch counts FLOPs unless told otherwise; seconds are
   kinder to it).
2. A 0/1 *knapsack* chooses the items that are saved; the capacity is the budget, a fraction of the bytes
   saved when no item is recomputed.  This is torch's own function.
3. Of the rest, a *minimum cut* finds the fewest bytes to keep such that the backward can be run without
   recomputing a saved item.
4. Everything else that the backward needs is recomputed once, when it is first needed, and kept until
   the backward has read it for the last time.

The rest of step 1, cheap elementwise ops, torch recomputes without asking, since a compiler fuses them;
here every kernel costs what it costs.  So the same is done a second time with every op an item.

The budget of torch is not one of the peak: it says nothing of gradients or of what is recomputed.  So
this stands in for a patient user: all fractions of a fine grid are tried with both kinds of items, every
plan is simulated, and the fastest whose peak fits is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ortools.graph.python.max_flow import SimpleMaxFlow

from planner._compat import dp_knapsack
from solvers import Problem, Schedule
from solvers.core.just_in_time import can_be_dropped, turn_of
from solvers.core.simulate import simulate_steps

__all__ = ["Swept", "items", "least_saved", "recompute_once", "sweep"]

# By the names that fx gives to calls: the op's own, with a number where it repeats.
_BANNED = re.compile(
    r"(mm|bmm|addmm|baddbmm|convolution|_scaled_dot_product\w*|native_dropout|dropout_mask)(_\d+)?"
)
_REDUCTION = 4
_ENDLESS = 2**60


@dataclass(frozen=True)
class Swept:
    """One fraction's plan, simulated; ``every_op`` tells which ops were items."""

    fraction: float
    every_op: bool
    peak_bytes: int
    recompute_seconds: float
    schedule: Schedule


def items(problem: Problem, *, every_op: bool = False) -> list[int]:
    """Forward ops that torch recomputes only if its knapsack says so; ``ProblemError`` without a turn.

    ``every_op``: all that may be recomputed at all.
    """
    chosen = []
    for i, op in enumerate(problem.ops[: turn_of(problem, "torch's knapsack")]):
        if not any(can_be_dropped(problem, v) for v in op.outputs):
            continue
        read = sum(problem.values[v].bytes for v in problem.counted_inputs[i])
        if every_op or _BANNED.fullmatch(op.name) or read > _REDUCTION * _made(problem, i):
            chosen.append(i)
    return chosen


def _made(problem: Problem, i: int) -> int:
    return sum(problem.values[v].bytes for v in problem.ops[i].outputs)


def least_saved(problem: Problem, not_again: Collection[int]) -> set[int]:
    """The droppable forward values of fewest bytes from which the backward runs without ops ``not_again``.

    A minimum vertex cut: paths lead from what cannot be made again to what the backward reads.
    """
    turn = turn_of(problem, "a minimum cut")
    flow = SimpleMaxFlow()
    source, sink = 2 * len(problem.values), 2 * len(problem.values) + 1
    forward = [
        v
        for v, value in enumerate(problem.values)
        if can_be_dropped(problem, v) and value.producer is not None and value.producer < turn
    ]
    cuttable, kept_out = set(forward), set(not_again)
    for v in forward:
        i = problem.values[v].producer
        assert i is not None
        flow.add_arc_with_capacity(2 * v, 2 * v + 1, problem.values[v].bytes)
        if i in kept_out:
            flow.add_arc_with_capacity(source, 2 * v, _ENDLESS)
        else:
            for u in problem.counted_inputs[i]:
                if u in cuttable:
                    flow.add_arc_with_capacity(2 * u + 1, 2 * v, _ENDLESS)
        if problem.consumers[v] and problem.consumers[v][-1] >= turn:
            flow.add_arc_with_capacity(2 * v + 1, sink, _ENDLESS)
    if flow.solve(source, sink) != flow.OPTIMAL:
        raise RuntimeError(f"{problem.name}: the minimum cut was not solved")
    reached = set(flow.get_source_side_min_cut())
    return {v for v in forward if 2 * v in reached and 2 * v + 1 not in reached}


def recompute_once(problem: Problem, saved: Collection[int]) -> list[int]:
    """Op positions: the forward, then the backward with whatever is not ``saved`` made again once."""
    turn = turn_of(problem, "recomputation in the backward")
    steps = list(range(turn))
    done: set[int] = set()
    for t in range(turn, len(problem)):
        todo: set[int] = set()
        stack = list(problem.counted_inputs[t])
        while stack:
            v = stack.pop()
            i = problem.values[v].producer
            if i is None or i >= turn or v in saved or not can_be_dropped(problem, v):
                continue
            if i not in done and i not in todo:
                todo.add(i)
                stack.extend(problem.counted_inputs[i])
        steps.extend(sorted(todo))
        done |= todo
        steps.append(t)
    return steps


def sweep(problem: Problem, fractions: Iterable[float]) -> list[Swept]:
    """The plan of each fraction of torch's memory budget, 0 to 1; equal plans once.

    Raises ``ProblemError`` for a problem without a turn.
    """
    found: dict[tuple[int, ...], Swept] = {}
    grid = list(fractions)
    for every_op in (False, True):
        candidates = items(problem, every_op=every_op)
        whole = sum(problem.values[v].bytes for v in least_saved(problem, candidates)) or 1
        memory = [_made(problem, i) / whole for i in candidates]
        seconds = [problem.ops[i].again_s for i in candidates]
        for fraction in grid if candidates else ():
            saved_items = [candidates[k] for k in dp_knapsack(memory, seconds, fraction)]
            steps = recompute_once(problem, least_saved(problem, saved_items))
            if tuple(steps) not in found:
                line = simulate_steps(problem, steps)
                schedule = Schedule.of(problem, steps)
                found[tuple(steps)] = Swept(
                    fraction, every_op, line.peak_bytes, line.recompute_seconds, schedule
                )
    return list(found.values())
