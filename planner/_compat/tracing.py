"""How a step is traced: the settings of the tracer, what it hands to the model, the forms of ops in it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch._functorch.config as _functorch_config  # settings of the tracer
import torch.optim.optimizer as _optimizer
import torch.utils.checkpoint as _checkpoint
from torch import fx, nn

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import (  # tensors with shapes, strides and storages, no memory; 2.0+
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import (
    FunctionalTensor,  # what a trace hands to the model; 2.2+
    FunctionalTensorMode,  # what makes a trace of calls in place; 2.2+
)
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from planner._compat.in_one_run import NotInOneRun, joint_in_one_run
from planner._compat.ops import is_in_place
from planner._compat.quick import (
    Remembered,
    asked_once,
    code_when_run,
    dynamo_callback,
    fakes_remembered,
    without_writes_at_once,
)
from planner._compat.symbols import sizes_remembered

log = logging.getLogger(__name__)


@contextlib.contextmanager
def values_unchecked() -> Iterator[None]:
    """What only checks values is left out: transformers' checks, and those of distributions' arguments.

    The settings are process-global and put back.
    """
    key = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before, checks = os.environ.get(key), Distribution._validate_args  # 1.8+
    os.environ[key] = "1"
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextlib.contextmanager
def fakes_as_kernels() -> Iterator[None]:
    """Fakes are taken wherever kernels take tensors; those that are not are no news in torch's log; 2.0+.

    For all threads.  An op that takes no fakes is raised beside, with its line.
    """
    fakes = logging.getLogger("torch._subclasses.fake_tensor")

    def is_news(said: logging.LogRecord) -> bool:  # a function of this entry, so that another's stays
        return not str(said.msg).startswith("failed while attempting to run meta")

    of_fakes = importlib.import_module("torch._subclasses.fake_impls").op_implementations_dict
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # 2.8+
    if grouped is not None:
        of_fakes.setdefault(grouped.default, _grouped_product)
    fakes.addFilter(is_news)
    try:
        yield
    finally:
        fakes.removeFilter(is_news)


def _grouped_product(
    mode: FakeTensorMode,
    func: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Products of groups of rows, of which torch's own formula takes bfloat16 alone, the kernels others too.

    Shapes: a (M, K), b (G, K, N) -> (M, N); (M, K), (K, N) -> (G, M, N); (G, M, K), (K, N) -> (M, N);
    (G, M, K), (G, K, N) -> (G, M, N).
    """
    if a.dtype is torch.bfloat16 or a.dtype is not b.dtype or a.device.type != "cpu":
        return NotImplemented
    rows, columns = a.shape[-2], b.shape[-1]
    groups = () if a.dim() != b.dim() else (a.shape[0],) if a.dim() == 3 else (offs.shape[0],)  # type: ignore
    with mode:
        return torch.empty((*groups, rows, columns), dtype=out_dtype or a.dtype, device=a.device)


@contextlib.contextmanager
def _tracing_flags() -> Iterator[None]:
    """Leave out what checks values, and trace the backward as it runs: outside autocast.

    The settings are process-global and put back.
    """
    outside = _functorch_config.patch(backward_pass_autocast="off")  # 2.10+
    with values_unchecked(), fakes_as_kernels(), outside, _views_of_any_base():
        yield


def _views_of_any_base() -> contextlib.AbstractContextManager[object]:
    """Under inference mode, a view of what was made outside of it can be traced; 2.11 knows no base of it.

    What torch notes of bases there is for ops of others that write, which then copy a whole base.
    """
    if "get" in FunctionalTensor.__new__.__code__.co_names:  # 2.12+
        return contextlib.nullcontext()
    settings: Any = importlib.import_module("torch._export.config")
    kept: contextlib.AbstractContextManager[object] = settings.patch(
        enable_auto_functionalized_v2_for_export=False
    )
    return kept


