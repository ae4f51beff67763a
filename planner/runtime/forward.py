"""What runs a rewritten step: autograd nodes around generated code, and the guard in front of it.

The forward graph runs once under ``no_grad``.  Then K autograd nodes are made, one per segment of
the backward, tied to each other only by an empty token: the node of the last segment first, the node
that hands out the model's outputs last.  In the backward each node runs its segment's code and
returns the gradients made there, so that hooks fire and gradients accumulate as they come.

What is needed later is held in three places, each released as soon as it is read: tensors of the
forward in the node of the first segment that reads them (``save_for_backward``, so that autograd
notices in-place changes), values that cross segments in a mailbox, parameters and inputs wherever
the caller has them.

Nothing here waits for a device, so the host runs ahead as it does in eager.  While a CUDA graph is being
captured, a step that replays random state is refused (:func:`_refuse_capture`).

Defined behaviour elsewhere: evaluation, ``no_grad`` and calls that a compiler or a transform of
``torch.func`` traces (:mod:`planner.runtime.tracing`) go to the original forward; a second backward, a
gradient of a gradient, or a gradient for an output that was not planned for is an error that says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planner import _compat
from planner.capture.expectation import Expectation
from planner.capture.inputs import Inputs
from planner.capture.outputs import OutputTemplate
from planner.errors import PlannerError
from planner.graph import kernels
from planner.rewrite.emit import Argument, Program
from planner.runtime.guard import Guard
from planner.runtime.tracing import is_traced

if TYPE_CHECKING:
    from planner.runtime.variants import Variants

__all__ = ["PlannedForward", "Step", "planned_forward_of"]


@dataclass(frozen=True)
class Step:
    """A program and what its callers must agree with; the same for every instance of the model.

    ``budget_bytes``  that it was planned to.
    ``variants``  finds the program for a batch where sizes vary; ``None``: this one, at its sizes.
    """

    program: Program
    template: OutputTemplate
    expected: Expectation
    device: torch.device
    budget_bytes: int
    variants: Variants | None = None


class _Call:
    """One forward of a planned step, and what its backward still needs."""

    def __init__(self, step: Step, given: dict[Argument, Any], results: list[torch.Tensor]) -> None:
        self.step = step
        program = step.program
        outputs, saved = results[: program.outputs], results[program.outputs :]
        tracked = [leaf.requires_grad for leaf in step.template.leaves]
        self.tracked = [i for i, t in enumerate(tracked) if t]
        self.outputs = [outputs[i] for i in self.tracked]
        self.like = [(t.shape, t.dtype) for t in self.outputs]
        self.mail: dict[str, Any] = {}
        self.spent = [False] * len(program.segments)
        self.direct: dict[Argument, Any] = {}
        self.keep: list[list[torch.Tensor]] = []
        for segment in program.segments:
            kept = []
            for argument in segment.arguments:
                if argument.kind == "saved":
                    kept.append(saved[int(argument.key)])
                elif argument.kind in ("parameter", "input"):
                    kept.append(given[argument])
                elif argument.kind in ("buffer", "constant", "size"):
                    self.direct[argument] = given[argument]
            self.keep.append(kept)

    @property
    def waits(self) -> bool:
        """Whether some of its backward is still to come."""
        return not all(self.spent)

    def arguments(
        self, index: int, saved: tuple[torch.Tensor, ...], tangents: tuple[Any, ...]
    ) -> list[torch.Tensor]:
        """The boxed arguments of a segment; mail is taken out of the box it lay in."""
        held = iter(saved)
        boxed = []
        for argument in self.step.program.segments[index].arguments:
            if argument.kind == "mail":
                boxed.append(self.mail.pop(str(argument.key)))
            elif argument.kind == "tangent":
                boxed.append(self._tangent(int(argument.key), tangents))
            elif argument.kind in ("buffer", "constant", "size"):
                boxed.append(self.direct[argument])
            else:
                boxed.append(next(held))
        return boxed

    def _tangent(self, output: int, tangents: tuple[Any, ...]) -> torch.Tensor:
        position = self.tracked.index(output)
        tangent = tangents[position]
        if tangent is None:  # an output that the loss turned out not to use
            shape, dtype = self.like[position]
            tangent = torch.zeros(shape, dtype=dtype, device=self.step.device)
        return tangent

    def refuse(self, tangents: tuple[Any, ...]) -> None:
        """A gradient arrived for an output the plan does not differentiate."""
        for position, index in enumerate(self.tracked):
            leaf = self.step.template.leaves[index]
            if tangents[position] is not None and not leaf.differentiated:
                chosen = ", ".join(x.name for x in self.step.template.leaves if x.differentiated)
                raise PlannerError(
                    f"a gradient arrived for {leaf.name}, but the plan differentiates {chosen} only; "
                    "plan with loss_fn=... computing the loss you train with"
                )


class _Segment(torch.autograd.Function):
    """Autograd's view of one segment of the backward."""

    clear_saved_tensors_on_access = True  # else the saved set lives until the segment returns

    @staticmethod
    def forward(ctx: Any, call: _Call, index: int, token: torch.Tensor | None, *leaves: torch.Tensor) -> Any:
        ctx.call, ctx.index, ctx.leaves = call, index, len(leaves)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.keep[index])
        call.keep[index] = []
        if index == 0:
            outputs, call.outputs = call.outputs, []
            return tuple(outputs)
        return torch.empty(0, device=call.step.device)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        call, index = ctx.call, ctx.index
        if torch.is_grad_enabled():
            raise PlannerError(
                "a planned step has no second derivative (create_graph=True); call plan.restore(model) first"
            )
        if call.spent[index]:
            raise PlannerError(
                "a second backward through one planned step: what it saved was released by the first. "
                "Run the forward again, or call plan.restore(model) for retain_graph=True"
            )
        _refuse_capture(call.step)
        call.spent[index] = True
        if index == 0:
            call.refuse(tangents)
        segment = call.step.program.segments[index]
        boxed = call.arguments(index, ctx.saved_tensors, tangents)
        with torch.no_grad(), _without_autocast(call.step.device), _memory_explained(call.step, "backward"):
            results = segment.module.forward(boxed)
        made = len(segment.gradients)
        call.mail.update(zip(segment.mail, results[made:], strict=True))
        token = None if index == len(call.spent) - 1 else torch.empty(0, device=call.step.device)
        return None, None, token, *results[:made]


