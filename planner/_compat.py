"""The one door to private torch APIs: each name, what it is for, which versions have it.

Tested with torch 2.11 and 2.13.  Nothing else in this package imports a private torch name, so a
torch upgrade is a change to this file.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib
import inspect
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch._functorch.config as _functorch_config  # settings of the tracer
import torch.optim.optimizer as _optimizer
import torch.utils._python_dispatch as _python_dispatch  # the modes that are on; 1.13+
import torch.utils._pytree as pytree  # public-to-be container flattening; 2.0+
import torch.utils.checkpoint as _checkpoint
from torch import fx, nn

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import OpOverload  # an op at one of its signatures: what a captured graph calls; 1.13+
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
from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen  # code that takes one list and clears it; 2.1+
from torch.multiprocessing.reductions import StorageWeakRef  # does not hold the storage; 1.0+
from torch.utils._python_dispatch import TorchDispatchMode  # sees every op below autograd; 1.13+
from torch.utils.flop_counter import _FlopCounterMode  # what FlopCounterMode enters; 2.1+

__all__ = [
    "ENTERS_AUTOCAST",
    "STAND_INS",
    "BoxedCodeGen",
    "CheckpointCalls",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "Loops",
    "OpOverload",
    "TorchDispatchMode",
    "after_backward",
    "at_end_of_backward",
    "autocast_depth",
    "autocast_watched",
    "backward_functions",
    "batch_norm_is_cudnns",
    "batch_norm_reserve_bytes",
    "checkpoint_calls",
    "clear_cublas_workspaces",
    "compiled",
    "compiled_parts_as_eager",
    "compiler_flags",
    "cuda_driver_version",
    "current_backward",
    "cut_by_dynamo",
    "dense_parts",
    "descriptors",
    "dispatch_state",
    "dp_knapsack",
    "dynamo_as_eager",
    "dynamo_breaks",
    "dynamo_stands_aside",
    "evaluated",
    "export_joint",
    "expression_of",
    "fake_mode_of",
    "flop_counter_sees_pieces",
    "foreach_takes_fakes",
    "generator_key",
    "gone",
    "graph_in_tracing",
    "graph_is_kept",
    "guards_of",
    "hide_from_dynamo",
    "is_checkpoint",
    "is_data_dependent",
    "is_faked",
    "is_out_of_memory",
    "is_symbol",
    "is_top_mode",
    "is_transformed",
    "is_under_autocast",
    "job_store",
    "modes_set_aside",
    "parametrized_weights_are_cached",
    "pieces_of",
    "pytree",
    "reads_a_number",
    "saved_tensors_hooks_set_aside",
    "size_hint",
    "stand_ins_derive_from",
    "storage_key",
    "storage_uses",
    "symbolic_fake",
    "symbolic_mode",
    "tensors_on",
    "values_unchecked",
    "watching_modes",
    "weak_storage",
    "wraps_others",
    "writes_arguments",
    "writes_keep_layout",
    "writes_so_far",
]


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
def _tracing_flags() -> Iterator[None]:
    """Leave out what checks values, and trace the backward as it runs: outside autocast.

    The settings are process-global and put back.
    """
    with values_unchecked(), _functorch_config.patch(backward_pass_autocast="off"):  # 2.10+
        yield


@contextlib.contextmanager
def compiled_parts_as_eager() -> Iterator[None]:
    """What ``torch.compile`` has wrapped runs as it is written; 2.6+.

    Dynamo would otherwise follow a call into whatever watches it.  Nothing is wrapped where Dynamo was
    never imported, and nothing is to be done where it is the one that asks.
    """
    if "torch._dynamo.eval_frame" not in sys.modules or _dynamo_callback() not in (None, False):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _dynamo_callback() -> Any:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return get_eval_frame_callback()


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
        yield
    finally:
        for cls, bases in before:
            cls.__bases__ = bases


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


class _Remembered(dict[Any, Any]):
    """What ops give on fakes, as torch remembers it.

    Without ops of whole graphs: those are known by ids, and torch forgets them in its own table only.
    """

    def __setitem__(self, key: Any, entry: Any) -> None:
        if isinstance(key.key[0], OpOverload):
            super().__setitem__(key, entry)


_MOST_REMEMBERED = 4096  # entries; a model of thousands of ops has a few hundred different ones


@functools.cache
def _remembered(*settings: bool) -> _Remembered:
    return _Remembered()


def _fakes_remembered(on_cpu: bool) -> _Remembered:
    """What is remembered from one trace to the next, under settings that choose kernels; 2.6+."""
    cuda = torch.backends.cuda
    found = _remembered(
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
    remembered = FakeTensorMode.cache
    try:
        for op, key, _ in forms:
            del op.py_kernels[key]
            op._dispatch_cache.clear()
        formulas.update({op: _on_dense(formula, laid_out[op]) for op, formula in before.items()})
        if on_cpu:
            torch.ops.aten.gru.input.py_kernels.update(dict.fromkeys(_FORM_KEYS, gru))
        dropout.py_kernels.update(dict.fromkeys(_FORM_KEYS, _dropout))
        dropout._dispatch_cache.clear()
        fakes[torch.ops.aten.mkldnn_rnn_layer_backward.default] = lstm_gradients
        FakeTensorMode.cache = _fakes_remembered(on_cpu)  # torch's own remembers other layouts
        effects.register(None)  # else the check would come with tokens, in and out of the graph
        fx.node.has_side_effect(checks)  # and without either it would be swept away
        yield
    finally:
        effects.register(effect)
        if not kept:
            fx.node._side_effectful_functions.discard(checks)
        formulas.update(before)
        fakes.pop(torch.ops.aten.mkldnn_rnn_layer_backward.default, None)
        FakeTensorMode.cache = remembered
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


def _on_dense(formula: Callable[..., Any], dense: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(formula)
    def on_dense(*args: Any, **kwargs: Any) -> Any:
        return formula(*map(dense, args), **kwargs)

    return on_dense


def export_joint(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The joint graph of ``module`` at fake inputs, undecomposed, each placeholder and output described.

    Called inside :func:`kernels_as_eager`.

    ``node.meta["desc"]`` on placeholders and on the output node holds ``descriptors`` objects;
    ``node.meta["val"]`` is a fake tensor.
    """
    with _tracing_flags(), contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, module, args, kwargs)
        return joint.graph_module


