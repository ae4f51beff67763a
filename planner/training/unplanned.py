"""Calls with gradients that no plan serves: the model in eval mode, or a part of it called by itself.

Nothing is said or planned before a backward came through such a call: many evaluate without ``no_grad``.
Then a call of the model in eval mode is planned from the next one of its kind on, and a part
(``model.encoder(x)``, a method such as ``get_image_features``) is named in one warning.  The parts are
watched by hooks on the model's children, which a planned step never calls.

Known limits: a method that calls no child (``F.linear(x, model.head.weight)``) goes unseen, and so do
embeddings, which loops look up by themselves.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from planner._compat import watching_modes
from planner.measure.meter import StorageMeter
from planner.measure.step import tensors_in
from planner.runtime.tracing import is_traced
from planner.units import bytes_text

__all__ = ["Held", "forget", "put_hooks", "remind", "take_hooks", "when_differentiated", "where_called"]

log = logging.getLogger(__name__)

METERED = 2  # calls whose bytes are counted op by op


class Watcher(Protocol):
    """The switch, as its parts' hooks see it."""

    def opens(self) -> bool:
        """Whether a call that begins now trains, outside of any other; from here on it is open."""
        ...

    def closes(self, name: str, part: nn.Module, outputs: Any) -> None:
        """It has returned ``outputs``, or raised."""
        ...


class _Hook:
    """A hook that only looks on, so that checks that refuse hooks on submodules let it be."""

    only_watches = True

    def __init__(self, watcher: Watcher, name: str) -> None:
        self.watcher, self.name = watcher, name
        self.open = False


class _Before(_Hook):
    def __call__(self, part: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.open = self.watcher.opens()


class _After(_Hook):
    def __init__(self, before: _Before) -> None:
        super().__init__(before.watcher, before.name)
        self.before = before

    def __call__(self, part: nn.Module, args: Any, outputs: Any) -> None:
        if self.before.open and not torch.compiler.is_compiling():
            self.before.open = False
            self.watcher.closes(self.name, part, outputs)


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child, f"{path}{key}.")
        elif not isinstance(child, (nn.Embedding, nn.EmbeddingBag, torch.jit.ScriptModule)):
            yield path + key, child


def put_hooks(module: nn.Module, watcher: Watcher) -> None:
    """Watch the parts of ``module``."""
    take_hooks(module)
    for name, part in _parts(module):
        before = _Before(watcher, name)
        part.register_forward_pre_hook(before)
        part.register_forward_hook(_After(before), always_call=True)


def take_hooks(module: nn.Module) -> None:
    """Watch them no longer; also of a copy, whose hooks nobody has handles of."""
    for _, part in _parts(module):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)


class _Reminder(_Hook):
    """Says once, when a step trains, that the switch was never thrown."""

    def __init__(self, watcher: Watcher, model: nn.Module, budget: str) -> None:
        super().__init__(watcher, type(model).__name__)
        self.budget = budget

    def __call__(self, part: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (part.training and torch.is_grad_enabled()):
            return
        if is_traced(self.name):
            return
        forget(part)
        if hasattr(vars(part).get("forward"), "original"):  # of a plan that was applied by hand
            return
        log.warning(
            "%s trains without a plan: it is enabled%s, and its switch was not thrown. "
            "TrainingArguments(gradient_checkpointing=True) does, model.gradient_checkpointing_enable(), or "
            "planner.enable(model, ..., now=True)",
            self.name, self.budget,
        )  # fmt: skip


def remind(module: nn.Module, watcher: Watcher, model: nn.Module, budget_bytes: int | None) -> None:
    """Let the first call of ``module`` that trains say that nothing is planned yet."""
    forget(module)
    budget = "" if budget_bytes is None else f" for {bytes_text(budget_bytes)}"
    module.register_forward_pre_hook(_Reminder(watcher, model, budget))


def forget(module: nn.Module) -> None:
    """Take the reminder off ``module``; also off a copy."""
    hooks = module._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if isinstance(hook, _Reminder)]:
        del hooks[key]


def is_real(name: str) -> bool:
    """Whether a call computes: nobody traces it, and its tensors have memory."""
    return not is_traced(name)


def when_differentiated(outputs: Any, then: Callable[[bool], None]) -> None:
    """``then(twice)`` at the start of a backward through ``outputs``; ``twice``: one that keeps a graph."""
    try:
        made = [t for t in tensors_in(outputs) if type(t) is torch.Tensor]
    except (TypeError, ValueError):  # a container of its own kind
        return

    def arrives(_: Any) -> None:
        then(torch.is_grad_enabled())

    for node in {t.grad_fn for t in made if t.grad_fn is not None}:
        node.register_prehook(arrives)


class Held:
    """Counts what calls leave behind for their backward: on CUDA always, elsewhere the first few."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._left = METERED
        self._meter: StorageMeter | None = None
        self._before_bytes = 0

    def begin(self) -> None:
        """A call begins."""
        if self.device.type == "cuda":
            self._before_bytes = torch.cuda.memory_allocated(self.device)
        elif self._left and not watching_modes():
            self._left -= 1
            self._meter = StorageMeter(self.device)
            self._meter.__enter__()

    def end(self) -> int | None:
        """Bytes it left; ``None`` where they were not counted.  Outputs are among them."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._before_bytes
        if self._meter is None:
            return None
        meter, self._meter = self._meter, None
        meter.__exit__(None, None, None)
        return meter.made_bytes


def where_called() -> str:
    """The line outside of torch and this package that called, and the function it is in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame):
        frame = frame.f_back
    if frame is None:
        return "a place unknown"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _is_machinery(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "planner", "contextlib")


def held_text(held_bytes: int | None) -> str:
    """As the end of a sentence."""
    return "" if held_bytes is None else f" and held {bytes_text(held_bytes)} for its backward"
