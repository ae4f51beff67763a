"""Ops of a trace that no layer of the tracer adds anything to go through all layers at once.

What a model runs while it is traced passes three modes, each within the next: one that makes a program
without writes of it (``FunctionalTensorMode``), one that writes the graph (``ProxyTorchDispatchMode``), and
one that says what comes out (``FakeTensorMode``).  Each takes the call apart and asks anew what kind of op it
is.  For most calls the answers are known:

* an op that neither writes nor shares memory, on tensors without writes that are still to be applied, is the
  same op on what these tensors stand for: its node is written, and its results are made again as they were
  for the same kinds of arguments (:mod:`planner._compat.quick`);
* a view goes through C++ alone, which notes what it is a view of, and its node is written likewise.

Everything else is torch's: what writes, what reads values, ops of whole graphs, sizes that are symbols, what
has not been run on such arguments before.  Nothing that comes out differs.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from planner._compat.sized_fakes import VALUES

__all__ = ["AtOnce"]

_kind_of = type  # a capture replaces the builtin, for code outside torch (as_eager.questions)

_torch: Any = torch  # with what it does not tell of
_C: Any = torch._C
_KEYS, _MODES = _C.DispatchKey, _C._TorchDispatchModeKey
_WHOLE = _KEYS.CompositeImplicitAutograd  # of an op that is made of others
_FUNCTIONALIZE = _C.DispatchKeySet(_KEYS.Functionalize)
_PLAIN, _VIEW, _IN_PLACE, _BESIDE, _WRITES, _OTHER = range(6)
_THROUGH = _VIEW, _IN_PLACE, _BESIDE
_TORCHS: Any = object()  # a call that is left to torch
_DEVICE = torch.ops.prim.device.default
_HIDDEN_VIEW = torch.ops.aten._unsafe_view.default  # a view that its schema does not tell of


class _Odd(Exception):
    """An argument that only torch's own code knows."""


