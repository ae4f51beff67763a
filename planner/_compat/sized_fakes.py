"""What ops give on tensors without memory whose sizes are symbols, once for each op and kind of arguments.

Torch remembers such results too, under keys that take longer than the op.  Here a key is the expressions of
all sizes, and which of them are one and the same symbol of the trace; what comes out has the symbols that
came in where the first result had them, and else symbols of its own with the same expressions, as torch
would have made them.  Guards are there since the first time.  A table belongs to one shape environment.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["OF_SYMBOLS", "VALUES", "fake_of", "fake_on", "held_by", "no_data", "placed", "sized_output"]

_kind, _identity = type, id  # a capture replaces the builtins, for code outside torch (as_eager.questions)

VALUES = frozenset({
    int, float, bool, str, type(None), complex,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip


def fake_of(mode: Any, inner: torch.Tensor, device: torch.device, held: dict[str, Any]) -> FakeTensor:
    """``inner``, on the meta device, as a fake of ``mode`` on ``device``; ``held``: its other attributes."""
    made = torch.Tensor._make_subclass(
        FakeTensor, inner, inner.requires_grad, dispatch_device=True, device_for_backend_keys=device
    )
    no_data(mode, made)
    attributes = vars(made)
    attributes.update(held)
    attributes["fake_mode"] = mode
    return made


def placed(device: torch.device) -> Any:
    """A device, with the number of the current one where it is told by its kind alone (``"cuda"``)."""
    of_kind = getattr(torch, device.type, None) if device.index is None else None
    begun = getattr(of_kind, "is_initialized", None)
    return device if of_kind is None or begun is None or not begun() else (device, of_kind.current_device())


def no_data(mode: Any, made: torch.Tensor) -> None:
    """Whoever asks where its data is finds out that there is none."""
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)


def held_by(mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    """The attributes of a fake."""
    known = vars(mode).setdefault(_HELD, {})
    if device not in known:
        held = dict(vars(FakeTensor(mode, _plain((0,), (1,), torch.float32), device)))
        assert all(held[name] is None for name in held if name not in _OF_A_FAKE)
        del held["fake_mode"]  # set by who makes one
        known[device] = held
    return {**known[device], "fake_mode": mode}


def fake_on(
    storage: torch.UntypedStorage | int, like: FakeTensor, shape: list[int], stride: list[int], offset: int
) -> FakeTensor:
    """A fake of the mode, dtype and device of ``like``, laid out so on a storage of a fake, or one of so many
    bytes; 2.9+."""
    with torch._C._DisableTorchDispatch():
        if isinstance(storage, int):
            storage = torch.empty((storage,), dtype=torch.uint8, device="meta").untyped_storage()
        inner = torch.empty((0,), dtype=like.dtype, device="meta")
        inner.set_(storage, offset, shape, stride)
    made: Any = torch.Tensor._make_subclass(
        FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=like.fake_device
    )
    no_data(like.fake_mode, made)
    vars(made).update(held_by(like.fake_mode, like.fake_device))
    fake: FakeTensor = made
    return fake


_HELD = "_planner_held"  # on a mode: the attributes of its fakes, by device

# Attributes of a fake that are not ``None``.
_OF_A_FAKE = frozenset({"_fake_device", "fake_device", "fake_mode"})


def _plain(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class _Nodes:
    """The symbols that an op is given: by which of them a size is, and which of them are one and the same."""

    __slots__ = ("given", "places")

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.places: dict[int, int] = {}

    def kind_of(self, size: torch.SymInt) -> Any:
        """The expression of a size, and the first of the sizes that is the same node."""
        node = size.node
        place = self.places.setdefault(_identity(node), len(self.given))
        self.given.append(size)
        return node._expr, place

    def place(self, size: torch.SymInt) -> int | None:
        return self.places.get(_identity(size.node))


def _sized_kinds_of(items: Any, mode: FakeTensorMode, out: list[Any], nodes: _Nodes) -> bool:
    """As :func:`_kinds_of`, where sizes may be symbols."""
    for x in items:
        kind = _kind(x)
        if kind is FakeTensor:
            if x.fake_mode is not mode or x.constant is not None or x.layout is not torch.strided:
                return False
            out += (
                x.dtype,
                x.fake_device,
                x.requires_grad,
                x.is_conj(),
                x.is_neg(),
                x.is_inference(),
                x.dim(),
            )
            sizes = *x.shape, *x.stride(), x.storage_offset(), x.untyped_storage().nbytes()
            for size in sizes:
                out.append(nodes.kind_of(size) if _kind(size) is torch.SymInt else size)
        elif kind in VALUES:
            out += (kind, placed(x) if kind is torch.device else x)
        elif kind is torch.SymInt:
            if x.node.__class__ is not _sym_node().SymNode or x.node.constant is not None:
                return False
            out += (kind, nodes.kind_of(x))
        elif kind is list or kind is tuple or kind is torch.Size:
            out += (kind, len(x))
            if not _sized_kinds_of(x, mode, out, nodes):
                return False
        else:
            return False
    return True


@functools.cache
def _sym_node() -> Any:
    return importlib.import_module("torch.fx.experimental.sym_node")


class _SizedTensor:
    """Makes a tensor that a call gives; symbols that the call is given stay the same ones."""

    __slots__ = ("anew", "device", "flags", "held", "held_bytes", "options", "sizes", "view")

    def __init__(self, made: FakeTensor, view: int | None, nodes: _Nodes) -> None:
        """``view``: on the storage of which argument."""
        self.sizes = tuple(
            tuple([_noted_size(size, nodes) for size in sizes])
            for sizes in (made.shape, made.stride(), (made.storage_offset(),))
        )
        self.options = made.dtype, made.requires_grad
        self.flags = made.is_conj(), made.is_neg()
        self.view = view
        held_bytes = made.untyped_storage().nbytes()
        self.held_bytes = _noted_size(held_bytes, nodes)
        self.anew = _made_as(made, nodes)
        self.device = made.fake_device
        self.held = held_by(made.fake_mode, made.fake_device)

    def __call__(self, mode: FakeTensorMode, args: Any, nodes: _Nodes) -> Any:
        shape, stride, offset = [[_size_again(s, nodes) for s in sizes] for sizes in self.sizes]
        dtype, requires_grad = self.options
        with torch._C._DisableTorchDispatch(), _no_guards(mode):
            if self.anew is not None and self.view is None:
                inner = self.anew(shape, stride, dtype=dtype, device="meta", requires_grad=requires_grad)
            else:
                if self.view is not None:
                    storage = args[self.view].untyped_storage()
                else:
                    count = _size_again(self.held_bytes, nodes)
                    storage = torch.empty((count,), dtype=torch.uint8, device="meta").untyped_storage()
                inner = torch.empty((0,), dtype=dtype, device="meta", requires_grad=requires_grad)
                inner.set_(storage, offset[0], shape, stride)
            if self.flags != (False, False):
                torch._C._set_conj(inner, self.flags[0])
                torch._C._set_neg(inner, self.flags[1])
        return fake_of(mode, inner, self.device, self.held)


def _no_guards(mode: FakeTensorMode) -> Any:
    env: Any = mode.shape_env
    return env.suppress_guards()


def _noted_size(size: Any, nodes: _Nodes) -> Any:
    """A number, or the place among the sizes given, or what a node of its own holds."""
    if _kind(size) is not torch.SymInt:
        return size
    place = nodes.place(size)
    return [place] if place is not None else dict(vars(size.node))


def _size_again(size: Any, nodes: _Nodes) -> Any:
    kind = _kind(size)
    if kind is list:
        return nodes.given[size[0]]
    if kind is dict:
        node = object.__new__(_sym_node().SymNode)
        vars(node).update(size)
        return torch.SymInt(node)
    return size


def _sized_recipe(output: Any, mode: Any, func: Any, args: Any, kwargs: Any, nodes: _Nodes) -> Any:
    """How to make the results again; ``None``: as torch does it."""
    if func._schema.is_mutable or func.namespace not in ("aten", "prims"):
        return None
    if _UNSTEADY & set(func.tags):
        return None
    given = [x for x in args if _kind(x) is FakeTensor]
    made = output if _kind(output) is tuple or _kind(output) is list else (output,)
    if any(_kind(x) is not FakeTensor and x is not None for x in made):
        return None
    recipes: list[Any] = []
    storages: set[int] = set()
    for x in made:
        if x is None:
            recipes.append(None)
            continue
        if any(x is y for y in (*given, *kwargs.values())):
            return None
        if x.constant is not None or x.fake_mode is not mode or x.layout is not torch.strided:
            return None
        if x.is_inference() or not all(_is_noted(s) for s in (*x.shape, *x.stride(), x.storage_offset())):
            return None
        storage = x.untyped_storage()._cdata
        view = next(
            (
                i
                for i, y in enumerate(args)
                if _kind(y) is FakeTensor and y.untyped_storage()._cdata == storage
            ),
            None,
        )
        if view is None and storage in storages:
            return None
        if view is None and not _is_noted(x.untyped_storage().nbytes()):
            return None
        storages.add(storage)
        recipes.append(_SizedTensor(x, view, nodes))
    if _kind(output) is FakeTensor:
        return recipes[0]
    if output is None:
        return None
    kind = _kind(output)
    return lambda mode, args, nodes: kind([r and r(mode, args, nodes) for r in recipes])


_UNSTEADY = frozenset({
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view,
})  # fmt: skip


def _is_on(value: Any, storage: int) -> bool:
    return _kind(value) is FakeTensor and value.untyped_storage()._cdata == storage


def _is_noted(size: Any) -> bool:
    return _kind(size) is int or (_kind(size) is torch.SymInt and size.node._hint is not None)


def _plainly(shape: Any, stride: Any, **options: Any) -> torch.Tensor:
    return torch.empty(shape, **options)


def _made_as(made: FakeTensor, nodes: _Nodes) -> Callable[..., torch.Tensor] | None:
    """What makes a tensor of its sizes and strides on as many bytes, told by the same expressions."""
    own = *made.stride(), made.storage_offset(), made.untyped_storage().nbytes()
    strides: Any = made.stride()
    given = any(_kind(s) is torch.SymInt and nodes.place(s) is not None for s in strides)
    for anew in (torch.empty_strided,) if given else (_plainly, torch.empty_strided):
        with torch._C._DisableTorchDispatch(), _no_guards(made.fake_mode):
            other = anew(made.shape, made.stride(), dtype=made.dtype, device="meta")
            told = *other.stride(), other.storage_offset(), other.untyped_storage().nbytes()
        if [*map(_expression, told)] == [*map(_expression, own)]:
            return anew
    return None


def _expression(size: Any) -> Any:
    return size.node.expr if _kind(size) is torch.SymInt else size


# The attribute of a shape environment that has what ops gave on fakes of its symbols.
OF_SYMBOLS = "_planner_remembers"


def sized_output(
    known: dict[Any, Any], run: Any, mode: Any, func: Any, types: Any, args: Any, kwargs: Any
) -> Any:
    """What an op gives on fakes whose sizes may be symbols."""
    suppressed = mode.shape_env._suppress_guards_tls()
    key = [func, torch.get_default_dtype(), torch._C._get_default_device(), suppressed, *kwargs]
    nodes = _Nodes()
    if not (_sized_kinds_of(args, mode, key, nodes) and _sized_kinds_of(kwargs.values(), mode, key, nodes)):
        return run(mode, func, types, args, kwargs)
    made = tuple(key)
    recipe = known.get(made, run)
    if recipe is None:
        return run(mode, func, types, args, kwargs)
    if recipe is not run:
        return recipe(mode, args, nodes)
    output = run(mode, func, types, args, kwargs)
    known[made] = _sized_recipe(output, mode, func, args, kwargs, nodes)
    return output
