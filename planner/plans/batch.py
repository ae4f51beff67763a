"""A batch as JSON: containers, constants, and tensors by their sizes, without torch.

A file is read where there may be no torch at all, so a record is checked here as far as it is data; what only
an installation can tell (whether this torch has a dtype) is asked where tensors are made of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from planner.errors import PlannerError

__all__ = ["TensorRecord", "decode", "encode", "tensors_in"]

# Every dtype of torch is named so, and nothing else in ``torch`` is.
_DTYPE = re.compile(r"torch\.(bool|bfloat16|(float|complex)\d+(_\w+)?|q?u?int\d+(x\d+)?|bits\d+(x\d+)?)")

_DEVICE = re.compile(r"[a-z]\w*(:\d+)?")
_MOST_ELEMENTS = 2**62  # of any storage: what torch counts bytes with has 63 bits


@dataclass(frozen=True)
class TensorRecord:
    """A tensor without its numbers; ``shape`` and ``stride`` in elements, ``dtype`` as ``"torch.float32"``.

    ``ValueError`` or ``TypeError`` if there can be no such tensor.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str
    requires_grad: bool

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or not _DTYPE.fullmatch(self.dtype):
            raise ValueError(f"an input has dtype {self.dtype!r}")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ValueError(f"an input is on device {self.device!r}")
        if type(self.requires_grad) is not bool:
            raise ValueError(f"whether an input requires a gradient is {self.requires_grad!r}")
        for name in ("shape", "stride"):
            if any(type(n) is not int or n < 0 for n in getattr(self, name)):
                raise ValueError(f"an input has {name} {getattr(self, name)!r}")
        if len(self.shape) != len(self.stride):
            raise ValueError(f"an input has shape {self.shape} and stride {self.stride}")
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True) if n)
        if max(math.prod(self.shape), reach) >= _MOST_ELEMENTS:
            raise ValueError(f"an input has shape {self.shape} and stride {self.stride}, beyond any memory")


def encode(tree: Any, of_tensor: Callable[[Any], TensorRecord | None]) -> Any:
    """``tree`` as JSON; ``of_tensor`` is ``None`` of what is no tensor.

    ``PlannerError`` for a type that no file can describe.
    """
    record = of_tensor(tree)
    if record is not None:
        shape, stride, *rest = astuple(record)
        return {"tensor": [list(shape), list(stride), *rest]}
    if isinstance(tree, Mapping):
        return {"dict": [[str(k), encode(v, of_tensor)] for k, v in tree.items()]}
    if isinstance(tree, (tuple, list)):
        return {"tuple" if isinstance(tree, tuple) else "list": [encode(x, of_tensor) for x in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"constant": tree}
    raise PlannerError(
        f"an input of type {type(tree).__name__} cannot be described in a plan file; pass tensors, numbers, "
        "strings and containers of them"
    )


def decode(record: Any, made: Callable[[TensorRecord], Any]) -> Any:
    """The inverse of :func:`encode`, ``made`` of each tensor.  ``ValueError`` or ``TypeError`` if none."""
    ((kind, body),) = record.items()
    if kind == "tensor":
        shape, stride, dtype, device, requires_grad = body
        return made(TensorRecord(tuple(shape), tuple(stride), dtype, device, requires_grad))
    if kind == "dict":
        return {k: decode(v, made) for k, v in body}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(decode(x, made) for x in body)
    if kind == "constant":
        return body
    raise ValueError(f"an input is described as {kind!r}")


def tensors_in(tree: Any) -> list[TensorRecord]:
    """The tensors of a decoded record, in the order in which they are flattened."""
    if isinstance(tree, TensorRecord):
        return [tree]
    below = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return [found for part in below for found in tensors_in(part)]
