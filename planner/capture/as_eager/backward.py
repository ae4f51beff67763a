"""What the backward does besides computing gradients: seen, and refused where a plan would not do it.

The backward is traced with the forward. Code of the user's that runs in it (a Function's ``backward``, a
hook on a tensor) finds the same stand-ins of parameters and buffers on the modules as the forward did;
what it writes into one of them is in no output of the graph.

What Python code there changes is looked for where it can reach by name: variables of closures, globals, lists
and dicts in them and on what they hold.

Known limit: what it changes deeper inside objects outside the model goes unseen.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CellType, CodeType, ModuleType
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.capture.as_eager.places import is_ours, users_place
from planner.errors import TraceError

__all__ = ["Installed", "Noted"]


class Installed:
    """The stand-ins of a model's parameters and buffers, on its modules from the forward's end on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = [
            (registered, key, tensor)
            for module in model.modules()
            for registered in (module._parameters, module._buffers)
            for key, tensor in registered.items()
        ]
        self._names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._writes: dict[str, tuple[torch.Tensor, int]] = {}  # stand-in, and how often it had been written
        self._replaced: list[str] = []
        self._there = False

    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """``state``: the stand-ins by name, as the forward left them."""
        self._there = True
        for registered, key, tensor in self._places:
            if tensor is not None:
                registered[key] = state[self._names[id(tensor)]]  # type: ignore[assignment]
        self._writes = {name: (tensor, _compat.writes_so_far(tensor)) for name, tensor in state.items()}

    def remove(self) -> None:
        """The model's own are where they were."""
        for registered, key, tensor in self._places:
            name = self._names.get(id(tensor))
            if self._there and name is not None and registered.get(key) is not self._writes[name][0]:
                self._replaced.append(name)
            registered[key] = tensor  # type: ignore[assignment]
        self._there = False

    def refuse(self, again: Callable[[Any], object]) -> None:
        """Raise ``TraceError`` for what the backward wrote into.

        ``again(mode)`` runs the step once more, on tensors without memory, its backward inside ``mode``.
        """
        written = [
            n for n, (tensor, before) in self._writes.items() if _compat.writes_so_far(tensor) > before
        ]
        self.refuse_changes(self._replaced)
        if not written:
            return
        seen = _Writes()
        with contextlib.suppress(Exception):
            again(seen)
        place = f" at {seen.place}" if seen.place else ""
        self._refuse(f"writes into {written[0]}{place}")

    def refuse_changes(self, names: Iterable[str], but: Collection[str] = ()) -> None:
        """Raise ``TraceError`` for the first attribute of the model that the backward changed."""
        for name in names:
            if name not in but:
                self._refuse(f"changes {name}")

    def _refuse(self, what: str) -> None:
        raise TraceError(
            f"the backward of {type(self._model).__name__} {what}; a planned step computes gradients in its "
            "backward and would not. Note it outside what is planned, from the gradients of parameters, "
            "inputs or outputs, or plan the parts of the model without it"
        )


class Noted:
    """What Python code in the backward changes outside the model, seen around each function; put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changed: list[str] = []  # in words

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at what a Function's backward and hooks on stand-ins can reach, before and after they run."""
        with _compat.backward_functions(self._around):
            yield

    def refuse(self) -> None:
        """Raise ``TraceError`` for the first change."""
        if self._changed:
            raise TraceError(
                f"in the backward of {type(self._model).__name__}, {self._changed[0]}; a planned step "
                "computes gradients in its backward and would not. Note it outside what is planned, from the "
                "gradients of parameters, inputs or outputs"
            )

    def _around(self, function: Callable[..., Any], call: Callable[[], Any], context: Any = None) -> Any:
        code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
        if code is None or not _is_the_users(function):
            return call()
        reach = [*_reach(function, code), *([] if context is None else _containers(vars(context)))]
        before = [(name, holder, key, value, _shallow(value)) for name, holder, key, value in reach]
        result = call()
        for name, holder, key, value, items in before:
            now = holder.get(key, value)
            if now is not value or not _equal(_shallow(now), items):
                place = f"{code.co_filename}:{code.co_firstlineno}"
                self._changed.append(f"{code.co_name} at {place} changes {name}")
                holder[key] = value
                _refill(value, items)
        return result


def _is_the_users(function: Any) -> bool:
    module = str(getattr(function, "__module__", None) or "")
    return module.partition(".")[0] != "torch" and not is_ours(module)


def _reach(
    function: Any, code: CodeType, met: set[CodeType] | None = None
) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, holder, key, value) of the variables outside itself that a function names.

    So of the functions among them, and of those in turn; ``met`` need not be looked at again.
    """
    met = {code} if met is None else met
    for name, holder, key, value in _named(function, code):
        yield name, holder, key, value
        helper = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        if isinstance(helper, CodeType) and helper not in met and _is_the_users(value):
            met.add(helper)
            yield from _reach(value, helper, met)


def _named(function: Any, code: CodeType) -> Iterator[tuple[str, Any, Any, Any]]:
    plain = inspect.unwrap(getattr(function, "__func__", function))
    for name, cell in zip(code.co_freevars, plain.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            yield name, _Cell(cell), None, cell.cell_contents
            if not isinstance(cell.cell_contents, nn.Module):
                yield from _containers(getattr(cell.cell_contents, "__dict__", {}))
    for name in _names(code):
        if name in plain.__globals__ and not isinstance(plain.__globals__[name], (ModuleType, type)):
            yield name, plain.__globals__, name, plain.__globals__[name]
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (nn.Module, type)):
        yield from ((f"self.{key}", vars(owner), key, value) for key, value in _attributes(owner).items())


def _attributes(thing: Any) -> dict[str, Any]:
    return dict(getattr(thing, "__dict__", {}))


def _containers(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    for key, value in list(attributes.items()):
        if isinstance(value, (list, dict, set)):
            yield key, attributes, key, value


def _names(code: CodeType) -> set[str]:
    """Names that a function and those inside it look up."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


class _Cell:
    """A closure's variable, read as a dict is."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell

    def get(self, _: None, default: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return default

    def __setitem__(self, _: None, value: Any) -> None:
        self._cell.cell_contents = value


def _shallow(value: Any) -> list[Any] | None:
    """What a container holds; ``None`` for everything else."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return [*value] if isinstance(value, (list, set)) else None


def _refill(container: Any, items: list[Any] | None) -> None:
    if isinstance(container, dict) and items is not None:
        half = len(items) // 2
        container.clear()
        container.update(zip(items[:half], items[half:], strict=True))
    elif isinstance(container, list) and items is not None:
        container[:] = items
    elif isinstance(container, set) and items is not None:
        container.clear()
        container.update(items)


def _equal(a: list[Any] | None, b: list[Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class _Writes(_compat.TorchDispatchMode):
    """Remembers the user's first line that writes into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.place: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.place is None and _compat.writes_arguments(func):
            self.place = users_place(sys._getframe(1))
        return func(*args, **(kwargs or {}))
