"""Tracing in less time: what a trace asks of torch again and again is answered from tables, alike.

Each context here stands for torch's own code where that would do the same work once more, and leaves
everything else to it: what an op gives on fakes of the same kind, the text of graphs that nobody runs, a
description of tensors that nobody reads.  Nothing that comes out of a trace differs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch._subclasses.fake_tensor
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module  # graphs whose code is written when run; 2.3+

from planner._compat.at_once import AtOnce
from planner._compat.sized_fakes import OF_SYMBOLS, VALUES, fake_of, held_by, no_data, placed, sized_output

_kind_of, _identity = type, id  # a capture replaces the builtins, for code outside torch (as_eager.questions)

_fake_tensor: Any = torch._subclasses.fake_tensor  # what fakes are made by, and remembered; 2.0+

# -- the garbage collector ------------------------------------------------------------------------------

# A trace makes a million objects of which hardly one is garbage in a circle; each of the collector's looks,
# by default after 700 of them, walks all that are young, and now and then all there are.
_SELDOM = 100_000, 20, 100

_at_once = threading.Lock()
_seldom_for = 0  # how many contexts are open, in all threads
_before = gc.get_threshold()


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """The garbage collector looks less often, for the whole process; not at all stays not at all."""
    global _seldom_for, _before
    with _at_once:
        if _seldom_for == 0:
            _before = gc.get_threshold()
            if _before[0] > 0:
                gc.set_threshold(*map(max, _before, _SELDOM))
        _seldom_for += 1
    try:
        yield
    finally:
        with _at_once:
            _seldom_for -= 1
            if _seldom_for == 0:
                gc.set_threshold(*_before)


# -- fakes ----------------------------------------------------------------------------------------------


class Remembered(dict[Any, Any]):
    """What ops give on fakes, as torch remembers it, and once more by keys that are quick to make.

    Without ops of whole graphs: those are known by ids, and torch forgets them in its own table only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quick: dict[Any, Any] = {}

    def __setitem__(self, key: Any, entry: Any) -> None:
        if isinstance(key.key[0], OpOverload):
            super().__setitem__(key, entry)

    def clear(self) -> None:
        super().clear()
        self.quick.clear()


def _kinds_of(items: Any, mode: FakeTensorMode, out: list[Any]) -> bool:
    """Append to ``out`` all that an op's result may hang on; ``False`` where torch is to see for itself."""
    for x in items:
        kind = _kind_of(x)
        if kind is FakeTensor:
            if (
                x.fake_mode is not mode
                or x.constant is not None
                or x.layout is not torch.strided
                or x._has_symbolic_sizes_strides
            ):
                return False
            out += (
                x.dtype,
                x.shape,
                x.stride(),
                x.storage_offset(),
                x.fake_device,
                x.requires_grad,
                x.untyped_storage().nbytes(),
                x.is_conj(),
                x.is_neg(),
                x.is_inference(),
            )
        elif kind in VALUES:
            out += (kind, placed(x) if kind is torch.device else x)  # 1 and 1.0 are one key
        elif kind is list or kind is tuple:
            out += (kind, len(x))
            if not _kinds_of(x, mode, out):
                return False
        else:
            return False
    return True


