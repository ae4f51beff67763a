"""Dynamo, which takes a second to import and is asked for only where a step is cut."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib
import inspect
import logging
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.utils._python_dispatch as _python_dispatch  # the modes that are on; 1.13+
from torch import fx

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from planner._compat.running import watching_modes
from planner._compat.sharded import frames_of_spread, masks_of_traces_apart
from planner._compat.tracing import fakes_as_kernels

RECOMPILES = 32  # of one place in the code, beyond which Dynamo gives up on it


_COMPILER_QUESTIONS = ("is_compiling", "is_dynamo_compiling", "is_exporting", "_is_in_optimized_module")


def is_checkpoint(target: Any) -> bool:
    """Whether a call in one of Dynamo's graphs is ``torch.utils.checkpoint`` of a function; 2.1+."""
    return target is torch.ops.higher_order.tag_activation_checkpoint


def is_autograd_function(target: Any) -> bool:
    """Whether a call in one of Dynamo's graphs is an ``autograd.Function``, of its methods' graphs; 2.5+."""
    from torch._functorch.autograd_function import autograd_function_apply

    return target is autograd_function_apply


def is_hook(target: Any) -> bool:
    """Whether a call in one of Dynamo's graphs hooks a graph to a tensor; 2.12+, torch cuts before."""
    return target is getattr(torch.ops.higher_order, "register_hook", None)


def switches_gradients(node: fx.Node) -> bool | None:
    """Whether a call in one of Dynamo's graphs switches gradients on, or off; ``None``: neither; 2.0+."""
    return bool(node.args[0]) if node.target is torch._C._set_grad_enabled else None


def nests(node: fx.Node) -> int:
    """1 where a call in one of Dynamo's graphs enters a transform of ``torch.func``, -1 where it leaves one,
    else 0; 2.1+.
    """
    name = getattr(node.target, "__name__", "")
    return (name in _ENTERS or name.endswith("_increment_nesting")) - (
        name in _LEAVES or name.endswith("_decrement_nesting")
    )


def forbids_hooks(node: fx.Node) -> bool:
    """Whether hooks on saved tensors are an error from a call in one of Dynamo's graphs on; 2.1+."""
    return getattr(node.target, "__name__", "") in _ENTERS


_ENTERS, _LEAVES = ("_saved_tensors_hooks_disable",), ("_saved_tensors_hooks_enable",)


def split_graph(graph: fx.GraphModule, part_of: Callable[[fx.Node], int]) -> fx.GraphModule:
    """``graph`` in parts, each a module ``submod_<number>`` of the result; 2.6+ for modes that span parts."""
    from torch.fx.passes.split_module import split_module

    whole: fx.GraphModule = split_module(graph, graph, part_of, keep_original_order=True)
    return whole


def dynamo_stands_aside() -> bool:
    """Whether a mode is on in this thread under which Dynamo runs code as it is, and remembers to; 2.10+."""
    if not hasattr(_python_dispatch, _STANDS_ASIDE):
        return bool(watching_modes())
    return any(not m.ignore_compile_internals() for m in _python_dispatch._get_current_dispatch_mode_stack())


_STANDS_ASIDE = "_is_in_any_mode_without_ignore_compile_internals"


def _forget_modes_elsewhere() -> None:
    """Torch keeps one answer for all threads, which stays wrong where they enter and leave modes by turns."""
    if getattr(_python_dispatch, _STANDS_ASIDE, False) and not dynamo_stands_aside():
        setattr(_python_dispatch, _STANDS_ASIDE, False)
        _python_dispatch.set_is_in_mode_without_ignore_compile_internals(False)  # type: ignore[attr-defined]


