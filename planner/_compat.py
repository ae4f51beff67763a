"""The one door to private torch APIs: each name, what it is for, which versions have it.

Tested with torch 2.11 and 2.13.  Nothing else in this package imports a private torch name, so a
torch upgrade is a change to this file.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as _functorch_config  # settings of the tracer
import torch.optim.optimizer as _optimizer
import torch.utils._pytree as pytree  # public-to-be container flattening; 2.0+
import torch.utils.checkpoint as _checkpoint
from torch import fx, nn

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import (  # tensors with shapes, strides and storages, no memory; 2.0+
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen  # code that takes one list and clears it; 2.1+
from torch.utils._python_dispatch import TorchDispatchMode  # sees every op below autograd; 1.13+

__all__ = [
    "BoxedCodeGen",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "checkpoint_calls",
    "descriptors",
    "dp_knapsack",
    "export_joint",
    "fake_mode_of",
    "foreach_takes_fakes",
    "is_data_dependent",
    "modes_set_aside",
    "pytree",
    "reads_a_number",
    "size_hint",
    "storage_key",
    "writes_arguments",
]


@contextlib.contextmanager
def _tracing_flags() -> Iterator[None]:
    """Tell libraries that a compiler is looking, and trace the backward as it runs: outside autocast.

    The settings are process-global and put back.
    """
    from torch._export.utils import _compiling_state_context  # 2.7+

    key = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with _compiling_state_context(), _functorch_config.patch(backward_pass_autocast="off"):  # 2.10+
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def export_joint(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The joint graph of ``module`` at fake inputs, undecomposed, each placeholder and output described.

    ``node.meta["desc"]`` on placeholders and on the output node holds ``descriptors`` objects;
    ``node.meta["nn_module_stack"]`` names the module; ``node.meta["val"]`` is a fake tensor.
    """
    with _tracing_flags(), contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, module, args, kwargs, _record_nn_module_stack=True)
        return joint.graph_module


@contextlib.contextmanager
def checkpoint_calls(found: Callable[[], None]) -> Iterator[None]:
    """Call ``found`` when anything enters ``torch.utils.checkpoint`` while the context is open.

    Models hold ``checkpoint`` itself under many names, so its internals are watched instead.
    """

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            found()
            return original(*args, **kwargs)

        return watched

    generator = _checkpoint._checkpoint_without_reentrant_generator  # 2.1+
    function = _checkpoint.CheckpointFunction.apply
    _checkpoint._checkpoint_without_reentrant_generator = watch(generator)
    _checkpoint.CheckpointFunction.apply = watch(function)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _checkpoint._checkpoint_without_reentrant_generator = generator
        del _checkpoint.CheckpointFunction.apply  # the class inherits it


def modes_set_aside() -> contextlib.AbstractContextManager[Any]:
    """Meters and counters that watch ops see none of those inside; 2.0+."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a (fake) tensor: equal for views, unequal otherwise."""
    return tensor.untyped_storage()._cdata


def is_data_dependent(error: BaseException) -> bool:
    """Whether the tracer stopped because the program asked for a tensor's value."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException  # 2.0+
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # 2.1+

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)


def size_hint(size: int | torch.SymInt) -> int:
    """The size as an int; of a symbolic one, what it was traced with, and no guard is made; 2.0+."""
    return size if isinstance(size, int) else int(size.node.hint)


def writes_arguments(target: Any) -> bool:
    """Whether an aten overload writes to one of its arguments; ``False`` for what has no schema; 1.12+."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def fake_mode_of(tensor: torch.Tensor) -> FakeTensorMode:
    """The mode a fake tensor belongs to; enter it to make more of its kind."""
    assert isinstance(tensor, FakeTensor)
    return tensor.fake_mode


@contextlib.contextmanager
def foreach_takes_fakes() -> Iterator[None]:
    """Let optimizers choose between foreach and a loop for fake parameters as they do for real ones.

    Their list of parameter types is process-global (DTensor extends it too) and is put back.
    """
    types = _optimizer._foreach_supported_types  # 2.0+
    types.append(FakeTensor)
    try:
        yield
    finally:
        types.remove(FakeTensor)


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