class AtOnce:
    """One trace: which ops may be taken at once, and what was written so far.

    ``key_of(mode, op, args, kwargs)`` is all that a result on fakes hangs on; ``None`` where it is not known.
    ``known``: by such keys what makes the results again, of the mode and the arguments.
    """

    def __init__(self, key_of: Callable[..., Any], known: dict[Any, Any]) -> None:
        self._key_of, self._known = key_of, known
        self._proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
        self._new_node: Any = fx.proxy.TracerBase.create_node
        self._kinds: dict[Any, int] = {}
        self._names: dict[Any, str | None] = {}
        self._written: set[int] = set()  # storages with a write that their views may not have yet
        self._all_written = False

    # -- what an op is -----------------------------------------------------------------------------

    def _kind(self, func: Any) -> int:
        known = self._kinds.get(func)
        if known is None:
            known = self._kinds[func] = _kind_of_op(func)
        return known

    def _name(self, func: Any, mode: Any) -> str | None:
        """The name of its nodes; ``None`` where torch does more than to write one."""
        if func not in self._names:
            name: str | None = None
            if isinstance(func, OpOverload) and _kind_of_op(func) in (_PLAIN, _VIEW):
                exact = self._proxies._should_save_eager_input_vals(func)
                values = torch.Tag.data_dependent_output in func.tags
                if not exact and not values and func not in self._formulas(mode):
                    name = mode.tracer.graph._target_to_str(func.overloadpacket.__name__)
            self._names[func] = name
        return self._names[func]

    def _formulas(self, mode: Any) -> Any:
        """What the mode that writes the graph runs in the place of ops; 2.11 keeps it beside the mode."""
        own = getattr(mode, "decomposition_table", None)
        return self._proxies.CURRENT_DECOMPOSITION_TABLE if own is None else own

    # -- without writes ----------------------------------------------------------------------------

    def functional(self, torchs: Any) -> Any:
        """For ``FunctionalTensorMode.__torch_dispatch__``; ``torchs`` is what else it would run."""

        def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kind = self._kind(func)
            if kind == _PLAIN:
                result = self._plain(mode, func, args, kwargs or {})
            elif kind in _THROUGH:
                result = self._through(mode, kind, func, args, kwargs or {})
            elif func is _DEVICE:
                result = _device_of(args[0])
            else:
                if kind == _WRITES:
                    self._note_writes((args, kwargs))
                elif not isinstance(func, OpOverload):
                    self._all_written = True  # it may write what it does not say
                result = _TORCHS
            return torchs(mode, func, types, args, kwargs) if result is _TORCHS else result

        return dispatch

    def _note_writes(self, x: Any) -> None:
        kind = _kind_of(x)
        if kind is FunctionalTensor:
            self._written.add(x.elem.untyped_storage()._cdata)
        elif kind in (tuple, list):
            for item in x:
                self._note_writes(item)
        elif kind is dict:
            self._note_writes(list(x.values()))

    def _elem(self, x: Any) -> Any:
        """The tensor of C++ below one of the trace, which has all writes then; the same of a list of them."""
        kind = _kind_of(x)
        if kind is FunctionalTensor:
            elem = x.elem
            if self._written and elem.untyped_storage()._cdata in self._written:
                self._bring_writes(x)
            return elem
        if kind in VALUES:
            return x
        if kind is tuple or kind is list:
            return kind([self._elem(item) for item in x])
        raise _Odd

    @staticmethod
    def _bring_writes(x: Any) -> None:
        """Make a view anew that does not have a write to its base; its node is marked as the first one's."""
        writer = _C._get_dispatch_mode(_MODES.PROXY)
        if writer is None:
            _torch._sync(x)
            return
        entry = writer.tracer.tensor_tracker.get(_torch._from_functional_tensor(x.elem))
        if entry is None:
            raise _Odd
        with fx.traceback.set_current_replay_node(entry.proxy.node):
            _torch._sync(x)

    def _inner(self, x: Any) -> Any:
        """The fake that a tensor of the trace stands for."""
        kind = _kind_of(x)
        if kind is FunctionalTensor:
            return _torch._from_functional_tensor(self._elem(x))
        if kind in VALUES:
            return x
        if kind is tuple or kind is list:
            return kind([self._inner(item) for item in x])
        raise _Odd

    def _plain(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if self._all_written or mode.export or mode.pre_dispatch:
            return _TORCHS
        try:
            inner = tuple([self._inner(x) for x in args])
            named = {name: self._inner(x) for name, x in kwargs.items()} if kwargs else kwargs
        except _Odd:
            return _TORCHS
        if inner and inner[-1] is None:
            return _TORCHS  # C++ may leave it out
        if any(x is None for x in named.values()):
            named = _as_given_on(func, named)
        writer = _C._get_dispatch_mode(_MODES.PROXY)
        made = self._made(func, inner, named) if writer is None else self._noted(writer, func, inner, named)
        if made is _TORCHS:
            return _TORCHS
        if _kind_of(made) is tuple:
            return tuple([x if x is None else _functional(x, mode) for x in made])
        return _functional(made, mode)

    def _through(self, mode: Any, kind: int, func: Any, args: Any, kwargs: Any) -> Any:
        """A view, or a write: C++ notes what it is of, and runs what it is without writes."""
        if kind != _VIEW:
            self._note_writes((args, kwargs))
        if self._all_written or mode.export or mode.pre_dispatch or _kind_of(args[0]) is not FunctionalTensor:
            return _TORCHS
        if kind != _VIEW and args[0]._has_symbolic_sizes_strides:
            return _TORCHS  # what it gives has sizes of its own, whose nodes count in the names of others
        try:
            elems = [self._elem(x) for x in args]
            if kwargs:
                kwargs = {name: self._elem(x) for name, x in kwargs.items()}
        except _Odd:
            return _TORCHS
        include = _C._dispatch_tls_local_include_set() | _FUNCTIONALIZE
        exclude = _C._dispatch_tls_local_exclude_set().remove(_KEYS.Functionalize)
        with _C._ForceDispatchKeyGuard(include, exclude - FunctionalTensor._extra_dispatch_keys):
            before = _torch._functionalize_enable_reapply_views(True)
            try:
                out = func._op_dk(_KEYS.Functionalize, *elems, **kwargs)
            finally:
                _torch._disable_functionalization()
                _torch._functionalize_enable_reapply_views(before)
        if kind == _IN_PLACE:
            return args[0]
        many = isinstance(out, (list, tuple))
        made = [_wrapped(x, mode) for x in (out if many else [out])]
        for each in made if kind == _VIEW and func is not _HIDDEN_VIEW else ():
            _torch._functionalize_unsafe_set(each, args[0])
        return type(out)(made) if many else made[0]

    # -- the graph ---------------------------------------------------------------------------------

    def written(self, torchs: Any) -> Any:
        """For ``ProxyTorchDispatchMode.__torch_dispatch__``."""

        def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = _device_of(args[0]) if func is _DEVICE else self._noted(mode, func, args, kwargs or {})
            return torchs(mode, func, types, args, kwargs) if made is _TORCHS else made

        return dispatch

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results as they were, tensors and ``None``."""
        mode = _C._get_dispatch_mode(_MODES.FAKE)
        if mode is None or not mode.cache_enabled or mode.cache_crosscheck_enabled:
            return _TORCHS
        key = self._key_of(mode, func, args, kwargs)
        if key is None:
            return _TORCHS
        maker = self._known.get(key)
        if maker is not None:
            made = maker(mode, args)
        elif mode.shape_env is None:
            with self._proxies.disable_proxy_modes_tracing():
                made = func(*args, **kwargs)  # on fakes alone, which are remembered if that can be
        else:
            return _TORCHS
        of = made if _kind_of(made) is tuple else (made,)
        return made if all(x is None or _kind_of(x) is FakeTensor for x in of) else _TORCHS

    def _noted(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Results as they were, and a node that makes them."""
        name = self._name(func, mode)
        if name is None or mode.pre_dispatch or getattr(mode, "emulate_precision_casts", False):
            return _TORCHS
        tracer = mode.tracer
        tracker = tracer.tensor_tracker
        try:
            given = tuple([_argument(x, tracker) for x in args])
            named = {key: _argument(x, tracker) for key, x in kwargs.items()} if kwargs else kwargs
        except (_Odd, KeyError):
            return _TORCHS
        made = self._made(func, args, kwargs)
        if made is _TORCHS or made is None:
            return _TORCHS
        node = self._new_node(tracer, "call_function", func, given, named, name)
        self._track(tracer, node, made)
        return made

    def _track(self, tracer: Any, node: fx.Node, made: Any) -> None:
        proxies = self._proxies
        snapshot = proxies.snapshot_fake
        if _kind_of(made) is not tuple:
            node.meta["val"] = snapshot(made)
            proxies.set_proxy_slot(made, tracer, proxies._ProxyTensor(fx.Proxy(node, tracer), None))
            return
        node.meta["val"] = tuple([x if x is None else snapshot(x) for x in made])
        for at, each in enumerate(made):
            item = self._new_node(tracer, "call_function", operator.getitem, (node, at), {}, "getitem")
            if each is not None:
                self._track(tracer, item, each)


def _as_given_on(func: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Named arguments without tensors that are undefined in C++ and none by default, as C++ gives them on."""
    defaults = {x.name for x in func._schema.arguments if x.has_default_value() and x.default_value is None}
    return {name: x for name, x in named.items() if x is not None or name not in defaults}


def _device_of(x: Any) -> Any:
    if _kind_of(x) is FunctionalTensor:
        x = _torch._from_functional_tensor(x.elem)
    return x.fake_device if _kind_of(x) is FakeTensor and not x.fake_mode.in_kernel_invocation else _TORCHS


def _argument(x: Any, tracker: Any) -> Any:
    """What a node is called with in the place of ``x``."""
    kind = _kind_of(x)
    if kind is FakeTensor:
        entry = tracker[x]
        if entry.constant is not None:
            raise _Odd
        return entry.proxy.node
    if kind in VALUES:
        return x
    if kind is tuple or kind is list:
        return kind([_argument(item, tracker) for item in x])
    raise _Odd


def _functional(inner: Any, mode: Any) -> Any:
    return _wrapped(_torch._to_functional_tensor(inner), mode)


def _wrapped(elem: Any, mode: Any) -> Any:
    """The tensor of the trace around one of C++, as ``FunctionalTensor`` makes itself, but quick."""
    inner: Any = _torch._from_functional_tensor(elem)
    plain = _kind_of(inner) is FakeTensor and inner.layout is torch.strided
    if not plain or inner._has_symbolic_sizes_strides or torch.is_inference_mode_enabled():
        return FunctionalTensor(elem, mode)
    keys = FunctionalTensor._extra_dispatch_keys & _C._dispatch_keys(elem)
    made: Any = _torch.Tensor._make_wrapper_subclass(
        FunctionalTensor, inner.shape, inner.stride(), inner.storage_offset(), None, inner.dtype,
        torch.strided, inner.fake_device, False, elem.requires_grad, None, False, False, keys,
    )  # fmt: skip
    _C._set_throw_on_mutable_data_ptr(made)
    made.elem = elem
    return made


def _kind_of_op(func: Any) -> int:
    """Whether an op is plain, a view of its first argument, a write in its place or beside its results, or is
    left to torch."""
    if not isinstance(func, OpOverload):
        return _OTHER
    schema, name = func._schema, func.name()
    writes = schema.is_mutable or torch.Tag.inplace_view in func.tags
    effects: Any = importlib.import_module("torch._higher_order_ops.effects")
    apart = (
        func.namespace != "aten"
        or func in FunctionalTensor.metadata_fns
        or func is torch.ops.aten.lift_fresh.default
        or _WHOLE in func.py_kernels
        or _KEYS.Functionalize in func.py_kernels
        or _C._dispatch_has_kernel_for_dispatch_key(name, _WHOLE)
        or {"maybe_aliasing_or_mutating", "inplace_view"} & {tag.name for tag in func.tags}
        or effects.has_effects(func)
    )
    if apart:
        return _WRITES if writes else _OTHER
    if func is _HIDDEN_VIEW:
        return _VIEW
    kernel = _C._dispatch_has_kernel_for_dispatch_key(name, _KEYS.Functionalize)
    if writes:
        return _kind_of_write(schema) if kernel else _WRITES
    aliases = [x.alias_info is not None for x in (*schema.arguments, *schema.returns)]
    lazy = func is torch.ops.aten._to_copy.default  # its kernel there does more for lazy devices alone
    if not any(aliases) and (lazy or not kernel):
        return _PLAIN if schema.returns and all(_is_tensor(x) for x in schema.returns) else _OTHER
    python: Any = importlib.import_module("torch.utils._python_dispatch")
    of_first = kernel and python.get_alias_info(func).read_only_alias_match_indexes == [(0, 0)]
    alone = sum(aliases) == 2 and len(schema.returns) == 1
    return _VIEW if of_first and alone and func.is_view else _OTHER


def _kind_of_write(schema: Any) -> int:
    """Of an op that writes: whether it gives its first argument, or tensors beside those that it writes."""
    written = [x for x in schema.arguments if x.alias_info is not None]
    given = [x.alias_info for x in schema.returns]
    if schema.returns and not any(given) and all(_is_tensor(x) for x in schema.returns):
        return _BESIDE if all(x.alias_info.is_write for x in written) else _WRITES
    first = written == [schema.arguments[0]] and len(given) == 1 and given[0] is not None
    return _IN_PLACE if first and schema.name.endswith("_") else _WRITES


def _is_tensor(returned: Any) -> bool:
    return isinstance(returned.type, torch.TensorType)