@contextlib.contextmanager
def compiled_parts_as_eager() -> Iterator[None]:
    """What ``torch.compile`` has wrapped runs as it is written; 2.6+.

    Dynamo would otherwise follow a call into whatever watches it.  Nothing is wrapped where Dynamo was
    never imported, and nothing is to be done where it is the one that asks.
    """
    if "torch._dynamo.eval_frame" not in sys.modules or dynamo_callback() not in (None, False):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def compiler_flags(answer: Callable[[FrameType | None], bool]) -> Iterator[None]:
    """``torch.compiler.is_compiling()`` and ``is_exporting()`` are ``answer(frame that asks)``.

    The flags behind them (2.7+), which those see who hold the functions themselves, are False; all of it is
    process-global and put back.
    """

    def asked() -> bool:
        return answer(sys._getframe(1))

    def asked_of_fx() -> bool:
        return answer(sys._getframe(1)) and bool(fx_before())

    compiler: Any = torch.compiler
    fx_tracing: Any = fx._symbolic_trace
    fx_before = fx_tracing.is_fx_tracing  # 1.13+
    names = "_is_compiling_flag", "_is_exporting_flag", "is_compiling", "is_exporting"
    before = [getattr(compiler, name) for name in names]
    for name, value in zip(names, (False, False, asked, asked), strict=True):
        setattr(compiler, name, value)
    fx_tracing.is_fx_tracing = asked_of_fx
    try:
        yield
    finally:
        fx_tracing.is_fx_tracing = fx_before
        for name, value in zip(names, before, strict=True):
            setattr(compiler, name, value)


# What stands in for tensors while a step is traced; 2.2+
STAND_INS = FunctionalTensor, FakeTensor


@contextlib.contextmanager
def stand_ins_derive_from(base: type[torch.Tensor]) -> Iterator[None]:
    """What ``base``, a subclass of ``torch.Tensor``, defines is what stand-ins have; put back."""
    before = [(cls, cls.__bases__) for cls in STAND_INS]
    try:
        for cls, bases in before:
            cls.__bases__ = tuple(base if b is torch.Tensor else b for b in bases)
            if _TRUTH in vars(base):  # C asks the class itself
                type.__setattr__(cls, _TRUTH, vars(base)[_TRUTH])
        yield
    finally:
        for cls, bases in before:
            cls.__bases__ = bases
            if _TRUTH in vars(cls):
                type.__delattr__(cls, _TRUTH)


_TRUTH = "__bool__"


# Ops whose Python form the tracer may keep: their kernel writes to its arguments without saying so (batch
# norms), reads values (one_hot, istft, tensor_split) or wants sizes as numbers (matmul), or the planner
# restates them itself (dropout, which :func:`_dropout` corrects).
_PYTHON_FORMS = frozenset({
    "broadcast_tensors", "cudnn_batch_norm", "dropout", "empty", "istft", "matmul", "miopen_batch_norm",
    "native_batch_norm", "one_hot", "pad_sequence", "stft", "tensor_split", "unsafe_chunk",
})  # fmt: skip


# Ops over sequences: what eager composes them of is known for the CPU.  Elsewhere that is a library's kernel,
# and packed ones (overload "data") read values.
_RECURRENCES = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})


_FORM_KEYS = torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd


@functools.cache
def _python_forms(on_cpu: bool = True) -> tuple[tuple[Any, Any], ...]:
    """(op, dispatch key) of the Python formulas that a trace would run where eager runs a kernel."""
    importlib.import_module("torch._decomp.decompositions")  # registers them
    packets = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if name not in _PYTHON_FORMS)
    ops = (
        getattr(p, o)
        for p in packets
        if isinstance(p, torch._ops.OpOverloadPacket)
        for o in p.overloads()
        if p.__name__ not in _RECURRENCES or (on_cpu and o == "input")
    )
    return tuple((op, key) for op in ops for key in _FORM_KEYS if key in op.py_kernels)


_MOST_REMEMBERED = 4096  # entries; a model of thousands of ops has a few hundred different ones


@functools.cache
def _remembered(*settings: bool) -> Remembered:
    """One table for each of ``settings``, whatever they mean."""
    return Remembered()


def fakes_as_last_time() -> contextlib.AbstractContextManager[None]:
    """What ops gave on fakes outside of a trace is remembered from one run to the next; 2.6+."""
    return fakes_remembered(_remembered_for(in_trace=False, on_cpu=False))


