"""What a forward does to its modules besides computing: seen, put back, refused where it matters.

A captured graph computes outputs and new buffer values.  A forward that also stores tensors on its
modules, or counts there, would be left without that by a planned step, and would keep fake tensors
from the trace.  Caches of anything else (masks' keys, chosen functions) are put back and let pass, and so
are caches of constant tensors, which the first call fills and later calls leave (a grid, a table of
angles): the graph works them out at each step, see :func:`is_cache`.
Numbers and strings that a first call corrects and later calls leave (Swin's windows at a small image, the
kind of problem that labels are of) are corrected, as eager's first call would: see :func:`settled`.  A first
call that runs other ops than those behind it is refused: see :func:`alike`.

Looked at are the attributes of modules and, deeper, lists, dicts, sets and plain objects that hang there or
in ``others``.

Known limits: objects are compared by identity; what is changed outside of these goes unseen.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from planner._compat import STAND_INS, TorchDispatchMode, pytree, storage_key
from planner.capture.as_eager.generators import global_sources
from planner.capture.state.reads import OWN, Slot, is_plain_object
from planner.errors import TraceError

__all__ = [
    "Alike",
    "Before",
    "Effects",
    "Marks",
    "OpsSeen",
    "alike",
    "attributes_kept",
    "is_cache",
    "others_kept",
    "settle",
    "settled",
    "tensors_kept",
]

_identity, _kind_of = id, type  # a capture replaces the builtins, for code outside torch

_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)
)
_Container = list[Any] | dict[Any, Any] | set[Any]


@dataclass
class Effects:
    """What a forward left on its modules, since put back.

    ``stored``   names of attributes that held tensors, and ``tensors`` these.
    ``changed``  (name, container, key, value before, value left) of numbers and strings that were there; the
                 container of a module's attribute is ``vars(module)``.
    ``grown``    names of lists, dicts and sets that held more than before.
    ``written``  by (id of a dict, key): whatever was left there; by (id of a list or set, ``None``).
    ``left``     containers that had changed, and what they then held.
    ``hooks``    on modules that it set: where, under which key, and what.
    ``touched``  names of all that had changed, ``changed`` and ``stored`` among it.
    ``look``     looks at another container, by its name, from here on.
    """

    stored: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    changed: list[tuple[str, Any, Any, Any, Any]] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    written: dict[tuple[int, Any], Any] = field(default_factory=dict)
    left: list[tuple[_Container | Slot, Any]] = field(default_factory=list)
    hooks: list[tuple[dict[Any, Any], Any, Any]] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    look: Callable[[str, Any], None] = lambda _, __: None

    @property
    def lost(self) -> list[str]:
        """Names of what a plan would have to store, count or add to."""
        counts = [name for name, _, _, _, now in self.changed if type(now) in (int, float)]
        return list(dict.fromkeys(self.stored + counts + self.grown))

    @property
    def going(self) -> tuple[str, ...]:
        """Names of numbers that changed and of what grew: of a second call, what each call does."""
        return tuple(dict.fromkeys([*(name for name, *_ in self.changed), *self.grown]))

    def again(self) -> None:
        """Leave it all once more."""
        for held, key, hook in self.hooks:
            held[key] = hook
        for container, contents in self.left:
            if isinstance(container, Slot):
                container.put(contents)
            else:
                _fill(container, contents)


def _set(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, Slot):
        container.put(value)
    else:
        container[key] = value


def settle(effects: Effects) -> None:
    """Leave ``effects.changed`` on the modules."""
    for _, container, key, _, now in effects.changed:
        _set(container, key, now)


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
                _set(container, key, was)
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


@contextlib.contextmanager
def attributes_kept(model: nn.Module, others: Iterable[tuple[str, Any]] = ()) -> Iterator[Effects]:
    """Put every module's attributes back on leaving; what is yielded then says what they had become.

    ``others``  (name, container) of what is looked at besides; those met on the way may be added
                (:attr:`Effects.look`).

    Hooks that the forward set are taken off with the attribute that remembers them: transformers sets its
    recorders at a model's first call, and would set them twice.
    """
    kept = _Kept()
    for path, module in model.named_modules():
        kept.look(f"{path}." if path else "", module)
    for name, other in others:
        kept.look(name, other)
    hooks = [(held, dict(held)) for m in model.modules() for held in (getattr(m, name) for name in _HOOKS)]
    effects = Effects(look=kept.look)
    try:
        yield effects
    finally:
        kept.put_back(effects)
        for held, was in hooks:
            for key in held.keys() - was.keys():
                effects.hooks.append((held, key, held.pop(key)))


class Before:
    """A model before its forward runs: attributes, buffers, random states, put back where it runs twice.

    Of weights that do not train (a teacher that the forward moves) there is a copy, unless they are more
    than those that do.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = _Kept()
        for path, module in model.named_modules():
            inside = f"{path}." if path else ""
            self._kept.look(inside, module)
            for held in (module._parameters, module._buffers):  # others may be put there
                if type(held) is dict:
                    self._kept.keep(inside, held)
        for name, parameter in model.named_parameters():
            if vars(parameter):  # a quantized weight has its scales there, which its layer takes away
                self._kept.keep(f"{name}.", vars(parameter))
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        plain = [p for p in model.parameters() if type(p.data) is torch.Tensor and not p.is_inference()]
        self._bound = [(p, p.data, p._version) for p in plain]
        frozen = [p for p in plain if not p.requires_grad]
        few = 2 * sum(p.nbytes for p in frozen) <= sum(p.nbytes for p in plain)
        self._copies = {id(p): p.detach().clone() for p in frozen if few}
        self._states = global_sources()
        self._torch = torch.get_rng_state()
        devices = sorted({b.device.index or 0 for b in model.parameters() if b.device.type == "cuda"})
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices]

    def is_lost(self) -> bool:
        """Whether weights were written over of which there is no copy."""
        return any(p._version != version and id(p) not in self._copies for p, _, version in self._bound)

    def put_back(self) -> None:
        """As it was."""
        self._kept.put_back(Effects())
        with torch.no_grad():
            for parameter, data, _ in self._bound:
                if parameter.data.data_ptr() != data.data_ptr():
                    parameter.data = data
                copy = self._copies.get(id(parameter))
                if copy is not None and not torch.equal(parameter, copy):
                    parameter.copy_(copy)
            for buffer, was in self._buffers:
                if not torch.equal(buffer, was):
                    buffer.copy_(was)
        for source in self._states:
            source.restore()
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


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


