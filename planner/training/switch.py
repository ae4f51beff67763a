"""The stand-in for a module's forward that runs training steps as planned, and everything else as before.

It takes the place of ``forward`` on one instance.  A call that trains (training mode, gradients enabled,
nobody tracing) is run by the plan for calls of its kind, made on the spot from the arguments it came with
if it is the first (:mod:`planner.training.ondemand`).  Every other call goes to the forward that was there
before; one in eval mode is planned too once a backward came through one of its kind, and a part of the model
that trains by itself is named (:mod:`planner.training.unplanned`).

When the model was edited after planning (a layer replaced, an adapter added, ``requires_grad`` changed) the
guard notices before anything runs, and the step is captured and planned again.  An exception from a planned
step, Ctrl-C and out of memory included, leaves nothing behind but what eager would: gradients that had
already arrived.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import left_alone
from planner.capture.inputs import Inputs
from planner.capture.module import home_of
from planner.compiled.loop import Compiled
from planner.errors import PlannerError, TraceError
from planner.plan import Plan
from planner.runtime.tracing import is_traced
from planner.training import huggingface, unplanned
from planner.training.calls import Call, Signature
from planner.training.in_regions import InRegions
from planner.training.ondemand import OnDemand
from planner.training.settings import Settings

__all__ = ["Switch"]

log = logging.getLogger(__name__)


class Switch:
    """``planned.forward`` while the switch is on; ``root`` is the model that was enabled."""

    def __init__(self, root: nn.Module, planned: nn.Module, settings: Settings) -> None:
        self.root, self.planned = root, planned
        self.on = False
        self._before: Callable[..., Any] | None = None  # what planned.__dict__ held under "forward"
        self._lowered: list[nn.Module] = []
        self._planning = False
        self._plans = OnDemand(root, planned, settings, self._aside)
        self._watch()

    def _watch(self) -> None:
        self._regions: InRegions | None = None  # where the step is not one graph
        self._compiled: Compiled | None = None
        self._flagged: list[nn.Module] = []  # modules whose own checkpointing serves calls without a plan
        self._running = 0  # calls without a plan that have begun
        self._told: set[str] = set()
        self._differentiated: set[Signature] = (
            set()
        )  # kinds of calls in eval mode that a backward came through
        self._refused: set[Signature] = set()
        self._held: unplanned.Held | None = None

    @property
    def settings(self) -> Settings:
        """The options in force."""
        return self._plans.settings

    @property
    def plan(self) -> Plan | None:
        """The plan of the last training call, ``None`` before the first."""
        if self._compiled is not None:
            return self._compiled.last
        return self._plans.last if self._regions is None else self._regions.last

    @property
    def calls(self) -> int | None:
        """How many calls a step is taken to have; ``None`` until its first one has told."""
        return self._plans.calls

    # -- on and off --------------------------------------------------------------------------------

    def turn_on(self, *, by_name: bool = False) -> None:
        """Plan from the next training call on.

        ``by_name``: the library's own switch was asked for; what no plan serves is to checkpoint as it says.
        """
        if self.settings.budget_bytes is None:
            raise ValueError(
                f"no budget for this {type(self.root).__name__}: pass planner.enable(model, budget_gb=8), or "
                'gradient_checkpointing_kwargs={"budget_gb": 8}'
            )
        unplanned.forget(self.planned)
        if not self.on:
            self._lowered = huggingface.flags_raised(self.root)
            self._flagged = huggingface.own_checkpointing(self.root) if by_name else self._lowered
            huggingface.set_flags(self._flagged, False)
            unplanned.put_hooks(self.planned, self)
            if vars(self.planned).get("forward") is not self:
                self._before = vars(self.planned).get("forward")
                vars(self.planned)["forward"] = self
        self.on = True

    def remind(self) -> None:
        """Say so, once, where a step trains before the switch was thrown."""
        if not self.on:
            unplanned.remind(self.planned, self, self.root, self.settings.budget_bytes)

    def turn_off(self) -> None:
        """Back to the forward that was there; what was planned is kept for the next time."""
        unplanned.forget(self.planned)
        if self.on:
            unplanned.take_hooks(self.planned)
            huggingface.set_flags(self._lowered, True)
            self._lowered = []
            self._flagged = []
            if vars(self.planned).get("forward") is self:  # else somebody wrapped it: pass through
                _put_back(self.planned, self._before)
        self.on = False

    def change(self, settings: Settings) -> None:
        """From the next training call on."""
        if settings != self.settings:
            self._compiled = None
        self._plans.change(settings)
        if self._regions is not None and settings.capture != "one graph":
            self._regions.change(settings)
        else:
            self._regions = None

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

    @left_alone
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.planned:  # bound once more, by a library that unwraps forwards
            args = args[1:]
        if self.settings.backend == "inductor" and torch.compiler.is_dynamo_compiling():
            return _outside(self, args, kwargs)  # whoever compiles around it leaves it to itself
        if not self._trains(args, kwargs):
            self._plans.settle()
            if self._regions is not None:
                self._regions.settle()
            return self._as_written(*args, **kwargs)
        if not self.planned.training and not self._is_known_to_train(args, kwargs):
            return self._unplanned(args, kwargs)
        asked = huggingface.training_arguments(self.original, getattr(self.planned, "config", None), kwargs)
        if self.settings.backend == "inductor":
            if self._compiled is None:
                unplanned.take_hooks(self.planned)  # Dynamo would look into them
                self._compiled = self._of_graphs()
            return self._compiled(*args, **asked)
        if self._regions is None and self.settings.capture == "regions":
            self._cut("so it was asked for")
        if self._regions is not None:
            return self._regions(*args, **asked)
        call = self._plans.arrived(args, asked)
        if call.fake:
            return self._as_written(*args, **kwargs)
        try:
            kept = self._plans.find(call) or self._plans.make(call, self.original)
        except PlannerError as error:
            if isinstance(error, TraceError) and self.settings.capture == "auto":
                return self._cut(str(error))(*args, **asked)
            if self.planned.training:
                raise
            self._refuse(args, kwargs, error)
            return self._unplanned(args, kwargs)
        return self._plans.run(kept, call)

    def _as_written(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that this one stands in for; Dynamo would find a bound one by its name: here."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self.planned).forward(self.planned, *args, **kwargs)

    def _of_graphs(self) -> Compiled:
        s = self.settings
        assert s.budget_bytes is not None
        return Compiled(
            self.root, self.planned, self._plain(), s.budget_bytes, s.optimizer, s.costs, s.search,
            s.recompute,
        )  # fmt: skip

    def _plain(self) -> Callable[..., Any]:
        """A function that runs the forward, which Dynamo follows."""
        before, planned = self._before, self.planned

        def forward(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                return before(*args, **kwargs)
            return type(planned).forward(planned, *args, **kwargs)

        return forward

    def _cut(self, why: str) -> InRegions:
        """From here on in regions."""
        unplanned.take_hooks(self.planned)  # Dynamo would look into them
        self._regions = InRegions(self.root, self.planned, self.settings, why)
        return self._regions

    def _trains(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            self.on
            and not self._planning
            and not self._running
            and torch.is_grad_enabled()
            and (
                any(p.requires_grad for p in self.planned.parameters())
                or any(t.requires_grad for t in Inputs(args, kwargs).tensors())
            )
            and not is_traced(type(self.root).__name__)
        )

    # -- calls without a plan ----------------------------------------------------------------------

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        return Call.of(args, kwargs, module=self.planned).signature.kind

    def _is_known_to_train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not self._differentiated:
            return False
        kind = self._kind(args, kwargs)
        return kind in self._differentiated and kind not in self._refused

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: PlannerError) -> None:
        self._refused.add(self._kind(args, kwargs))
        self._tell("refused", f"{type(self.root).__name__} in eval mode goes on without a plan: {error}")

    def _unplanned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call in eval mode; it is planned from the next one on if a backward comes through it."""
        if not self.opens():
            return self._as_written(*args, **kwargs)
        outputs = None
        try:
            outputs = self._as_written(*args, **kwargs)
        finally:
            held = self._close()
        kind, name = self._kind(args, kwargs), type(self.root).__name__
        if kind not in self._refused:
            where = unplanned.where_called()

            def differentiated(twice: bool) -> None:
                if kind in self._refused:
                    return
                (self._refused if twice else self._differentiated).add(kind)
                then = "calls like it are planned from the next one on"
                if twice:
                    then = "no plan can be differentiated twice"
                self._tell(
                    f"eval {twice}",
                    f"this {name} was called in eval mode with gradients ({where}): the call ran without a "
                    f"plan{unplanned.held_text(held)}; {then}",
                )

            unplanned.when_differentiated(outputs, differentiated)
        return outputs

    def opens(self) -> bool:
        """Whether a call that begins now, of the model or a part, has no plan; then it has begun."""
        name = type(self.root).__name__
        if not self.on or self._planning or self._running or not unplanned.is_real(name):
            return False
        self._running += 1
        huggingface.set_flags(self._flagged, True)
        if self._held is None:
            self._held = unplanned.Held(home_of(self.planned, ()))
        self._held.begin()
        return True

    def _close(self) -> int | None:
        assert self._held is not None
        self._running -= 1
        huggingface.set_flags(self._flagged, False)
        return self._held.end()

    def closes(self, name: str, part: nn.Module, outputs: Any) -> None:
        """A part of the model was called by itself."""
        held = self._close()
        if name in self._told:
            return
        where, root = unplanned.where_called(), type(self.root).__name__

        def differentiated(_: bool) -> None:
            self._tell(
                name,
                f"{name} ({type(part).__name__}) of this {root} was called by itself and trains ({where}): "
                f"the call ran without a plan{unplanned.held_text(held)}. Planned are calls of the whole "
                f"{root}; call that, or enable the part that is called, planner.enable(model.{name}, ...)",
            )

        unplanned.when_differentiated(outputs, differentiated)

    def _tell(self, what: str, message: str) -> None:
        """Once for each ``what``."""
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", message)

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
        kept = ("root", "planned", "on", "_before", "_lowered", "_flagged")
        instance = isinstance(self.settings.optimizer, torch.optim.Optimizer)
        settings = replace(self.settings, optimizer="find") if instance else self.settings
        return {**{name: vars(self)[name] for name in kept}, "settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        settings = state.pop("settings")
        self._watch()
        vars(self).update(state)
        self._planning = False
        self._plans = OnDemand(self.root, self.planned, settings, self._aside)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(switch: Switch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return switch(*args, **kwargs)


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
