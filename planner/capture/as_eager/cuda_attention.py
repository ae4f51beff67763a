"""Attention as CUDA would run it, captured where there is no CUDA.

``scaled_dot_product_attention`` is many kernels: which one runs decides what the forward keeps.  On a CPU
dropout alone turns it into products and a softmax whose matrices of (heads, length, length) are kept,
which no CUDA kernel has.  Under :class:`CudaAttention` a capture on the CPU's fake tensors calls the op
that CUDA would choose, so that the graph has its outputs, its random state and its backward.

The choice follows ``select_sdp_backend`` in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` of
torch 2.11: cuDNN first on compute capability 9.0 and 10.0 (for cuDNN above 9.15, which builds for CUDA 13
have), then flash, then memory-efficient, then plain products.  It is that of ``torch._fused_sdp_choice`` of
torch 2.11 for CUDA 13, told that the device is of capability 8.0, 8.6, 8.9, 9.0, 10.0 or 12.0, in each of
10,800 calls that vary types, sizes, masks, dropout and grouped heads.  What surrounds each kernel follows
``scaled_dot_product_attention`` in ``aten/src/ATen/native/transformers/attention.cpp``: a boolean mask
becomes an additive one, a mask of odd strides is copied, head dimensions are padded to eight.

Known limits: nested tensors go their own way; ``torch.nn.attention.sdpa_kernel`` around the model is not
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CudaAttention", "Kernel", "kernel_for"]

aten = torch.ops.aten

Kernel = Literal["cudnn", "flash", "efficient", "math"]

_HALF = (torch.bfloat16, torch.float16)
_MASK_ALIGNMENT = 8  # elements: a mask's strides, for the memory-efficient kernel


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def fits(self) -> bool:
        """Of the shape and type that every fused kernel asks for."""
        tensors = (self.query, self.key, self.value)
        return (
            all(t.dim() == 4 and t.stride(-1) == 1 for t in tensors)
            and len({t.dtype for t in tensors}) == 1
            and min(self.query.shape[2], self.key.shape[2]) > 0
            and (self.enable_gqa or self.query.shape[1] == self.key.shape[1])
        )


def kernel_for(call: _Call, capability: tuple[int, int]) -> Kernel:
    """The kernel that CUDA chooses on a device of this compute capability, all of them enabled."""
    if not call.fits or capability < (8, 0):
        return "math"
    if capability in ((9, 0), (10, 0), (10, 3)) and _cudnn_takes(call, capability):
        return "cudnn"
    if _flash_takes(call, capability):
        return "flash"
    return "efficient" if _efficient_takes(call) else "math"


def _cudnn_takes(call: _Call, capability: tuple[int, int]) -> bool:
    query, mask = call.query, call.mask
    depth, value_depth = query.shape[-1], call.value.shape[-1]
    return (
        query.dtype in _HALF
        and max(depth, value_depth) <= (256 if capability == (9, 0) else 128)
        and depth % 8 == value_depth % 8 == 0
        and call.key.shape[2] != 1
        and (call.dropout_p == 0 or query.shape[2] != 1)
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
    )


def _flash_takes(call: _Call, capability: tuple[int, int]) -> bool:
    depth = call.query.shape[-1]
    small = capability in ((8, 6), (8, 9)) or capability[0] == 12
    return (
        call.mask is None
        and call.query.dtype in _HALF
        and depth == call.key.shape[-1] == call.value.shape[-1] <= 256
        and not (small and (192 < depth <= 224 or (depth > 224 and call.dropout_p > 0)))
        and not (call.is_causal and call.query.shape[2] != call.key.shape[2])
    )


def _efficient_takes(call: _Call) -> bool:
    alignment = 128 // (8 * call.query.element_size())
    depth, value_depth = call.query.shape[-1], call.value.shape[-1]
    return (
        call.query.dtype in (*_HALF, torch.float32)
        and depth == call.key.shape[-1]
        and depth % alignment == value_depth % alignment == 0
        and call.query.shape[1] == call.key.shape[1]
    )


class CudaAttention(TorchFunctionMode):
    """While entered, ``scaled_dot_product_attention`` calls the op of CUDA's choice."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _call_of(*args, **kwargs)
        return _RUN[kernel_for(call, self.capability)](call)


def _call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Call:
    return _Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _additive(call: _Call) -> Tensor | None:
    """The mask to add, of the query's type."""
    mask = call.mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    low = torch.full((), -math.inf, dtype=call.query.dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=call.query.dtype, device=mask.device), low)


def _expanded(call: _Call, mask: Tensor | None) -> Tensor | None:
    batch, heads, length, _ = call.query.shape
    return None if mask is None else mask.expand(batch, heads, length, call.key.shape[2])


def _flash(call: _Call) -> Tensor:
    depth = call.query.shape[-1]
    query, key, value = (
        F.pad(t, (0, -depth % 8)) if depth % 8 else t for t in (call.query, call.key, call.value)
    )
    scale = call.scale if call.scale is not None else 1 / math.sqrt(depth)
    out: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, call.dropout_p, call.is_causal, False, scale=scale
    )[0]
    return out[..., :depth] if depth % 8 else out


def _efficient(call: _Call) -> Tensor:
    mask = _additive(call)
    if mask is not None and (mask.stride(-1) != 1 or any(s % _MASK_ALIGNMENT for s in mask.stride()[:-1])):
        size = mask.shape[-1]
        mask = F.pad(mask, (0, _MASK_ALIGNMENT - size % _MASK_ALIGNMENT))[..., :size]
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        call.query,
        call.key,
        call.value,
        _expanded(call, mask),
        True,
        call.dropout_p,
        call.is_causal,
        scale=call.scale,
    )[0]
    return out


def _cudnn(call: _Call) -> Tensor:
    mask = _expanded(call, _additive(call))
    out: Tensor = aten._scaled_dot_product_cudnn_attention(
        call.query, call.key, call.value, mask, True, call.dropout_p, call.is_causal, False, scale=call.scale
    )[0]
    return out


def _math(call: _Call) -> Tensor:
    out: Tensor = aten._scaled_dot_product_attention_math(
        call.query,
        call.key,
        call.value,
        call.mask,
        call.dropout_p,
        call.is_causal,
        None,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )[0]
    return out


_RUN: dict[Kernel, Callable[[_Call], Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}
