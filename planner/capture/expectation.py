"""What a capture depended on: inputs, parameters, modules, autocast, as of the moment it was made.

A captured graph is right for one structure of inputs, one set of modules with their training flags,
parameters of certain sizes and ``requires_grad``, one autocast state.  Here that is written down;
:mod:`planner.runtime.guard` holds it against what is there at each planned step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.capture.module import home_of
from planner.capture.state.asked import Asked
from planner.capture.state.watched import Watched

__all__ = ["Expectation", "TensorSpec", "autocast_state", "expectation_of"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (in elements), dtype, device and whether autograd tracks it.

    ``offset``  how many elements into its storage it begins, where a graph depends on that; else ``None``.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    offset: int | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, *, placed: bool = False) -> TensorSpec:
        """The spec of a tensor, fake or real; ``placed``: with its offset."""
        offset = int(tensor.storage_offset()) if placed else None
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, offset
        )

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether this is the spec of ``tensor``."""
        return TensorSpec.of(tensor, placed=self.offset is not None) == self

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}] on {self.device}"


@dataclass(frozen=True)
class Expectation:
    """All that the capture depended on.

    ``leaves``       tensor specs and constants of the flattened inputs; ``in_spec`` their structure.
    ``parameters``   by name (buffers too); ``tied`` maps each further name to the first.
    ``modules``      (path, type name, training flag) in traversal order.
    ``autocast``     see :func:`autocast_state`.
    ``default_dtype``  torch's, which a forward may read without saying so.
    ``read``         what the forward read besides: attributes, globals, functions, plain tensors.
    ``asked``        what it asked of the values of the batch.
    """

    in_spec: Any
    leaves: tuple[Any, ...]
    parameters: dict[str, TensorSpec]
    tied: dict[str, str]
    modules: tuple[tuple[str, str, bool], ...]
    autocast: tuple[bool, str]
    default_dtype: torch.dtype
    read: Watched
    asked: Asked


def expectation_of(
    model: nn.Module,
    leaves: Sequence[Any],
    in_spec: Any,
    read: Watched | None = None,
    asked: Asked | None = None,
) -> Expectation:
    """What a capture of ``model`` at these inputs (flattened, with their structure) depends on, as of now.

    ``read``, ``asked``  what its forward read, and asked of the batch, if it was traced.
    """
    read = Watched() if read is None else read
    position = itertools.count()
    return Expectation(
        in_spec,
        tuple(
            TensorSpec.of(x, placed=next(position) in read.placed) if isinstance(x, torch.Tensor) else x
            for x in leaves
        ),
        {
            n: TensorSpec.of(t, placed=n in read.placed)
            for n, t in (*model.named_parameters(), *model.named_buffers())
        },
        _tied(model),
        tuple((n, type(m).__name__, m.training) for n, m in model.named_modules()),
        autocast_state(home_of(model, leaves)),
        torch.get_default_dtype(),
        read,
        asked or Asked(),
    )


def autocast_state(device: torch.device) -> tuple[bool, str]:
    """Whether autocast is on for the device's type, and to which dtype ("" where it is off)."""
    on = torch.is_autocast_enabled(device.type)
    return on, str(torch.get_autocast_dtype(device.type)) if on else ""


def _tied(model: nn.Module) -> dict[str, str]:
    """Names beyond the first of each parameter and buffer, and the first."""
    first: dict[int, str] = {}
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {n: first[id(t)] for n, t in tensors if first.setdefault(id(t), n) != n}
