"""Recorders that are on, in this process: at most one at a time is the top mode of a thread."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from planner import _compat
from planner.regions.recorder import Recorder

__all__ = ["Watch", "is_watched"]


class Owner(Protocol):
    """Whose steps are recorded."""

    @property
    def is_called(self) -> bool:
        """Whether a call of it runs."""
        ...

    @property
    def is_under_way(self) -> bool:
        """Whether a call of its step is about to run, runs, or may yet have a backward."""
        ...


class _Entered(NamedTuple):
    """Where a recorder was entered: by whom, in which thread, under which of the dispatcher's keys."""

    owner: weakref.ref[Owner]
    thread: int
    keys: tuple[int, int]


# Those of this process that are on.  One whose step is over is taken off by the next call of its model, where
# the last of its calls is freed, before an optimizer's step, or at a garbage collection: the first of these.
# (A mode that is taken off as the backward ends is put back by the engine.)
_RECORDERS: weakref.WeakKeyDictionary[Recorder, _Entered] = weakref.WeakKeyDictionary()


# Of the dispatcher where nothing is going on: one that was entered within compiled code is taken off there.
_OUTSIDE = _compat.dispatch_state()


class Watch:
    """The recorder of one model's training loop."""

    def __init__(self, owner: Owner, device: torch.device) -> None:
        self._owner, self._device = weakref.ref(owner), device
        self._on: Recorder | None = None

    def may_begin(self, *, must: bool = False) -> bool:
        """Whether a step that begins now can be recorded; ``must``: although another model's is."""
        for recorder, entered in list(_RECORDERS.items()):
            owner = entered.owner()
            if must or not recorder.counts or owner is None or not owner.is_under_way:
                _take_off(recorder)
        if self._on is not None and self._on not in _RECORDERS:
            self._on = None
        return not _compat.watching_modes() and self._on is None

    def begin(self, there: Iterable[torch.Tensor]) -> Recorder:
        """Record the step that begins, which finds ``there``, until its backward is through."""
        _before_optimizers()
        recorder = Recorder(self._device)
        recorder.register(*there)
        recorder.__enter__()
        _RECORDERS[recorder] = _Entered(self._owner, threading.get_ident(), _compat.dispatch_state())
        if _at_collections not in gc.callbacks:
            gc.callbacks.append(_at_collections)
        self._on = recorder
        return recorder

    def settle(self, only: Recorder | None = None) -> None:
        """Take a recorder off that has seen its step; ``only``: this one.  Within a call it stays."""
        recorder, owner = self._on, self._owner()
        if recorder is None or only not in (None, recorder) or (owner is not None and owner.is_called):
            return
        if recorder not in _RECORDERS or _take_off(recorder):
            self._on = None

    def settle_with(self, holder: object) -> None:
        """Take the recorder off when ``holder`` is gone."""
        if self._on is not None:
            weakref.finalize(holder, self.settle, self._on).atexit = False


def is_watched() -> bool:
    """Whether a mode is on that records no model's step, which will be over soon."""
    return bool(_compat.watching_modes()) and not any(map(_compat.is_top_mode, list(_RECORDERS)))


@functools.cache
def _before_optimizers() -> None:
    """From here on recorders that have seen their steps are taken off before an optimizer's."""
    register_optimizer_step_pre_hook(_take_off_those_through)


def _take_off_those_through(*_: Any) -> None:
    for recorder, entered in list(_RECORDERS.items()):
        owner = entered.owner()
        if not recorder.counts or owner is None or not owner.is_under_way:
            _take_off(recorder)


def _at_collections(phase: str, _: object) -> None:
    if phase == "stop":
        _take_off_those_through()
        if not _RECORDERS and _at_collections in gc.callbacks:
            gc.callbacks.remove(_at_collections)


def _take_off(recorder: Recorder) -> bool:
    """End its record, if this is the place to take it off."""
    _, thread, keys = _RECORDERS[recorder]
    if threading.get_ident() != thread or _compat.current_backward() != -1:
        return False
    if not _compat.is_top_mode(recorder) or _compat.dispatch_state() not in (keys, _OUTSIDE):
        return False
    del _RECORDERS[recorder]
    recorder.counts = False
    recorder.__exit__(None, None, None)
    return True