def graph_in_tracing() -> fx.Graph | None:
    """The graph that a tracer writes just now; 2.1+."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


ENTERS_AUTOCAST = torch.amp.autocast_mode._enter_autocast  # how Dynamo writes that a context opens; 2.0+


def autocast_depth() -> int:
    """How many contexts of autocast are open in this thread; 1.6+."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def is_under_autocast() -> bool:
    """Whether a context of autocast is open that casts anything; 2.4+."""
    return torch._C._is_any_autocast_enabled()


@contextlib.contextmanager
def autocast_watched(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Say when an outermost context of autocast begins and ends in this thread; 1.6+.

    The functions that its contexts call are replaced meanwhile, for all threads.
    """
    thread = threading.get_ident()
    increment, clear = torch.autocast_increment_nesting, torch.clear_autocast_cache

    def entered() -> int:
        depth = increment()
        if depth == 1 and threading.get_ident() == thread:
            begin()
        return depth

    def cleared() -> None:
        clear()
        if threading.get_ident() == thread:
            end()

    torch.autocast_increment_nesting, torch.clear_autocast_cache = entered, cleared
    try:
        yield
    finally:
        torch.autocast_increment_nesting, torch.clear_autocast_cache = increment, clear


@contextlib.contextmanager
def writes_keep_layout() -> Iterator[None]:
    """What a trace makes of a call in place is laid out as its operand; 2.6+.

    A call in place leaves strides as they are.  The call with a result of its own that stands for it in a
    trace chooses others along dimensions of size 1, and by these a convolution chooses its kernel.
    """
    run = FunctionalTensorMode.__torch_dispatch__

    def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if not (
            isinstance(first, FunctionalTensor)
            and torch._library.utils.is_inplace(func)
            and first.is_base_tensor()
            and 1 in first.shape
        ):
            return run(mode, func, types, args, kwargs)
        strides = first.from_functional().stride()
        result = run(mode, func, types, args, kwargs)
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
        type.__setattr__(FunctionalTensorMode, "__torch_dispatch__", run)


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

    generator = _checkpoint._checkpoint_without_reentrant_generator  # 2.1+
    function = _checkpoint.CheckpointFunction.apply
    _checkpoint._checkpoint_without_reentrant_generator = watch(generator)
    _checkpoint.CheckpointFunction.apply = watch(function)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        _checkpoint._checkpoint_without_reentrant_generator = generator
        del _checkpoint.CheckpointFunction.apply  # the class inherits it


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator had nothing left; the CPU's says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def clear_cublas_workspaces() -> None:
    """Give back the scratch that cuBLAS keeps per thread; the next product takes it again; 1.12+."""
    torch._C._cuda_clearCublasWorkspaces()


def batch_norm_is_cudnns(
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether eager's batch norm of these (fake) tensors is cuDNN's; 2.3+."""
    if weight is None or bias is None or (mean is None and not training):
        return False  # torch's first conditions; its function does not take None
    if mean is None or variance is None:
        mean = variance = weight  # neither is as good as both
    private: Any = torch._C
    chosen = private._select_batch_norm_backend(x, weight, bias, mean, variance, training, eps)
    return bool(chosen == private._BatchNormBackend.Cudnn)


def batch_norm_reserve_bytes(x: torch.Tensor, training: bool) -> int:
    """What cuDNN's batch norm keeps for its backward beside the statistics; needs a GPU; 2.3+."""
    if not training:
        return 0
    private: Any = torch._C
    return int(private._get_cudnn_batch_norm_reserve_space_size(x, training))


def cuda_driver_version() -> int:
    """The newest CUDA that the installed driver supports, as 1000 * major + 10 * minor; 0 without one."""
    found = getattr(torch._C, "_cuda_getDriverVersion", None)  # 1.0+, in CUDA builds only
    return 0 if found is None else int(found())


def modes_set_aside() -> contextlib.AbstractContextManager[Any]:
    """Meters and counters that watch ops see none of those inside; 2.1+."""
    if not watching_modes() and not torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return contextlib.nullcontext()  # what a training step goes through at every call
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def watching_modes() -> int:
    """How many modes look at every op just now, tracers among them; 2.0+."""
    return int(torch._C._len_torch_dispatch_stack())


def dispatch_state() -> tuple[int, int]:
    """The dispatch keys that this thread adds and leaves out, which guards of C++ put back; 1.12+.

    But for those of autocast, which come and go by themselves.
    """
    keys: Any = torch._C
    names = ("AutocastCPU", "AutocastCUDA")
    autocast = [getattr(keys.DispatchKey, name) for name in names if hasattr(keys.DispatchKey, name)]
    mask = 0
    for key in autocast:
        mask |= keys.DispatchKeySet(key).raw_repr()
    return (
        keys._dispatch_tls_local_include_set().raw_repr() & ~mask,
        keys._dispatch_tls_local_exclude_set().raw_repr() & ~mask,
    )


def is_top_mode(mode: TorchDispatchMode) -> bool:
    """Whether ``mode`` is the one that was entered last, and may be left; 2.0+."""
    count = watching_modes()
    return count > 0 and torch._C._get_dispatch_stack_at(count - 1) is mode


def after_backward(then: Callable[[], None]) -> None:
    """Called inside a backward: ``then()`` at its end; 1.4+."""
    torch.autograd.Variable._execution_engine.queue_callback(then)


def is_faked() -> bool:
    """Whether a tracer or a fake mode is looking at every op; 2.2+."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(k) is not None for k in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


@contextlib.contextmanager
def saved_tensors_hooks_set_aside() -> Iterator[None]:
    """Hooks that pack what autograd saves see none of it inside, and are back after it; 2.5+."""
    hooks: Any = torch._C._autograd
    aside = []
    while (pair := hooks._top_saved_tensors_default_hooks(True)) is not None:
        aside.append(pair)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(aside):
            hooks._push_saved_tensors_default_hooks(*pair)


def post_accumulate_hooks(parameter: torch.Tensor) -> dict[int, Any]:
    """What runs when the gradient of a leaf has been added up, by handle; empty without any; 2.1+."""
    found: dict[int, Any] | None = parameter._post_accumulate_grad_hooks
    return {} if found is None else found


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a (fake) tensor: equal for views, unequal otherwise."""
    return tensor.untyped_storage()._cdata


def dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that hold the values of ``tensor``: itself, or a sparse one's indices and values; 1.13+."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # a kernel library's own, whose storage is out of sight


def generator_key(generator: torch.Generator) -> int:
    """Identity of a generator, whichever object of Python's stands for it; 1.7+."""
    return int(generator._cdata)  # type: ignore[attr-defined]


def weak_storage(tensor: torch.Tensor) -> tuple[Any, int]:
    """A reference to a tensor's storage that does not hold it, and its bytes."""
    storage = tensor.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()


def storage_uses(ref: Any) -> int:
    """How many tensors (and Python objects) hold the storage of :func:`weak_storage`; 0: it is gone."""
    return int(torch._C._storage_Use_Count(ref.cdata))  # as the CUDA graph trees of inductor; 2.1+


@functools.cache
def _uses_by_python() -> int:
    """What Python's object of a storage adds to its uses: differs from version to version."""
    tensor = torch.empty(1)
    return storage_uses(weak_storage(tensor)[0]) - 1


def tensors_on(ref: Any) -> int:
    """How many tensors lie on the storage of :func:`weak_storage`, which Python has seen."""
    return storage_uses(ref) - _uses_by_python()


def gone(tensor: torch.Tensor) -> Callable[[], bool]:
    """Whether nothing holds ``tensor`` any more, to be asked later; autograd's holding counts; 2.0+."""
    return torch._C._WeakTensorRef(tensor).expired  # type: ignore[attr-defined]


def is_data_dependent(error: BaseException) -> bool:
    """Whether the tracer stopped because the program asked for a tensor's value."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException  # 2.0+
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # 2.1+

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)


def size_hint(size: int | torch.SymInt) -> int:
    """The size as an int; of a symbolic one, what it was traced with, and no guard is made; 2.0+."""
    return size if isinstance(size, (int, float)) else int(size.node.hint)


def symbolic_mode() -> FakeTensorMode:
    """A mode in which sizes can be symbols; each symbol is one dimension of one input.

    Equal sizes get symbols of their own, and what depends on a tensor's value is refused as it is with
    fixed sizes.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # 2.0+; the three flags 2.1+

    sizes = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes)
    mode.cache_enabled = False  # 2.2+; an entry whose sizes are symbols takes longer than the op it saves
    return mode


