"""Stands in for ``model.forward`` where a step is planned in regions.

Each call goes through Dynamo's cut of the original forward, whose pieces the session runs.  A step begins
where no call waits for its backward.  A kind of step that has no plan yet is looked at and recorded, in two
steps of the training loop itself, and planned before the third.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.capture.inputs import Inputs
from planner.costs.target import target_for
from planner.errors import PlannerError, StalePlanError
from planner.measure.step import held, tensors_in
from planner.plans.plan_data import PlanData
from planner.regions.joined import RecordedStep, join, parts
from planner.regions.record import Record
from planner.regions.session import Parts, Session
from planner.runtime.apply import put, restored
from planner.runtime.tracing import is_traced

__all__ = ["RegionsForward", "apply_plan", "regions_forward_of"]

log = logging.getLogger(__name__)

CHECKS = 2  # planned steps that are counted

# A recorded step -> what each of its calls is to run.
Solve = Callable[[Record], Parts]


class RegionsForward:
    """``model.forward`` in regions; evaluation, ``no_grad`` and compilers get the original.

    ``solve``  plans a recorded step of a kind that has no plan.
    ``over``   hears what each of the first planned steps took (CPU), and may say what to run instead.
    ``root``   the model that ``model`` is a part of.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        solve: Solve,
        *,
        root: nn.Module | None = None,
        over: Callable[[int], Parts | None] | None = None,
    ) -> None:
        self.model, self.session, self.solve, self.over = model, session, solve, over
        self.root = model if root is None else root
        self.gradients_bytes = 0  # that the recorded step found
        self._checks = CHECKS
        self._told = False
        self.original = session.original
        self.training = model.training
        self.before: Any = None  # what model.__dict__ held under "forward", put back by restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            not torch.is_grad_enabled()
            or self.model.training is not self.training
            or is_traced(type(self.model).__name__)
        ):
            return self.original(*args, **kwargs)
        session = self.session
        if _compat.dynamo_stands_aside():
            self._tell_of_mode()
            return self.original(*args, **kwargs)
        if not session.waits:
            self._begin((args, kwargs))
        return session.call(*args, **kwargs)

    def _tell_of_mode(self) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "%s was called under a dispatch mode (a counter of FLOPs, a tracker of memory), under "
                "which Dynamo runs code as it is: such a step runs without its plan. A mode of your own that "
                "only looks on can say so: ignore_compile_internals = classmethod(lambda cls: True)",
                type(self.model).__name__,
            )

    def _begin(self, inputs: Any) -> None:
        """A step begins: what the last one showed is acted upon."""
        session = self.session
        session.settle()
        if session.is_recorded:
            session.follow(self.solve(session.record()))
            self._checks = CHECKS
        elif session.is_counted and self.over is not None:
            self._checks -= 1
            instead = self.over(session.counted_bytes)
            if instead is not None:
                session.follow(instead)
        stage = session.next_stage()
        session.begin(stage)
        counts = stage == "plan" and self.over is not None and self._checks and session.device.type == "cpu"
        if stage == "record" or counts:
            session.watch(self._there(inputs), must=stage == "record")

    def _there(self, inputs: Any) -> list[torch.Tensor]:
        """What a step finds on the device."""
        gradients = [p.grad for p in self.root.parameters() if p.grad is not None]
        self.gradients_bytes = sum(g.untyped_storage().nbytes() for g in gradients)
        return [*held(self.root, None), *gradients, *tensors_in(inputs)]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original

    @property
    def __code__(self) -> Any:
        return self.original.__code__

    def __reduce__(self) -> Any:
        raise PlannerError(
            "a planned model cannot be pickled (compiled code and autograd nodes do not travel); save "
            "model.state_dict() and plan.save(path), or call plan.restore(model) first"
        )


def apply_plan(plan: PlanData, model: nn.Module) -> nn.Module:
    """Make ``model`` train as ``plan`` says, one of a step in regions, from a file.  Returns the model.

    Two steps are looked at and recorded; if they are the plan's, the third runs as planned, else
    ``StalePlanError``.
    """
    session = Session(model, target_for(model, "roofline"), plan.budget_bytes)

    def follow(record: Record) -> Parts:
        step = RecordedStep(model, Inputs((), {}), join(record))
        if step.fingerprint != plan.fingerprint:
            raise StalePlanError(
                f"the plan was made for another step in regions than that of this {type(model).__name__} "
                f"(fingerprint {plan.fingerprint[:12]} with torch {plan.torch_version}, here "
                f"{step.fingerprint[:12]} with torch {torch.__version__}): the model, its sizes, what the "
                "loop does, or the versions of its libraries differ; make a new plan"
            )
        position = {op.name: i for i, op in enumerate(step.graph.ops)}
        return parts(step.joined, [position[name] for name in plan.sequence])

    return put(restored(model), RegionsForward(model, session, follow))


def regions_forward_of(model: nn.Module) -> RegionsForward | None:
    """The stand-in on ``model``, if one is applied."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, RegionsForward) else None
