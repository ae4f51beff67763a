"""What stood where a forward read, and whether it stands there still.

:func:`watched` writes down the values behind :class:`~planner.capture.state.reads.Reads` without reference
to one model: :class:`Watched` may be held against any instance. :meth:`Watched.bind` does that, value by
value, and gives back a flat list of who has to be whom, which is what is asked at each step: identities
first, and the values only where these differ.

Known limits: what is neither plain, a container, a function, a tensor nor an object with attributes is
known by its type and, from then on, by its identity.  Attributes that the forward itself writes (a cache)
may change to what it writes.
"""

from __future__ import annotations

import enum
import functools
import pathlib
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from planner._compat import version_of
from planner.capture.state.reads import OWN, Reads, is_plain_object
from planner.errors import StalePlanError

__all__ = ["Bound", "Watched", "watched"]

ABSENT = type("Absent", (), {"__repr__": lambda _: "absent"})()

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), slice, range,
    np.generic, enum.Enum, pathlib.PurePath, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.CodeType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
_BY_VALUE = frozenset({"tolist", "numpy", "item", "array", "asarray", "from_numpy", "__array__"})
_Lists = (list, tuple, set, frozenset, deque)


# -- what stood there ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """What one value was.  ``text``: how it is named in messages."""

    kind: str
    of: type
    value: Any = None
    parts: dict[Any, Node] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Watched:
    """What a forward read, and what stood there.

    ``modules``     of each module in traversal order: what was read of it.
    ``namespaces``  (name, namespace or class, what was read of it).
    ``placed``      names of parameters and buffers, and positions among the tensors of the inputs, that it
                    asked where in their storages they begin.
    """

    modules: tuple[Node, ...] = ()
    namespaces: tuple[tuple[str, Any, Node], ...] = ()
    placed: frozenset[str | int] = frozenset()

    def __repr__(self) -> str:
        read = sum(len(node.parts) for node in (*self.modules, *(n for _, _, n in self.namespaces)))
        return f"Watched({read} attributes of {len(self.modules)} modules, globals included)"

    def bind(self, model: nn.Module, before: Bound | None = None) -> Bound:
        """Who has to be whom in ``model``; ``StalePlanError`` if something else stands there already.

        ``before``: who had to be so far, where this ``model`` was bound already.
        """
        binder = _Binder(model, before)
        for (path, module), node in zip(model.named_modules(), self.modules, strict=False):
            binder.owner = path or "the model"
            binder.contents(vars(module), module, node, "")
        for name, namespace, node in self.namespaces:
            binder.owner = name
            binder.contents(
                vars(namespace) if isinstance(namespace, type) else namespace, namespace, node, ""
            )
        return binder.bound