def symbolic_fake(
    mode: FakeTensorMode, tensor: torch.Tensor, dims: Collection[int], name: str
) -> torch.Tensor:
    """A fake of ``tensor`` whose ``dims`` are symbols; a size of 0 or 1 stays that number."""
    from torch._dynamo.source import ConstantSource  # names a symbol's origin; 2.0+
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # 2.3+

    kinds = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * tensor.dim())
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))


def expression_of(size: Any) -> Any:
    """The sympy expression of a symbolic number, what the trace found equal replaced; others as they are."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def is_symbol(expression: Any) -> bool:
    """Whether an expression is a symbol and nothing else."""
    return getattr(expression, "is_Symbol", False)


def evaluated(expression: Any, values: Mapping[Any, int]) -> Any:
    """``expression`` with integers for its symbols, as a Python number; what is no expression as it is."""
    import sympy

    if not isinstance(expression, sympy.Basic):
        return expression
    number = expression.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if number in (sympy.true, sympy.false):
        return bool(number)
    return int(number) if number.is_integer else float(number)


def guards_of(mode: FakeTensorMode, symbols: Sequence[Any]) -> list[Any]:
    """Conditions on ``symbols`` under which the traced graph is right, ranges included."""
    import sympy

    sizes = mode.shape_env
    assert sizes is not None
    conditions = [guard.expr for guard in sizes.guards]  # 2.0+
    for symbol in symbols:
        lower, upper = sizes.var_to_range[symbol].lower, sizes.var_to_range[symbol].upper  # 2.1+
        conditions.append(sympy.Ge(symbol, lower))
        if upper < 2**62:  # beyond that it stands for no limit
            conditions.append(sympy.Le(symbol, upper))
    known = set(symbols)
    unknown = {s for c in conditions for s in c.free_symbols} - known
    if unknown or any(sizes.deferred_runtime_asserts.values()):  # 2.1+
        raise RuntimeError(f"sizes that no input determines: {', '.join(map(str, unknown)) or 'of values'}")
    return [c for c in dict.fromkeys(conditions) if c != sympy.true]


def compiled(expressions: Sequence[Any], symbols: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """A Python function of the symbols' values that returns the values of ``expressions``."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # names that printed guards use; 2.0+
    from torch.utils._sympy.printers import PythonPrinter  # 2.6+

    printer = PythonPrinter()
    body = "".join(f"{printer.doprint(e)}, " for e in expressions)
    function: Callable[..., tuple[Any, ...]] = eval(
        f"lambda {', '.join(map(str, symbols))}: ({body})", dict(SYMPY_INTERP)
    )
    return function