def _key_of(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    env = mode.shape_env
    key = [
        func,
        torch.get_default_dtype(),
        torch._C._get_default_device(),
        torch.is_inference_mode_enabled(),
        None if env is None else env.settings,  # not whether it is traced: that is for symbols
    ]
    if not _kinds_of(args, mode, key):
        return None
    if kwargs:
        key += kwargs
        if not _kinds_of(kwargs.values(), mode, key):
            return None
    return tuple(key)


class _Tensor:
    """Makes a tensor that a call gives: as torch makes it of its own table, at fixed sizes."""

    __slots__ = ("device", "flags", "held", "options", "sizes", "view")

    def __init__(self, made: FakeTensor, view: int | None) -> None:
        """``view``: on the storage of which argument."""
        self.sizes = tuple(made.shape), made.stride(), made.storage_offset()
        self.options = made.dtype, made.requires_grad
        self.flags = made.is_conj(), made.is_neg()
        self.view = view
        self.device = made.fake_device
        self.held = held_by(made.fake_mode, made.fake_device)

    def __call__(self, mode: FakeTensorMode, args: Any) -> Any:
        shape, stride, offset = self.sizes
        dtype, requires_grad = self.options
        with torch._C._DisableTorchDispatch():
            inner = torch.empty_strided(
                shape, stride, dtype=dtype, device="meta", requires_grad=requires_grad
            )
            if self.flags != (False, False):
                torch._C._set_conj(inner, self.flags[0])
                torch._C._set_neg(inner, self.flags[1])
            if self.view is not None:
                inner.set_(args[self.view].untyped_storage(), offset, shape, stride)
        return fake_of(mode, inner, self.device, self.held)


def _recipe(mode: Any, output: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """How to make the results again, where torch would remember them; ``None``: as torch makes them."""
    if func is not torch.ops.aten._unsafe_view.default:  # a view, of which torch remembers nothing
        try:
            mode._validate_cache_key(func, args, kwargs)
        except _fake_tensor._BypassDispatchCache:
            return None
    if not isinstance(output, tuple) or isinstance(output, torch.Size):
        return _maker_of(mode, output, func, args, kwargs)
    each = [_maker_of(mode, made, func, args, kwargs) for made in output]
    storages = [made.untyped_storage()._cdata for made in output if _kind_of(made) is FakeTensor]
    if None in each or len({*storages}) < len(storages):
        return None
    return lambda mode, args: tuple([make(mode, args) for make in each])


def _maker_of(mode: Any, made: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What makes one result again, of the mode and the arguments; ``None`` if that is not known."""
    if made is None or isinstance(made, int):
        return lambda mode, args: made
    plain = _kind_of(made) is FakeTensor and made.fake_mode is mode and made.layout is torch.strided
    if not plain or made.constant is not None or made._has_symbolic_sizes_strides:
        return None
    if any(made is given for given in kwargs.values()):
        return None
    for at, given in enumerate(args):
        if made is given:
            return lambda mode, args: args[at]
    storage = made.untyped_storage()
    on = [i for i, x in enumerate(args) if isinstance(x, FakeTensor) and _is_storage_of(x, storage)]
    viewed = func.is_view or func is torch.ops.aten._unsafe_view.default
    if len(on) != int(viewed):
        return None
    maker = _Tensor(made, on[0] if on else None)
    again = maker(mode, args)
    keys = torch._C._dispatch_key_set
    alike = keys(again) == keys(made) and again.untyped_storage().nbytes() == storage.nbytes()
    return maker if alike else None


def _is_storage_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return tensor.untyped_storage()._cdata == storage._cdata


# What is put in the place of torch's is put back in order.
_ONE_TABLE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def fakes_remembered(known: Remembered) -> Iterator[None]:
    """What ops give on fakes is looked up in ``known`` and noted there; for the whole process; 2.9+.

    Threads wait for each other.
    """
    with _ONE_TABLE_AT_A_TIME, _looked_up(known):
        yield


_READS_A_NUMBER = torch.ops.aten._local_scalar_dense.default


@contextlib.contextmanager
def _looked_up(known: Remembered) -> Iterator[None]:
    before = FakeTensorMode.cache
    run: Any = FakeTensorMode.__torch_dispatch__
    quick, apart = known.quick, _fake_tensor._DISPATCH_META_HANDLERS
    direct = _fake_tensor._DISPATCH_HANDLE_DIRECTLY

    def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sized = getattr(mode.shape_env, OF_SYMBOLS, None)
        if sized is not None:
            if func in apart or func in direct or not isinstance(func, OpOverload):
                return run(mode, func, types, args, kwargs or {})
            return sized_output(sized, run, mode, func, types, args, kwargs or {})
        if func is _READS_A_NUMBER:
            args[0].item_memo = None  # 2.14+ notes the value of the tensor that the fake was made of
        looks = mode.cache_enabled and not mode.cache_crosscheck_enabled
        if not looks or func in apart or func in direct or not isinstance(func, OpOverload):
            return run(mode, func, types, args, kwargs or {})
        key = _key_of(mode, func, args, kwargs)
        if key is None:
            return run(mode, func, types, args, kwargs or {})
        recipe = quick.get(key, run)
        if recipe is None:
            return mode._dispatch_impl(func, types, args, kwargs or {})
        if recipe is not run:
            return recipe(mode, args)
        output = mode._dispatch_impl(func, types, args, kwargs or {})
        if FakeTensorMode.cache is known:
            quick[key] = _recipe(mode, output, func, args, kwargs or {})
        return output

    FakeTensorMode.cache = known
    type.__setattr__(FakeTensorMode, "__torch_dispatch__", dispatch)
    try:
        yield
    finally:
        FakeTensorMode.cache = before
        type.__setattr__(FakeTensorMode, "__torch_dispatch__", run)


def _layers() -> AtOnce:
    cache: Any = FakeTensorMode.cache
    return AtOnce(_key_of, cache.quick if isinstance(cache, Remembered) else {})


def without_writes_at_once(run: Any) -> Any:
    """``run`` of the mode that makes programs without writes, but for what passes layers at once; 2.9+."""
    return _layers().functional(not_hidden(run))


def _noted_at_once(run: Any) -> Any:
    """``run`` of the mode that writes the graph, likewise."""
    return _layers().written(not_hidden(run))


# -- graphs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def code_when_run() -> Iterator[None]:
    """The code of a graph module that is made here is written when it is asked for; 2.3+."""
    with _use_lazy_graph_module(True):
        yield


# How many contexts of :func:`graphs_quick` are open, in all threads, and what will put torch's own back.
_graphs_for = 0
_graphs = contextlib.ExitStack()


@contextlib.contextmanager
def graphs_quick() -> Iterator[None]:
    """Nodes are made in less time, in whatever thread; 2.0+."""
    global _graphs_for
    with _at_once:
        if _graphs_for == 0:
            leaves = _Leaves(importlib.import_module("torch.utils._pytree"))
            _graphs.enter_context(_names_of(importlib.import_module("torch.fx.graph"), pytree=leaves))
        _graphs_for += 1
    try:
        yield
    finally:
        with _at_once:
            _graphs_for -= 1
            if _graphs_for == 0:
                _graphs.close()


def _impure_once(torchs: Any) -> Any:
    """Whether a node is to stay where nobody reads it, asked once for each op."""
    known: dict[Any, bool] = {}

    def is_impure(node: fx.Node, *how: Any, **named: Any) -> bool:
        if node.op != "call_function" or named or not isinstance(node.target, OpOverload):
            return bool(torchs(node, *how, **named))
        key = node.target, *how
        found = known.get(key)
        if found is None:
            found = known[key] = bool(torchs(node, *how))
        return found

    return is_impure


# -- what is asked at every op --------------------------------------------------------------------------

_LEAF: Any = object()


class _Odd(Exception):
    """A container that only torch's own flattening knows."""


class _Shape:
    """How a nest of tuples, lists and dicts was flattened."""

    __slots__ = ("nest",)

    def __init__(self, nest: Any) -> None:
        self.nest = nest


class _Flattening:
    """Torch's flattening of containers, quick for the tuples, lists and dicts that ops take; 2.0+."""

    def __init__(self, torchs: Any) -> None:
        self._torchs = torchs
        self._leaves: dict[type, bool] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torchs, name)

    def _is_leaf(self, x: Any) -> bool:
        kind = _kind_of(x)
        known = self._leaves.get(kind)
        if known is None:
            torchs = self._torchs
            known = self._leaves[kind] = kind not in torchs.SUPPORTED_NODES and not issubclass(kind, tuple)
        if not known:
            raise _Odd
        return True

    def _flat(self, x: Any, leaves: list[Any]) -> Any:
        kind = _kind_of(x)
        if kind is tuple or kind is list:
            return kind, [self._flat(item, leaves) for item in x]
        if kind is dict:
            return list(x), [self._flat(item, leaves) for item in x.values()]
        self._is_leaf(x)
        leaves.append(x)
        return _LEAF

    def _made(self, nest: Any, leaves: Iterator[Any]) -> Any:
        if nest is _LEAF:
            return next(leaves)
        kind, items = nest
        if kind is tuple:
            return tuple([self._made(item, leaves) for item in items])
        if kind is list:
            return [self._made(item, leaves) for item in items]
        return dict(zip(kind, [self._made(item, leaves) for item in items], strict=True))

    def _mapped(self, only: Any, change: Any, x: Any) -> Any:
        kind = _kind_of(x)
        if kind is tuple:
            return tuple([self._mapped(only, change, item) for item in x])
        if kind is list:
            return [self._mapped(only, change, item) for item in x]
        if kind is dict:
            return {key: self._mapped(only, change, item) for key, item in x.items()}
        self._is_leaf(x)
        return change(x) if isinstance(x, only) else x

    def tree_flatten(self, tree: Any, *how: Any, **more: Any) -> Any:
        if not how and not more:
            leaves: list[Any] = []
            with contextlib.suppress(_Odd):
                return leaves, _Shape(self._flat(tree, leaves))
        return self._torchs.tree_flatten(tree, *how, **more)

    def tree_leaves(self, tree: Any, *how: Any, **more: Any) -> Any:
        return self.tree_flatten(tree, *how, **more)[0]

    def tree_unflatten(self, leaves: Any, shape: Any) -> Any:
        if _kind_of(shape) is _Shape:
            return self._made(shape.nest, iter(leaves))
        return self._torchs.tree_unflatten(leaves, shape)

    def tree_map_only(self, only: Any, change: Any, tree: Any, *more: Any, **how: Any) -> Any:
        if isinstance(only, _kind_of) and not more and not how:
            with contextlib.suppress(_Odd):
                return self._mapped(only, change, tree)
        return self._torchs.tree_map_only(only, change, tree, *more, **how)


def _snapshot(torchs: Any) -> Any:
    """A fake for the node of a graph: on the storage of the one that the program holds, apart from it."""
    held: dict[str, Any] = {}

    def snapshot_fake(val: Any, include_real: bool = False) -> Any:
        if _kind_of(val) is not FakeTensor or include_real or val._has_symbolic_sizes_strides:
            return torchs(val, include_real)
        if not held:
            made = torchs(val)
            held.update((name, None) for name in vars(made))
            return made
        mode, device = val.fake_mode, val.fake_device
        with torch._C._DisableTorchDispatch():
            made = torch.Tensor._make_subclass(
                FakeTensor, val, False, dispatch_device=True, device_for_backend_keys=device
            )
        no_data(mode, made)
        vars(made).update(held)
        made.fake_mode, made.fake_device = mode, device
        return made

    return snapshot_fake


def _remembering(torchs: Any, key_of: Any) -> Any:
    """``torchs``, asked once for each key; where there is none, each time."""
    known: dict[Any, Any] = {}

    def asked(*args: Any) -> Any:
        key = key_of(*args)
        if key is None:
            return torchs(*args)
        if key not in known:
            known[key] = torchs(*args)
        return known[key]

    return asked


def _op_and_device(func: Any, flat_args: Any) -> Any:
    return func, next((a.device.type for a in flat_args if isinstance(a, torch.Tensor)), None)


def _op(func: Any) -> Any:
    return func if isinstance(func, OpOverload) else None


def _plain_value(value: Any) -> Any:
    return _kind_of(value) if _kind_of(value) in VALUES or isinstance(value, torch.Tensor) else None


def _asked_of_values(proxies: Any) -> dict[str, Any]:
    """Whether a value is an object that a graph holds as it is; 2.14+ asks by another name."""
    names = [name for name in ("is_opaque_value", "is_custom_class_obj") if hasattr(proxies, name)]
    return {name: _remembering(getattr(proxies, name), _plain_value) for name in names}


@contextlib.contextmanager
def _names_of(module: Any, **names: Any) -> Iterator[None]:
    """Names of a module's own code, put back; those that the module lacks but for builtins are left out."""
    own = vars(module)
    names = {name: value for name, value in names.items() if name in own or name in ("type", "id")}
    before = {name: own[name] for name in names if name in own}
    own.update(names)
    try:
        yield
    finally:
        for name in names:
            del own[name]
        own.update(before)


def dynamo_callback() -> Any:
    """What Dynamo does with each frame that is about to run; ``None`` or False: nothing; 2.6+."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return get_eval_frame_callback()


def not_hidden(run: Any) -> Any:
    """``run`` without what hides it from Dynamo at every call, where Dynamo does not look."""
    return inspect.unwrap(run) if dynamo_callback() in (None, False) else run


@contextlib.contextmanager
def _method_of(cls: Any, name: str, instead_of: Any) -> Iterator[None]:
    """A method that a class defines itself, put back; ``instead_of(torch's)`` is what stands there."""
    before = vars(cls)[name]
    type.__setattr__(cls, name, instead_of(before))
    try:
        yield
    finally:
        type.__setattr__(cls, name, before)


_Generator: Any = torch.Generator


def _argument(torchs: Any) -> Any:
    """What a node of a graph is called with: nodes and plain values, tuples and lists of them."""

    def create_arg(tracer: Any, a: Any) -> Any:
        kind = _kind_of(a)
        if kind in VALUES:
            return a
        if kind is fx.Proxy:
            return a.node
        if kind is tuple:
            return tuple([create_arg(tracer, item) for item in a])
        if kind is list:
            return [create_arg(tracer, item) for item in a]
        if kind is _Generator:  # 2.11 has no place for one in a graph
            return a
        return torchs(tracer, a)

    return create_arg


class _Thunks:
    """Whether sizes that are computed are written to the graph only when they are used, within a context."""

    __slots__ = ("before", "enable", "tracer")

    def __init__(self, tracer: Any, *, enable: bool = True) -> None:
        self.tracer, self.enable = tracer, enable

    def __enter__(self) -> None:
        self.before = self.tracer.enable_thunkify
        self.tracer.enable_thunkify = self.enable

    def __exit__(self, *_: object) -> None:
        self.tracer.enable_thunkify = self.before


def _tracked(proxies: Any) -> Any:
    """A tensor is noted with its node, and sizes of it with theirs where they are symbols."""
    track_tensor, note = proxies.track_tensor, proxies.set_proxy_slot
    noted: Any = proxies._ProxyTensor

    def track(tensor: Any, proxy: Any, *, constant: Any, tracer: Any) -> None:
        if tensor._has_symbolic_sizes_strides or tensor.layout is not torch.strided:
            track_tensor(tensor, proxy, constant=constant, tracer=tracer)
        else:
            note(tensor, tracer, noted(proxy, constant))

    return track


class _Leaves:
    """Torch's flattening of containers, quick where a graph looks through what a node is called with."""

    def __init__(self, torchs: Any) -> None:
        self._torchs = torchs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torchs, name)

    def tree_iter(self, tree: Any) -> list[Any]:
        leaves: list[Any] = []
        waiting = [tree]
        while waiting:
            for x in waiting.pop():
                if isinstance(x, (tuple, list)):
                    waiting.append(x)
                elif isinstance(x, dict):
                    waiting.append(x.values())
                else:
                    leaves.append(x)
        return leaves


class _Copying:
    """``copy.copy`` of what nodes hold on to: texts, and dicts of them."""

    @staticmethod
    def copy(x: Any) -> Any:
        kind = _kind_of(x)
        return x if kind is str else dict(x) if kind is dict else copy.copy(x)


# Torch's own code that asks for the kind or the identity of objects at every op, which a capture answers.
_ASK_OF_OBJECTS = frozenset({
    "torch._dynamo.eval_frame", "torch._library.opaque_object", "torch._tensor",
    "torch.fx.experimental.sym_node", "torch.fx.experimental.symbolic_shapes",
    "torch.fx.graph", "torch.fx.node", "torch.fx.proxy",
    "torch.utils._python_dispatch", "torch.utils._pytree", "torch.utils.weak",
})  # fmt: skip


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """What the tracer asks at every op, of the op alone, it asks once; for the whole process.

    And nodes get no ``tensor_meta`` and no ``original_aten``, which say in other words what ``val`` and the
    target do.
    """
    effects: Any = importlib.import_module("torch._higher_order_ops.effects")
    automatic: Any = importlib.import_module("torch._higher_order_ops.auto_functionalize")
    functional: Any = importlib.import_module("torch._subclasses.functional_tensor")
    proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
    builtin = {"type": _kind_of, "id": _identity}
    flattening = _Flattening(importlib.import_module("torch.utils._pytree"))
    decomposed = _remembering(proxies.autograd_would_have_decomposed, _op_and_device)
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(_names_of(effects, has_effects=_remembering(effects.has_effects, _op)))
        asked = automatic.can_auto_functionalize
        put(_names_of(automatic, can_auto_functionalize=_remembering(asked, _op)))
        put(_names_of(functional, **builtin, pytree=flattening, autograd_would_have_decomposed=decomposed))
        put(
            _names_of(
                proxies,
                **builtin,
                pytree=flattening,
                autograd_would_have_decomposed=decomposed,
                **_asked_of_values(proxies),
                snapshot_fake=_snapshot(proxies.snapshot_fake),
                track_tensor=_tracked(proxies),
                _enable_thunkify=_Thunks,
                set_original_aten_op=contextlib.nullcontext,
                _extract_tensor_metadata=lambda _: None,
            )
        )
        put(_method_of(proxies.ProxyTorchDispatchMode, "__torch_dispatch__", _noted_at_once))
        put(_method_of(proxies.PythonKeyTracer, "create_arg", _argument))
        for name in _ASK_OF_OBJECTS & sys.modules.keys():
            put(_names_of(sys.modules[name], **builtin))
        put(graphs_quick())
        put(_method_of(fx.Node, "is_impure", _impure_once))
        put(_names_of(importlib.import_module("torch.fx.proxy"), copy=_Copying))
        put(_names_of(_fake_tensor, **builtin))
        yield
