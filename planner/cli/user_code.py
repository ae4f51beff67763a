"""Models, inputs, losses and optimizers named on a command line: ``package.module:name``, ``file.py:name``.

What is named is the user's code.  Where it fails, the error shows the line of it that did, not the stack
of the command that called it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensorMode
from planner.errors import PlannerError

__all__ = ["Built", "UserCodeError", "build", "named"]

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
_OURS = str(Path(__file__).resolve().parent.parent) + os.sep  # frames below it are the planner's own


class UserCodeError(PlannerError):
    """What a command line names cannot be found, or fails; names the line."""


@dataclass(frozen=True)
class Built:
    """A model and one batch for it, ``None`` if the model knows its own."""

    model: nn.Module
    inputs: object


def build(factory: str, inputs: str | None = None, *, fake: bool = False) -> Built:
    """The model that ``factory`` names or makes, and the inputs that it or ``inputs`` does.

    ``factory``  an ``nn.Module``, or a callable without arguments that returns one, or ``(model, inputs)``.
    ``inputs``   a tuple or dict, or a callable that returns one, given the model if it takes an argument.
    ``fake``     build both without memory, as fake tensors.

    Raises ``UserCodeError`` for what is not there, fails, or is none of these.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        made = named(factory)
        if not isinstance(made, nn.Module):
            made = _called(made, factory)
        batch: object = None
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
            made, batch = made
        if not isinstance(made, nn.Module):
            raise UserCodeError(
                f"{factory} returned an object of type {type(made).__name__}; it has to return a "
                "torch.nn.Module, or a tuple (model, inputs)"
            )
        if inputs is not None:
            batch = named(inputs, beside=factory)
            if callable(batch) and not isinstance(batch, (tuple, dict, torch.Tensor)):
                takes_model = bool(_required(batch))
                batch = _called(batch, inputs, *((made,) if takes_model else ()))
    return Built(made, batch)


def optimizer(name: str | None, beside: str) -> Any:
    """ "adamw", "adam", "sgd", or what ``name`` names; ``None`` for none."""
    if name is None or name.lower() in _OPTIMIZERS:
        return None if name is None else _OPTIMIZERS[name.lower()]
    return named(name, beside=beside)


def named(reference: str, *, beside: str | None = None) -> Any:
    """The object that ``module:name`` or ``file.py:name`` stands for; a bare name is in ``beside``'s."""
    place, colon, name = reference.rpartition(":")
    if not colon and beside is not None:
        place, name = beside.rpartition(":")[0], reference
    if not place or not name:
        raise UserCodeError(
            f"{reference!r} names no object: write package.module:name or path/to/file.py:name"
        )
    with _theirs(reference):
        module = _file(place) if place.endswith(".py") else _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            defined = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            there = [n for n in defined if getattr(vars(module)[n], "__module__", "") == module.__name__]
            raise UserCodeError(
                f"{place} has no {name!r}" + (f"; it defines {', '.join(there[:8])}" if there else "")
            )
        found = getattr(found, part)
    return found


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as `python -m` has it
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # something that it imports
        raise UserCodeError(
            f"there is no module {error.name!r} in the working directory or on PYTHONPATH; for a file write "
            "path/to/file.py:name"
        ) from None


def _file(path: str) -> ModuleType:
    where = Path(path).resolve()
    if not where.is_file():
        raise UserCodeError(f"there is no file {path}")
    name = f"{where.stem}_{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, where)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    with contextlib.ExitStack() as if_it_fails:
        sys.path.insert(0, str(where.parent))  # what lies beside it can be imported, as in a script
        sys.modules[name] = module
        if_it_fails.callback(sys.modules.pop, name, None)
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(where.parent))
        if_it_fails.pop_all()
    return module


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the positional arguments without which it cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have none
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def _called(function: Any, reference: str, *arguments: Any) -> Any:
    if not callable(function):
        raise UserCodeError(f"{reference} is of type {type(function).__name__}, which cannot be called")
    missing = _required(function)[len(arguments) :]
    if missing:
        raise UserCodeError(
            f"{reference} takes {', '.join(missing)}: name a callable that needs no arguments, such as "
            "`def build(): return Model(...)`"
        )
    with _theirs(reference):
        return function(*arguments)


@contextlib.contextmanager
def _theirs(reference: str) -> Iterator[None]:
    """Whatever the user's code raises becomes a ``UserCodeError`` that shows where."""
    guard = contextlib.ExitStack()
    guard.push(lambda kind, error, where: _raise_as_theirs(error, reference))
    with guard:
        yield


def _raise_as_theirs(error: BaseException | None, reference: str) -> bool:
    if isinstance(error, SyntaxError) and error.filename:
        said = f"{error.filename}, line {error.lineno}: {error.msg}\n    {(error.text or '').strip()}"
        raise UserCodeError(f"{reference} cannot be read: {said}") from error
    if not isinstance(error, Exception) or isinstance(error, PlannerError):
        return False
    stack = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    frames = [f for f in stack if _is_users(f.filename)] or stack
    said = f"{type(error).__name__}: {error}"
    if frames:
        at = frames[-1]
        line = linecache.getline(at.filename, at.lineno or 0).strip()
        said += f"\n    {_short(at.filename)}, line {at.lineno}, in {at.name}\n    {line}"
    raise UserCodeError(f"{reference} failed: {said}") from error


def _is_users(filename: str) -> bool:
    """Neither an installed package's nor Python's own."""
    installed = "site-packages" in filename or "dist-packages" in filename
    return not (installed or filename.startswith(("<", str(Path(contextlib.__file__).parent))))


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
