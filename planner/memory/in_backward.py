"""The optimizer in the backward: each parameter steps as soon as its gradient is there, and lets go of it.

Gradients of a whole model never exist together.  :func:`optimizer_in_backward` sets a model up so; a loop
that has done so itself is recognised by what it must have: a hook on a parameter
(``register_post_accumulate_grad_hook``) and a live optimizer that holds this one parameter and no other.

What does not go with it: gradients accumulated over several backwards (each backward steps; refused where
accelerate says that it does so), clipping by the norm of all gradients (they are never there together), and
``GradScaler`` (the step would see scaled gradients).  A parameter that is thawed later has no optimizer, and
is told unless another one holds it.  Under ``DistributedDataParallel`` the hook would see the gradient of one
rank.

The idiom is torch's (https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial);
LOMO (https://arxiv.org/abs/2306.09782) is the same with an optimizer that keeps no state.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planner._compat import (
    current_backward,
    is_fully_sharded,
    is_scaling,
    is_spread,
    post_accumulate_hooks,
)
from planner.alive import instances_of, kinds_of
from planner.errors import PlannerError
from planner.memory.live_optimizers import bytes_of_each, optimizers_holding
from planner.options import check_model

__all__ = ["InBackward", "OptimizerInBackward", "in_backward", "optimizer_in_backward"]


@dataclass(frozen=True)
class InBackward:
    """What is known of the parameters of a model that step in the backward.

    ``scratch_bytes``  by name, what the step takes beside parameter, gradient and state.
    ``state_bytes``    of all of them, kept between steps.
    """

    scratch_bytes: Mapping[str, int]
    state_bytes: int = 0

    def __post_init__(self) -> None:
        for name, count in (*self.scratch_bytes.items(), ("all", self.state_bytes)):
            if count < 0:
                raise ValueError(f"{count} bytes of {name}, want 0 or more")

    def __str__(self) -> str:
        return f"{len(self.scratch_bytes)} parameters step in the backward, {self.state_bytes} bytes of state"


def in_backward(model: nn.Module, *, as_on: torch.device | None = None) -> InBackward:
    """The parameters of ``model`` with a hook and an optimizer of their own, and what that takes.

    ``as_on``  count as if they were on this device.

    One whose step cannot be foreseen counts with no scratch.
    """
    hooked = {name: p for name, p in model.named_parameters() if p.requires_grad and post_accumulate_hooks(p)}
    if not hooked:
        return InBackward({})
    own = {id(p): name for name, p in hooked.items()}
    optimizers: dict[str, Optimizer] = {}
    for optimizer in optimizers_holding(own.keys()):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if len(params) == 1:
            optimizers[own[id(params[0])]] = optimizer
    order = [name for name in hooked if name in optimizers]
    device = next(iter(hooked.values())).device
    taken = bytes_of_each([optimizers[name] for name in order], device, as_on)
    return InBackward(
        {name: of.step_transient_bytes for name, of in zip(order, taken, strict=True)},
        sum(of.state_bytes for of in taken),
    )


class _Step:
    """The hook of one parameter: its optimizer steps, and the gradient goes."""

    def __init__(self, optimizer: Optimizer, owner: OptimizerInBackward) -> None:
        self.optimizer, self.owner = optimizer, owner

    def __call__(self, parameter: Tensor) -> None:
        self.owner._about_to_step()
        self.optimizer.step()
        parameter.grad = None


class OptimizerInBackward:
    """The optimizers of the parameters of one model, each stepped by the backward.

    ``optimizers``  by the parameter's name.  Schedulers of the learning rate are made of each.
    ``frozen``      the parameters that had none to get, by name.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], frozen: Mapping[str, nn.Parameter]) -> None:
        self.optimizers = dict(optimizers)
        self._frozen = {name: weakref.ref(parameter) for name, parameter in frozen.items()}
        self._steps, self._look_at, self._backward = 0, 1, -1
        self._handles = [
            optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(_Step(optimizer, self))
            for optimizer in self.optimizers.values()
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them: what is set here (``group["lr"] = 1e-4``) is set."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Of each optimizer, by the parameter's name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.  ``KeyError`` names parameters that one side does not have."""
        other = sorted(state.keys() ^ self.optimizers.keys())
        if other:
            raise KeyError(f"{other[0]!r} and {len(other) - 1} more are in one of model and state only")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def remove(self) -> None:
        """Take the hooks off: from here on a backward leaves gradients, and nobody steps."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __repr__(self) -> str:
        kinds = sorted({type(optimizer).__name__ for optimizer in self.optimizers.values()})
        return f"OptimizerInBackward({len(self.optimizers)} parameters, {', '.join(kinds)})"

    def _about_to_step(self) -> None:
        """``PlannerError`` where gradients are accumulated or scaled, or a parameter has been thawed.

        The first and the last are asked once a backward; scaling at the 1st, 2nd, 4th ... parameter's step,
        for to look is to ask all objects that there are.
        """
        if (backward := current_backward()) != self._backward:
            self._backward = backward
            _refuse_accumulated()
            self._refuse_thawed()
        self._steps += 1
        if self._steps < self._look_at:
            return
        scalers = instances_of(kinds_of(torch.amp.GradScaler))
        if any(map(is_scaling, scalers)):
            raise PlannerError(
                "a GradScaler is in use in this process, and with the optimizer in the backward each step "
                "would see gradients that are scaled: this one was not taken. Train in bfloat16 or float32 "
                "without a scaler (GradScaler(enabled=False), or del one of another model's), or call "
                ".remove() and step after the backward"
            )
        self._look_at *= 2

    def _refuse_thawed(self) -> None:
        there = {name: found for name, of in self._frozen.items() if (found := of()) is not None}
        thawed = {name: parameter for name, parameter in there.items() if parameter.requires_grad}
        if not thawed:
            return
        others = optimizers_holding({id(parameter) for parameter in thawed.values()})
        held = {id(p) for of in others for group in of.param_groups for p in group["params"]}
        bare = [name for name, parameter in thawed.items() if id(parameter) not in held]
        if bare:
            raise PlannerError(
                f"{len(bare)} parameters, {bare[0]} among them, were frozen when optimizer_in_backward was "
                "called and train now, with no optimizer that holds them: they would never change. Call "
                ".remove() and optimizer_in_backward again, or give them an optimizer of their own. No step "
                "of this backward was taken"
            )
        for name in thawed:  # another optimizer's from here on
            del self._frozen[name]


def _refuse_accumulated() -> None:
    """``PlannerError`` inside accelerate's (so a Trainer's) accumulation of gradients."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    if state is not None and not getattr(state, "_shared_state", {}).get("sync_gradients", True):
        raise PlannerError(
            "gradients are accumulated over several backwards (gradient_accumulation_steps), and with the "
            "optimizer in the backward each of them would step: this step was not taken. Set "
            "gradient_accumulation_steps=1 with a larger batch, or call .remove() and step after the backward"
        )


