"""A program in the place of a model's forward: on the model itself, or as a GraphModule beside it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from planner.rewrite.program import Program
from planner.runtime.forward import PlanAgain, PlannedForward, planned_forward_of
from planner.runtime.held_outputs import HeldOutputs
from planner.runtime.step import ExecutableStep

__all__ = ["CheckpointedModule", "applied", "as_written", "put", "restored"]


def applied(
    model: nn.Module,
    step: ExecutableStep,
    outputs: HeldOutputs | None = None,
    again: PlanAgain | None = None,
) -> nn.Module:
    """Make ``model`` itself run ``step``, in place; twice is a no-op.  Returns the model.

    ``outputs`` watches what the caller holds; ``again`` plans anew for what it saw.

    Raises ``StalePlanError``, with nothing changed, for a model that is not the one captured.
    """
    standing = planned_forward_of(model)
    if standing is not None and standing.given is step:
        return model
    restored(model)
    stand_in = PlannedForward(model, step)  # raises before anything is changed
    stand_in.outputs, stand_in.again = outputs, again
    return put(model, stand_in)


def put(model: nn.Module, stand_in: Any) -> nn.Module:
    """Let ``stand_in`` be the forward of ``model``, with ``before``, what was there.  Returns the model."""
    stand_in.before = model.__dict__.get("forward")
    model.__dict__["forward"] = stand_in
    return model


def restored(model: nn.Module) -> nn.Module:
    """Undo :func:`applied`, whatever was applied; a no-op if nothing was.  Returns the model."""
    standing: Any = model.__dict__.get("forward")
    if hasattr(standing, "before") and hasattr(standing, "original"):
        if standing.before is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = standing.before
    return model


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """``model`` runs its own forward, or what is applied within; then again what it ran before."""
    standing = vars(model).get("forward")
    if hasattr(standing, "original"):  # a plan that is applied, or the switch
        del vars(model)["forward"]
    try:
        yield
    finally:
        restored(model)
        if hasattr(standing, "original"):
            vars(model)["forward"] = standing


class CheckpointedModule(fx.GraphModule):
    """The rewritten model.  ``graph`` is its forward; ``code`` the whole step, backward included.

    It shares the original's submodules and Parameters, so training either trains both.
    """

    original: nn.Module

    def __init__(self, original: nn.Module, step: ExecutableStep, outputs: HeldOutputs | None = None) -> None:
        super().__init__({}, step.program.forward.graph, type(original).__name__ + "Checkpointed")
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        self.__dict__["original"] = original
        forward = PlannedForward(original, step, original=_unplanned(original))
        forward.outputs = outputs
        self.__dict__["forward"] = forward
        self.training = original.training

    @property
    def program(self) -> Program:
        """The generated graphs."""
        planned: PlannedForward = self.__dict__["forward"]
        return planned.step.program

    @property
    def code(self) -> str:
        """The whole step as Python; recomputed calls are named ``..._recomputed``."""
        return self.program.code

    def train(self, mode: bool = True) -> CheckpointedModule:
        """Also sets the original's own flag, which decides whether the plan applies."""
        self.original.training = mode
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedModule:
        original = copy.deepcopy(self.original, memo)
        forward: PlannedForward = self.__dict__["forward"]
        return CheckpointedModule(original, forward.step, forward.outputs)

    def __reduce__(self) -> Any:
        return self.__dict__["forward"].__reduce__()


def _unplanned(model: nn.Module) -> Any:
    applied = planned_forward_of(model)
    return model.forward if applied is None else applied.original
