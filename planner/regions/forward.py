"""Stands in for ``model.forward`` where a step is planned in regions.

Each call goes through Dynamo's cut of the original forward, whose pieces the session runs.  A step begins where
no call waits for its backward; what the session learned in the last one is then acted upon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.errors import PlannerError
from planner.regions.session import Session
from planner.runtime.tracing import is_traced

__all__ = ["RegionsForward", "regions_forward_of"]


class RegionsForward:
    """``model.forward`` in regions; evaluation, ``no_grad`` and compilers get the original."""

    def __init__(self, model: nn.Module, session: Session, *, training: bool = True) -> None:
        self.model, self.session, self.training = model, session, training
        self.original = session.original
        self.before: Any = None  # what model.__dict__ held under "forward", put back by restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            not torch.is_grad_enabled()
            or self.model.training is not self.training
            or is_traced(type(self.model).__name__)
        ):
            return self.original(*args, **kwargs)
        session = self.session
        if not session.waits:
            session.begin("plan")
        return session.call(*args, **kwargs)

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


def regions_forward_of(model: nn.Module) -> RegionsForward | None:
    """The stand-in on ``model``, if one is applied."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, RegionsForward) else None
