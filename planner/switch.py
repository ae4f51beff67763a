"""The stand-in that plans a module's training step when it first sees one, and runs it as planned.

It takes the place of ``forward`` on one instance.  A call that trains (training mode, gradients enabled,
nobody tracing) is run by the plan for calls of its kind; the first of a kind is planned on the spot, from
the arguments it came with.  Every other call goes to the forward that was there before.

A plan is for one :class:`~planner.calls.Signature`: sizes, dtypes, constants, autocast, and whether
gradients of earlier batches are held.  Which plans are kept, and which serves a call, is decided by a
:class:`~planner.shapes.PerShape` and nowhere else.

When the model was edited after planning (a layer replaced, an adapter added, ``requires_grad`` changed) the
guard notices before anything runs, all plans are dropped and the step is planned again.  An exception from
a planned step, Ctrl-C and out of memory included, leaves nothing behind but what eager would: gradients
that had already arrived.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from planner.accounting import OptimizerLike, Resident, resident_of
from planner.calls import Call
from planner.capture import LossFn
from planner.errors import PlannerError, StalePlanError
from planner.integrations import huggingface
from planner.optimizers import found_optimizer_bytes
from planner.plan import Plan
from planner.prepared import CostSource, Prepared, prepare
from planner.runtime import PlannedForward
from planner.shapes import PerShape

__all__ = ["OnLarger", "Settings", "Switch"]

log = logging.getLogger(__name__)

OnLarger = Literal["replan", "raise"]


@dataclass(frozen=True)
class Settings:
    """What :func:`planner.enable` was told; see there."""

    budget_bytes: int | None
    loss_fn: LossFn | None = None
    optimizer: OptimizerLike | Literal["find"] | None = "find"
    costs: CostSource = "auto"
    solver: str = "auto"
    time_limit_s: float = 30.0
    on_larger: OnLarger = "replan"
    max_plans: int = 64

    def __post_init__(self) -> None:
        if self.on_larger not in ("replan", "raise"):
            raise ValueError(f"on_larger must be 'replan' or 'raise', not {self.on_larger!r}")
        if isinstance(self.max_plans, bool) or not isinstance(self.max_plans, int) or self.max_plans < 1:
            raise ValueError(f"max_plans must be a whole number from 1 up, not {self.max_plans!r}")
        if isinstance(self.optimizer, str) and self.optimizer != "find":
            raise TypeError(
                f"optimizer must be 'find', None, an optimizer, its class or bytes, got {self.optimizer!r}"
            )


class Switch:
    """``planned.forward`` while the switch is on; ``root`` is the model that was enabled.

    ``plan``  of the last training call, ``None`` before the first.
    """

    def __init__(self, root: nn.Module, planned: nn.Module, settings: Settings) -> None:
        self.root, self.planned = root, planned
        self.settings = settings
        self.on = False
        self.plan: Plan | None = None
        self._before: Callable[..., Any] | None = None  # what planned.__dict__ held under "forward"
        self._lowered: list[nn.Module] = []
        self._forget()

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
        """From the next training call on; steps already captured are not captured again."""
        if settings == self.settings:
            return
        if (settings.loss_fn, settings.costs) != (self.settings.loss_fn, self.settings.costs):
            self._steps.clear()
        self.settings = settings
        self._plans = PerShape(settings.max_plans)

    def _forget(self) -> None:
        """Drop every plan and every captured step."""
        self._plans = PerShape(self.settings.max_plans)
        self._steps: dict[object, Prepared] = {}
        self._announced = False
        self._planning = False

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
        if not self._trains():
            return self.original(*args, **kwargs)
        kwargs = huggingface.training_arguments(self.original, getattr(self.planned, "config", None), kwargs)
        parameter = next(p for p in self.planned.parameters() if p.requires_grad)
        has_gradients = any(p.grad is not None for p in self.root.parameters())
        call = Call.of(args, kwargs, parameter.device, has_gradients)
        if call.fake:
            return self.original(*args, **kwargs)
        runner = self._runner(call)
        return runner(*args, **kwargs)

    def _trains(self) -> bool:
        return (
            self.on
            and not self._planning
            and self.planned.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and any(p.requires_grad for p in self.planned.parameters())
        )

    def _runner(self, call: Call) -> PlannedForward:
        kept = self._plans.find(call)
        if kept is not None:
            try:
                kept[1].check(call.leaves, call.in_spec)
            except StalePlanError as edited:
                log.info("%s is planned again: %s", type(self.root).__name__, edited)
                self._forget()
                kept = None
        if kept is None:
            kept = self._planned(call)
        self.plan, runner = kept
        return runner

    # -- planning ----------------------------------------------------------------------------------

    def _planned(self, call: Call) -> tuple[Plan, PlannedForward]:
        self._refuse(call)
        began = time.perf_counter()
        self._planning = True
        try:
            with self._in_place():
                plan = self._solved(call)
                runner = PlannedForward(self.planned, plan.step(), original=self.original)
        finally:
            self._planning = False
        self._plans.keep(call, plan, runner)
        level = logging.DEBUG if self._announced else logging.INFO
        self._announced = True
        log.log(level, "%s", _announcement(plan, call, time.perf_counter() - began))
        return plan, runner

    def _solved(self, call: Call) -> Plan:
        s = self.settings
        assert s.budget_bytes is not None
        key = replace(call.signature, has_gradients=False)
        step = self._steps.get(key)
        if step is None:
            step = prepare(self.planned, call.inputs, loss_fn=s.loss_fn, costs=s.costs)
            if len(self._steps) >= s.max_plans:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = step
        step = replace(step, resident=self._resident(call, step), least_limit_s=s.time_limit_s)
        return step.plan_bytes(s.budget_bytes, solver=s.solver, time_limit_s=s.time_limit_s, hint=self.plan)

    def _resident(self, call: Call, step: Prepared) -> Resident:
        """What the device holds through a step of the whole model, not only of the part that is planned."""
        chosen = self.settings.optimizer
        arguments = (call.inputs.args, call.inputs.kwargs)
        device = step.graph.device
        found = resident_of(self.root, arguments, None if chosen == "find" else chosen, device=device)
        if chosen == "find":
            taken = found_optimizer_bytes(self.root, device)
            found = replace(
                found,
                optimizer_state_bytes=taken.state_bytes,
                optimizer_step_bytes=taken.step_transient_bytes,
            )
        inside = {id(p) for p in self.planned.parameters()}
        outside = [p for p in self.root.parameters() if id(p) not in inside and p.requires_grad]
        coming = sum(p.nbytes for p in outside if p.grad is None and p.device == device)
        return replace(found, gradients_bytes=found.gradients_bytes + coming)

    def _refuse(self, call: Call) -> None:
        where = next(self.planned.parameters()).device
        strange = [x for x in call.leaves if isinstance(x, torch.Tensor) and x.dim() and x.device != where]
        if strange:
            raise PlannerError(
                f"{type(self.root).__name__} is on {where} and was called with a tensor on "
                f"{strange[0].device}: move the batch to the model. (nn.DataParallel cannot be planned: "
                "start one process per device, with torchrun, and use DistributedDataParallel)"
            )
        if self.settings.on_larger == "raise" and self._plans.exceeds(call):
            raise StalePlanError(
                f"a batch of {call.signature} came after the plan was made for {self._plans.largest}, which "
                "is smaller; start with the largest batch, or use planner.enable(..., on_larger='replan')"
            )

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """This very stand-in as ``planned.forward``, if libraries wrapped it: a capture looks beneath it."""
        standing = vars(self.planned).get("forward")
        vars(self.planned)["forward"] = self
        try:
            yield
        finally:
            _put_back(self.planned, standing)

    # -- copies ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model is enabled as the first one is, and plans for itself."""
        kept = ("root", "planned", "on", "_before", "_lowered")
        state: dict[str, Any] = {name: vars(self)[name] for name in kept}
        instance = isinstance(self.settings.optimizer, torch.optim.Optimizer)
        state["settings"] = replace(self.settings, optimizer="find") if instance else self.settings
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.plan = None
        self._forget()


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


def _announcement(plan: Plan, call: Call, seconds: float) -> str:
    gb = 1e9
    return (
        f"{plan.model_name} planned to {plan.budget_bytes / gb:.4g} GB for {call.signature}: peak "
        f"{plan.peak_bytes / gb:.4g} GB (nothing recomputed: {plan.baseline_peak_bytes / gb:.4g} GB), "
        f"overhead {plan.overhead:.2%} (proved >= {plan.overhead_bound:.2%}), {seconds:.1f} s to plan"
    )
