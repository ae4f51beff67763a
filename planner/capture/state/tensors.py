"""Tensors that a forward puts on modules where a graph would not: put back, and refused.

Parameters and buffers of the model itself (:func:`tensors_kept`), and tensors of modules that are no part of
it (:func:`others_kept`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from planner._compat import STAND_INS
from planner.errors import TraceError

__all__ = ["others_kept", "tensors_kept"]


@contextlib.contextmanager
def others_kept(model: nn.Module) -> Iterator[None]:
    """Put tensors of modules that are no part of ``model`` back; ``TraceError`` if the forward replaced any.

    A library's list of all its modules, say, which a call of one resets.  They would keep tensors of the
    trace.  Those of modules that the forward itself made are its own affair.
    """
    own = {id(module) for module in model.modules()}
    thread, write = threading.get_ident(), nn.Module.__setattr__
    was: dict[tuple[int, str], tuple[nn.Module, str, torch.Tensor]] = {}

    def __setattr__(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and id(module) not in own and threading.get_ident() == thread:
            before = getattr(module, name, None)
            if isinstance(before, torch.Tensor) and not isinstance(before, STAND_INS):
                was.setdefault((id(module), name), (module, name, before))
        write(module, name, value)

    type.__setattr__(nn.Module, "__setattr__", __setattr__)
    try:
        yield
    finally:
        type.__setattr__(nn.Module, "__setattr__", write)
        for module, name, before in was.values():
            write(module, name, before)
    for module, name, _ in was.values():
        raise TraceError(
            f"the forward of {type(model).__name__} stores a tensor in {name} of a {type(module).__name__} "
            "that is no part of it (of a library's list of all its modules, say); a planned step runs one "
            "graph and would not. Do it outside forward"
        )


@contextlib.contextmanager
def tensors_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's parameters and buffers back; ``TraceError`` if the forward registered another.

    ``torch.func.functional_call`` puts them back itself, but leaves its own where a module has two names,
    and knows nothing of buffers that the forward registers.
    """
    before = [
        (path, m, dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set))
        for path, m in model.named_modules()
    ]
    made: list[str] = []
    try:
        yield
    finally:
        for path, module, parameters, buffers, passing in before:
            new = [k for k, b in module._buffers.items() if b is not None and buffers.get(k) is None]
            made.extend(f"{path}.{key}" if path else key for key in new)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            for key in module._buffers.keys() - buffers.keys():
                del module._buffers[key]
            module._non_persistent_buffers_set.intersection_update(passing)
            module._non_persistent_buffers_set.update(passing)
    if made:
        raise TraceError(
            f"the forward of {type(model).__name__} registers the buffer {made[0]}; a planned step runs one "
            "graph and would not. Register it in __init__; where it is a cache that the first call fills, "
            "call the model once before planning"
        )
