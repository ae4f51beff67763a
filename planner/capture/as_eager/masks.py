"""transformers' attention masks as eager has them, while a compiler seems to look.

Attention without padding needs no mask: transformers then passes ``is_causal`` instead, which flash
attention takes and for which grouped keys are not repeated.  While it is traced it makes the mask after
all, since whether one is needed may depend on values that a trace does not have.  A plan made from such
a trace would run another, slower kernel than the model itself.  But without ``attention_mask`` nothing
depends on values, with one exception: positions that start over inside a row mean several sequences in
one row.  So, while a step is captured,

* where there is no padding mask, whether to leave the causal one out is asked as eager asks it;
* positions that the model itself counted, as opposed to those it was given, are known not to start over.
  They are recognised by how they were made: ``torch.arange``, plus a number, reshaped.

A batch that has an ``attention_mask`` is captured with the mask, whatever it holds: the plan is right for
every mask, and where nothing is padded eager would have used another kernel.

Known weakness: this names three functions of ``transformers.masking_utils``; a version that has others is
traced as it wants to be, with masks.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["masks_as_eager"]

_MASKING = "transformers.masking_utils"
_CONSECUTIVE = "_rises_by_one"  # set on tensors whose last dimension is known to count up by one

# What keeps each row counting up by one, whatever else it is given: numbers and sizes, never tensors.
_KEEPS = frozenset(
    {
        torch.Tensor.__add__,
        torch.Tensor.__radd__,
        torch.Tensor.add,
        torch.Tensor.expand,
        torch.Tensor.long,
        torch.Tensor.to,
        torch.add,
    }
)

_PASSES_ON = frozenset({torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.__getitem__})  # some of them
_MAY_COUNT_UP = _KEEPS | _PASSES_ON | {torch.arange}


def _is_one_of_theirs(model: nn.Module) -> bool:
    """Whether ``model`` may call what makes transformers' masks."""
    return any(cls.__module__.startswith("transformers") for m in model.modules() for cls in type(m).__mro__)


@contextlib.contextmanager
def masks_as_eager(
    model: nn.Module, eagerly: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Iterator[None]:
    """Leave out of the capture what eager leaves out; ``eagerly()`` is a context in which nobody traces."""
    masking = sys.modules.get(_MASKING)
    if masking is None or not _is_one_of_theirs(model):
        yield
        return
    wrappers: dict[str, Callable[..., Any]] = {
        "find_packed_sequence_indices": _none_if_consecutive,
        "_ignore_causal_mask_sdpa": functools.partial(_asked_eagerly, eagerly),
        "_ignore_bidirectional_mask_sdpa": functools.partial(_asked_eagerly, eagerly),
    }
    before = {name: getattr(masking, name) for name in wrappers if hasattr(masking, name)}
    for name, original in before.items():
        setattr(masking, name, functools.wraps(original)(functools.partial(wrappers[name], original)))
    try:
        with _Consecutive():
            yield
    finally:
        for name, original in before.items():
            setattr(masking, name, original)


def _none_if_consecutive(original: Callable[..., Any], position_ids: torch.Tensor) -> Any:
    """Which sequence of its row each token is in; ``None``, as in eager, if there is only one."""
    return None if getattr(position_ids, _CONSECUTIVE, False) else original(position_ids)


def _asked_eagerly(
    eagerly: Callable[[], contextlib.AbstractContextManager[Any]],
    original: Callable[..., bool],
    padding_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """Whether no mask is needed: without padding the answer depends on sizes alone."""
    if padding_mask is not None:
        return original(padding_mask, *args, **kwargs)
    with eagerly():
        return original(padding_mask, *args, **kwargs)


class _Consecutive(TorchFunctionMode):
    """Marks integers whose last dimension counts up by one, by the calls that made them."""

    def __init__(self) -> None:
        super().__init__()
        self._writes: dict[Any, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func in _MAY_COUNT_UP
            and _counts_up(func, args, kwargs or {})
            and isinstance(result, torch.Tensor)
        ):
            setattr(result, _CONSECUTIVE, result.dtype in (torch.int32, torch.int64))
        elif self._may_write(func) and args and getattr(args[0], _CONSECUTIVE, False):
            setattr(args[0], _CONSECUTIVE, False)
        return result

    def _may_write(self, func: Any) -> bool:
        known = self._writes.get(func)
        if known is None:
            known = self._writes[func] = _writes(func)
        return known


def _writes(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _counts_up(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result of the call counts up by one along its last dimension."""
    if func is torch.arange:
        return len(args) <= 2 and "step" not in kwargs
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if len(tensors) != 1 or not getattr(tensors[0], _CONSECUTIVE, False):
        return False
    if func in (torch.Tensor.unsqueeze, torch.unsqueeze):
        return args[1:] == (0,) or kwargs == {"dim": 0}
    if func is torch.Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        whole = all(i is None or i == slice(None) for i in index)
        return whole and (index == (None,) or index[-1] == slice(None))
    return func in _KEEPS