def optimizer_in_backward(
    model: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], Optimizer]
) -> OptimizerInBackward:
    """Let each parameter of ``model`` step as soon as the backward has its gradient, and let go of that.

    ``make_optimizer``  makes an optimizer of a list of parameters: a class or a ``functools.partial`` of one.
                        It is called once for each parameter that trains, with that one alone.

    The loop is then only ``model(**batch).loss.backward()``.  :func:`planner.plan` and
    :func:`planner.enable` count it: a gradient until its step is over, the steps' scratch where it is taken,
    the optimizers' state throughout.  Optimizers that look at one parameter at a time (AdamW, SGD, Adafactor)
    train as they would after the backward.

    Not to be had with it: gradients accumulated over several backwards (where accelerate does so, the first
    step says so), clipping by the norm of all gradients, ``GradScaler`` (the first step says so),
    ``DistributedDataParallel`` and FSDP2.  A parameter that is thawed later wants another call, and is told.

    Raises ``PlannerError`` for a model whose gradients come from several ranks, one that trains nothing, one
    whose parameters step in the backward already, or one with gradients left over; ``TypeError`` for what
    makes no optimizer.
    """
    check_model(model)
    made_by = make_optimizer.func if isinstance(make_optimizer, functools.partial) else make_optimizer
    is_other_class = isinstance(made_by, type) and not issubclass(made_by, Optimizer)
    if not callable(make_optimizer) or is_other_class or isinstance(made_by, nn.Module):
        raise TypeError(
            f"make_optimizer is {make_optimizer!r}; want what makes an optimizer of a list of parameters: "
            "torch.optim.AdamW, or functools.partial(torch.optim.AdamW, lr=1e-4)"
        )
    _refuse(model)
    optimizers: dict[str, Optimizer] = {}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            made = make_optimizer([parameter])
            if not isinstance(made, Optimizer):
                raise TypeError(f"make_optimizer made a {type(made).__name__}, want a torch.optim.Optimizer")
            held = [p for group in made.param_groups for p in group["params"]]
            if len(held) != 1 or held[0] is not parameter:
                raise TypeError(
                    f"make_optimizer was given {name} alone and made an optimizer of {len(held)} parameters; "
                    "it must be of those that it is given"
                )
            if _wants_closure(made):
                raise TypeError(
                    f"{type(made).__name__} computes the loss again in its step, which a backward cannot: "
                    "take an optimizer whose step() needs nothing, AdamW say, or step after the backward"
                )
            optimizers[name] = made
    return OptimizerInBackward(optimizers, frozen)


def _wants_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    params = dict(model.named_parameters())
    inside = any(is_fully_sharded(m) for m in model.modules()) or any(
        is_spread(type(p)) for p in params.values()
    )
    if inside or isinstance(model, nn.parallel.DistributedDataParallel):
        raise PlannerError(
            f"{kind} adds up its gradients over ranks after a parameter's hook has run, so that steps in the "
            "backward would differ from rank to rank: step after the backward"
        )
    trained = {name: p for name, p in params.items() if p.requires_grad}
    if not trained:
        raise PlannerError(f"no parameter of {kind} is trained, so there is nothing to step")
    stepping = in_backward(model).scratch_bytes
    if stepping:
        raise PlannerError(
            f"{len(stepping)} parameters of {kind}, {min(stepping)} among them, have an optimizer in the "
            "backward already: .remove() that first"
        )
    left = [name for name, p in trained.items() if p.grad is not None]
    if left:
        raise PlannerError(
            f"{len(left)} gradients of {kind}, of {left[0]} among them, are there already, and the first "
            "step would add to them: model.zero_grad(set_to_none=True) first"
        )