def _refuse_capture(step: Step) -> None:
    """Under CUDA graph capture a generator's state is a place in that graph, and means nothing in another.

    A backward captured apart from its forward would draw other numbers, without an error.
    """
    if step.program.replays and kernels.is_capturing(step.device):
        raise PlannerError(
            "a CUDA graph is being captured, and this plan draws random numbers again from a generator's "
            "state, which a captured graph cannot go back to. Plan with a budget at which masks are kept, "
            "train without dropout, or call plan.restore(model) before capturing"
        )


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The graph holds its casts; autocast must not add others."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _memory_explained(step: Step, phase: str) -> Iterator[None]:
    """Out of memory, by its own type and message, and what it means for the plan.

    Trainers look at both, to try again with a smaller batch.
    """
    try:
        yield
    except RuntimeError as error:
        if len(error.args) == 1 and _compat.is_out_of_memory(error):
            error.args = (
                f"{error.args[0]}\nThis was in the {phase} of a step planned to "
                f"{step.budget_bytes / 1e9:.4g} GB. What the budget does not know of (other models and "
                "processes, layers outside the planned module, fragmentation) leaves less than that: lower "
                "budget_gb by as much. The model can go on: gradients that had arrived are in .grad, as "
                "after any backward that breaks off",
            )
        raise


