"""What a forward read besides its arguments and parameters: seen as it is traced.

A graph has no attribute reads left in it: a number of a config object, a list's entry, a global or a
replaced function has become a constant or has chosen the ops.  :class:`Reads` records them:

* attributes of modules and of plain objects exactly, by ``__getattribute__`` of their classes, which is
  replaced for the trace and put back (of classes, since instances have no hook; other threads' reads pass
  through it and are not recorded);
* globals, class attributes, closures and defaults by the names in the code that read those attributes, and
  in the functions which that code names in turn; code of torch, numpy and the standard library is left out.

:mod:`planner.capture.state.watched` keeps what stood there.

Why not Dynamo's guards, which are of the same kind (torch 2.13, one core in one run, BERT and GPT2 of 12
layers, 128 wide): its trace takes 4.2 s and 7.5 s beside captures of 5.4 s and 3.9 s, for 2570 guards on
BERT; GPT2 falls into several graphs, each with guards of its own, where the capture takes one; arrays of
numpy and plain tensors it makes inputs of the graph instead of guarding them; and its guards live in
private caches of compiled code. What is here cannot be told from noise in the time of a capture, and the
check of a step takes 1.07 times (BERT) and 1.14 times (GPT2) what the one of public numbers took.
``sys.settrace`` over the trace, which would tell exactly which functions run, adds 80 %.

Known limits: reads through ``vars(module)`` or from C are not seen, nor is what functions of torch, numpy
and the standard library look up.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_identity, _kind_of = id, type  # a capture replaces the builtins, for code outside torch

__all__ = ["OWN", "Reads", "Slot", "is_foreign", "is_plain_object"]

OWN = frozenset(vars(nn.Module()))  # parameters, buffers and submodules are looked after elsewhere

# pytest writes calls of its own into the assertions of tests.
_FOREIGN = frozenset(sys.stdlib_module_names) - {"__main__"} | {
    "torch",
    "numpy",
    "planner",
    "pytest",
    "_pytest",
}
_NOT_IN_A_FORWARD = frozenset({
    "__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__getattribute__",
    "__replace__", "__post_init__",
})  # fmt: skip
_CACHE = functools._lru_cache_wrapper
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")


def is_foreign(module_name: object) -> bool:
    """Whether what is defined there is taken as it is: torch, numpy, the standard library, this package."""
    return not isinstance(module_name, str) or _is_foreign(module_name)


@functools.lru_cache(maxsize=4096)  # it is asked at every read, and the names are few
def _is_foreign(module_name: str) -> bool:
    return module_name.split(".")[0] in _FOREIGN


def is_plain_object(value: object) -> bool:
    """Whether ``value`` is an instance of somebody's class whose attributes are worth looking at."""
    kind = _kind_of(value)
    return not (isinstance(value, _OTHERWISE) or is_foreign(kind.__module__))


_OTHERWISE = (
    type, types.ModuleType, types.MethodType, enum.Enum, nn.Module, torch.Tensor, np.ndarray, list, tuple,
    dict, set, frozenset, str, int, float,
)  # fmt: skip


class Slot(NamedTuple):
    """A global, or an attribute of a class: a place that code may write to by its name."""

    holder: Any
    key: str

    @property
    def value(self) -> Any:
        """What stands there; ``None`` if nothing does."""
        held = vars(self.holder) if isinstance(self.holder, type) else self.holder
        return held.get(self.key)

    def put(self, value: Any) -> None:
        """Let ``value`` stand there."""
        if isinstance(self.holder, type):
            setattr(self.holder, self.key, value)
        else:
            self.holder[self.key] = value


