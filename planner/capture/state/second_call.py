"""What a second call of a forward shows: whether the model settles after the first.

A first call may do what no later one does: it corrects numbers and strings (Swin's windows at a small image,
the kind of problem that labels are of), fills caches of constants (a grid, a table of angles), or runs other
ops altogether.  :func:`settled` and :func:`is_cache` tell these from what goes on changing; :func:`alike`
compares op by op.  Each leaves the model as it found it, but for what ``settled`` says it keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from planner._compat import TorchDispatchMode, pytree, storage_key
from planner.capture.state.effects import Effects, attributes_kept, put

__all__ = ["Alike", "Marks", "OpsSeen", "alike", "is_cache", "settle", "settled"]

_identity, _kind_of = id, type  # a capture replaces the builtins, for code outside torch


def settle(effects: Effects) -> None:
    """Leave ``effects.changed`` on the modules."""
    for _, container, key, _, now in effects.changed:
        put(container, key, now)


def settled(
    model: nn.Module,
    effects: Effects,
    call: Callable[[], object],
    others: Iterable[tuple[str, Any]] = (),
) -> bool:
    """Leave ``effects.changed`` on the modules if another ``call`` leaves them as they are then."""
    settle(effects)
    stays = False
    try:
        with attributes_kept(model, others) as again:
            call()
        stays = not again.changed
    finally:
        if not stays:
            for _, container, key, was, _ in effects.changed:
                put(container, key, was)
    return stays


class Alike(NamedTuple):
    """What a second call has in common with the first: its ``ops``; not what goes on changing (``going``)."""

    ops: bool
    going: tuple[str, ...]


def alike(
    model: nn.Module,
    call: Callable[[contextlib.AbstractContextManager[object]], object],
    named: Mapping[str, torch.Tensor],
    others: Iterable[tuple[str, Any]] = (),
) -> Alike:
    """Whether another ``call``, which finds what the first one left, runs the same ops on the same tensors.

    ``call``   runs the forward within a context of dispatch; ``named``: the tensors that it is given.
    """
    others, ran = list(others), [_Ops(named), _Ops(named)]
    remembers = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a second call would find what the first one cast
    try:
        with attributes_kept(model, others) as first:
            call(ran[0])
        with attributes_kept(model, others):
            first.again()
            with attributes_kept(model, others) as second:
                call(ran[1])
    finally:
        torch.set_autocast_cache_enabled(remembers)
    return Alike(ran[0].seen == ran[1].seen, second.going)


class OpsSeen:
    """Ops with their arguments: tensors by name, or by the place of the op that made them.

    What an op makes is not held on to: torch copies what it hands out where somebody else holds it.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self._named = list(named)  # kept, so that no identity comes again
        self._names: dict[int, Any] = {_identity(t): name for name, t in self._named}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """``func(*args, **kwargs)`` gave ``result``."""
        given: list[Any] = [func]
        self._name_all(args, given)
        if kwargs:
            given.extend(kwargs)
            self._name_all(kwargs.values(), given)
        self.seen.append(tuple(given))
        # by class, where a stand-in that is none would be asked for its own
        for k, made in enumerate(result if issubclass(_kind_of(result), (tuple, list)) else (result,)):
            if isinstance(made, torch.Tensor) and self._name(made) is None:
                vars(made)[_MADE] = self, len(self.seen), k

    def _name(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(_identity(tensor))
        if name is None:
            by, *place = vars(tensor).get(_MADE, (None,))
            return tuple(place) if by is self else None
        return name

    def _name_all(self, values: Iterable[Any], out: list[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                name = self._name(value)
                out.append((tuple(value.shape), value.dtype) if name is None else name)
            elif isinstance(value, (list, tuple)):
                out.append(len(value))
                self._name_all(value, out)
            else:
                out.append(_kind_of(value))
                out.append(value if isinstance(value, (bool, int, float, str, torch.dtype)) else None)


_MADE = "_planner_made"  # on a tensor: by which record, at which place


class _Ops(TorchDispatchMode):
    """Notes each op that runs."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._ops = OpsSeen(named.items())

    @property
    def seen(self) -> list[tuple[Any, ...]]:
        return self._ops.seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # questions, which fakes ask where they remember no answer
            self._ops.note(func, args, kwargs, result)
        return result


def is_cache(
    model: nn.Module,
    call: Callable[[contextlib.AbstractContextManager[object]], object],
    variable: Iterable[torch.Tensor],
    others: Iterable[tuple[str, Any]] = (),
) -> bool:
    """Whether what ``call`` stores are constants, and another call leaves them: a cache.

    ``call``      runs the forward within a context of dispatch.
    ``variable``  the tensors that it is given: what is computed from those is no constant.
    """
    others, marks = list(others), Marks(variable)
    with attributes_kept(model, others) as first:
        call(marks)
    if any(map(marks.has, first.tensors)):
        return False
    with attributes_kept(model, others):
        first.again()
        with attributes_kept(model, others) as second:
            call(contextlib.nullcontext())
    return not second.stored and not second.going


class Marks(TorchDispatchMode):
    """Marks what is computed from marked tensors, or drawn at random."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._marked: dict[Any, torch.Tensor] = {}  # kept, so that no storage is used again
        self._mark(tensors)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` shares storage with something marked."""
        return storage_key(tensor) in self._marked

    def _mark(self, tensors: Iterable[torch.Tensor]) -> None:
        self._marked.update((storage_key(t), t) for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(self.has, given)):
            written = given if func._schema.is_mutable else []
            made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            self._mark([*made, *written])
        return result