class PlannedForward:
    """Stands in for ``model.forward``: runs the plan's program, or the original where that applies."""

    def __init__(self, model: nn.Module, step: Step, original: Callable[..., Any] | None = None) -> None:
        self.model, self.step, self._late = model, step, False
        self.original = original if original is not None else model.forward
        self.last_call: weakref.ref[_Call] | None = None
        self.before: Any = None  # what model.__dict__ held under "forward", put back by restore
        self.guard = Guard(model, step.expected)

    @functools.cached_property
    def _held(self) -> dict[str, Argument]:
        """What a program calls the model's parameters and buffers, by name."""
        parameters = self.guard.parameters
        return {
            n: Argument("parameter" if n in parameters else "buffer", n)
            for n in self.step.expected.parameters
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        planned_for = self.step.expected.modules[0][2]
        if (
            not torch.is_grad_enabled()
            or self.model.training is not planned_for
            or is_traced(type(self.model).__name__)
        ):
            return self.original(*args, **kwargs)
        leaves, in_spec = Inputs(args, kwargs).flatten()
        return self.run(leaves, in_spec, self.check(leaves, in_spec))

    def run(self, leaves: list[Any], in_spec: Any, tensors: dict[str, torch.Tensor] | None = None) -> Any:
        """The planned step at arguments that :meth:`check` has let pass; ``tensors``: what it returned."""
        step, variants = self.step, self.step.variants
        given = self._given(leaves, self.guard.tensors() if tensors is None else tensors)
        if variants is not None:
            step, sizes = variants.step_for(self.model, leaves, in_spec)
            given.update(sizes)
        program = step.program
        _refuse_capture(step)
        given.update((Argument("constant", name), tensor) for name, tensor in program.constants.items())
        boxed = [given[a] for a in program.arguments]
        with torch.no_grad(), _without_autocast(step.device), _memory_explained(step, "forward"):
            results = program.forward.forward(boxed)
        flat = list(results[: program.outputs])
        call = _Call(step, given, results)
        self.last_call = weakref.ref(call)
        del results
        token = None
        for index in reversed(range(len(program.segments))):
            leaves_here = [given[self._leaf(g)] for g in program.segments[index].gradients]
            token = _Segment.apply(call, index, token, *leaves_here)
        assert token is not None
        for position, tensor in zip(call.tracked, token, strict=True):
            flat[position] = tensor
        return step.template.rebuild(flat)

    def check(self, leaves: list[Any], in_spec: Any) -> dict[str, torch.Tensor]:
        """The model's tensors by name; ``StalePlanError`` if it or the arguments are not as planned."""
        self.guard.check_inputs(leaves, in_spec, sized=self.step.variants is None)
        self.guard.check_modules()
        return self.guard.tensors()

    @staticmethod
    def _leaf(gradient: str | int) -> Argument:
        return Argument("parameter" if isinstance(gradient, str) else "input", gradient)

    def _given(self, leaves: list[Any], tensors: dict[str, torch.Tensor]) -> dict[Argument, Any]:
        held = self._held
        given: dict[Argument, Any] = {held[name]: tensor for name, tensor in tensors.items()}
        for i, tensor in enumerate(x for x in leaves if isinstance(x, torch.Tensor)):
            given[Argument("input", i)] = tensor
        return given

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original  # so that inspect.signature shows the model's own arguments

    @property
    def __code__(self) -> Any:
        return self.original.__code__  # torch.compile asks a GraphModule's forward for it

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        """A copied model is planned as the first one is, on its own parameters."""
        model = memo.get(id(self.model)) or copy.deepcopy(self.model, memo)
        twin = object.__new__(PlannedForward)
        memo[id(self)] = twin
        original = getattr(self.original, "__func__", None)
        twin.model, twin.step = model, self.step
        twin.original = (
            original.__get__(model) if original is not None else copy.deepcopy(self.original, memo)
        )
        twin.before = twin.last_call = None
        twin._late = True  # the copy's modules are filled in after this returns
        return twin

    def __getattr__(self, name: str) -> Any:
        if name == "guard" and self.__dict__.get("_late"):
            self.guard = Guard(self.model, self.step.expected)
            return self.guard
        raise AttributeError(name)

    def __reduce__(self) -> Any:
        raise PlannerError(
            "a planned model cannot be pickled (generated code and autograd nodes do not travel); save "
            "model.state_dict() and plan.save(path), or call plan.restore(model) first"
        )


def planned_forward_of(model: nn.Module) -> PlannedForward | None:
    """The plan's stand-in on ``model``, if one is applied."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, PlannedForward) else None