def cut_by_dynamo(
    forward: Callable[..., Any], backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """``forward`` with each graph that Dynamo finds in it run by what ``backend`` makes of it; 2.0+.

    Other models that run the same code do not count among its compiles (2.13+), and what Dynamo left alone of
    theirs is not left alone here.
    """
    forward = _of_its_own(forward)
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
    """Dynamo's answers and settings as a cut forward wants them, while any runs: made once, entered often.

    What another thread compiles meanwhile waits for the forward, and the forward for that: Dynamo would run
    as it is what comes while a mode of that thread is on.
    """

    def __init__(self) -> None:
        from torch._dynamo import config, trace_rules
        from torch._dynamo.variables.torch import TorchInGraphFunctionVariable, tracing_state_functions

        # torch's own modules of several others: cut where a loop that cannot be followed calls them.  The
        # list is asked for each time: DDP and process groups have it made anew
        self._lists, nn = trace_rules.get_legacy_mod_inlinelist, Path(torch.nn.modules.__file__).parent
        self._followed: set[str] = set()
        self._followed_here = {(nn / name).as_posix() for name in _MODULES_OF_SEVERAL} - self._lists()
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
        self._compiling = importlib.import_module("torch._dynamo.convert_frame").compile_lock  # 2.0+
        self._hf: tuple[Any, Any] | None = None
        self._translator = importlib.import_module("torch._dynamo.symbolic_convert").InstructionTranslatorBase
        self._in_a_loop = getattr(self._translator, _IN_A_LOOP, None)
        functions: Any = importlib.import_module("torch._dynamo.variables.misc").AutogradFunctionVariable
        self._functions, self._apply = functions, functions.call_apply  # 2.0+
        _SINGLE.append(self)
        self._skip_code = importlib.import_module("torch._dynamo.eval_frame").skip_code  # 2.1+

    @property
    def is_inside(self) -> bool:
        """Whether a cut forward runs, in any thread."""
        return bool(self._inside)

    def __enter__(self) -> None:
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        if not depth:
            self._here.is_alone = self._compiling.acquire(timeout=_WAIT_S)
            _forget_modes_elsewhere()
            self._here.patch = self._here.__dict__.get("patch") or self._config.patch(
                recompile_limit=RECOMPILES,
                skip_nnmodule_hook_guards=False,  # hooks that come later are seen
                use_numpy_random_stream=True,  # what it draws is drawn by numpy, not by torch
                accumulated_recompile_limit=64 * RECOMPILES,
                optimize_ddp=False,
                suppress_errors=True,
                allow_unspec_int_on_nn_module=True,  # a counter on a module is a number that changes
                allow_rnn=True,  # their kernels are captured whole
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
            if self._here.is_alone:
                self._compiling.release()

    def _answer(self) -> None:
        for entry in _ENTRIES[:1]:  # all have one code; torch.compiler.reset() forgets what was said of it
            self._skip_code(entry.__code__)
        for code in frames_of_spread():
            self._skip_code(code)
        for entry in _ENTRIES:
            for name, value in zip(_DISABLED, (True, "it plans for itself"), strict=True):
                setattr(entry, name, value)
        for function in self._asked:
            self._answers[function] = False
        for function in self._unasked:
            self._answers[function] = False
            self._handlers[function] = self._handlers[torch.jit.is_tracing]  # type: ignore[attr-defined]
        self._followed = self._lists()
        self._followed |= self._followed_here
        self._advises.addFilter(_is_no_advice)
        self._fakes = contextlib.ExitStack()
        self._fakes.enter_context(fakes_as_kernels())
        self._fakes.enter_context(masks_of_traces_apart())
        if self._in_a_loop is not None:
            setattr(self._translator, _IN_A_LOOP, _asks_loops(self._in_a_loop))
        self._functions.call_apply = _asks_for_none(self._apply)
        module = sys.modules.get("transformers.utils.output_capturing")
        was = getattr(module, _HF_QUESTION, None)
        if was is not None:  # outputs are collected by a ContextVar, which ends graphs, or as it compiles
            self._hf = module, was
            setattr(module, _HF_QUESTION, _yes)

    def _take_back(self) -> None:
        for entry in _ENTRIES:
            for name in _DISABLED:
                delattr(entry, name)
        if self._hf is not None:
            setattr(self._hf[0], _HF_QUESTION, self._hf[1])
            self._hf = None
        if self._in_a_loop is not None:
            setattr(self._translator, _IN_A_LOOP, self._in_a_loop)
        self._functions.call_apply = self._apply
        self._followed -= self._followed_here
        self._advises.removeFilter(_is_no_advice)
        self._fakes.__exit__(None, None, None)
        for function in self._asked:
            self._answers[function] = True
        for function in self._unasked:
            self._answers.pop(function, None)
            self._handlers.pop(function, None)


_WAIT_S = 60.0  # for another thread to have compiled, which may itself wait for this one


_SINGLE: list[_DynamoAsEager] = []  # none before a forward was cut


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, by which Dynamo keeps and counts what it compiles; 2.0+."""
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forwards of torch's own modules Dynamo enters by one function for all (``external_utils.wrap_inline``),
    whose compiles are limited together: those get one of their own too.
    """
    from torch._dynamo import trace_rules

    if inspect.ismethod(forward) and inspect.isfunction(forward.__func__):
        apart: Callable[..., Any] = types.MethodType(own_code(forward.__func__), forward.__self__)
    else:
        apart = own_code(forward) if inspect.isfunction(forward) else forward
    if not trace_rules.check(forward):
        return apart

    def entered(*args: Any, **kwargs: Any) -> Any:
        return apart(*args, **kwargs)

    return own_code(entered)


def left_alone(entry: Callable[..., Any]) -> Callable[..., Any]:
    """``entry`` such that where a forward is cut that calls it, Dynamo leaves it and all that it calls alone;
    2.1+.  Other compilers find in it what is written.
    """
    left: list[Callable[..., Any]] = []

    @functools.wraps(entry)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not (_SINGLE and _SINGLE[0].is_inside):
            return entry(*args, **kwargs)
        if not left:
            left.append(torch.compiler.disable(entry, reason=f"{entry.__qualname__} plans for itself"))
        return left[0](*args, **kwargs)

    _ENTRIES.append(called)
    return called


_ENTRIES: list[Callable[..., Any]] = []
_DISABLED = (
    "_torchdynamo_disable",
    "_torchdynamo_disable_msg",
)  # of a function that is not to be followed; 2.1+


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


def _asks_for_none(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo ends a graph before an ``autograd.Function`` that asks for ``None`` where no gradient comes: it
    would follow its backward for zeros, and parameters would get zeros where eager leaves ``None``.
    """

    def call_apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        methods = self.fn_cls.forward, self.fn_cls.setup_context
        if any("set_materialize_grads" in getattr(m, "__code__", _yes.__code__).co_names for m in methods):
            from torch._dynamo.exc import Unsupported

            raise Unsupported(
                f"{self.fn_cls.__name__} calls set_materialize_grads: it is told where no gradient comes"
            )
        return original(self, *args, **kwargs)

    return call_apply


@functools.cache
def _make_iterators_go_on() -> None:
    """An iterator over a dictionary, a ModuleList's among them, or over a zip of lists and of such, goes on
    behind the end of a graph as one over a list of what is left.

    Dynamo of 2.13 has no code for the first (before, they were lists'), and leaves the function to eager; a
    zip it makes anew, but it does not follow one that comes from outside of a graph.
    """
    iterators = importlib.import_module("torch._dynamo.variables.iter")
    kinds = [getattr(iterators, name, None) for name in ("DictViewIterator", "ZipVariable")]
    for kind in filter(None, kinds):
        kind.reconstruct = _as_a_list(kind.reconstruct)


def _as_a_list(before: Callable[..., None]) -> Callable[..., None]:
    def reconstruct(self: Any, codegen: Any) -> None:
        rest = _rest_of(self)
        if rest is None:
            before(self, codegen)
            return
        lists: Any = importlib.import_module("torch._dynamo.variables.lists")
        lists.ListIteratorVariable(rest).reconstruct(codegen)

    return reconstruct


def _rest_of(iterator: Any) -> list[Any] | None:
    """What an iterator of Dynamo's is yet to give; ``None`` where that is not known beforehand."""
    lists: Any = importlib.import_module("torch._dynamo.variables.lists")
    kind = type(iterator).__name__
    if isinstance(iterator, lists.ListIteratorVariable):
        return [] if getattr(iterator, "is_exhausted", False) else list(iterator.items[iterator.index :])
    if kind.startswith("Dict") and hasattr(iterator, "view_type"):  # 2.13+
        rest = list(copy.copy(iterator._iter))
        if iterator.view_type == "keys":
            return [key.vt for key in rest]
        if iterator.view_type == "items":
            return [lists.TupleVariable([key.vt, value]) for key, value in rest]
        return rest
    if kind == "ZipVariable":
        if hasattr(iterator, "iterables"):  # before 2.13: lists, from one index on, and iterators
            every = [x[iterator.index :] if type(x) is list else _rest_of(x) for x in iterator.iterables]
        else:
            every = [_rest_of(x) for x in iterator.iterable.items]
        known = [x for x in every if x is not None]
        if len(known) < len(every) or (iterator.strict and len({len(x) for x in known}) > 1):
            return None
        return [lists.TupleVariable(list(items)) for items in zip(*known, strict=False)]
    return None


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
