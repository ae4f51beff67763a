"""What the backward does besides computing gradients: seen, and refused where a plan would not do it.

The backward is traced with the forward. Code of the user's that runs in it (a Function's ``backward``, a
hook on a tensor) finds the same stand-ins of parameters and buffers on the modules as the forward did;
what it writes into one of them is in no output of the graph.

Known limit: what it changes outside the model (a list in a closure, a global) goes unseen.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.capture.as_eager.places import users_place
from planner.errors import TraceError

__all__ = ["Installed"]


class Installed:
    """The stand-ins of a model's parameters and buffers, on its modules from the forward's end on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = [
            (registered, key, tensor)
            for module in model.modules()
            for registered in (module._parameters, module._buffers)
            for key, tensor in registered.items()
        ]
        self._names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._writes: dict[str, tuple[torch.Tensor, int]] = {}  # stand-in, and how often it had been written

    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """``state``: the stand-ins by name, as the forward left them."""
        for registered, key, tensor in self._places:
            if tensor is not None:
                registered[key] = state[self._names[id(tensor)]]  # type: ignore[assignment]
        self._writes = {name: (tensor, _compat.writes_so_far(tensor)) for name, tensor in state.items()}

    def remove(self) -> None:
        """The model's own are where they were."""
        for registered, key, tensor in self._places:
            registered[key] = tensor  # type: ignore[assignment]

    def refuse(self, again: Callable[[Any], object]) -> None:
        """Raise ``TraceError`` for what the backward wrote into.

        ``again(mode)`` runs the step once more, on tensors without memory, its backward inside ``mode``.
        """
        written = [
            n for n, (tensor, before) in self._writes.items() if _compat.writes_so_far(tensor) > before
        ]
        if not written:
            return
        seen = _Writes()
        with contextlib.suppress(Exception):
            again(seen)
        place = f" at {seen.place}" if seen.place else ""
        raise TraceError(
            f"the backward of {type(self._model).__name__} writes into {written[0]}{place}; a planned step "
            "computes gradients in its backward and would not. Note it outside what is planned, from the "
            "gradients of parameters, inputs or outputs, or plan the parts of the model without it"
        )


class _Writes(_compat.TorchDispatchMode):
    """Remembers the user's first line that writes into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.place: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.place is None and _compat.writes_arguments(func):
            self.place = users_place(sys._getframe(1))
        return func(*args, **(kwargs or {}))