class _Kept:
    """Containers and what they held, with the name of each."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[str, _Container, _Container, frozenset[str]]] = {}
        self._slots: list[tuple[str, Slot, Any]] = []
        self._results: dict[int, tuple[Any, int]] = {}  # functions that remember theirs, and how many

    def look(self, name: str, value: Any) -> None:
        """Remember ``value``, if it can be written to, and what is in it.

        ``name`` ends in a dot for what has attributes.
        """
        if isinstance(value, Slot):
            self._slots.append((name, value, value.value))
            return
        if isinstance(value, functools._lru_cache_wrapper):
            self._results.setdefault(_identity(value), (value, value.cache_info().misses))
            return
        if _identity(value) in self._held or isinstance(value, (str, int, float, torch.Tensor)):
            return
        if isinstance(value, nn.Module) or is_plain_object(value) or type(value) is SimpleNamespace:
            if isinstance(value, nn.Module) and type(value._modules) is dict:  # a scripted one has another
                self.keep(name, value._modules, OWN)
            held = getattr(value, "__dict__", None)
            if type(held) is dict and _identity(held) not in self._held:
                self.keep(name, held, OWN if isinstance(value, nn.Module) else frozenset())
                for key, item in held.items():
                    if key not in OWN or not isinstance(value, nn.Module):
                        self.look(f"{name}{key}" + "." * _has_attributes(item), item)
        elif isinstance(value, (list, tuple)):
            if type(value) is list:
                self.keep(name, value)
            for i, item in enumerate(value):
                self.look(f"{name}[{i}]" + "." * _has_attributes(item), item)
        elif type(value) is dict:
            self.keep(name, value)
            for key, item in value.items():
                self.look(f"{name}[{key!r}]" + "." * _has_attributes(item), item)
        elif type(value) is set:
            self.keep(name, value)

    def keep(self, name: str, container: _Container, but: frozenset[str] = frozenset()) -> None:
        """Remember what is in ``container``; all but what is under these keys, of a module's attributes."""
        self._held[_identity(container)] = name, container, container.copy(), but

    def put_back(self, effects: Effects) -> None:
        """Every container as it was; ``effects`` then says what they had become."""
        for name, container, held, but in self._held.values():
            if _same_items(container, held):
                continue
            effects.left.append((container, container.copy()))
            if len(container) > len(held) and not but:
                effects.grown.append(name.rstrip("."))
            if isinstance(container, dict):
                self._compare(name, container, held, but, effects)
            else:
                effects.written[_identity(container), None] = None
                effects.touched.append(name)
            if isinstance(container, list):
                _note_tensors(name, [x for x in container if not any(x is y for y in held)], effects)
            _fill(container, held)
        for name, slot, was in self._slots:
            now = slot.value
            if now is not was:
                effects.left.append((slot, now))
                effects.written[_identity(slot.holder), slot.key] = now
                effects.touched.append(name)
                if not _note_tensors(name, now, effects) and type(now) in (int, float, str) and now != was:
                    effects.changed.append((name, slot, None, was, now))
                slot.put(was)
        for function, misses in self._results.values():
            if function.cache_info().misses != misses:
                function.cache_clear()  # there may be tensors of the trace among them; it will be asked again

    @staticmethod
    def _compare(name: str, now: dict[Any, Any], held: Any, but: frozenset[str], effects: Effects) -> None:
        for key, item in now.items():
            if key in but or (key in held and held[key] is item):
                continue
            module = bool(but)
            inside = f"{name}{key}" if module or name[-1:] == "." else f"{name}[{key!r}]"
            effects.written[_identity(now), key] = item
            effects.touched.append(inside)
            if key == "_flat_weights" and module:  # an RNN's parameters once more
                continue
            if not _note_tensors(inside, item, effects) and (
                key in held and type(item) in (int, float, str) and item != held[key]
            ):
                effects.changed.append((inside, now, key, held[key], item))


def _has_attributes(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_plain_object(value) or type(value) is SimpleNamespace


def _fill(container: _Container, contents: Any) -> None:
    """Make ``container`` hold ``contents``, in place."""
    if isinstance(container, list):
        container[:] = contents
    elif isinstance(container, set):
        container.clear()
        container.update(contents)
    else:  # piece by piece: it may be the attributes of a module
        for key in container.keys() - contents.keys():
            del container[key]
        container.update(contents)


def _same_items(now: Any, held: Any) -> bool:
    if len(now) != len(held):
        return False
    if isinstance(now, dict):
        return all(k in held and held[k] is v for k, v in now.items())
    if isinstance(now, set):
        return bool(now == held)
    return all(a is b for a, b in zip(now, held, strict=True))


def _note_tensors(name: str, value: Any, effects: Effects) -> bool:
    found = list(_tensors_in(value, set()))
    if found:
        effects.stored.append(name)
        effects.tensors.extend(found)
    return bool(found)


def _tensors_in(value: Any, met: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in met:
        return
    met.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _tensors_in(item, met)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, met)
    elif _has_attributes(value) and not isinstance(value, nn.Module):
        yield from _tensors_in(getattr(value, "__dict__", {}), met)
