"""The stand-in for a module's forward that runs training steps as planned, and everything else as before.

It takes the place of ``forward`` on one instance.  A call that trains (training mode, gradients enabled,
nobody tracing) is run by the plan for calls of its kind, made on the spot from the arguments it came with
if it is the first (:mod:`planner.training.ondemand`).  Every other call goes to the forward that was there
before.

When the model was edited after planning (a layer replaced, an adapter added, ``requires_grad`` changed) the
guard notices before anything runs, and the step is captured and planned again.  An exception from a planned
step, Ctrl-C and out of memory included, leaves nothing behind but what eager would: gradients that had
already arrived.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.plan import Plan
from planner.runtime.tracing import is_traced
from planner.training import huggingface
from planner.training.ondemand import OnDemand
from planner.training.settings import Settings

__all__ = ["Switch"]


class Switch:
    """``planned.forward`` while the switch is on; ``root`` is the model that was enabled."""

    def __init__(self, root: nn.Module, planned: nn.Module, settings: Settings) -> None:
        self.root, self.planned = root, planned
        self.on = False
        self._before: Callable[..., Any] | None = None  # what planned.__dict__ held under "forward"
        self._lowered: list[nn.Module] = []
        self._planning = False
        self._plans = OnDemand(root, planned, settings, self._aside)

    @property
    def settings(self) -> Settings:
        """The options in force."""
        return self._plans.settings

    @property
    def plan(self) -> Plan | None:
        """The plan of the last training call, ``None`` before the first."""
        return self._plans.last

    @property
    def calls(self) -> int | None:
        """How many calls a step is taken to have; ``None`` until its first one has told."""
        return self._plans.calls

    # -- on and off --------------------------------------------------------------------------------

    def turn_on(self) -> None:
        """Plan from the next training call on."""
        if self.settings.budget_bytes is None:
            raise ValueError(
                f"no budget for this {type(self.root).__name__}: pass planner.enable(model, budget_gb=8), or "
                'gradient_checkpointing_kwargs={"budget_gb": 8}'
            )
        if not self.on:
            self._lowered = huggingface.flags_raised(self.root)
            huggingface.set_flags(self._lowered, False)
            if vars(self.planned).get("forward") is not self:
                self._before = vars(self.planned).get("forward")
                vars(self.planned)["forward"] = self
        self.on = True

    def turn_off(self) -> None:
        """Back to the forward that was there; what was planned is kept for the next time."""
        if self.on:
            huggingface.set_flags(self._lowered, True)
            self._lowered = []
            if vars(self.planned).get("forward") is self:  # else somebody wrapped it: pass through
                _put_back(self.planned, self._before)
        self.on = False

    def change(self, settings: Settings) -> None:
        """From the next training call on."""
        self._plans.change(settings)

    # -- as a forward ------------------------------------------------------------------------------

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that this one stands in for."""
        if self._before is not None:
            return self._before
        forward: Callable[..., Any] = type(self.planned).forward.__get__(self.planned)
        return forward

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original  # so that inspect.signature shows the model's own arguments

    @property
    def __code__(self) -> Any:
        return self.original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.planned:  # bound once more, by a library that unwraps forwards
            args = args[1:]
        if not self._trains(args, kwargs):
            return self.original(*args, **kwargs)
        kwargs = huggingface.training_arguments(self.original, getattr(self.planned, "config", None), kwargs)
        call = self._plans.arrived(args, kwargs)
        if call.fake:
            return self.original(*args, **kwargs)
        kept = self._plans.find(call) or self._plans.make(call, self.original)
        outputs = kept.runner.run(call.leaves, call.in_spec)
        self._plans.started(kept)
        return outputs

    def _trains(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            self.on
            and not self._planning
            and self.planned.training
            and torch.is_grad_enabled()
            and (
                any(p.requires_grad for p in self.planned.parameters())
                or any(t.requires_grad for t in Inputs(args, kwargs).tensors())
            )
            and not is_traced(type(self.root).__name__)
        )

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """This very stand-in is the forward, and steps back: a capture looks beneath it, not at a wrapper."""
        standing, planning = vars(self.planned).get("forward"), self._planning
        vars(self.planned)["forward"], self._planning = self, True
        try:
            yield
        finally:
            _put_back(self.planned, standing)
            self._planning = planning

    # -- copies ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model is enabled as the first one is, and plans for itself."""
        kept = ("root", "planned", "on", "_before", "_lowered")
        instance = isinstance(self.settings.optimizer, torch.optim.Optimizer)
        settings = replace(self.settings, optimizer="find") if instance else self.settings
        return {**{name: vars(self)[name] for name in kept}, "settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        settings = state.pop("settings")
        vars(self).update(state)
        self._planning = False
        self._plans = OnDemand(self.root, self.planned, settings, self._aside)


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
