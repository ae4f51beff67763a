"""Inputs, parameters and buffers as fake tensors: sizes, strides and storages without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from planner import _compat
from planner._compat import FakeTensor, FakeTensorMode
from planner.capture.sizes import Dims, Sizes
from planner.errors import TraceError

__all__ = ["fake_inputs", "fake_of"]


def _mode_of(model: nn.Module, flat: list[Any]) -> FakeTensorMode:
    for tensor in (*model.parameters(), *model.buffers(), *flat):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(
    model: nn.Module, flat: list[Any], dims: Dims | None
) -> tuple[FakeTensorMode, list[Any], Sizes | None]:
    """The inputs as fake tensors, of symbolic sizes where ``dims`` says so."""
    if dims is None or not any(dims):
        mode = _mode_of(model, flat)
        return mode, [fake_of(mode, x) if isinstance(x, torch.Tensor) else x for x in flat], None
    if any(isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers())):
        raise TraceError(f"sizes cannot vary where {type(model).__name__} is made of fake tensors")
    mode = _compat.symbolic_mode()
    named = iter([(d, f"input{i}") for i, d in enumerate(dims)])
    fake = [
        _compat.symbolic_fake(mode, _plain(x), *next(named)) if isinstance(x, torch.Tensor) else x
        for x in flat
    ]
    return mode, fake, Sizes.of([x for x in fake if isinstance(x, torch.Tensor)])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor by itself: no fake, which another mode does not take (inputs are small), and no view, whose
    base would bring symbols of its own."""
    if isinstance(tensor, FakeTensor):
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    elif tensor._is_view():
        made = tensor.data
    else:
        return tensor
    return made.requires_grad_(tensor.requires_grad)


def fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