class _Freezer:
    def __init__(self, model: nn.Module, reads: Reads, written: Mapping[tuple[int, Any], Any]) -> None:
        self.reads, self.written = reads, written
        self.modules = {id(m): i for i, m in enumerate(model.modules())}
        tensors = (*model.named_parameters(), *model.named_buffers())
        self.tensors = {id(t): name for name, t in tensors}
        self.known: dict[int, Node] = {}
        self.alive: list[Any] = []
        self.by_value = bool(reads.names & _BY_VALUE)
        self.loose = False  # a library's own registries grow, and its globals are filled as they are needed

    def attributes(self, owner: Any, held: Mapping[str, Any], names: Collection[str]) -> Node:
        """What stood under ``names`` in ``held``, the attributes of ``owner``."""
        node = Node("attributes", type(owner))
        for name in names:
            if isinstance(owner, nn.Module) and name not in held:
                registered = next((d for d in _registered(owner) if name in d), None)
                if registered is not None:
                    if registered[name] is None:
                        node.parts[name] = Node("unset", type(None), text="None")
                    continue
            if name in held:
                part = self.value(held[name], name)
            elif isinstance(owner, nn.Module) or _class_attribute(owner, name) or not hasattr(owner, name):
                part = Node("absent", type(None), text=_text(getattr(type(owner), name, ABSENT)))
            else:
                part = Node("computed", object, parts={"": self.value(getattr(owner, name), name)})
            node.parts[name] = self.written_or(held, name, part)
        return node

    def written_or(self, holder: Any, name: str, part: Node) -> Node:
        """``part``, or where the forward itself writes there, that and what it writes."""
        if (id(holder), name) not in self.written:
            return part
        return Node("written", object, _like(self.written[id(holder), name]), {"": part}, part.text)

    def value(self, value: Any, name: str | None = None) -> Node:
        """What ``value`` is; ``name``: under which name the code reads it."""
        if value is None and self.loose:
            return Node("any", object)
        if isinstance(value, (*_PLAIN, type)):
            return Node("type" if isinstance(value, type) else "plain", type(value), value, text=_text(value))
        known = self.known.get(id(value))
        if known is not None:
            if known.kind == "dict" and not known.value and known.of is dict:  # perhaps read otherwise there
                keys = self.reads.keys_of(name) if name is not None else None
                if keys is None or not keys <= known.parts.keys():
                    known.parts.clear()
                    self._fill(known, value, None)
            return known
        node = self.known[id(value)] = Node("", type(value), text=_text(value))
        self.alive.append(value)
        self._fill(node, value, name)
        return node

    def _fill(self, node: Node, value: Any, name: str | None) -> None:
        if id(value) in self.modules:
            node.kind, node.value = "module", self.modules[id(value)]
        elif id(value) in self.tensors:
            node.kind, node.value = "registered", self.tensors[id(value)]
        elif isinstance(value, torch.Tensor):
            node.kind, node.value = "tensor", (value, _spec(value), self.by_value, version_of(value))
        elif isinstance(value, np.ndarray):
            node.kind, node.value = "array", _bytes(value)
        elif isinstance(value, _Lists) and (
            (id(value), None) in self.written or (self.loose and not isinstance(value, (tuple, frozenset)))
        ):
            node.kind = "any"
        elif isinstance(value, _Lists):
            node.kind = "list"
            if not isinstance(value, (set, frozenset)):
                node.parts = {i: self.value(x) for i, x in enumerate(value)}
            else:
                node.value = frozenset(x for x in value if isinstance(x, _PLAIN))
        elif isinstance(value, dict):
            node.kind = "dict"
            keys = self.reads.keys_of(name) if type(value) is dict and name is not None else None
            grows = type(value) is dict and id(value) in {where for where, _ in self.written}
            node.value = keys is None and not grows and not self.loose
            for key in dict(value) if keys is None else keys:
                if (id(value), key) not in self.written:
                    held = dict.get(value, key, ABSENT)
                    node.parts[key] = Node("absent", type(None)) if held is ABSENT else self.value(held)
        elif isinstance(value, types.FunctionType):
            node.kind, node.value = "function", value.__code__
            given = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            node.parts = {("default", i): self.value(x) for i, x in enumerate(given)}
            for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                held = _of_cell(cell)
                node.parts["cell", free] = (
                    self.value(held, free) if held is not ABSENT else Node("any", object)
                )
        elif isinstance(value, (types.MethodType, functools.partial, staticmethod, classmethod, property)):
            node.kind = "slots"
            node.parts = {n: self.value(held) for n, held in _slots(value)}
        elif type(value) is types.SimpleNamespace or is_plain_object(value) or isinstance(value, nn.Module):
            self._object(node, value)
        else:
            node.kind, node.value = "opaque", None

    def _object(self, node: Node, value: Any) -> None:
        held = getattr(value, "__dict__", None)
        if self.reads.is_exact(value):
            names: Collection[str] = self.reads.attributes.get(id(value), ())
        else:
            names = [n for n in held or {} if n in self.reads.names]
        found = self.attributes(value, {} if held is None else held, [n for n in names if n not in OWN])
        node.kind, node.parts = "attributes", found.parts
        if isinstance(value, nn.Module):  # not registered anywhere: its tensors are constants of the graph
            tensors = (*value.named_parameters(), *value.named_buffers())
            node.kind = "stranger"
            node.parts = {**found.parts, ("tensors",): Node("any", object)}
            node.value = [(n, self.value(t)) for n, t in tensors]


