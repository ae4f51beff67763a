"""A model's forward, compiled with its plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.compiled.session import CompiledSession
from planner.errors import PlannerError

__all__ = ["CompiledForward"]


class CompiledForward:
    """Stands for the forward of ``model``; ``original`` is what it was.

    An outer ``torch.compile`` calls it as it is, and does not look inside.  Without gradients, in evaluation
    and at other sizes its graphs are compiled as torch compiles them.
    """

    def __init__(self, model: nn.Module, session: CompiledSession) -> None:
        self.before: Any = None
        standing = vars(model).get("forward")
        own = getattr(standing, "original", standing)  # set on the instance, and not by us

        def forward(*args: Any, **kwargs: Any) -> Any:  # Dynamo would find a bound one by its name: this one
            return type(model).forward(model, *args, **kwargs) if own is None else own(*args, **kwargs)

        self.original = model.forward if own is None else own
        self.session = session
        self._call = torch.compile(_compat.own_code(forward), backend=session.backend, dynamic=False)

    @property
    def __wrapped__(self) -> Any:
        return self.original  # so that inspect.signature shows the model's own arguments

    def __reduce__(self) -> Any:
        raise PlannerError(
            "a model that trains compiled as planned cannot be copied or pickled: compiled code does not "
            "travel. Save model.state_dict() and plan.save(path), or call plan.restore(model) first"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)
