"""What one value was that a forward read, and what of a value is compared.

A :class:`Node` has no reference to the model it was read from: its ``kind`` says how it is compared, its
``value`` and ``parts`` with what.
"""

from __future__ import annotations

import enum
import pathlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from planner.capture.state.reads import is_plain_object

__all__ = [
    "ABSENT",
    "PLAIN",
    "Node",
    "bytes_of",
    "layout_of",
    "like_of",
    "of_cell",
    "registered_in",
    "slots_of",
    "text_of",
]


ABSENT = type("Absent", (), {"__repr__": lambda _: "absent"})()


PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), slice, range,
    np.generic, enum.Enum, pathlib.PurePath, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.CodeType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip


@dataclass(eq=False)
class Node:
    """What one value was.  ``text``: how it is named in messages."""

    kind: str
    of: type
    value: Any = None
    parts: dict[Any, Node] = field(default_factory=dict)
    text: str = ""


def registered_in(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps parameters, buffers and modules."""
    return module._parameters, module._buffers, module._modules


def slots_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a bound method, a partial function or a descriptor holds."""
    for name in ("__func__", "__self__", "func", "args", "keywords", "fget"):
        held = getattr(value, name, None)
        if held is not None:
            yield name, held


def of_cell(cell: types.CellType) -> Any:
    """What the cell of a closure holds; ``ABSENT`` where it was not filled."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled
        return ABSENT


def like_of(value: Any) -> Any:
    """What tells a cache's contents from something else put in their place."""
    return (value.dim(), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def layout_of(tensor: Any) -> Any:
    """How a tensor is laid out, on which device; ``None`` of anything else."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def bytes_of(array: Any) -> Any:
    """Shape, type and contents of an array of numpy; ``None`` of anything else."""
    if not isinstance(array, np.ndarray):
        return None
    held = [id(x) for x in array.flat] if array.dtype.hasobject else array.tobytes()
    return array.shape, array.dtype, held


def text_of(value: Any) -> str:
    """How a value is named in messages, in at most 80 characters."""
    if isinstance(value, torch.Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"a tensor {str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (types.FunctionType, types.MethodType, type)):
        return getattr(value, "__qualname__", repr(value))
    text = object.__repr__(value) if is_plain_object(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
