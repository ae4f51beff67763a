"""Modes, hooks and the engine, while a step runs."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext  # of what this thread traces; 2.1+
from torch._subclasses.fake_tensor import FakeTensorMode  # tensors without memory; 2.0+
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode  # writes a graph; 2.0+

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch.utils._python_dispatch import TorchDispatchMode  # sees every op below autograd; 1.13+
from torch.utils.flop_counter import _FlopCounterMode  # what FlopCounterMode enters; 2.1+

from planner._compat.ops import pieces_of
from planner._compat.tracing import STAND_INS


def modes_set_aside() -> contextlib.AbstractContextManager[Any]:
    """Meters and counters that watch ops see none of those inside; 2.1+."""
    if not watching_modes() and not torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return contextlib.nullcontext()  # what a training step goes through at every call
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def watching_modes() -> int:
    """How many modes look at every op just now, tracers among them; 2.0+."""
    return int(torch._C._len_torch_dispatch_stack())


def compiles_here() -> bool:
    """Whether what compiles or traces does so in this thread; 2.1+.

    ``torch.compiler.is_compiling()`` says yes while any thread does (2.13+).
    """
    stack = (torch._C._get_dispatch_stack_at(i) for i in range(watching_modes()))
    return TracingContext.try_get() is not None or any(isinstance(m, _TRACERS) for m in stack)


_TRACERS = FakeTensorMode, ProxyTorchDispatchMode


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


def is_heard(mode: TorchDispatchMode) -> bool:
    """Whether ops of this thread come by ``mode``, the one that was entered last.  Compiled code that is left
    takes the key for that along, of a mode that was entered within it; 2.0+.
    """
    keys: Any = torch._C
    return is_top_mode(mode) and keys._dispatch_tls_local_include_set().has(keys.DispatchKey.Python)


def outermost_compiled() -> Any:
    """What ``torch.compile`` made for the outermost code that it compiles and that runs just now; ``None``:
    there is none; 2.1+.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    found = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frames is not None and frame.f_code.co_filename == frames.__file__:
            context = frame.f_locals.get("self")
            if isinstance(context, frames.OptimizeContext):
                found = context
        frame = frame.f_back
    return found


def before_compiled_calls(context: Any, work: Callable[[Sequence[Any], Mapping[str, Any]], None]) -> None:
    """Do ``work(args, kwargs)`` before each further call of what :func:`outermost_compiled` found, outside of
    its code; 2.4+.
    """

    def enter() -> Callable[[], None]:
        frame = sys._getframe(1)  # of the call, or of a list that is made in it
        given = (frame if "args" in frame.f_locals or frame.f_back is None else frame.f_back).f_locals
        work(given.get("args", ()), given.get("kwargs", {}))
        return lambda: None

    context.enter_exit_hooks.insert(0, enter)


def is_top_mode(mode: TorchDispatchMode) -> bool:
    """Whether ``mode`` is the one that was entered last, and may be left; 2.0+."""
    count = watching_modes()
    return count > 0 and torch._C._get_dispatch_stack_at(count - 1) is mode


def after_backward(then: Callable[[], None]) -> None:
    """Called inside a backward: ``then()`` at its end; 1.4+."""
    torch.autograd.Variable._execution_engine.queue_callback(then)


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


def current_backward() -> int:
    """Number of the backward that is running; -1 where none is; 1.13+."""
    return torch._C._current_graph_task_id()


def will_run(node: Any) -> bool:
    """Whether the backward that is running goes through ``node``, or has; 2.0+."""
    return bool(torch._C._will_engine_execute_node(node))


def once_in_backward(node: Any, look: Callable[[tuple[Any, ...]], None]) -> None:
    """Let ``look`` see what the backward that is running gives ``node``, before it is used; 2.0+."""
    task = current_backward()

    def seen(gradients: tuple[Any, ...]) -> None:
        handle.remove()
        if current_backward() == task:
            look(gradients)

    handle = node.register_prehook(seen)


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
