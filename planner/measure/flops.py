"""FLOPs of a step, counted while it runs: torch's counter, with the kernels it does not know.

In: the step of :mod:`planner.measure.step`.  Matrix products, convolutions, attention and recurrences count;
elementwise work counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from planner._compat import flop_counter_sees_pieces
from planner.capture.outputs import LossFn
from planner.measure.step import Batch, backward, call, forward, own, tangents_for, undone

__all__ = ["FLOP_FORMULAS", "step_flops"]

aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, products: tuple[int, int]) -> int:
    """``products``: matrix products over the key's depth, and over the value's."""
    batch, heads, rows, depth = query
    return 2 * batch * heads * rows * key[-2] * (products[0] * depth + products[1] * value[-1])


def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention_flops(query, key, value, (1, 1))  # QK', PV


def _backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention_flops(query, key, value, (3, 2))  # QK' again, dS K, dS'Q; dO V', P'dO


def _lstm_flops(x: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """Two products per step: with the weight of the input, and of the state."""
    return 2 * math.prod(x[:2]) * (math.prod(of_input) + math.prod(of_state))


def _lstm_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _lstm_flops(*args, **kwargs)


def _grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Groups of rows, columns or of what is summed over are together as much as one product."""
    return 2 * math.prod(a) * b[-1] if len(a) == 2 or len(b) == 3 else 2 * a[1] * a[2] * b[-1]


def _added_flops(_sum: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")

# torch's counter does not know grouped products, products added in place, the CPU's attention kernels and
# LSTM, which it would count as nothing; that of torch 2.11 refuses fewer heads of keys than of queries.
FLOP_FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        aten.addmm_: _added_flops,
        aten.mkldnn_rnn_layer: _lstm_flops,
        aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    }
    | ({aten._grouped_mm: _grouped_flops} if hasattr(aten, "_grouped_mm") else {})  # 2.8+
    | {
        getattr(aten, f"_scaled_dot_product_{kernel}{suffix}"): formula
        for kernel in _ATTENTION
        for suffix, formula in (("", _forward_flops), ("_backward", _backward_flops))
    }
)


class _NoModules:
    """In place of what counts FLOPs by module: its hooks refuse a gradient taken inside a forward."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def step_flops(
    fn_or_module: nn.Module | Callable[..., Any],
    inputs: Batch = None,
    *,
    loss_fn: LossFn | None = None,
    tangents: Iterable[Tensor] | None = None,
) -> int:
    """FLOPs of one step, forward, backward and any recomputation, counted while it runs.

    Matrix products, convolutions and attention, by torch's FlopCounterMode; elementwise work counts
    as nothing.  The step is that of :func:`step_peak`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS))
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with flop_counter_sees_pieces(), counter:
        if isinstance(fn_or_module, nn.Module):
            inputs = own(inputs)
            with undone(fn_or_module, inputs):
                passed = forward(fn_or_module, inputs, loss_fn)
                backward(passed, tangents_for(passed, tangents))
        else:
            call(fn_or_module, inputs)
    return counter.get_total_flops()
