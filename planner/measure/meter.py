"""A meter of live storages that knows nothing of plans: what a plan's predicted peak is judged by.

How it counts.  Each untyped storage seen as an input or output of an op is counted once, at its
full size, until it is freed, whoever holds it: Python, the autograd graph, a closure, a ``.grad``.
(A weak reference watches the storage object, which torch keeps for as long as the storage lives.)
Views cost nothing.  The peak is taken right after each op returns, while its inputs are still alive.
A storage first met as an *input* was there before the meter looked: it is counted from the start.

A sparse tensor is its indices and values, one that is spread over ranks (a DTensor) what this rank has of it.
A storage that is resized, as FSDP2 frees and refills its parameters, counts with the size it has.

It is exact at the granularity of ops.  Known limits: scratch inside a kernel is invisible; tensor
subclasses that wrap others are counted as their outer tensor; under inference mode a composite op is
one op.

The idea is that of ``torch.distributed._tools.MemTracker``, which needs hooks on modules and
optimizers to sort bytes by kind; a judge needs only their sum, and so no hooks.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from planner._compat import (
    TorchDispatchMode,
    dense_parts,
    hear_no_resizes,
    hear_resizes,
    is_spread,
    pieces_of,
)
from planner.units import rounded_up

__all__ = ["StorageMeter"]


LET_GO_S = 0.002  # gloo's threads let go of what they moved a little after it is there


def _op_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among an op's arguments or results: ops only nest lists and tuples."""
    if isinstance(value, Tensor):
        yield from dense_parts(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _op_tensors(item)


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    """A weak reference that remembers the size its storage was last seen with."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of live storages while ops run inside ``with StorageMeter() as meter:``.

    ``device``    count only this device; ``None`` counts all.  A device without an index stands
                  for all devices of its type.
    ``timeline``  keep ``meter.timeline``, one ``(op name, live bytes after it)`` per op.
    ``grain``     count every storage rounded up to a multiple of so many bytes, as an allocator would.

    The context may be left and entered again; what was tracked stays tracked.  Works on fake
    tensors (enter the fake mode first).
    """

    supports_higher_order_operators = True

    def __init__(
        self, device: torch.device | str | None = None, *, timeline: bool = False, grain: int = 1
    ) -> None:
        super().__init__()
        self.grain = grain
        self.device = None if device is None else torch.device(device)
        self.live_bytes = 0
        self._tracked: dict[int, _StorageRef] = {}
        # Bytes that turned out to have been there from the start are added to every moment at once:
        # moments are stored relative to this base.
        self._base_bytes = 0
        self._peak_over_base = 0
        self._talked = False  # whether the last op was a collective
        self._moments: list[tuple[str, int]] | None = [] if timeline else None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo goes on compiling under it (2.10+): it changes nothing of what runs."""
        return True

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive after any op since the start or the last :meth:`reset_peak`."""
        return self._peak_over_base + self._base_bytes

    @property
    def made_bytes(self) -> int:
        """Bytes alive now that were not there when the meter began to look."""
        return self.live_bytes - self._base_bytes

    @property
    def timeline(self) -> tuple[tuple[str, int], ...]:
        """``(op name, live bytes)`` after each op; needs ``timeline=True``."""
        if self._moments is None:
            raise ValueError("no timeline was kept: make the meter with StorageMeter(timeline=True)")
        return tuple((name, over + self._base_bytes) for name, over in self._moments)

    def reset_peak(self) -> None:
        """Forget the past: the peak becomes what is alive now."""
        self._peak_over_base = self.live_bytes - self._base_bytes

    def register(self, *tensors: Tensor) -> None:
        """Count these tensors' storages as alive from the start of the measurement."""
        for tensor in _op_tensors(tensors):
            self._see(tensor, there_before=True)

    def _see(self, tensor: Tensor, *, there_before: bool) -> None:
        if not self._counts_on(tensor.device):
            return
        storage = tensor.untyped_storage()
        nbytes = rounded_up(int(storage.nbytes()), self.grain)
        ref = self._tracked.get(id(storage))
        if ref is None:
            self._track(storage, nbytes, there_before=there_before)
        elif ref.nbytes != nbytes:  # resize_ keeps the storage and changes its size
            self._sized(ref, nbytes)

    def _counts_on(self, device: torch.device) -> bool:
        own = self.device
        return own is None or (device.type == own.type and own.index in (None, device.index))

    def _track(self, storage: torch.UntypedStorage, nbytes: int, *, there_before: bool) -> _StorageRef:
        ref = _StorageRef(storage, self._forget)
        ref.key, ref.nbytes = id(storage), nbytes
        self._tracked[ref.key] = ref
        self.live_bytes += nbytes
        if there_before:
            self._base_bytes += nbytes
        return ref

    def _sized(self, ref: _StorageRef, nbytes: int) -> None:
        self.live_bytes += nbytes - ref.nbytes
        ref.nbytes = nbytes

    def _resized(self, storage: torch.UntypedStorage, before_bytes: int) -> None:
        """Python code has, which no op shows."""
        if not self._counts_on(storage.device):
            return
        ref = self._tracked.get(id(storage))
        if ref is None:
            ref = self._track(storage, rounded_up(before_bytes, self.grain), there_before=True)
        self._sized(ref, rounded_up(int(storage.nbytes()), self.grain))
        self._peak_over_base = max(self._peak_over_base, self.live_bytes - self._base_bytes)

    def settle(self) -> None:
        """Wait for what the last op, a collective, holds in threads of its own."""
        if self._talked and self.device is not None and self.device.type == "cpu":
            time.sleep(LET_GO_S)

    def __enter__(self) -> Any:
        hear_resizes(self._resized)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        hear_no_resizes(self._resized)
        super().__exit__(*exc)

    def _forget(self, ref: _StorageRef) -> None:
        del self._tracked[ref.key]
        self.live_bytes -= ref.nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(is_spread, types)):  # its ops on what this rank has come by here again
            return NotImplemented
        if (pieces := pieces_of(func)) is not None:
            with self:
                return pieces(*args, **kwargs)
        self.settle()
        seen = [*_op_tensors(args), *_op_tensors(tuple(kwargs.values()))]
        # torch.tensor(...) makes its storage out of sight and shows it first to lift_fresh.
        # Likewise gloo, which scatters the sum of a copy, and shows that when it is through.
        fresh = func is torch.ops.aten.lift_fresh.default or self._talked
        self._talked = getattr(func, "namespace", "") in ("c10d", "_c10d_functional")
        for tensor in seen:
            self._see(tensor, there_before=not fresh)
        result = func(*args, **kwargs)
        for tensor in _op_tensors(result):
            self._see(tensor, there_before=False)
        for tensor in seen:
            self._see(tensor, there_before=False)  # the op may have resized or replaced its storage
        over = self.live_bytes - self._base_bytes
        self._peak_over_base = max(self._peak_over_base, over)
        if self._moments is not None:
            self._moments.append((str(func), over))
        return result
