"""A model run on tensors without memory: to look at its outputs, or once more at what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner._compat import pytree
from planner.capture.as_eager.values import Values
from planner.capture.flat_model import called
from planner.capture.inputs import Inputs
from planner.capture.sizes import fake_inputs, fake_of
from planner.capture.state.effects import attributes_kept

__all__ = ["on_fakes", "output_on_fakes", "step_on_fakes"]


def output_on_fakes(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, without memory."""
    with attributes_kept(model):
        return on_fakes(model, inputs)[0](contextlib.nullcontext())


def on_fakes(
    model: nn.Module, inputs: Inputs
) -> tuple[Callable[[contextlib.AbstractContextManager[object]], Any], dict[str, torch.Tensor]]:
    """What runs the model without memory, within a context, and the tensors it is given, by name."""
    flat, spec = inputs.flatten()
    mode, fake, _ = fake_inputs(model, flat, None)
    state = {n: fake_of(mode, t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    args, kwargs = pytree.tree_unflatten(fake, spec)

    values = Values(inputs)

    def call(around: contextlib.AbstractContextManager[object]) -> Any:
        values.begin(x for x in fake if isinstance(x, torch.Tensor))
        with mode, values.watching(), _compat.values_unchecked(), _compat.fakes_as_last_time(), around:
            return called(model, dict(state), args, kwargs)

    inputs_given = {f"input {i}": x for i, x in enumerate(fake) if isinstance(x, torch.Tensor)}
    return call, {**state, **inputs_given}


def step_on_fakes(
    model: nn.Module, inputs: Inputs, around: contextlib.AbstractContextManager[Any] | None = None
) -> None:
    """Forward and backward of the model, without memory; ``around``: a context for the backward."""
    outputs = pytree.tree_leaves(output_on_fakes(model, inputs))
    roots = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    with _compat.fake_mode_of(roots[0]), _compat.fakes_as_last_time(), around or contextlib.nullcontext():
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