def watched(
    model: nn.Module,
    reads: Reads,
    written: Mapping[tuple[int, Any], Any],
    placed: frozenset[str | int] = frozenset(),
) -> Watched:
    """What stands now where ``reads`` were.

    ``written``  by (id of a dict, key): what the forward itself had left there, since put back.
    ``placed``   see :class:`Watched`.
    """
    freezer = _Freezer(model, reads, written)
    modules = []
    for module in model.modules():
        names = reads.attributes.get(id(module), {})
        if module is model:  # a stand-in's place
            names = {n: None for n in names if n != "forward"}
        modules.append(freezer.attributes(module, vars(module), names))
    namespaces: list[tuple[str, Any, Node]] = []
    for namespace, found in reads.globals.values():
        freezer.loose = _is_library(namespace)
        parts = {
            n: freezer.written_or(namespace, n, freezer.value(namespace[n], n))
            for n in found
            if n in namespace
        }
        name = f"module {namespace.get('__name__', '__main__')}"
        namespaces.append((name, namespace, Node("attributes", dict, parts=parts)))
    for kind, found in reads.classes.items():
        if not isinstance(kind, enum.EnumMeta):
            held = vars(kind)
            freezer.loose = _is_library(vars(sys.modules.get(kind.__module__, kind)))
            named = {n for n in held if n in reads.names and n[:2] != "__"}  # type(self).name, say
            absent = Node("absent", type(None), text="absent")
            parts = {
                n: freezer.written_or(kind, n, freezer.value(held[n], n)) if n in held else absent
                for n in {*found, *named}
            }
            namespaces.append((f"class {kind.__name__}", kind, Node("attributes", type, parts=parts)))
    return Watched(tuple(modules), tuple(namespaces), placed)


def _is_library(namespace: Mapping[str, Any]) -> bool:
    """Whether a module is of an installed package, not of the user's own."""
    file = str(namespace.get("__file__") or "")
    return "site-packages" in file or "dist-packages" in file


# -- what stands there --------------------------------------------------------------------------------


