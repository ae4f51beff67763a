"""What stood where a forward read.

:func:`watched` writes down the values behind :class:`~planner.capture.state.reads.Reads` without reference
to one model: :class:`Watched` may be held against any instance (:meth:`Watched.bind`,
:mod:`~planner.capture.state.bound`).

Known limits: what is neither plain, a container, a function, a tensor nor an object with attributes is
known by its type and, from then on, by its identity.  Attributes that the forward itself writes (a cache)
may change to what it writes.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from planner._compat import version_of
from planner.capture.state.bound import Binder, Bound
from planner.capture.state.node import (
    ABSENT,
    PLAIN,
    Node,
    bytes_of,
    layout_of,
    like_of,
    of_cell,
    registered_in,
    slots_of,
    text_of,
)
from planner.capture.state.reads import OWN, Reads, is_plain_object

__all__ = ["Watched", "watched"]


_BY_VALUE = frozenset({"tolist", "numpy", "item", "array", "asarray", "from_numpy", "__array__"})
_Lists = (list, tuple, set, frozenset, deque)


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
        binder = Binder(model, before)
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
    """Writes down values as nodes, each object once."""

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
                registered = next((d for d in registered_in(owner) if name in d), None)
                if registered is not None:
                    if registered[name] is None:
                        node.parts[name] = Node("unset", type(None), text="None")
                    continue
            if name in held:
                part = self.value(held[name], name)
            elif isinstance(owner, nn.Module) or _class_attribute(owner, name) or not hasattr(owner, name):
                part = Node("absent", type(None), text=text_of(getattr(type(owner), name, ABSENT)))
            else:
                part = Node("computed", object, parts={"": self.value(getattr(owner, name), name)})
            node.parts[name] = self.written_or(held, name, part)
        return node

    def written_or(self, holder: Any, name: str, part: Node) -> Node:
        """``part``, or where the forward itself writes there, that and what it writes."""
        if (id(holder), name) not in self.written:
            return part
        return Node("written", object, like_of(self.written[id(holder), name]), {"": part}, part.text)

    def value(self, value: Any, name: str | None = None) -> Node:
        """What ``value`` is; ``name``: under which name the code reads it."""
        if value is None and self.loose:
            return Node("any", object)
        if isinstance(value, (*PLAIN, type)):
            return Node(
                "type" if isinstance(value, type) else "plain", type(value), value, text=text_of(value)
            )
        known = self.known.get(id(value))
        if known is not None:
            if known.kind == "dict" and not known.value and known.of is dict:  # perhaps read otherwise there
                keys = self.reads.keys_of(name) if name is not None else None
                if keys is None or not keys <= known.parts.keys():
                    known.parts.clear()
                    self._fill(known, value, None)
            return known
        node = self.known[id(value)] = Node("", type(value), text=text_of(value))
        self.alive.append(value)
        self._fill(node, value, name)
        return node

    def _fill(self, node: Node, value: Any, name: str | None) -> None:
        if id(value) in self.modules:
            node.kind, node.value = "module", self.modules[id(value)]
        elif id(value) in self.tensors:
            node.kind, node.value = "registered", self.tensors[id(value)]
        elif isinstance(value, torch.Tensor):
            node.kind, node.value = "tensor", (value, layout_of(value), self.by_value, version_of(value))
        elif isinstance(value, np.ndarray):
            node.kind, node.value = "array", bytes_of(value)
        elif isinstance(value, _Lists) and (
            (id(value), None) in self.written or (self.loose and not isinstance(value, (tuple, frozenset)))
        ):
            node.kind = "any"
        elif isinstance(value, _Lists):
            node.kind = "list"
            if not isinstance(value, (set, frozenset)):
                node.parts = {i: self.value(x) for i, x in enumerate(value)}
            else:
                node.value = frozenset(x for x in value if isinstance(x, PLAIN))
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
                held = of_cell(cell)
                node.parts["cell", free] = (
                    self.value(held, free) if held is not ABSENT else Node("any", object)
                )
        elif isinstance(value, (types.MethodType, functools.partial, staticmethod, classmethod, property)):
            node.kind = "slots"
            node.parts = {n: self.value(held) for n, held in slots_of(value)}
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


def _class_attribute(owner: Any, name: str) -> bool:
    """Whether ``name`` is a method, a property or a constant of the class, watched there."""
    for kind in type(owner).__mro__:
        if name in vars(kind):
            found = vars(kind)[name]
            return not isinstance(found, (types.MemberDescriptorType, types.GetSetDescriptorType))
    return False