def writes_so_far(stand_in: torch.Tensor) -> int:
    """How often what a trace handed to the model was written into, through whatever view; 2.3+."""
    private: Any = torch
    inner = getattr(stand_in, "elem", None)  # of a tensor without memory outside a trace there is none
    return 0 if inner is None else int(private._functionalize_mutation_counter(inner))


def writes_arguments(target: Any) -> bool:
    """Whether an aten overload writes to one of its arguments; ``False`` for what has no schema; 1.12+."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


@contextlib.contextmanager
def backward_functions(around: Callable[..., Any]) -> Iterator[None]:
    """The user's functions that run in a backward are called by ``around``; process-global, put back.

    ``around(function, call, ctx)`` for a Function's backward, ``around(function, call)`` for a hook that is
    registered on a stand-in meanwhile.
    """
    from torch.autograd.function import BackwardCFunction  # what the engine calls; 1.0+

    apply, register = BackwardCFunction.apply, torch.Tensor.register_hook

    def applied(self: Any, *args: Any) -> Any:
        return around(self._forward_cls.backward, functools.partial(apply, self, *args), self)

    def registered(self: torch.Tensor, hook: Callable[..., Any]) -> Any:
        @functools.wraps(hook)
        def hooked(gradient: torch.Tensor) -> Any:
            return around(hook, functools.partial(hook, gradient))

        return register(self, hooked if isinstance(self, STAND_INS) else hook)

    own: Any = BackwardCFunction, torch.Tensor
    own[0].apply, own[1].register_hook = applied, registered
    try:
        yield
    finally:
        own[0].apply, own[1].register_hook = apply, register


def pieces_of(func: object) -> Callable[..., Any] | None:
    """What runs the op that a captured call of a mutating custom op is, as ops of its own; 2.5+.

    A mode that sees such an op has no rule for it; run inside the mode, its pieces are seen one by one.
    ``None`` for every other op.
    """
    higher: Any = torch.ops.higher_order
    if func is higher.auto_functionalized or func is higher.auto_functionalized_v2:
        form: Callable[..., Any] = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
        return form
    return None


_LOOKS_ON = "ignore_compile_internals"  # what a mode says that Dynamo may compile under; 2.10+


@contextlib.contextmanager
def flop_counter_sees_pieces() -> Iterator[None]:
    """Let torch's FLOP counter count what :func:`pieces_of` finds, where it would raise; put back.

    And what Dynamo compiled runs under it as without it (2.10+): it only looks on.
    """
    higher: Any = torch.ops.higher_order

    def seen(op: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        form = pieces_of(op)
        assert form is not None
        with mode:
            return form(*args, **kwargs)

    ops = [higher.auto_functionalized, higher.auto_functionalized_v2]
    ops = [op for op in ops if _FlopCounterMode not in op.python_key_table]
    for op in ops:
        op.python_key_table[_FlopCounterMode] = functools.partial(seen, op)  # 2.5+
    looks_on: Any = classmethod(lambda _: True)
    setattr(_FlopCounterMode, _LOOKS_ON, looks_on)
    try:
        yield
    finally:
        delattr(_FlopCounterMode, _LOOKS_ON)
        for op in ops:
            del op.python_key_table[_FlopCounterMode]


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


def dp_knapsack(memory: list[float], runtimes: list[float], max_memory: float) -> list[int]:
    """Items that torch's partitioner would save under ``max_memory``; a yardstick for benchmarks.

    ``memory`` and ``max_memory`` in units of what its memory budget is a fraction of, so about 1.
    """
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack as solve  # 2.6+

    _, saved, _ = solve(memory, runtimes, max_memory)
    return saved


def reads_a_number(func: object) -> bool:
    """Whether the op ``func`` is the one below ``Tensor.item()``."""
    return func is torch.ops.aten._local_scalar_dense.default


def current_backward() -> int:
    """Number of the backward that is running; -1 where none is; 1.13+."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(check: Callable[[], None]) -> None:
    """Call ``check`` when the backward that is running is through; what it raises, that raises; 1.5+."""
    torch.autograd.Variable._execution_engine.queue_callback(check)


