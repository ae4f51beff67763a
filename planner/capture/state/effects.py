"""What a forward leaves on its modules besides computing: seen, and put back.

A captured graph computes outputs and new buffer values.  A forward that also stores tensors on its modules,
or counts there, would be left without that by a planned step, and would keep fake tensors from the trace.
:func:`attributes_kept` puts all of it back and says what there was; whether it matters is told by a second
call (:mod:`~planner.capture.state.second_call`).  Caches of anything but tensors (masks' keys, chosen
functions) are put back and let pass.

Looked at are the attributes of modules and, deeper, lists, dicts, sets and plain objects that hang there or
in ``others``.

Known limits: objects are compared by identity; what is changed outside of these goes unseen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from planner.capture.as_eager.generators import global_sources
from planner.capture.state.reads import OWN, Slot, is_plain_object

__all__ = ["Before", "Effects", "attributes_kept", "put"]

_identity = id  # a capture replaces the builtins, for code outside torch

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
        """Leave on the modules what the forward had left there."""
        for held, key, hook in self.hooks:
            held[key] = hook
        for container, contents in self.left:
            if isinstance(container, Slot):
                container.put(contents)
            else:
                _fill(container, contents)


def put(container: Any, key: Any, value: Any) -> None:
    """Leave ``value`` in ``container``: a slot, or a dict or list under ``key``."""
    if isinstance(container, Slot):
        container.put(value)
    else:
        container[key] = value


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
        """The model as it was before the forward."""
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
