"""A step whose parameters step in its backward: gradients let go of there, and what the optimizers take.

See :mod:`planner.memory.in_backward`.
"""

from __future__ import annotations

import dataclasses
from typing import overload

from torch.optim import Optimizer

from planner.memory.consumed_gradients import consumed
from planner.memory.optimizer_state import OptimizerLike
from planner.options import GradientsMode
from planner.solving.in_regions import JoinedStep
from planner.solving.priced import PricedStep

__all__ = ["stepping_in_backward"]


@overload
def stepping_in_backward(
    step: PricedStep, gradients: GradientsMode, optimizer: OptimizerLike | None
) -> PricedStep: ...


@overload
def stepping_in_backward(
    step: PricedStep | JoinedStep, gradients: GradientsMode, optimizer: OptimizerLike | None
) -> PricedStep | JoinedStep: ...


def stepping_in_backward(
    step: PricedStep | JoinedStep, gradients: GradientsMode, optimizer: OptimizerLike | None
) -> PricedStep | JoinedStep:
    """``step`` with what is known of hooks on its parameters, as ``gradients`` asks (:func:`planner.plan`).

    ``optimizer``  that the plan was given: a class or a number of bytes stands for the whole model, so that
                   the state of optimizers found in hooks is not added to it.

    In regions gradients stay counted as held; the state is counted.  Raises ``PlannerError`` for "consumed"
    where no parameter has a hook.
    """
    taken, known = consumed(step.model, gradients, as_on=step.target.device)
    if known.state_bytes and (optimizer is None or isinstance(optimizer, Optimizer)):
        found = step.memory.resident
        resident = dataclasses.replace(
            found, optimizer_state_bytes=found.optimizer_state_bytes + known.state_bytes
        )
        step = dataclasses.replace(step, memory=dataclasses.replace(step.memory, resident=resident))
    return step.consuming(taken) if taken and isinstance(step, PricedStep) else step
