"""What is to be known of single ops, of kernels and of libraries below them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator had nothing left; the CPU's says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def clear_cublas_workspaces() -> None:
    """Give back the scratch that cuBLAS keeps per thread; the next product takes it again; 1.12+."""
    torch._C._cuda_clearCublasWorkspaces()


def batch_norm_is_cudnns(
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether eager's batch norm of these (fake) tensors is cuDNN's; 2.3+."""
    if weight is None or bias is None or (mean is None and not training):
        return False  # torch's first conditions; its function does not take None
    if mean is None or variance is None:
        mean = variance = weight  # neither is as good as both
    private: Any = torch._C
    chosen = private._select_batch_norm_backend(x, weight, bias, mean, variance, training, eps)
    return bool(chosen == private._BatchNormBackend.Cudnn)


def batch_norm_reserve_bytes(x: torch.Tensor, training: bool) -> int:
    """What cuDNN's batch norm keeps for its backward beside the statistics; needs a GPU; 2.3+."""
    if not training:
        return 0
    private: Any = torch._C
    return int(private._get_cudnn_batch_norm_reserve_space_size(x, training))


def cuda_driver_version() -> int:
    """The newest CUDA that the installed driver supports, as 1000 * major + 10 * minor; 0 without one."""
    found = getattr(torch._C, "_cuda_getDriverVersion", None)  # 1.0+, in CUDA builds only
    return 0 if found is None else int(found())


def writes_arguments(target: Any) -> bool:
    """Whether an aten overload writes to one of its arguments; ``False`` for what has no schema; 1.12+."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


@functools.cache
def is_in_place(op: OpOverload) -> bool:
    """Whether an op writes to its first tensor and gives it back; of the schema: torch 2.11 has no tag."""
    schema = op._schema
    if not schema.arguments or len(schema.returns) != 1:
        return False
    written, returned = schema.arguments[0].alias_info, schema.returns[0].alias_info
    if written is None or returned is None or not written.is_write:
        return False
    return bool(written.before_set == returned.before_set)


def pieces_of(func: object) -> Callable[..., Any] | None:
    """What runs the op that a captured call of a mutating custom op is, as ops of its own; 2.5+.

    A mode that sees such an op has no rule for it; run inside the mode, its pieces are seen one by one.
    ``None`` for every other op.
    """
    higher: Any = torch.ops.higher_order
    if func is higher.auto_functionalized or func is higher.auto_functionalized_v2:
        form: Callable[..., Any] = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
        return form
    return None


def dp_knapsack(memory: list[float], runtimes: list[float], max_memory: float) -> list[int]:
    """Items that torch's partitioner would save under ``max_memory``; a yardstick for benchmarks.

    ``memory`` and ``max_memory`` in units of what its memory budget is a fraction of, so about 1.
    """
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack as solve  # 2.6+

    _, saved, _ = solve(memory, runtimes, max_memory)
    return saved


def reads_a_number(func: object) -> bool:
    """Whether the op ``func`` is the one below ``Tensor.item()``."""
    return func is torch.ops.aten._local_scalar_dense.default


def job_store() -> Any:
    """The key-value store that the processes of a job met in; ``None`` if there is none to be had; 1.8+."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store() if torch.distributed.is_initialized() else None
