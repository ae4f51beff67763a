"""A model without memory, in one mode of fake tensors: what a capture wants of it.

A model built on the meta device traces without its backward, and one built under one ``FakeTensorMode`` does
not mix with sizes that are symbols of another.  So its tensors are made anew as fakes, on the CPU where they
were on the meta device, and the model is copied around them; what has memory is shared with the original.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from planner._compat import FakeTensor, FakeTensorMode, modes_set_aside, pytree
from planner.memory.optimizer_state import OptimizerLike

__all__ = ["is_without_memory", "remade", "remade_inputs"]

_HOME = torch.device("cpu")


def is_without_memory(model: object) -> bool:
    """Whether a tensor of ``model`` is on the meta device or a fake one."""
    return isinstance(model, nn.Module) and any(map(_is_hollow, _tensors_of(model)))


def is_on_meta(model: object) -> bool:
    """Whether a tensor of ``model`` is on the meta device, where no plan can be made of it."""
    return isinstance(model, nn.Module) and any(
        t.device.type == "meta" for t in _tensors_of(model) if _is_hollow(t)
    )


def remade(
    model: nn.Module, optimizer: OptimizerLike | None, mode: FakeTensorMode
) -> tuple[nn.Module, OptimizerLike | None]:
    """A copy of ``model`` whose tensors without memory are fakes of ``mode``, and the optimizer of it.

    Its other tensors are the model's own.
    """
    memo: dict[int, Any] = {}
    with modes_set_aside():
        for tensor in _tensors_of(model):
            made = _fake_of(mode, tensor) if _is_hollow(tensor) else tensor
            memo.setdefault(id(tensor), made)
        twin: nn.Module = copy.deepcopy(model, memo)
        held = copy.deepcopy(optimizer, memo) if isinstance(optimizer, Optimizer) else optimizer
    return twin, held


def remade_inputs(inputs: object, mode: FakeTensorMode) -> object:
    """``inputs`` whose tensors without memory are fakes of ``mode``; one that comes twice stays one."""
    known: dict[int, torch.Tensor] = {}

    def made(tensor: torch.Tensor) -> torch.Tensor:
        if not _is_hollow(tensor):
            return tensor
        return known.setdefault(id(tensor), _fake_of(mode, tensor))

    with modes_set_aside():
        return pytree.tree_map_only(torch.Tensor, made, inputs)


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from itertools.chain(model.parameters(), model.buffers())
    for module in model.modules():
        yield from (x for x in vars(module).values() if isinstance(x, torch.Tensor))


def _is_hollow(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    device = _HOME if tensor.device.type == "meta" else tensor.device
    shape, stride = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
    with mode:
        fake = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)