class _Binder:
    """Compares what is there with nodes, and lists whom it met."""

    def __init__(self, model: nn.Module, before: Bound | None) -> None:
        self.model = model
        self.bound = Bound()
        self._opaque = {} if before is None else before.opaque
        self.owner = ""
        self.modules = list(model.modules())
        self._tensors: dict[str, torch.Tensor] | None = None
        self._met: set[tuple[int, int]] = set()

    def contents(self, held: Mapping[str, Any], owner: Any, node: Node, path: str) -> None:
        """The attributes of ``owner``, held in ``held``."""
        absent = False
        for name, part in node.parts.items():
            where = f"{path}.{name}" if path else str(name)
            if part.kind == "any":
                continue
            if part.kind == "computed":
                now = getattr(owner, name, ABSENT)
                self.value(now, part.parts[""], where)
                self.bound.computed.append((owner, name, now))
            elif part.kind == "unset":
                registered = next(d for d in _registered(owner) if name in d)
                if registered[name] is not None:
                    self._differs(where, part, registered[name])
                self.bound.named.append((registered, name, None))
            elif part.kind == "absent":
                absent = True
                if name in held:
                    self._differs(where, part, held[name])
            else:
                now = held.get(name, ABSENT)
                if part.kind == "written":
                    self._written(now, part, where)
                else:
                    self.value(now, part, where)
                self.bound.named.append((held, name, now))
        if absent:
            self.bound.sized.append((held, len(held)))

    def value(self, now: Any, node: Node, path: str) -> None:
        """Raise ``StalePlanError`` if ``now`` is not what ``node`` says; else list what is in it."""
        if node.kind == "any":
            return
        if node.kind == "opaque":
            if type(now) is not node.of or self._opaque.get(id(node), now) is not now:
                self._differs(path, node, now)
            self.bound.opaque[id(node)] = now
            return
        if node.kind == "absent":
            if now is not ABSENT:
                self._differs(path, node, now)
            return
        if node.kind == "type":
            same = now is node.value or (
                isinstance(now, type)
                and (now.__module__, now.__qualname__) == (node.value.__module__, node.value.__qualname__)
            )
            if not same:
                self._differs(path, node, now)
            return
        if node.kind == "plain":
            if now is not node.value and not _equal(now, node.value):
                self._differs(path, node, now)
            return
        if (id(node), id(now)) in self._met:
            return
        self._met.add((id(node), id(now)))
        if type(now) is not node.of:
            same_name = (type(now).__module__, type(now).__qualname__) == (
                node.of.__module__,
                node.of.__qualname__,
            )
            if not same_name or node.of.__module__ == "builtins":
                self._differs(path, node, now)
        _LOOKS[node.kind](self, now, node, path)

    def _written(self, now: Any, node: Node, path: str) -> None:
        """What the forward itself writes there is as good as what stood there before."""
        if _like(now) != node.value:
            self.value(now, node.parts[""], path)

    def _module(self, now: Any, node: Node, path: str) -> None:
        if now is not self.modules[node.value]:
            self._differs(path, node, now)

    def _registered(self, now: Any, node: Node, path: str) -> None:
        if self._tensors is None:
            model = self.model
            self._tensors = dict((*model.named_parameters(), *model.named_buffers()))
        if now is not self._tensors.get(node.value):
            self._differs(path, node, now)

    def _tensor(self, now: Any, node: Node, path: str) -> None:
        taken, spec, by_value, version = node.value
        if now is taken:
            if _spec(now) != spec or (by_value and version_of(now) != version):
                self._differs(path, node, now)
            self.bound.tensors.append((now, spec, version if by_value else None))
            return
        # Another instance's: the graph has the values of the first, which therefore have to stay.
        if _spec(now) != spec or version_of(taken) != version or not torch.equal(now, taken):
            self._differs(path, node, now)
        self.bound.tensors.append((now, spec, version_of(now)))

    def _array(self, now: Any, node: Node, path: str) -> None:
        if _bytes(now) != node.value:
            self._differs(path, node, now)
        self.bound.arrays.append((now, node.value))

    def _list(self, now: Any, node: Node, path: str) -> None:
        if node.value is not None:
            if frozenset(x for x in now if isinstance(x, _PLAIN)) != node.value:
                self._differs(path, node, now)
        else:
            if len(now) != len(node.parts):
                self._differs(path, node, now)
            for (i, part), item in zip(node.parts.items(), now, strict=True):
                self.value(item, part, f"{path}[{i}]")
        if not isinstance(now, (tuple, frozenset)):
            self.bound.lists.append((now, tuple(now)))

    def _dict(self, now: Any, node: Node, path: str) -> None:
        if node.value and now.keys() != node.parts.keys():
            new = [(k, dict.get(now, k)) for k in dict(now) if k not in node.parts]
            if not all(_is_cached(key, held) for key, held in new) or len(now) - len(new) != len(node.parts):
                self._differs(path, node, now)
        for key, part in node.parts.items():
            item = dict.get(now, key, ABSENT)
            self.value(item, part, f"{path}[{key!r}]")
            if not node.value:
                plain = type(now).get is dict.get
                (self.bound.named if plain else self.bound.odd).append((now, key, item))
        if node.value:
            self.bound.dicts.append((now, tuple(now), tuple(dict.values(now))))

    def _function(self, now: Any, node: Node, path: str) -> None:
        given = (*(now.__defaults__ or ()), *(now.__kwdefaults__ or {}).values())
        if now.__code__ != node.value or len(given) != sum(key[0] == "default" for key in node.parts):
            self._differs(path, node, now)
        cells = dict(zip(now.__code__.co_freevars, now.__closure__ or (), strict=True))
        for (what, name), part in node.parts.items():
            held = given[name] if what == "default" else _of_cell(cells[name])
            self.value(held, part, f"{path}'s {name}" if what == "cell" else f"a default of {path}")
            if what == "cell":
                self.bound.cells.append((cells[name], held))

    def _held(self, now: Any, node: Node, path: str) -> None:
        held = dict(_slots(now))
        for name, part in node.parts.items():
            self.value(held.get(name, ABSENT), part, f"{path}.{name}")

    def _attributes(self, now: Any, node: Node, path: str) -> None:
        self.contents(getattr(now, "__dict__", {}), now, node, path)

    def _stranger(self, now: Any, node: Node, path: str) -> None:
        self.contents(vars(now), now, node, path)
        tensors = dict((*now.named_parameters(), *now.named_buffers()))
        for name, part in node.value:
            self.value(tensors.get(name), part, f"{path}.{name}")

    def _differs(self, path: str, node: Node, now: Any) -> None:
        raise StalePlanError(
            f"{self.owner} has {path}={_text(now)}, the plan was made with {path}={node.text or 'absent'}; "
            "make a new plan, or set it back",
            setting=f"{self.owner}: {path}",
        )


