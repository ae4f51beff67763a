"""What has to be known of a step to play a schedule through, whoever holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = [
    "BETWEEN",
    "CALLERS",
    "DROPPED",
    "GLUE",
    "GRADIENT_SUM",
    "LAST",
    "OPTIMIZER_STEP",
    "RELEASE",
    "RNG_STATE",
    "StepGraph",
    "forward_length",
    "release_of",
    "replayed_states",
    "scratch_of",
    "written_over",
]

# The op at which the caller lets go of outputs: it costs nothing, and what it reads is there until it ran.
RELEASE = "outputs_released"

# The op that stands for what the caller still holds of the last call, and the one at which it drops that.
LAST = "outputs_of_last_call"
DROPPED = "last_outputs_dropped"

# What the caller does, as ops that run nothing.
CALLERS = frozenset({LAST, DROPPED, RELEASE})

# What the user's own code between two regions does, and what autograd does when a parameter's second gradient
# comes: names of ops that run nothing of ours begin with these words and a stroke.
GLUE = "glue"
GRADIENT_SUM = "gradient_sum"
BETWEEN = frozenset({GLUE, GRADIENT_SUM})

# The optimizer's step of one parameter in a hook of the backward: runs nothing of ours, and has scratch.  The
# parameter's name follows behind a stroke.
OPTIMIZER_STEP = "optimizer_step"

# Target of the op that keeps a generator's state for a random op that runs again.
RNG_STATE = "rng_state"


class _StepOp(Protocol):
    @property
    def target(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...


class _StepValue(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def final(self) -> bool: ...


class StepGraph(Protocol):
    """What has to be known of a step to play it through: a TrainingGraph or its Outline."""

    @property
    def ops(self) -> Sequence[_StepOp]: ...
    @property
    def values(self) -> Sequence[_StepValue]: ...


def forward_length(graph: StepGraph, steps: Sequence[int]) -> int:
    """How many leading positions of a schedule run in the forward, before the loss."""
    return next((t for t, i in enumerate(steps) if graph.ops[i].phase != "forward"), len(steps))


def written_over(ops: Sequence[Any], steps: Sequence[int]) -> set[int]:
    """The positions of ``steps`` at which an op writes over what it ``reuses``: that is not read again."""
    wanted: set[int] = set()  # values of which a later step reads the copy there is
    found = set()
    for t in range(len(steps) - 1, -1, -1):
        op = ops[steps[t]]
        if op.reuses is not None and op.reuses not in wanted:
            found.add(t)
        wanted.difference_update(op.outputs)
        wanted.update(op.inputs)
    return found


def release_of(graph: StepGraph, steps: Sequence[int]) -> int | None:
    """The position of a schedule at which the caller lets go of outputs; ``None`` if it holds them all."""
    return next((t for t, i in enumerate(steps) if graph.ops[i].target == RELEASE), None)


def replayed_states(graph: StepGraph, steps: list[int]) -> set[int]:
    """The ``rng_state`` ops from which ``steps`` replays a random op; the others need not run."""
    runs = Counter(steps)
    states = {op.outputs[0]: i for i, op in enumerate(graph.ops) if op.target == RNG_STATE}
    return {states[v] for i, op in enumerate(graph.ops) if runs[i] > 1 for v in op.inputs if v in states}


def scratch_of(ops: Sequence[Any], scratch_bytes: Sequence[int]) -> dict[str, int]:
    """By name of the parameter what its optimizer's step in the backward takes; of ops of a graph or plan."""
    word = f"{OPTIMIZER_STEP}/"
    return {
        op.name.removeprefix(word): count
        for op, count in zip(ops, scratch_bytes, strict=True)
        if op.name.startswith(word)
    }
