"""What holds the values of a tensor, and who holds that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._python_dispatch as _python_dispatch  # the modes that are on; 1.13+

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch.multiprocessing.reductions import StorageWeakRef  # does not hold the storage; 1.0+


def is_scaling(scaler: torch.amp.GradScaler) -> bool:
    """Whether it has scaled a loss; 2.3+."""
    return scaler.is_enabled() and scaler._scale is not None


def post_accumulate_hooks(parameter: torch.Tensor) -> dict[int, Any]:
    """What runs when the gradient of a leaf has been added up, by handle; empty without any; 2.1+."""
    found: dict[int, Any] | None = parameter._post_accumulate_grad_hooks
    return {} if found is None else found


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts (made under inference mode); 1.9+."""
    return -1 if tensor.is_inference() else tensor._version


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a (fake) tensor: equal for views, unequal otherwise."""
    return tensor.untyped_storage()._cdata


def dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that hold the values of ``tensor``: itself, those inside of it, or a sparse one's indices
    and values; 2.1+.
    """
    if wraps_others(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = (getattr(tensor, name) for name in names)  # of a DTensor its mesh too
        return tuple(part for one in inner if isinstance(one, torch.Tensor) for part in dense_parts(one))
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # a kernel library's own, whose storage is out of sight


def generator_key(generator: torch.Generator) -> int:
    """Identity of a generator, whichever object of Python's stands for it; 1.7+."""
    return int(generator._cdata)  # type: ignore[attr-defined]


def weak_storage(tensor: torch.Tensor) -> tuple[Any, int]:
    """A reference to a tensor's storage that does not hold it, and its bytes."""
    storage = tensor.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()


def storage_uses(ref: Any) -> int:
    """How many tensors (and Python objects) hold the storage of :func:`weak_storage`; 0: it is gone."""
    return int(torch._C._storage_Use_Count(ref.cdata))  # as the CUDA graph trees of inductor; 2.1+


@functools.cache
def _uses_by_python() -> int:
    """What Python's object of a storage adds to its uses: differs from version to version."""
    tensor = torch.empty(1)
    return storage_uses(weak_storage(tensor)[0]) - 1


def tensors_on(ref: Any) -> int:
    """How many tensors lie on the storage of :func:`weak_storage`, which Python has seen."""
    return storage_uses(ref) - _uses_by_python()


def gone(tensor: torch.Tensor) -> Callable[[], bool]:
    """Whether nothing holds ``tensor`` any more, to be asked later; autograd's holding counts; 2.0+."""
    return torch._C._WeakTensorRef(tensor).expired  # type: ignore[attr-defined]


def wraps_others(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has others inside, which its ops are taken to (quantized, nested, sharded); 2.1+."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)