def graph_is_kept() -> bool:
    """Whether the backward that is running was asked to ``retain_graph``; 2.6+, before ``False``."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is not None and bool(asked())


def is_transformed() -> bool:
    """Whether torch.jit or a transform of torch.func (grad, vmap, jvp) is running this call; 2.1+."""
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def parametrized_weights_are_cached() -> bool:
    """Whether a call runs under ``torch.nn.utils.parametrize.cached()``; 1.9+."""
    return bool(torch.nn.utils.parametrize._cache_enabled)


def job_store() -> Any:
    """The key-value store that the processes of a job met in; ``None`` if there is none to be had; 1.8+."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store() if torch.distributed.is_initialized() else None


# -- Dynamo, which takes a second to import and is asked for only where a step is cut ----------------

RECOMPILES = 32  # of one place in the code, beyond which Dynamo gives up on it

_COMPILER_QUESTIONS = ("is_compiling", "is_dynamo_compiling", "is_exporting", "_is_in_optimized_module")


def wraps_others(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has others inside, which its ops are taken to (quantized, nested, sharded); 2.1+."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def is_checkpoint(target: Any) -> bool:
    """Whether a call in one of Dynamo's graphs is ``torch.utils.checkpoint`` of a function; 2.1+."""
    return target is torch.ops.higher_order.tag_activation_checkpoint


def is_autograd_function(target: Any) -> bool:
    """Whether a call in one of Dynamo's graphs is an ``autograd.Function``, of its methods' graphs; 2.5+."""
    from torch._functorch.autograd_function import autograd_function_apply

    return target is autograd_function_apply


def switches_gradients(node: fx.Node) -> bool | None:
    """Whether a call in one of Dynamo's graphs switches gradients on, or off; ``None``: neither; 2.0+."""
    return bool(node.args[0]) if node.target is torch._C._set_grad_enabled else None


def split_graph(graph: fx.GraphModule, part_of: Callable[[fx.Node], int]) -> fx.GraphModule:
    """``graph`` in parts, each a module ``submod_<number>`` of the result; 2.6+ for modes that span parts."""
    from torch.fx.passes.split_module import split_module

    whole: fx.GraphModule = split_module(graph, graph, part_of, keep_original_order=True)
    return whole


def dynamo_stands_aside() -> bool:
    """Whether a mode is on under which Dynamo runs code as it is, and remembers to; 2.10+."""
    asked = getattr(_python_dispatch, "is_in_any_mode_without_ignore_compile_internals", None)
    return bool(watching_modes()) if asked is None else bool(asked())


def cut_by_dynamo(
    forward: Callable[..., Any], backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """``forward`` with each graph that Dynamo finds in it run by what ``backend`` makes of it; 2.0+.

    Other models that run the same code do not count among its compiles (2.13+).
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        apart: dict[str, Any] = {"isolate_recompiles": True}
        return torch.compile(forward, backend=backend, **apart)
    return torch.compile(forward, backend=backend)


def hide_from_dynamo(node: type[torch.autograd.Function]) -> None:
    """Dynamo does not follow its backward where a forward that is cut runs one by itself; 2.0+."""
    from torch._dynamo import disable

    if not hasattr(node.backward, "_torchdynamo_disable"):
        node.backward = staticmethod(disable(node.backward))  # type: ignore[method-assign]


class _DynamoAsEager:
    """Dynamo's answers and settings as a cut forward wants them, while any runs: made once, entered often."""

    def __init__(self) -> None:
        from torch._dynamo import config, trace_rules
        from torch._dynamo.variables.torch import TorchInGraphFunctionVariable, tracing_state_functions

        # torch's own modules of several others: cut where a loop that cannot be followed calls them
        self._followed, nn = trace_rules.get_legacy_mod_inlinelist(), Path(torch.nn.modules.__file__).parent
        self._followed_here = {(nn / name).as_posix() for name in _MODULES_OF_SEVERAL} - self._followed
        self._config, self._answers = config, tracing_state_functions()
        self._handlers = TorchInGraphFunctionVariable._get_handlers()
        self._asked = [
            f for f, answer in self._answers.items() if answer is True and f.__name__ in _COMPILER_QUESTIONS
        ]
        # a question of transformers', which ends a graph; who captures a step is told elsewhere
        capturing = torch.cuda.is_current_stream_capturing
        self._unasked = [] if capturing in self._handlers else [capturing]
        self._advises = logging.getLogger("torch._dynamo.variables.tensor")  # of each cut how to have none
        self._here = threading.local()  # settings are a thread's, answers the process's
        self._lock, self._inside = threading.Lock(), 0
        self._hf: tuple[Any, Any] | None = None
        self._translator = importlib.import_module("torch._dynamo.symbolic_convert").InstructionTranslatorBase
        self._in_a_loop = getattr(self._translator, _IN_A_LOOP, None)

    def __enter__(self) -> None:
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        if not depth:
            self._here.patch = self._here.__dict__.get("patch") or self._config.patch(
                recompile_limit=RECOMPILES,
                skip_nnmodule_hook_guards=False,  # hooks that come later are seen
                use_numpy_random_stream=True,  # what it draws is drawn by numpy, not by torch
                accumulated_recompile_limit=64 * RECOMPILES,
                optimize_ddp=False,
                suppress_errors=True,
                allow_unspec_int_on_nn_module=True,  # a counter on a module is a number that changes
            )
            self._here.patch.__enter__()
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._answer()

    def __exit__(self, *raised: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._take_back()
        self._here.depth -= 1
        if not self._here.depth:
            self._here.patch.__exit__(*raised)

    def _answer(self) -> None:
        for function in self._asked:
            self._answers[function] = False
        for function in self._unasked:
            self._answers[function] = False
            self._handlers[function] = self._handlers[torch.jit.is_tracing]  # type: ignore[attr-defined]
        self._followed |= self._followed_here
        self._advises.addFilter(_is_no_advice)
        if self._in_a_loop is not None:
            setattr(self._translator, _IN_A_LOOP, _asks_loops(self._in_a_loop))
        module = sys.modules.get("transformers.utils.output_capturing")
        was = getattr(module, _HF_QUESTION, None)
        if was is not None:  # outputs are collected by a ContextVar, which ends graphs, or as it compiles
            self._hf = module, was
            setattr(module, _HF_QUESTION, _yes)

    def _take_back(self) -> None:
        if self._hf is not None:
            setattr(self._hf[0], _HF_QUESTION, self._hf[1])
            self._hf = None
        if self._in_a_loop is not None:
            setattr(self._translator, _IN_A_LOOP, self._in_a_loop)
        self._followed -= self._followed_here
        self._advises.removeFilter(_is_no_advice)
        for function in self._asked:
            self._answers[function] = True
        for function in self._unasked:
            self._answers.pop(function, None)
            self._handlers.pop(function, None)


_MODULES_OF_SEVERAL = ("activation.py", "container.py", "rnn.py", "transformer.py")

_HF_QUESTION = "is_torchdynamo_compiling"  # of transformers 5.3+, where it collects outputs


_IN_A_LOOP = "maybe_has_backedge"  # whether a graph ends in a loop; 2.9+


def _yes() -> bool:
    return True


class Loops:
    """What Dynamo does with a function that has a loop in which a graph ends; for one cut forward.

    It leaves it to eager, with all of the loop.  ``followed``: it goes on behind the end instead, turn by
    turn, each with a compile of its own.  Where that are more than ``TURNS_HERE`` in one place, or ``TURNS``
    in all, ``are_too_long`` says so.  ``may_follow``: nothing has shown that they are.
    """

    _here: contextvars.ContextVar[Loops | None] = contextvars.ContextVar("loops", default=None)

    def __init__(self, *, followed: bool = False, may_follow: bool = True) -> None:
        self.followed, self._may_follow = followed, may_follow
        self._left: dict[CodeType, None] = {}  # functions left to eager
        self._turns: Counter[CodeType] = Counter()

    @property
    def are_left(self) -> bool:
        """Whether there are functions that were left to eager and may be followed."""
        return bool(self._left) and self._may_follow and not self.followed

    @property
    def are_too_long(self) -> bool:
        """Whether following them takes too many compiles."""
        return self.followed and bool(self._left)

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Meanwhile, in this thread, Dynamo asks here."""
        token = self._here.set(self)
        try:
            yield
        finally:
            self._here.reset(token)

    def turned(self) -> Loops:
        """Those of the same forward cut anew: followed, or, where they are too long, left to eager for good.

        What Dynamo knows of the functions is forgotten.
        """
        frames: Any = importlib.import_module("torch._dynamo.eval_frame")

        _make_iterators_go_on()
        for code in (*self._left, *self._turns):
            frames.reset_code(code)  # 2.1+
        return Loops(followed=not self.followed, may_follow=not self.followed)

    def leaves(self, translator: Any) -> bool:
        """A graph ends in a loop: whether the function is left to eager."""
        frames = [translator]
        while frames[-1].parent is not None:
            frames.append(frames[-1].parent)
        root = frames[-1].f_code
        self._turns[root] += 1
        if self.followed and self._turns[root] <= TURNS_HERE and self._turns.total() <= TURNS:
            return False
        self._left.update(dict.fromkeys(frame.f_code for frame in frames))
        return True


TURNS_HERE, TURNS = 3 * RECOMPILES // 4, 3 * RECOMPILES  # some compiles of a place are for what comes later


def _asks_loops(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def in_a_loop(translator: Any) -> bool:
        found = original(translator)
        loops = Loops._here.get()
        return found if loops is None or not found else loops.leaves(translator)

    return in_a_loop


@functools.cache
def _make_iterators_go_on() -> None:
    """An iterator over a dictionary, a ModuleList's among them, goes on behind the end of a graph.

    Dynamo of 2.13 has no code for that (before, they were lists'), and leaves the function to eager.
    """
    iterators = importlib.import_module("torch._dynamo.variables.iter")
    of_dicts = getattr(iterators, "DictViewIterator", None)
    if of_dicts is None or "reconstruct" in vars(of_dicts):
        return
    lists = importlib.import_module("torch._dynamo.variables.lists")

    def reconstruct(self: Any, codegen: Any) -> None:
        rest = list(copy.copy(self._iter))
        if self.view_type == "keys":
            rest = [key.vt for key in rest]
        elif self.view_type == "items":
            rest = [lists.TupleVariable([key.vt, value]) for key, value in rest]
        lists.ListIteratorVariable(rest).reconstruct(codegen)

    of_dicts.reconstruct = reconstruct


@functools.cache
def dynamo_as_eager() -> contextlib.AbstractContextManager[None]:
    """Dynamo answers "am I being compiled?" as eager would, and may compile one place ``RECOMPILES`` times;
    2.7+.  May be entered by several threads, and again inside.
    """
    return _DynamoAsEager()


def _is_no_advice(said: logging.LogRecord) -> bool:
    return not str(said.msg).startswith("Graph break from")


def dynamo_breaks() -> list[tuple[str, str]]:
    """Where (file:line) and why Dynamo ended graphs, in this process, since it was last reset; 2.0+."""
    from torch._dynamo.utils import graph_break_reasons

    found = []
    for reason in graph_break_reasons:
        place = reason.user_stack[-1] if reason.user_stack else None
        where = "" if place is None else f"{place.filename}:{place.lineno}"
        found.append((where, str(reason.reason).strip().splitlines()[0]))
    return found
