"""The model as the tracer takes it: a function of flat tensors, run as eager runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn

from planner import _compat
from planner._compat import pytree, run_as_traced
from planner.capture.as_eager.backward import Installed
from planner.capture.as_eager.casts import contexts_noted
from planner.capture.as_eager.questions import stand_in, standing_in
from planner.capture.as_eager.recurrences import gru, lstm_gradients
from planner.capture.as_eager.values import Values
from planner.capture.module import original_forward
from planner.capture.outputs import OutputTemplate, template_of
from planner.capture.pieces import ReadsOf, reached_from
from planner.capture.state.effects import Effects, attributes_kept
from planner.capture.state.reads import Reads
from planner.capture.state.second_call import Alike, OpsSeen
from planner.capture.state.tensors import others_kept, tensors_kept
from planner.errors import TraceError

__all__ = ["FlatModel", "apart", "called", "exported", "module_paths"]


class FlatModel(nn.Module):
    """The model as a function of flat tensors, each parameter once.

    Tied parameters would otherwise be two leaves whose gradients somebody has to add again; here
    autograd adds them inside the graph, in the order eager does.
    """

    def __init__(
        self,
        model: nn.Module,
        given: list[Any],
        fake: list[Any],
        spec: Any,
        used: frozenset[int] | None,
        *,
        records: bool = True,
        watch: ReadsOf | None = None,
        drops: bool = False,
        values: Values | None = None,
    ) -> None:
        super().__init__()
        self.model, self.records, self.watch, self.drops = model, records, watch, drops
        self.values = values  # those of the batch, where they are there
        self.given = (given,)  # no parameter among them is this module's
        self.fake, self.spec, self.used = fake, spec, used
        tensors = [id(x) for x in given if isinstance(x, torch.Tensor)]
        self.alone = [tensors.index(x) for x in tensors]  # of one that is given twice, the first place
        self.installed = Installed(model)
        self.names: dict[str, str] = {}
        self.rebound: list[str] = []  # buffers that the forward binds to a new tensor
        self.template: OutputTemplate | None = None
        self.reads, self.effects = Reads(), Effects()
        self.runs = 0  # of the forward
        self.looks = False  # a run is only to say what it does
        self.ran: OpsSeen | None = None  # the ops of the run before, where it matters
        self.running: OpsSeen | None = None
        self.alike: Alike | None = None  # what the second run has in common with the first
        self.placed: frozenset[str | int] = frozenset()
        self.keeps_casts = torch.is_autocast_cache_enabled()
        for name, parameter in model.named_parameters():
            self.register_parameter(self._mangle(name), parameter)
        for name, buffer in model.named_buffers():
            self.register_buffer(self._mangle(name), buffer)
        self.training = model.training  # not train(): that would reset the flags below

    def _mangle(self, name: str) -> str:
        mangled = "|" + name.replace(".", "|")
        self.names[mangled] = name
        return mangled

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([(n, p) for n, p in self._parameters.items() if p is not None])

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return iter([(n, b) for n, b in self._buffers.items() if b is not None])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.installed.remove()
        if self.values is not None:
            self.values.begin(tensors)
        state = {self.names[n]: t for n, t in (*self.named_parameters(), *self.named_buffers())}
        it = iter(tensors)
        flat = [next(it) if isinstance(x, torch.Tensor) else x for x in self.fake]
        for tensor, original in zip(flat, self.given[0], strict=True):
            if isinstance(tensor, torch.Tensor):
                stand_in(tensor, original)
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        after = dict(state)
        named = [*state.items(), *((f"input {i}", t) for i, t in zip(self.alone, tensors, strict=True))]
        output = self._called(after, args, kwargs, named)
        if self.looks:
            return ()
        self.installed.put(after)
        asked = {id(t) for t in self.reads.placed}
        self.placed |= {name for name, t in state.items() if id(t) in asked}
        self.placed |= {i for i, t in enumerate(tensors) if id(t) in asked}
        self.template, leaves = template_of(type(self.model).__name__, output, self.used, drops=self.drops)
        tracked: dict[str | int, torch.Tensor] = {}
        tracked.update(state)
        tracked.update(enumerate(tensors))
        self.template = replace(self.template, reached=reached_from(leaves, tracked))
        kept = zip(leaves, self.template.leaves, strict=True)
        results = [t if leaf.differentiated else t.detach() for t, leaf in kept]
        self.rebound = [name for name, t in after.items() if t is not state[name]]
        for name in self.rebound:
            old, new = state[name], after[name]
            if isinstance(old, nn.Parameter) or (old.shape, old.dtype) != (new.shape, new.dtype):
                raise TraceError(
                    f"the forward of {type(self.model).__name__} replaces {name}, {tuple(old.shape)} of "
                    f"{old.dtype}, by a tensor {tuple(new.shape)} of {new.dtype}; a plan can only update a "
                    "buffer's values"
                )
            results.append(new.detach())
        if self.watch is not None:
            self.watch.watch(tracked, results)
        return tuple(map(apart, results))

    def _called(
        self, state: dict[str, torch.Tensor], args: Any, kwargs: Any, named: list[tuple[str, torch.Tensor]]
    ) -> Any:
        """The model's output, the model as it was; ``effects`` then says what it did besides.

        It may be called more than once.  Each run finds the model as it was, but for what the run before it
        did besides: so it shows whether a later call runs the same ops as the first (``alike``).  Where
        tensors were stored, a later call would not make them: then each run is a first one.
        """
        first, again = self.effects, self.runs_again()
        kept = attributes_kept(self.model, self.reads.containers)
        with kept as self.effects, contextlib.ExitStack() as stack:
            look = self.effects.look
            if again:
                first.again()
                second = stack.enter_context(attributes_kept(self.model, self.reads.containers))
                look = _both(look, second.look)
            self.reads.look = look
            if self.records and (again or not self.runs):
                self.running = OpsSeen(named)
            try:
                with (
                    self.reads.recording() if self.records else contextlib.nullcontext(),
                    contexts_noted() if self.keeps_casts else contextlib.nullcontext(),
                ):
                    output = called(self.model, state, args, kwargs)
            finally:
                ran, self.running = self.running, None
        self.runs += 1
        if again and ran is not None and self.ran is not None:
            self.alike = Alike(ran.seen == self.ran.seen, second.going)
        self.ran = ran if self.runs == 1 and self.effects.touched and not self.effects.stored else None
        return output

    def runs_again(self) -> bool:
        """Whether a run behind the last one finds the model otherwise than that one did."""
        return self.records and bool(self.effects.touched) and not self.effects.stored

    def is_another_later(self, run: Callable[[], object]) -> bool:
        """Whether a call behind the one that was traced runs other ops, which ``run``, if need be, makes.

        What the backward was traced with stays.
        """
        if not self.runs_again():
            return False
        self.looks = True
        try:
            run()
        finally:
            self.looks = False
        return self.alike is None or not self.alike.ops

    def told(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An op of the step has run."""
        if self.running is not None:
            self.running.note(func, args, kwargs, result)
        if self.values is not None:
            self.values.note(func, args, kwargs, result)

    def answer(self, func: Any, args: Any) -> Any:
        """What an op gives that reads a value; ``NotImplemented`` where the batch has no answer."""
        return NotImplemented if self.values is None else self.values.answer(func, args)


