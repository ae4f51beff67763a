"""The few calls a rewritten graph makes beyond aten.

They are plain functions, so ``print(module.code)`` shows them by name, and each does with aten what
its docstring says, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from planner import _compat

__all__ = [
    "aten_op",
    "collective",
    "cudnn_batch_norm_functional",
    "dropout_apply",
    "dropout_mask",
    "dropout_mask_again",
    "dropout_scale",
    "gradient_apart",
    "gradient_like",
    "gradient_scaled",
    "is_capturing",
    "log_sum_below",
    "lstm_layer",
    "replay",
    "rng_state",
    "rng_state_bytes",
    "scale_gradient",
    "sum_over",
    "sum_with",
    "write_over",
    "written",
]


def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """The draw of eager's dropout on the CPU, kept as booleans: ``True`` where ``x`` is kept."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p)


def dropout_mask_again(state: torch.Tensor, device: str, x: torch.Tensor, p: float) -> torch.Tensor:
    """The draw that ``dropout_mask`` made when the generator was at ``state``, which is then put back."""
    mask: torch.Tensor = replay(state, device, dropout_mask, x, p)
    return mask


def dropout_apply(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``x * mask * scale`` in eager's order of operations: dropout, and its gradient.

    On the CPU, where products of mixed dtypes are slow, the mask is first cast into the result.
    """
    if x.device.type == "cpu":
        return torch.empty_like(x).copy_(mask).mul_(scale).mul_(x)
    return x.mul(mask).mul_(scale)


def dropout_scale(p: float, dtype: torch.dtype, device: str) -> float:
    """What eager's dropout multiplies the kept values by.

    Eager has no fused dropout on the CPU: it divides a mask of the input's dtype by ``1 - p``, which
    rounds the factor to that dtype, while ``native_dropout`` multiplies by ``1 / (1 - p)``.  CUDA's kernel
    takes ``1 - p`` in the type it computes in, and its inverse in that type again
    (``aten/src/ATen/native/cuda/Dropout.cu``, ``accscalar_t scale = 1.0 / p``); at ``p=0.15`` that is another
    number.  Its backward is given ``1 / (1 - p)`` by autograd, in eager and here.
    """
    if device.startswith("cuda"):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kept = float(torch.full((), 1.0 - p, dtype=wide))
        return float(torch.full((), 1.0 / kept, dtype=wide))
    return float(torch.ones((), dtype=dtype).div_(1.0 - p))


def collective(call: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What the ranks give together, by a functional collective ("all_reduce.default"), when it is there."""
    return _compat.run_collective(call, args, kwargs)


def cudnn_batch_norm_functional(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """cuDNN's batch norm on copies of the running statistics.

    Output, saved mean and inverse deviation, the moved running statistics, cuDNN's reserve.
    """
    mean, variance = mean.clone(), variance.clone()
    *made, reserve = torch.ops.aten.cudnn_batch_norm.default(
        x, weight, bias, mean, variance, training, momentum, eps
    )
    return (*made, mean, variance, reserve)


def lstm_layer(*args: Any) -> tuple[torch.Tensor, ...]:
    """oneDNN's LSTM over one layer's sequence: outputs, last state, last cell, workspace of its backward.

    The kernel leaves a workspace only where gradients are recorded; of its arguments, detached, none are.
    """
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    with torch.enable_grad():
        made: tuple[torch.Tensor, ...] = torch.ops.aten.mkldnn_rnn_layer.default(*detached)
    return made


def gradient_like(gradient: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """A copy of a gradient in its leaf's layout and dtype, as autograd would make on accumulation."""
    return torch.empty_like(leaf, requires_grad=False).copy_(gradient)


def gradient_apart(gradient: torch.Tensor) -> torch.Tensor:
    """A copy of a gradient on a storage of its own, laid out as it is: whoever reads it adds up by that."""
    steps = gradient.stride()
    once = gradient.as_strided(
        [n if s else min(n, 1) for n, s in zip(gradient.shape, steps, strict=True)], steps
    )
    return once.clone().expand(gradient.shape)


def gradient_scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A gradient that was made for a loss's gradient of one, where that is ``factor``, of one element."""
    return gradient.mul(factor.reshape(()))


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """:func:`gradient_scaled` in the gradient's own storage."""
    return gradient.mul_(factor.reshape(()))


def sum_with(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A sum and one more, of the same type or a narrower one."""
    return total.add(part)


def sum_over(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """:func:`sum_with` in the sum's own storage."""
    return total.add_(part)


def log_sum_below(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The logarithm of the sum of ``exp(scores - top)`` along each column."""
    return scores.sub(top).exp_().sum([0]).log_()


def written(
    base: torch.Tensor, call: str, args: tuple[Any, ...], view: tuple[tuple[Any, ...], ...]
) -> torch.Tensor:
    """:func:`write_over` on a copy of the storage under ``base``, as aten's ``slice_scatter`` makes one."""
    storage = base.untyped_storage()
    whole = base.as_strided((storage.nbytes() // base.element_size(),), (1,), 0).clone()
    copy = whole.as_strided(base.size(), base.stride(), base.storage_offset())
    return write_over(copy, call, args, view)


def write_over(
    base: torch.Tensor, call: str, args: tuple[Any, ...], view: tuple[tuple[Any, ...], ...]
) -> torch.Tensor:
    """``base`` after ``part.call(*args)``, where ``part`` is what the ops of ``view`` make of it in turn.

    ``call``  an in-place op of aten, as ``"copy_.default"``.
    ``view``  each ``(op, *arguments)``, as ``("slice.Tensor", 1, 0, 8)``.
    """
    part = base
    for name, *where in view:
        part = aten_op(name)(part, *where)
    aten_op(call)(part, *args)
    return base


@functools.cache
def aten_op(name: str) -> Any:
    """``torch.ops.aten.NAME`` of ``"add_.Tensor"``."""
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def rng_state(device: str) -> torch.Tensor:
    """State of the device's default generator, as a CPU tensor of ``rng_state_bytes``."""
    if device.startswith("cuda"):
        return torch.cuda.get_rng_state(device)
    state = torch.get_rng_state()
    return torch.ops.aten.lift_fresh.default(state)  # an op, so that memory meters see the new tensor


def rng_state_bytes(device: str) -> int:
    """Bytes of ``rng_state(device)``: a Mersenne twister on CPU, a Philox seed and offset on CUDA."""
    return 16 if device.startswith("cuda") else torch.get_rng_state().numel()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured from the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replay(state: torch.Tensor, device: str, op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` with the generator as it was at ``state``, then put the generator back."""
    cuda = device.startswith("cuda")
    now = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    _set_rng_state(state, device)
    try:
        return op(*args, **kwargs)
    finally:
        _set_rng_state(now, device)


def _set_rng_state(state: torch.Tensor, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
