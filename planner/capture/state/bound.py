"""Whether what a forward read stands there still.

:class:`Binder` holds :class:`~planner.capture.state.node.Node` s against a model, value by value, and fills
:class:`Bound`, a flat list of who has to be whom.  That is what is asked at each step: identities first, and
the values only where these differ.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from planner._compat import version_of
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
from planner.errors import StalePlanError

__all__ = ["Binder", "Bound"]


class Binder:
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
                registered = next(d for d in registered_in(owner) if name in d)
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
        """A value that the forward writes itself: either what it writes or what stood there before."""
        if like_of(now) != node.value:
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
            if layout_of(now) != spec or (by_value and version_of(now) != version):
                self._differs(path, node, now)
            self.bound.tensors.append((now, spec, version if by_value else None))
            return
        # Another instance's: the graph has the values of the first, which therefore have to stay.
        if layout_of(now) != spec or version_of(taken) != version or not torch.equal(now, taken):
            self._differs(path, node, now)
        self.bound.tensors.append((now, spec, version_of(now)))

    def _array(self, now: Any, node: Node, path: str) -> None:
        if bytes_of(now) != node.value:
            self._differs(path, node, now)
        self.bound.arrays.append((now, node.value))

    def _list(self, now: Any, node: Node, path: str) -> None:
        if node.value is not None:
            if frozenset(x for x in now if isinstance(x, PLAIN)) != node.value:
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
            held = given[name] if what == "default" else of_cell(cells[name])
            self.value(held, part, f"{path}'s {name}" if what == "cell" else f"a default of {path}")
            if what == "cell":
                self.bound.cells.append((cells[name], held))

    def _held(self, now: Any, node: Node, path: str) -> None:
        held = dict(slots_of(now))
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
            f"{self.owner} has {path}={text_of(now)}, the plan was made with {path}={node.text or 'absent'}; "
            "make a new plan, or set it back",
            setting=f"{self.owner}: {path}",
        )


_LOOKS: dict[str, Callable[[Binder, Any, Node, str], None]] = {
    "module": Binder._module,
    "registered": Binder._registered,
    "tensor": Binder._tensor,
    "array": Binder._array,
    "list": Binder._list,
    "dict": Binder._dict,
    "function": Binder._function,
    "slots": Binder._held,
    "attributes": Binder._attributes,
    "stranger": Binder._stranger,
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
            if now is not who and not (isinstance(now, PLAIN) and _equal(now, who)):
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
            if of_cell(cell) is not who:
                return False
        for owner, name, was in self.computed:
            now = getattr(owner, name, ABSENT)
            if now is not was and not (isinstance(now, PLAIN) and _equal(now, was)):
                return False
        return all(
            layout_of(t) == spec and (version is None or version_of(t) == version)
            for t, spec, version in self.tensors
        ) and all(bytes_of(array) == were for array, were in self.arrays)


def _is_cached(key: Any, value: Any) -> bool:
    """Whether an entry that came looks like one of a cache by shapes, which other sizes add to."""
    parts = value if isinstance(value, tuple) else (value,)
    return not isinstance(key, str) and any(isinstance(x, torch.Tensor) for x in parts)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))