class Reads:
    """What was read by the code that ran within :meth:`recording`, in this thread.

    ``attributes``  of each module and plain object: the names read, by the object's id.
    ``globals``     of each namespace: the names read, by the namespace's id.
    ``classes``     of each class: the names read of it.
    ``readers``     the code that read an attribute or global of this name.
    ``names``       every name and string in the code that was seen.
    ``containers``  (name, container, slot or function that remembers its results) of what may be written to
                    from there; ``look`` is told of each as it is met.
    ``placed``      tensors that were asked where in their storage they begin, and what they are views of.
    """

    def __init__(self) -> None:
        self.attributes: dict[int, dict[str, None]] = {}
        self.globals: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        self.classes: dict[type, dict[str, None]] = {}
        self.readers: dict[str, list[types.CodeType]] = {}
        self.names: set[str] = set()
        self.containers: list[tuple[str, Any]] = []
        self.placed: list[torch.Tensor] = []
        self.look: Callable[[str, Any], None] = lambda _, __: None
        self._alive: list[Any] = []  # so that no id is used again
        self._reached: set[int] = set()
        self._seen: set[tuple[int, str, int]] = set()
        self._lines: dict[type, list[tuple[type, Any]]] = {}  # the classes of a class, and what is in each
        self._named_of: dict[tuple[type, str, int], tuple[int, ...]] = {}
        self._kinds: dict[type, bool] = {nn.Module: True}  # whether reads from its instances are seen
        self._patched: dict[type, Any] = {}
        self._thread, self._recording = 0, False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record until left; may be entered again, one after the other."""
        self._thread, self._recording = threading.get_ident(), True
        try:
            for kind in list(self._kinds):
                self._patch(kind)
            with self._placed_noted():
                yield
        finally:
            self._recording = False
            while self._patched:
                self._unpatch(*self._patched.popitem())

    @contextlib.contextmanager
    def _placed_noted(self) -> Iterator[None]:
        """Note who asks a tensor for its place in its storage."""
        read = torch.Tensor.storage_offset

        def storage_offset(tensor: torch.Tensor) -> Any:
            if not is_foreign(sys._getframe(1).f_globals.get("__name__", "__main__")):
                self.placed += [tensor] if tensor._base is None else [tensor, tensor._base]
            return read(tensor)

        type.__setattr__(torch.Tensor, "storage_offset", storage_offset)
        try:
            yield
        finally:
            type.__delattr__(torch.Tensor, "storage_offset")

    # -- attributes ------------------------------------------------------------------------------------

    def _patch(self, kind: type) -> None:
        """Let reads from instances of ``kind`` pass through here."""
        own = vars(kind).get("__getattribute__")
        read: Any = kind.__getattribute__
        note, thread, seen, frame_at = self._note, self._thread, self._seen, sys._getframe

        def __getattribute__(owner: Any, name: str) -> Any:
            if name[:2] != "__" and name not in OWN:
                frame = frame_at(1)
                if (
                    _identity(owner),
                    name,
                    _identity(frame.f_code),
                ) not in seen and threading.get_ident() == thread:
                    note(owner, name, frame)
            return read(owner, name)

        try:
            type.__setattr__(kind, "__getattribute__", __getattribute__)
        except TypeError:  # a class of C's: all that it holds is looked at instead
            self._kinds[kind] = False
        else:
            self._patched[kind], self._kinds[kind] = own, True

    @staticmethod
    def _unpatch(kind: type, before: Any) -> None:
        if before is None:
            type.__delattr__(kind, "__getattribute__")
        else:
            type.__setattr__(kind, "__getattribute__", before)

    def _note(self, owner: Any, name: str, frame: types.FrameType) -> None:
        code = frame.f_code
        if not self._recording or (
            isinstance(owner, nn.Module) and _kind_of(owner).__module__[:8] == "planner."
        ):
            return
        self._seen.add((_identity(owner), name, _identity(code)))
        self._alive += (owner, code)
        self.attributes.setdefault(_identity(owner), {})[name] = None
        self.readers.setdefault(name, []).append(code)
        self._code(code, frame.f_globals)
        classes = self._classes_of(_kind_of(owner))
        sizes = tuple([len(attributes) for _, attributes in classes])  # more may have been set meanwhile
        if self._named_of.get((_kind_of(owner), name, _identity(code))) != sizes:
            self._named_of[_kind_of(owner), name, _identity(code)] = sizes
            for kind, attributes in classes:
                self._of_class(kind, {n for n in code.co_names if n in attributes} | {name})
        held = getattr(owner, "__dict__", {})
        if name in held:
            self._reach(held[name])

    def _classes_of(self, kind: type) -> list[tuple[type, Any]]:
        known = self._lines.get(kind)
        if known is None:
            known = [(k, vars(k)) for k in kind.__mro__ if not is_foreign(k.__module__)]
            self._lines[kind] = known
        return known

    # -- what is named in code -------------------------------------------------------------------------

    def _code(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        """The globals that ``code`` names, and the functions among them in turn."""
        if _identity(code) in self._reached or is_foreign(namespace.get("__name__", "__main__")):
            return
        self._reached.add(_identity(code))
        self._alive.append(code)
        strings = {c for c in code.co_consts if isinstance(c, str) and len(c) < 100}
        names = {*code.co_names, *strings}
        self.names |= names
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self._code(inner, namespace)
        for is_global, name in _looked_up(code):
            if not is_global:
                self._named(sys.modules.get(name), names, code)
            elif name in namespace:
                self._of_namespace(namespace, name, names, code)

    def _of_namespace(
        self, namespace: dict[str, Any], name: str, names: set[str], code: types.CodeType
    ) -> None:
        value = namespace[name]
        self.globals.setdefault(_identity(namespace), (namespace, {}))[1][name] = None
        self.readers.setdefault(name, []).append(code)
        self._contains(name, Slot(namespace, name))
        self._named(value, names, code)

    def _contains(self, name: str, slot: Slot) -> None:
        value = slot.value
        if isinstance(
            value, (type, types.FunctionType, types.ModuleType, property, classmethod, staticmethod)
        ):
            return
        self._written(name, slot)
        if isinstance(value, (list, dict, set)) or is_plain_object(value):
            self._written(f"{name}." if is_plain_object(value) else name, value)

    def _written(self, name: str, value: Any) -> None:
        self.containers.append((name, value))
        self.look(name, value)

    def _named(self, value: Any, names: set[str], code: types.CodeType) -> None:
        """A value that code names, and which may use ``names`` of it."""
        if isinstance(value, types.ModuleType):
            if not is_foreign(value.__name__):
                held = vars(value)
                for name in [n for n in names if n in held and not isinstance(held[n], types.ModuleType)]:
                    if name not in self.globals.setdefault(_identity(held), (held, {}))[1]:
                        self._of_namespace(held, name, names, code)
        elif isinstance(value, type):
            function = issubclass(value, torch.autograd.Function)
            for kind in value.__mro__:
                if not is_foreign(kind.__module__):
                    held = dict(vars(kind))
                    self._of_class(kind, set(held) if function else {n for n in names if n in held})
        else:
            self._reach(value)

    def _of_class(self, kind: type, names: set[str]) -> None:
        known = self.classes.setdefault(kind, {})
        for name in names - known.keys():
            if name[:2] == "__" and name != "__call__":
                continue
            known[name] = None
            if name in vars(kind):
                self._contains(f"{kind.__name__}.{name}", Slot(kind, name))
            self._reach(vars(kind).get(name))

    def _reach(self, value: Any) -> None:
        """The code behind a value, and the classes of the objects in it."""
        if (
            isinstance(value, (str, int, float, torch.Tensor, np.ndarray))
            or _identity(value) in self._reached
        ):
            return
        self._reached.add(_identity(value))
        self._alive.append(value)
        if isinstance(value, types.FunctionType):
            self._code(value.__code__, value.__globals__)
            if not is_foreign(value.__module__ or "__main__") or value.__closure__:
                for held in (
                    *_cells(value),
                    *(value.__defaults__ or ()),
                    *(value.__kwdefaults__ or {}).values(),
                ):
                    self._reach(held)
                self._reach(vars(value).get("__wrapped__"))
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            self._reach(value.__func__)
            self._reach(getattr(value, "__self__", None))
        elif isinstance(value, property):
            self._reach(value.fget)
        elif isinstance(value, functools.partial):
            for held in (value.func, *value.args, *value.keywords.values()):
                self._reach(held)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for held in value:
                self._reach(held)
        elif isinstance(value, dict):
            for held in list(value.values()):
                self._reach(held)
        elif isinstance(value, nn.Module):
            self._of_class(_kind_of(value), {"forward"} & vars(_kind_of(value)).keys())
        elif is_plain_object(value):
            self._object(value)
        elif isinstance(value, _CACHE):
            self._written(getattr(value, "__name__", "a cached function"), value)  # none of a partial
            self._reach(value.__wrapped__)

    def _object(self, value: Any) -> None:
        kind = _kind_of(value)
        for owner in kind.__mro__:
            if not is_foreign(owner.__module__):
                special = {n for n, held in vars(owner).items() if n[:2] == "__" and _is_code(held)}
                for name in special - _NOT_IN_A_FORWARD:
                    self._reach(vars(owner)[name])
                self._of_class(owner, {"__call__"} & vars(owner).keys())
        defined = next(k for k in kind.__mro__ if "__getattribute__" in vars(k))
        target = kind if defined is object else defined
        if self._recording and target not in self._kinds:
            self._patch(target)

    # -- asked afterwards ------------------------------------------------------------------------------

    def is_exact(self, owner: Any) -> bool:
        """Whether each attribute read from ``owner`` was seen."""
        return any(self._kinds.get(kind, False) for kind in _kind_of(owner).__mro__)

    def keys_of(self, name: str) -> frozenset[Any] | None:
        """Of dicts that stand under ``name``: the keys that are read, ``None`` if any may be.

        Known where all the code that reads the name does so as ``.name["key"]`` or ``.name.get("key")``.
        """
        keys: set[Any] = set()
        for code in {_identity(c): c for c in self.readers.get(name, ())}.values():
            found = _constant_keys(code, name)
            if found is None:
                return None
            keys |= found
        return frozenset(keys) or None


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents


def _is_code(value: object) -> bool:
    return isinstance(value, (types.FunctionType, staticmethod, classmethod, property))


@functools.lru_cache(maxsize=4096)  # the same code is met at every capture
def _looked_up(code: types.CodeType) -> tuple[tuple[bool, str], ...]:
    """(is a global, name) of each global and module that ``code`` looks up, in order, once each."""
    steps = [i for i in dis.get_instructions(code) if i.opname in (*_GLOBAL, "IMPORT_NAME")]
    return tuple(dict.fromkeys((i.opname in _GLOBAL, str(i.argval)) for i in steps))


def _constant_keys(code: types.CodeType, name: str) -> set[Any] | None:
    if name in code.co_consts:
        return None
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL", "PRECALL")]
    keys: set[Any] = set()
    found = False
    for k, step in enumerate(steps):
        if step.argval != name or not step.opname.startswith("LOAD_"):
            continue
        found = True
        after = steps[k + 1 : k + 4]
        if after and after[0].argval == "get" and after[0].opname in ("LOAD_METHOD", "LOAD_ATTR"):
            after = after[1:2]
        elif len(after) < 2 or not (
            after[1].opname == "BINARY_SUBSCR"
            or (after[1].opname == "BINARY_OP" and "[]" in after[1].argrepr)
        ):
            return None
        if not after or not after[0].opname.startswith("LOAD_") or after[0].opcode not in _CONSTANTS:
            return None
        keys.add(after[0].argval)
    return keys if found else None


_CONSTANTS = frozenset(dis.opmap[n] for n in ("LOAD_CONST", "LOAD_SMALL_INT") if n in dis.opmap)