def _both(one: Callable[[str, Any], None], other: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def look(name: str, container: Any) -> None:
        one(name, container)
        other(name, container)

    return look


class _Bare(nn.Module):
    """The model's own forward without the model's hooks, which go on firing around a planned step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with fx_traceback.annotate({"module": ""}):
            return original_forward(self.model)(*args, **kwargs)


def called(
    model: nn.Module, state: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``model`` with ``state`` for its parameters and buffers; ``state`` then holds what it left there."""
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    held = dict((*model.named_parameters(), *model.named_buffers()))
    pairs = {name: (tensor, held[name]) for name, tensor in state.items()}
    with others_kept(model), tensors_kept(model), standing_in(model, pairs):
        output = torch.func.functional_call(_Bare(model), named, args, kwargs)
    state.update({name: named[f"model.{name}"] for name in state})
    return output


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that tells the tracer to treat an output as a tensor of its own; :func:`told_apart` removes it.

    Outputs that are views of each other, of inputs or of parameters would be handed out as their base
    and lose their gradients.
    """
    return tensor.clone()


def _unheard(*_: Any) -> None:
    """Nobody asks which ops run."""


def _unanswered(*_: Any) -> Any:
    """Nobody knows a batch."""
    return NotImplemented


def exported(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    """The joint graph of ``module``, of the kernels that eager would run."""

    def again() -> bool:
        return isinstance(module, FlatModel) and module.is_another_later(
            lambda: run_as_traced(module, inputs)
        )

    values = module.values if isinstance(module, FlatModel) else None
    on_cpu = all(t.device.type == "cpu" for t in (*inputs, *module.parameters(), *module.buffers()))
    with (
        _compat.kernels_as_eager(gru, lstm_gradients, on_cpu),
        _compat.writes_keep_layout(
            *((module.told, module.answer) if isinstance(module, FlatModel) else (_unheard, _unanswered))
        ),
        values.told_to_libraries() if values is not None else contextlib.nullcontext(),
    ):
        return _compat.export_joint(module, inputs, again)


@contextlib.contextmanager
def module_paths(model: nn.Module) -> Iterator[None]:
    """Leave the path of the running module in each node; see :func:`planner.capture.meta.module`."""
    paths = {id(module): name for name, module in model.named_modules()}
    open_contexts: list[contextlib.AbstractContextManager[None]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in paths:
            context = fx_traceback.annotate({"module": paths[id(module)]})
            context.__enter__()
            open_contexts.append(context)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in paths and open_contexts:
            open_contexts.pop().__exit__(None, None, None)

    noted = dict(fx_traceback.current_meta)
    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        before.remove()
        after.remove()
        while open_contexts:  # an exception passed through the modules
            open_contexts.pop().__exit__(None, None, None)
        # These were left out of turn, and each has put back what it found: the next graph would have it.
        fx_traceback.current_meta.clear()
        fx_traceback.current_meta.update(noted)
