"""What a forward asks of its tensors and of torch, answered as eager answers it.

While a step is captured, tensors are stand-ins of the tracer's classes: a parameter is no
``nn.Parameter`` and no leaf, ``type(x)`` is no ``torch.Tensor``, and a compiler seems to be looking. A
forward that asks would take another branch than eager, without an error: another network would be
trained. So, for code that is neither torch's nor ours,

* ``type(x)``, ``x.__class__``, ``id(x)``, ``isinstance(w, nn.Parameter)``, ``is_leaf``, ``grad_fn`` and
  attributes that somebody set on a parameter are those of the tensor that the stand-in stands for; so
  are the parameters and buffers that modules hold a second time, in plain attributes, lists, tuples and
  dicts;
* ``torch.compiler.is_compiling()`` and ``is_exporting()`` are False. transformers' own code is told
  True, which it asks where it would read values, but for the modules of ``_AS_EAGER`` and where a batch
  has the answer (:mod:`planner.capture.as_eager.values`);
* ``bool(t)`` of a number is a question for a yes or no, whether it is another than 0;
* what changes from step to step (``_version``, a parameter's ``grad``), or has no answer
  (``data_ptr()``), is refused with the line;
* ``buffer.data = new`` and ``buffer.set_(new)`` write the values into the buffer, and ``buffer.data``
  shares its.

``type`` and ``id`` are replaced in ``builtins`` for the time of the capture, and look at who asks.

Known limits: C code asks past all this; ``isinstance(n, int)`` of a size that varies is False;
parameters that code holds in globals, closures or deeper inside objects are other objects than the
stand-ins.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.capture.as_eager.places import is_ours, users_place
from planner.errors import TraceError

__all__ = ["Questions", "stand_in", "standing_in"]

_type, _id = type, id
_STANDS_FOR = "_planner_stands_for"  # set on a stand-in: the tensor whose place it takes

# Modules of transformers that choose between kernels, not between reading values and not.
_AS_EAGER = ("transformers.integrations.sdpa_attention", "transformers.integrations.moe")

# Functions that only pass the question on.
_PASS_ON = frozenset({"is_compiling", "is_exporting", "is_tracing"}) | {
    f"is_torchdynamo_{word}" for word in ("compiling", "exporting")
}
_NUMBERS: Mapping[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def _outside(frame: FrameType) -> bool:
    """Whether neither torch nor we ask."""
    return _is_outside(str(frame.f_globals.get("__name__", "")))


@functools.lru_cache(maxsize=4096)  # it is asked at every op, and the names are few
def _is_outside(module: str) -> bool:
    return module.partition(".")[0] != "torch" and not is_ours(module)


def _original(tensor: Any) -> Any:
    """What a stand-in stands for; ``None`` for what stands for itself."""
    return vars(tensor).get(_STANDS_FOR)


def _class_of(tensor: Any) -> type:
    original = _original(tensor)
    if original is None:
        return torch.Tensor
    if isinstance(original, _compat.STAND_INS):  # of a model that has no memory
        return nn.Parameter if isinstance(original, nn.Parameter) else torch.Tensor
    return _type(original)


class _Type:
    """``type``, but of a stand-in the class that eager has there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            found = _type(args[0])
            if found in _compat.STAND_INS and _outside(sys._getframe(1)):
                return _class_of(args[0])
            if found in _NUMBERS and _outside(sys._getframe(1)):
                return _NUMBERS[found]
            return found
        if len(args) == 3:
            args[2].setdefault("__module__", sys._getframe(1).f_globals.get("__name__"))
        return _type(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        return getattr(_type, name)

    def __instancecheck__(self, thing: Any) -> bool:
        return isinstance(thing, _type)

    def __subclasscheck__(self, cls: Any) -> bool:
        return issubclass(cls, _type)

    def __mro_entries__(self, bases: Any) -> tuple[type]:
        return (_type,)

    def __getitem__(self, item: Any) -> Any:
        return _type[item]

    def __or__(self, other: Any) -> Any:
        return _type | other

    def __ror__(self, other: Any) -> Any:
        return other | _type

    def __eq__(self, other: object) -> bool:
        return other is _type or _type(other) is _Type

    def __hash__(self) -> int:
        return hash(_type)


def _id_as_eager(thing: Any, /) -> int:
    if _type(thing) in _compat.STAND_INS and _outside(sys._getframe(1)):
        original = _original(thing)
        return _id(thing if original is None else original)
    return _id(thing)


# -- a capture ----------------------------------------------------------------------------------------


class Questions:
    """What was asked during a capture that has no answer for all steps."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._refused: list[tuple[str, str]] = []  # (what was asked for, where)

    def refuse(self, model_name: str) -> None:
        """Raise ``TraceError`` for the first question that a capture cannot answer as eager would."""
        if self._refused:
            what, place = self._refused[0]
            raise TraceError(
                f"the forward of {model_name} asks for {what} at {place}: it may be another at every step, "
                "and a planned step would go by what it was while planning. Ask outside forward and pass the "
                "answer in"
            )

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Answer as eager does."""
        answering = _type("Answering", (torch.Tensor,), self._answers())
        builtin: dict[str, Any] = {"type": _Type(), "id": _id_as_eager}
        with (
            _compat.compiler_flags(_asks_as_compiler),
            _compat.stand_ins_derive_from(answering),
            _set_on(builtins, builtin),
            _memory_read_as_eager(self._thread),
        ):
            yield

    def _note(self, what: str) -> None:
        place = users_place(sys._getframe(2), self._thread)
        if place is not None:
            self._refused.append((what, place))

    def _replaces(self, what: str) -> None:
        place = users_place(sys._getframe(2), self._thread)
        raise TraceError(
            f"the forward {what} at {place}; a planned step can only write values into a buffer. Copy into "
            "it (buffer.copy_(new)), or do it outside forward"
        )

    def _answers(self) -> dict[str, Any]:
        """Attributes of the stand-ins' classes; torch's own code gets what was there."""
        note = self._note
        tensor: Any = torch.Tensor

        def class_of(t: Any) -> type:
            return _class_of(t) if _outside(sys._getframe(1)) else _type(t)

        def truth(t: Any) -> bool:  # of a number it is a yes or a no too, which a batch may have an answer to
            is_number = t.dtype is not torch.bool and t.numel() == 1
            return bool(tensor.__bool__(t.ne(0) if is_number else t))

        def is_leaf(t: Any) -> bool:
            original = _original(t) if _outside(sys._getframe(1)) else None
            return bool(tensor.is_leaf.__get__(t) if original is None else original.is_leaf)

        def grad_fn(t: Any) -> Any:
            original = _original(t) if _outside(sys._getframe(1)) else None
            asked = original is not None and original.is_leaf
            return None if asked else tensor.grad_fn.__get__(t)

        def grad(t: Any) -> Any:
            if _original(t) is not None and _outside(sys._getframe(1)):
                note("a parameter's or input's .grad")
            return tensor.grad.__get__(t)

        def set_grad(t: Any, value: Any) -> None:
            tensor.grad.__set__(t, value)

        def version(t: Any) -> int:
            if _outside(sys._getframe(1)):
                note("a tensor's _version")
            return int(tensor._version.__get__(t))

        def data_ptr(t: Any) -> int:
            if _outside(sys._getframe(1)):
                note("a tensor's data_ptr()")
            return int(tensor.data_ptr(t))

        def data(t: Any) -> Any:
            # torch's own makes a copy of the stand-in, and what is written there would be lost
            return t.detach() if _outside(sys._getframe(1)) else tensor.data.__get__(t)

        def set_data(t: Any, value: Any) -> None:
            if not _outside(sys._getframe(1)):
                tensor.data.__set__(t, value)
            elif not _takes(t, value):
                self._replaces("gives a tensor other memory (.data =)")

        def set_(t: Any, *source: Any, **kwargs: Any) -> Any:
            if not _outside(sys._getframe(1)):
                return tensor.set_(t, *source, **kwargs)
            if kwargs or len(source) != 1 or not _takes(t, source[0]):
                self._replaces("gives a tensor other memory (set_)")
            return t

        return {
            "data": property(data, set_data),
            "set_": set_,
            "__bool__": truth,
            "__class__": property(class_of),
            "is_leaf": property(is_leaf),
            "grad_fn": property(grad_fn),
            "grad": property(grad, set_grad),
            "_version": property(version),
            "data_ptr": data_ptr,
        }


def _takes(tensor: Any, value: Any) -> bool:
    """Give a stand-in the values that it is to share from here on; ``False`` where that is not the same."""
    if _original(tensor) is None or not isinstance(value, torch.Tensor):
        return False
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        return False
    tensor.detach().copy_(value.detach())
    return True


def _asks_as_compiler(frame: FrameType | None) -> bool:
    """Whether who asks is told that a compiler is looking."""
    while frame is not None and frame.f_code.co_name in _PASS_ON:
        frame = frame.f_back
    module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in ("torch", "transformers") and module not in _AS_EAGER


@contextlib.contextmanager
def _memory_read_as_eager(thread: int) -> Iterator[None]:
    """``numpy()`` of a tensor that is neither given nor computed: the tracer would make it of no memory.

    What it then reads is watched like any setting (:mod:`planner.capture.state.watched`).
    """
    read = torch.Tensor.numpy

    def numpy(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if _type(tensor) is not torch.Tensor or threading.get_ident() != thread:
            return read(tensor, *args, **kwargs)
        with _compat.modes_set_aside():
            return read(tensor, *args, **kwargs)

    type.__setattr__(torch.Tensor, "numpy", numpy)
    try:
        yield
    finally:
        type.__delattr__(torch.Tensor, "numpy")


@contextlib.contextmanager
def _set_on(module: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Names of a module set, and put back."""
    before = {name: vars(module)[name] for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


# -- stand-ins ----------------------------------------------------------------------------------------


def stand_in(tensor: torch.Tensor, original: torch.Tensor) -> None:
    """From here on ``tensor`` answers for ``original``."""
    for name, value in vars(original).items():
        if name not in vars(tensor):
            setattr(tensor, name, value)
    setattr(tensor, _STANDS_FOR, original)
    if isinstance(original, nn.Parameter):
        tensor._is_param = True


@contextlib.contextmanager
def standing_in(model: nn.Module, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Let stand-ins of parameters and buffers stand wherever modules hold the originals.

    ``pairs``  (stand-in, original) by name.
    Raises ``TraceError`` if the forward sets an attribute on one of them.
    """
    for tensor, original in pairs.values():
        stand_in(tensor, original)
    before = {name: dict(vars(tensor)) for name, (tensor, _) in pairs.items()}
    there = {_id(original): tensor for tensor, original in pairs.values()}
    exchanged = [e for module in model.modules() for e in _exchanged(vars(module), there, 0)]
    try:
        yield
    finally:
        for holder, key, was, now in reversed(exchanged):
            if (key in holder if _type(holder) is dict else key < len(holder)) and holder[key] is now:
                holder[key] = was
    for name, (tensor, _) in pairs.items():
        for key, value in vars(tensor).items():
            if not key.startswith("_") and (key not in before[name] or before[name][key] is not value):
                raise TraceError(
                    f"the forward of {_type(model).__name__} sets the attribute {key!r} of {name}; a planned "
                    "step runs one graph and would not. Keep it in a buffer, or set it outside forward"
                )


_DEEP = 4  # containers in containers that are looked into
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})  # exchanged by whoever calls the model


def _exchanged(holder: Any, there: Mapping[int, Any], depth: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(holder, key, was, now) of what is exchanged in a dict or list, and in those it holds."""
    for key, value in list(holder.items() if _type(holder) is dict else enumerate(holder)):
        if depth == 0 and key in _REGISTERED:
            continue
        kind = _type(value)
        now = value
        if _id(value) in there:
            now = there[_id(value)]
        elif kind is tuple and any(_id(item) in there for item in value):
            now = tuple(there.get(_id(item), item) for item in value)
        elif kind is dict and any(_id(k) in there for k in value):
            now = {there.get(_id(k), k): there.get(_id(v), v) for k, v in value.items()}
        elif kind is set and any(_id(item) in there for item in value):
            now = {there.get(_id(item), item) for item in value}
        elif kind in (dict, list) and depth < _DEEP:
            yield from _exchanged(value, there, depth + 1)
        if now is not value:
            holder[key] = now
            yield holder, key, value, now