def _remembered_for(*, in_trace: bool, on_cpu: bool) -> Remembered:
    """What is remembered from one run to the next, under settings that choose kernels."""
    cuda = torch.backends.cuda
    found = _remembered(
        in_trace,
        on_cpu,
        torch.are_deterministic_algorithms_enabled(),
        bool(torch.backends.mkldnn.enabled),
        bool(torch.backends.cudnn.enabled),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
    if len(found) > _MOST_REMEMBERED:
        found.clear()
    return found


@contextlib.contextmanager
def kernels_as_eager(
    gru: Callable[..., Any], lstm_gradients: Callable[..., Any], on_cpu: bool = True
) -> Iterator[None]:
    """Inside a trace: ops that torch would restate in Python for compilers stay the kernels that eager runs.

    Interpolation is the case that matters: its formula has other rounding, twenty times the ops, and
    other memory.  Where a kernel's output is laid out otherwise than its fake form says, the fake form is
    corrected: a ``reshape`` after it is a view or a copy by that layout.  What raises on a singular matrix
    stays too.  The registries are process-global and put back.  2.0+

    ``gru``             what ``aten::gru.input`` is composed of on the CPU.
    ``lstm_gradients``  fake form of ``aten::mkldnn_rnn_layer_backward``.
    """
    formulas = importlib.import_module("torch._decomp").decomposition_table
    checks = torch.ops.aten._linalg_check_errors.default
    effects: Any = (
        importlib.import_module("torch._library.simple_registry").singleton.find(checks._name).effect
    )
    effect, kept = effects.effect, checks in fx.node._side_effectful_functions
    fakes = importlib.import_module("torch._subclasses.fake_impls").op_implementations_dict
    forms = [(op, key, op.py_kernels[key]) for op, key in _python_forms(on_cpu) if key in op.py_kernels]
    dropout: Any = torch.ops.aten.dropout.default
    forms += [(dropout, key, dropout.py_kernels[key]) for key in _FORM_KEYS]
    laid_out = _laid_out_anew()
    before = {op: formulas[op] for op in laid_out if op in formulas}
    try:
        for op, key, _ in forms:
            del op.py_kernels[key]
            op._dispatch_cache.clear()
        dense = {op: _on_dense(formula, laid_out[op]) for op, formula in before.items()}
        formulas.update({op: _on_few(f) if op in _BY_CHANNEL else f for op, f in dense.items()})
        if on_cpu:
            torch.ops.aten.gru.input.py_kernels.update(dict.fromkeys(_FORM_KEYS, gru))
        dropout.py_kernels.update(dict.fromkeys(_FORM_KEYS, _dropout))
        dropout._dispatch_cache.clear()
        fakes[torch.ops.aten.mkldnn_rnn_layer_backward.default] = lstm_gradients
        effects.register(None)  # else the check would come with tokens, in and out of the graph
        fx.node.has_side_effect(checks)  # and without either it would be swept away
        with fakes_remembered(
            _remembered_for(in_trace=True, on_cpu=on_cpu)
        ):  # torch's own remembers other layouts
            yield
    finally:
        effects.register(effect)
        if not kept:
            fx.node._side_effectful_functions.discard(checks)
        formulas.update(before)
        fakes.pop(torch.ops.aten.mkldnn_rnn_layer_backward.default, None)
        for op, key, formula in forms:
            op.py_kernels[key] = formula
            op._dispatch_cache.clear()


def _dropout(x: torch.Tensor, p: float, train: bool | None) -> torch.Tensor:
    """Dropout as a trace has it, and as eager where nothing or all is dropped, which draws no numbers."""
    if not train or p == 0 or x.numel() == 0:
        return x  # torch's form for traces makes a copy
    if p == 1:
        return x.mul(torch.zeros((), dtype=x.dtype, device=x.device))
    kept: torch.Tensor = torch.ops.aten.native_dropout.default(x, p, train)[0]
    return kept


def _dense(tensor: Any) -> Any:
    return tensor.contiguous() if isinstance(tensor, torch.Tensor) else tensor


def _dense_on_cpu(tensor: Any) -> Any:
    """Contiguous, or so with channels last; CUDA's batch norm keeps strides."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        return tensor
    return tensor.contiguous(memory_format=torch._prims_common.suggest_memory_format(tensor))


def _laid_out_anew() -> dict[Any, Callable[[Any], Any]]:
    """Ops whose kernels lay their results out anew, and how their arguments would be for that."""
    aten = torch.ops.aten
    return {
        aten._native_batch_norm_legit.default: _dense_on_cpu,
        aten._native_batch_norm_legit_functional.default: _dense_on_cpu,
        aten.native_batch_norm_backward.default: _dense_on_cpu,
        aten.native_layer_norm_backward.default: _dense,
        aten.mse_loss_backward.default: _dense,
        aten.smooth_l1_loss_backward.default: _dense,
    }


_BY_CHANNEL = frozenset({
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._native_batch_norm_legit_functional.default,
    torch.ops.aten.native_batch_norm_backward.default,
})  # fmt: skip

_FEW = 3, 2, 5  # rows, channels, places


def _on_few(formula: Callable[..., Any]) -> Callable[..., Any]:
    """``formula`` asked once, on a few channels and places, for what it gives on tensors of any size.

    It takes tensors (rows, channels, places ...), all laid out alike, and vectors of channels, and gives
    such.  What is neither is asked of the formula itself, and so is what has a dimension of size 1, along
    which strides say nothing.
    """

    @functools.wraps(formula)
    def on_few(*args: Any) -> Any:
        whole = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 2]
        if not whole or any(x.stride() != whole[0].stride() or x._has_symbolic_sizes_strides for x in whole):
            return formula(*args)
        like = whole[0]
        if min(like.shape) < 2:
            return formula(*args)
        places = like.dim() - 2
        few_sizes = (*_FEW[:2], *_FEW[2:] * places)
        order = sorted(range(like.dim()), key=like.stride, reverse=True)
        few_of: dict[int, torch.Tensor] = {}
        given: dict[int, torch.Tensor] = {}
        for x in args:
            if isinstance(x, torch.Tensor) and id(x) not in few_of:
                if x.dim() == 1 and x.shape[0] == like.shape[1] and x.is_contiguous():
                    few = x.new_empty((_FEW[1],))
                elif x.dim() > 2 and x.shape == like.shape and _is_laid_out(x, order):
                    few = torch.empty_permuted(few_sizes, order, dtype=x.dtype, device=x.device)
                else:
                    return formula(*args)
                few_of[id(x)], given[id(few)] = few, x
        few_args = [few_of[id(x)] if isinstance(x, torch.Tensor) else x for x in args]
        made: list[Any] = []
        storages = {x.untyped_storage()._cdata for x in few_of.values()}
        for x in formula(*few_args):
            if x is None or id(x) in given:
                made.append(given.get(id(x)))
            elif x.untyped_storage()._cdata in storages:
                return formula(*args)
            elif x.shape == few_sizes and _is_laid_out(x, order):
                made.append(torch.empty_permuted(like.shape, order, dtype=x.dtype, device=x.device))
            elif x.dim() == 1 and x.shape[0] in (0, _FEW[1]):
                made.append(x.new_empty((like.shape[1] if x.shape[0] else 0,)))
            else:
                return formula(*args)
        return tuple(made)

    return on_few


def _is_laid_out(tensor: torch.Tensor, order: list[int]) -> bool:
    """Whether dimensions lie in memory in this order, the last one's elements side by side, without gaps."""
    expected = 1
    for k in reversed(order):
        if tensor.stride(k) != expected:
            return False
        expected *= tensor.shape[k]
    return True


def _on_dense(formula: Callable[..., Any], dense: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(formula)
    def on_dense(*args: Any, **kwargs: Any) -> Any:
        return formula(*map(dense, args), **kwargs)

    return on_dense


# Nodes need not say which Python function made them, which a mode would watch for at every call; 2.10+
_UNNAMED: dict[str, Any] = (
    {"_disable_torch_fn_metadata_mode": True}
    if "_disable_torch_fn_metadata_mode" in inspect.signature(aot_export_joint_with_descriptors).parameters
    else {}
)


def export_joint(
    module: nn.Module, args: tuple[Any, ...], again: Callable[[], bool] = lambda: False
) -> fx.GraphModule:
    """The joint graph of ``module`` at fake inputs, undecomposed, each placeholder and output described.

    Called inside :func:`kernels_as_eager`.  ``again()``, asked once there is a graph: whether that is to be
    one of another run.

    ``node.meta["desc"]`` on placeholders and on the output node holds ``descriptors`` objects;
    ``node.meta["val"]`` is a fake tensor.
    """
    env = next((x.fake_mode.shape_env for x in args if isinstance(x, FakeTensor)), None)
    with (
        _tracing_flags(),
        code_when_run(),
        asked_once(),
        sizes_remembered(env),
        contextlib.ExitStack() as stack,
    ):
        try:
            graph = joint_in_one_run(module, args)
            return joint_in_one_run(module, args) if again() else graph
        except NotInOneRun as error:
            log.debug("the forward runs twice more: %s", error)
        joint = aot_export_joint_with_descriptors(stack, module, args, {}, **_UNNAMED)
        return joint.graph_module


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor of torch's own class is none of the tracer's: 2.0+."""
    private: Any = torch
    return not private._is_functional_tensor(tensor) and tensor.device.type != "meta"


def no_python_kernels() -> contextlib.AbstractContextManager[Any]:
    """Inside, ops are kernels, whatever formulas in Python a trace around it prefers; 2.0+."""
    aside: contextlib.AbstractContextManager[Any] = importlib.import_module(
        "torch._dispatch.python"
    ).no_python_dispatcher()
    return aside


def graph_in_tracing() -> fx.Graph | None:
    """The graph that a tracer writes just now; 2.1+."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def last_node(graph: fx.Graph) -> fx.Node:
    """The last node of a graph; of an empty one its root, which all stand behind; 1.13+."""
    return next(iter(reversed(graph.nodes)), graph._root)


# What gives a number of Python's, or a yes or a no, by the values of tensors
READS_VALUES = frozenset({
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default
})  # fmt: skip


@contextlib.contextmanager
def writes_keep_layout(told: Callable[..., None], answer: Callable[..., Any]) -> Iterator[None]:
    """What a trace makes of a call in place is laid out as its operand; 2.6+.

    A call in place leaves strides as they are.  The call with a result of its own that stands for it in a
    trace chooses others along dimensions of size 1, and by these a convolution chooses its kernel.

    ``told(op, args, kwargs, result)`` hears of each op that the traced program runs.  ``answer(op, args)`` is
    what one of ``READS_VALUES`` gives; ``NotImplemented``: it stops the trace.
    """
    before: Any = FunctionalTensorMode.__torch_dispatch__
    run = without_writes_at_once(before)

    def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func in READS_VALUES:
            found = answer(func, args)
            if found is not NotImplemented:
                return found
        if not (
            isinstance(first, FunctionalTensor)
            and is_in_place(func)
            and first.is_base_tensor()
            and 1 in first.shape
        ):
            result = run(mode, func, types, args, kwargs)
            told(func, args, kwargs, result)
            return result
        strides = first.from_functional().stride()
        result = run(mode, func, types, args, kwargs)
        told(func, args, kwargs, result)
        made = first.from_functional()
        pairs = zip(made.shape, strides, made.stride(), strict=True)
        if made.stride() != strides and all(size == 1 or a == b for size, a, b in pairs):
            first.replace_(made.as_strided(made.shape, strides, made.storage_offset()))
            first.commit_update()
            first.sync()
        return result

    type.__setattr__(FunctionalTensorMode, "__torch_dispatch__", dispatch)
    try:
        yield
    finally:
        type.__setattr__(FunctionalTensorMode, "__torch_dispatch__", before)


@dataclass
class CheckpointCalls:
    """How often ``torch.utils.checkpoint`` was entered."""

    count: int = 0


@contextlib.contextmanager
def checkpoint_calls() -> Iterator[CheckpointCalls]:
    """Count what enters ``torch.utils.checkpoint`` while the context is open.

    Models hold ``checkpoint`` itself under many names, so its internals are watched instead.
    """

    calls = CheckpointCalls()

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.count += 1
            return original(*args, **kwargs)

        return watched

    internals: Any = _checkpoint
    names = [f"_checkpoint_without_reentrant_generator{more}" for more in ("_impl", "")]  # 2.14+, 2.1+
    name = next(name for name in names if hasattr(internals, name))
    generator, function = getattr(internals, name), internals.CheckpointFunction.apply
    setattr(internals, name, watch(generator))
    internals.CheckpointFunction.apply = watch(function)
    try:
        yield calls
    finally:
        setattr(internals, name, generator)
        del internals.CheckpointFunction.apply  # the class inherits it


def is_faked() -> bool:
    """Whether a tracer or a fake mode is looking at every op; 2.2+."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(k) is not None for k in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def is_data_dependent(error: BaseException) -> bool:
    """Whether the tracer stopped because the program asked for a tensor's value."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException  # 2.0+
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # 2.1+

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)


def writes_so_far(stand_in: torch.Tensor) -> int:
    """How often what a trace handed to the model was written into, through whatever view; 2.3+."""
    private: Any = torch
    inner = getattr(stand_in, "elem", None)  # of a tensor without memory outside a trace there is none
    return 0 if inner is None else int(private._functionalize_mutation_counter(inner))


def fake_mode_of(tensor: torch.Tensor) -> FakeTensorMode:
    """The mode a fake tensor belongs to; enter it to make more of its kind."""
    assert isinstance(tensor, FakeTensor)
    return tensor.fake_mode


@contextlib.contextmanager
def foreach_takes_fakes() -> Iterator[None]:
    """Let optimizers choose between foreach and a loop for fake parameters as they do for real ones.

    Their list of parameter types is process-global (DTensor extends it too) and is put back.
    """
    types = _optimizer._foreach_supported_types  # 2.0+
    types.append(FakeTensor)
    try:
        yield
    finally:
        types.remove(FakeTensor)


def parametrized_weights_are_cached() -> bool:
    """Whether a call runs under ``torch.nn.utils.parametrize.cached()``; 1.9+."""
    return bool(torch.nn.utils.parametrize._cache_enabled)
