"""Stands in for ``model.forward``: the guard in front, then the nodes of :mod:`planner.runtime.autograd`.

Evaluation, ``no_grad`` and calls that a compiler or a transform of ``torch.func`` traces
(:mod:`planner.runtime.tracing`) go to the original forward.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from planner._compat import left_alone, modes_set_aside, pytree
from planner.capture.inputs import Inputs
from planner.errors import InfeasibleBudgetError, PlannerError, StalePlanError
from planner.plans.plan_data import PlanData
from planner.rewrite.program import Argument
from planner.runtime.autograd import PendingCall, SegmentNode
from planner.runtime.guard import Guard, OtherAnswerError
from planner.runtime.held_outputs import HeldOutputs
from planner.runtime.output_sets import OutputSets, Start
from planner.runtime.running import memory_explained, refuse_capture, without_autocast
from planner.runtime.shared_casts import shared_casts
from planner.runtime.step import ExecutableStep, Lifetimes
from planner.runtime.tracing import is_traced

__all__ = ["PlanAgain", "PlannedForward", "planned_forward_of", "run_step"]

log = logging.getLogger(__name__)

# Until when outputs are held -> the step planned for that.
PlanAgain: TypeAlias = Callable[[Lifetimes], ExecutableStep]

# Steps for batches that answer otherwise what the forward asks of them: what has more is better cut there.
_MOST_TURNS = 8


class _Turn(NamedTuple):
    """One step of several, each for other answers, and what goes with it."""

    step: ExecutableStep
    guard: Guard
    sets: OutputSets
    again: PlanAgain | None


class PlannedForward:
    """Stands in for ``model.forward``: runs the plan's program, or the original where that applies."""

    def __init__(
        self, model: nn.Module, step: ExecutableStep, original: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.step, self.given = model, step, step
        self.original = original if original is not None else model.forward
        self.sets = OutputSets(model, step)
        self.last_call: weakref.ref[PendingCall] | None = None
        self.outputs: HeldOutputs | None = None  # watches them
        self.again: PlanAgain | None = None  # plans for what was seen of them; None: nobody does here
        self.turns: list[_Turn] = []  # those that do not run now
        self.before: Any = None  # what model.__dict__ held under "forward", put back by restore
        _ = self.guard  # raises here where the model is not the plan's

    @functools.cached_property
    def guard(self) -> Guard:
        """What the plan was made for, bound to the model; of a copied model once its modules are there."""
        return Guard(self.model, self.step.expected)

    @functools.cached_property
    def _told(self) -> set[int]:
        """Plans, by identity, that were looked at where gradients were there already; of a copy none."""
        return set()

    @functools.cached_property
    def _held(self) -> dict[str, Argument]:
        """What a program calls the model's parameters and buffers, by name."""
        parameters = self.guard.parameters
        return {
            n: Argument("parameter" if n in parameters else "buffer", n)
            for n in self.step.expected.parameters
        }

    @left_alone
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        planned_for = self.step.expected.modules[0][2]
        if (
            not torch.is_grad_enabled()
            or self.model.training is not planned_for
            or is_traced(type(self.model).__name__)
        ):
            return self.original(*args, **kwargs)
        if self.again is not None and self.outputs is not None:
            lifetimes = self.unforeseen
            if lifetimes is not None:
                self._plan_again(self.outputs, self.again, lifetimes)
        leaves, in_spec = Inputs(args, kwargs).flatten()
        try:
            tensors = self.check(leaves, in_spec)
        except OtherAnswerError as other:
            self._turn(leaves, in_spec, other)
            tensors = self.check(leaves, in_spec)
        return self.run(leaves, in_spec, tensors)

    def _turn(self, leaves: list[Any], in_spec: Any, other: OtherAnswerError) -> None:
        """From this call on by the step for its batch's answers, made if there is none."""
        now = _Turn(self.step, self.guard, self.sets, self.again)
        batch = [x for x in leaves if isinstance(x, torch.Tensor)]
        there = [t for t in self.turns if t.step.expected.asked.hold(batch)]
        turn = there[0] if there else self._turn_for(leaves, in_spec, other)
        self.turns = [t for t in self.turns if t is not turn] + [now]
        self.step, self.sets, self.again = turn.step, turn.sets, turn.again
        vars(self)["guard"] = turn.guard

    def _turn_for(self, leaves: list[Any], in_spec: Any, other: OtherAnswerError) -> _Turn:
        if self.step.for_batch is None:
            raise other
        if len(self.turns) + 1 >= _MOST_TURNS:
            raise StalePlanError(
                f"{other.what}. There are {_MOST_TURNS} steps by now, each for other answers: plan with "
                'capture="regions", where the forward asks for itself'
            ) from None
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        with modes_set_aside():  # a meter that watches training is not to count this
            step = self.step.for_batch(self.model, Inputs(args, kwargs))
        log.warning("planned again, for both: %s", other.what)
        return _Turn(step, Guard(self.model, step.expected), OutputSets(self.model, step), None)

    def run(self, leaves: list[Any], in_spec: Any, tensors: dict[str, torch.Tensor] | None = None) -> Any:
        """The planned step at arguments that :meth:`check` has let pass; ``tensors``: what it returned."""
        self.sets.began()
        step = self.sets.now
        tensors = self.guard.tensors() if tensors is None else tensors
        self._tell_of_gradients(step.plan, tensors)
        variants = step.variants
        given = self._given(leaves, tensors)
        if variants is not None:
            step, sizes = variants.step_for(self.model, leaves, in_spec)
            given.update(sizes)
        start = self._start(step, given, leaves, in_spec)
        flat, call = run_step(step, given, functools.partial(PendingCall, sets=self.sets, start=start))
        self.last_call = weakref.ref(call)
        if self.outputs is not None:
            self.outputs.handed_out(step, type(self.model).__name__, flat)
        return step.template.rebuild(flat)

    def _tell_of_gradients(self, plan: PlanData | None, tensors: Mapping[str, torch.Tensor]) -> None:
        """Warn, once, where gradients are there already that the plan counts as made by its own backward."""
        if plan is None or id(plan) in self._told:
            return
        there = [name for name, tensor in tensors.items() if tensor.requires_grad and tensor.grad is not None]
        if not there:
            return
        self._told.add(id(plan))
        adding_bytes = plan.adding_peak_bytes or 0
        if adding_bytes <= plan.budget_bytes:
            return
        log.warning(
            "%d gradients of %s are there already, of %s among them, and this plan was made where none were: "
            "a step that adds to them takes %.6g GB or more, %.1f %% over its budget of %.6g GB. Plan where "
            "they are (after a backward, gradients are then counted), give it that much less, or train with "
            "planner.enable, which plans both kinds of steps",
            len(there),
            type(self.model).__name__,
            there[0],
            adding_bytes / 1e9,
            100 * (adding_bytes / plan.budget_bytes - 1),
            plan.budget_bytes / 1e9,
        )

    @property
    def unforeseen(self) -> Lifetimes | None:
        """Of the outputs, as its loop showed them, where a plan for that is wanted; ``None``: none is.

        A step whose backwards came for other outputs than were planned for goes on as planned for those.
        """
        if self.outputs is None or self.sets.now is not self.step:
            return None
        return self.outputs.wanted(self.step)

    def _plan_again(self, outputs: HeldOutputs, again: PlanAgain, lifetimes: Lifetimes) -> None:
        """From this call on by a plan for the outputs that the loop was seen to hold and let go of."""
        try:
            with modes_set_aside():  # a meter that watches training is not to count this
                self.step = again(lifetimes)
            self.sets = OutputSets(self.model, self.step)
        except InfeasibleBudgetError as error:
            outputs.settle(self.step, type(self.model).__name__, error)

    def check(self, leaves: list[Any], in_spec: Any) -> dict[str, torch.Tensor]:
        """The model's tensors by name; ``StalePlanError`` if it or the arguments are not as planned."""
        self.guard.check_inputs(leaves, in_spec, sized=self.step.variants is None)
        self.guard.check_modules()
        return self.guard.tensors()

    def _start(
        self, step: ExecutableStep, given: dict[Argument, Any], leaves: list[Any], in_spec: Any
    ) -> Start | None:
        """What the forward could be run again from; ``None`` where there is but one set of outputs."""
        if sum(leaf.requires_grad for leaf in step.template.leaves) < 2:
            return None
        return Start(step, given, leaves, in_spec, hold=not self.sets.arrived)

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
        twin.sets = OutputSets(model, self.step)
        twin.given, twin.outputs, twin.again = self.given, self.outputs, self.again
        twin.before = twin.last_call = None
        twin.turns = []
        return twin

    def __reduce__(self) -> Any:
        raise PlannerError(
            "a planned model cannot be pickled (generated code and autograd nodes do not travel); save "
            "model.state_dict() and plan.save(path), or call plan.restore(model) first"
        )


def run_step(
    step: ExecutableStep, given: dict[Argument, Any], pending: Callable[..., PendingCall]
) -> tuple[list[torch.Tensor], PendingCall]:
    """Run the forward of ``step`` and put its nodes behind the outputs; those, flat, and what waits for them.

    ``given``    the program's arguments; its own constants are added.
    ``pending``  makes what waits, of ``step``, ``given`` and the results.
    """
    program = step.program
    refuse_capture(step)
    given.update((Argument("constant", name), tensor) for name, tensor in program.constants.items())
    boxed = [given[a] for a in program.arguments]
    with torch.no_grad(), without_autocast(step.device), memory_explained(step, "forward"):
        results = program.forward.forward(boxed)
        for i in program.alone:  # a view that a node of autograd hands out could not be written into
            if results[i]._is_view():
                results[i] = results[i].data
    flat = list(results[: program.outputs])
    call = pending(step, given, results)
    if call.start is not None:
        call.start.ran(given)
    del results
    if any(step.apart.casts):
        call.share(shared_casts(step.device), given)
    token = None
    for index in reversed(range(len(program.segments))):
        token = SegmentNode.apply(call, index, token, *call.leaves_of(index, given))
    assert token is not None
    for position, tensor in call.gates.through(token).items():
        flat[position] = tensor
    return flat, call


def planned_forward_of(model: nn.Module) -> PlannedForward | None:
    """The plan's stand-in on ``model``, if one is applied."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, PlannedForward) else None
