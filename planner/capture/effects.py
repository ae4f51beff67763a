"""What a forward does to its modules besides computing: seen, put back, refused where it matters.

A captured graph computes outputs and new buffer values.  A forward that also stores tensors on its
modules, or counts there, would be left without that by a planned step, and would keep fake tensors
from the trace.  Caches of anything else (masks' keys, chosen functions) are put back and let pass.
Numbers and strings that a first call corrects and later calls leave (Swin's windows at a small image,
BigBird's attention at a short text) are corrected, as eager's first call would: see :func:`settled`.

Known limits: objects are compared by identity, lists and dicts by what they hold; what is changed
deeper inside, or outside the model, goes unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner.errors import TraceError

__all__ = [
    "Effects",
    "attributes_kept",
    "settled",
    "tensors_kept",
]

_OWN = frozenset(vars(nn.Module()))  # parameters, buffers and submodules are looked after elsewhere
_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)
)


@dataclass
class Effects:
    """What a forward left on its modules, since put back.

    ``stored``   names of attributes that held tensors.
    ``changed``  (name, module, key, value before, value left) of numbers and strings that were there.
    """

    stored: list[str] = field(default_factory=list)
    changed: list[tuple[str, nn.Module, str, Any, Any]] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        """Names of what a plan would have to store or count."""
        counts = [name for name, _, _, _, now in self.changed if type(now) in (int, float)]
        return self.stored + counts


def settled(model: nn.Module, effects: Effects, call: Callable[[], object]) -> bool:
    """Leave ``effects.changed`` on the modules if another ``call`` leaves them as they are then."""
    for _, module, key, _, now in effects.changed:
        vars(module)[key] = now
    stays = False
    try:
        with attributes_kept(model) as again:
            call()
        stays = not again.changed
    finally:
        if not stays:
            for _, module, key, was, _ in effects.changed:
                vars(module)[key] = was
    return stays


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[Effects]:
    """Put every module's attributes back on leaving; what is yielded then says what they had become.

    Hooks that the forward set are taken off with the attribute that remembers them: transformers sets its
    recorders at a model's first call, and would set them twice.
    """
    before = [(path, module, _contents(module)) for path, module in model.named_modules()]
    hooks = [(held, dict(held)) for _, m, _ in before for held in (getattr(m, name) for name in _HOOKS)]
    effects = Effects()
    try:
        yield effects
    finally:
        for path, module, contents in before:
            _put_back(path, module, contents, effects)
        for held, was in hooks:
            for key in held.keys() - was.keys():
                del held[key]


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


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {key: (value, _snapshot(value)) for key, value in vars(module).items() if key not in _OWN}


def _snapshot(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else None


def _put_back(path: str, module: nn.Module, contents: dict[str, tuple[Any, Any]], effects: Effects) -> None:
    attributes = vars(module)
    for key in [k for k in attributes if k not in _OWN]:
        now = attributes[key]
        was, held = contents.get(key, (None, None))
        if now is was and (held is None or _same_items(now, held)):
            continue
        name = f"{path}.{key}" if path else key
        listed = key == "_flat_weights" and isinstance(module, nn.RNNBase)  # the parameters once more
        if not listed and _holds_tensor(now):
            effects.stored.append(name)
        elif key in contents and type(now) in (int, float, str) and now != was:
            effects.changed.append((name, module, key, was, now))
        if key not in contents:
            del attributes[key]
    for key, (was, held) in contents.items():
        attributes[key] = was
        if held is not None and not _same_items(was, held):
            was.clear()
            was.extend(held) if isinstance(was, list) else was.update(held)


def _same_items(now: Any, held: Any) -> bool:
    if len(now) != len(held):
        return False
    if isinstance(now, dict):
        return all(k in held and held[k] is v for k, v in now.items())
    return all(a is b for a, b in zip(now, held, strict=True))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_tensor, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)