_LOOKS: dict[str, Callable[[_Binder, Any, Node, str], None]] = {
    "module": _Binder._module,
    "registered": _Binder._registered,
    "tensor": _Binder._tensor,
    "array": _Binder._array,
    "list": _Binder._list,
    "dict": _Binder._dict,
    "function": _Binder._function,
    "slots": _Binder._held,
    "attributes": _Binder._attributes,
    "stranger": _Binder._stranger,
}


@dataclass(eq=False)
class Bound:
    """Who has to be whom, in flat lists: asked at every step.

    ``named``     (dict, key, who stands there); ``odd``: the same of dicts with a ``get`` of their own.
    ``sized``     (dict, how many entries).
    ``lists``     (list, its items); ``dicts``: (dict, its keys, its values).
    ``cells``     (cell of a closure, its contents).
    ``computed``  (object, attribute, value) of what is no entry of a dict.
    ``tensors``   (tensor, how it is laid out, its version where its values were read).
    ``arrays``    (array of numpy, its bytes).
    ``opaque``    what is known by its identity only, by the id of its node.
    """

    named: list[tuple[Mapping[Any, Any], Any, Any]] = field(default_factory=list)
    odd: list[tuple[dict[Any, Any], Any, Any]] = field(default_factory=list)
    sized: list[tuple[Any, int]] = field(default_factory=list)
    lists: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)
    dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)
    cells: list[tuple[types.CellType, Any]] = field(default_factory=list)
    computed: list[tuple[Any, str, Any]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, Any, int | None]] = field(default_factory=list)
    arrays: list[tuple[np.ndarray, Any]] = field(default_factory=list)
    opaque: dict[int, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether everybody is who it was; if not, the values may still be equal."""
        for held, key, who in self.named:
            now = held.get(key, ABSENT)
            if now is not who and not (isinstance(now, _PLAIN) and _equal(now, who)):
                return False
        if any(dict.get(held, key, ABSENT) is not who for held, key, who in self.odd):
            return False
        for container, size in self.sized:
            if len(container) != size:
                return False
        for items, were in self.lists:
            if len(items) != len(were) or not all(map(is_, items, were)):
                return False
        for table, keys, values in self.dicts:
            if len(table) != len(keys) or not (
                all(map(is_, table, keys)) and all(map(is_, dict.values(table), values))
            ):
                return False
        for cell, who in self.cells:
            if _of_cell(cell) is not who:
                return False
        for owner, name, was in self.computed:
            now = getattr(owner, name, ABSENT)
            if now is not was and not (isinstance(now, _PLAIN) and _equal(now, was)):
                return False
        return all(
            _spec(t) == spec and (version is None or version_of(t) == version)
            for t, spec, version in self.tensors
        ) and all(_bytes(array) == were for array, were in self.arrays)


def _registered(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _class_attribute(owner: Any, name: str) -> bool:
    """Whether ``name`` is a method, a property or a constant of the class, watched there."""
    for kind in type(owner).__mro__:
        if name in vars(kind):
            found = vars(kind)[name]
            return not isinstance(found, (types.MemberDescriptorType, types.GetSetDescriptorType))
    return False


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    """What a bound method, a partial function or a descriptor holds."""
    for name in ("__func__", "__self__", "func", "args", "keywords", "fget"):
        held = getattr(value, name, None)
        if held is not None:
            yield name, held


def _of_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled
        return ABSENT


def _is_cached(key: Any, value: Any) -> bool:
    """Whether an entry that came looks like one of a cache by shapes, which other sizes add to."""
    parts = value if isinstance(value, tuple) else (value,)
    return not isinstance(key, str) and any(isinstance(x, torch.Tensor) for x in parts)


def _like(value: Any) -> Any:
    """What tells a cache's contents from something else put in their place."""
    return (value.dim(), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _spec(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _bytes(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return None
    held = [id(x) for x in array.flat] if array.dtype.hasobject else array.tobytes()
    return array.shape, array.dtype, held


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"a tensor {str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (types.FunctionType, types.MethodType, type)):
        return getattr(value, "__qualname__", repr(value))
    text = object.__repr__(value) if is_plain_object(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
