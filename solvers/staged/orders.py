"""From a choice of what is kept at each stage's start to a sequence of steps.

Two orders are emitted and the simulator picks: just in time, where every recomputation runs right
before the first step that needs it and what nobody needs never runs; and the template's, which is
what the program's memory rows describe.

Sources: ours.
"""

from __future__ import annotations

from solvers.core.just_in_time import runs_again
from solvers.staged.program import Choice
from solvers.staged.stages import Stages

__all__ = ["in_template_order", "just_in_time"]


def just_in_time(stages: Stages, choice: Choice) -> list[int]:
    """Steps of the whole schedule (op positions); what ``choice`` carries but nobody makes is left out."""
    facts = stages.facts
    problem, turn = facts.problem, facts.turn
    steps = list(range(turn))
    resident, pinned = set(facts.decided), _pinned(stages)
    ends = (*stages.first[1:], len(problem))
    for g, (start, end) in enumerate(zip(stages.first, ends, strict=True)):
        resident &= choice.kept[g] | pinned
        for t in range(start, end):
            _run_needed(stages, t, resident, steps)
            steps.append(t)
    return steps


def in_template_order(stages: Stages, choice: Choice) -> list[int]:
    """Steps with each stage's recomputations at their template slots, carried ones included."""
    facts = stages.facts
    turn = facts.turn
    steps = list(range(turn))
    resident, pinned = set(facts.decided), _pinned(stages)
    for g, row in enumerate(stages.template):
        resident &= choice.kept[g] | pinned
        for i in row:
            if i >= turn or i in choice.again[g]:
                _run_needed(stages, i, resident, steps)
                steps.append(i)
                if i < turn:
                    resident.update(facts.problem.ops[i].outputs)
    return steps


def _pinned(stages: Stages) -> set[int]:
    """Values that cannot be made again: whoever needs one keeps it, whatever a rounded choice says."""
    ops, values = stages.facts.problem.ops, stages.facts.problem.values
    producers = {v: values[v].producer for v in stages.facts.decided}
    return {v for v, p in producers.items() if p is not None and not ops[p].recomputable}


def _run_needed(stages: Stages, t: int, resident: set[int], steps: list[int]) -> None:
    """Append the recomputations op ``t`` needs; ``resident`` grows by what they make."""
    problem, reads = stages.facts.problem, stages.facts.reads
    for i in runs_again(problem, reads[t], resident.__contains__, reads=reads):
        steps.append(i)
        resident.update(problem.ops[i].outputs)
