"""Runs a model's step twice, as if it had not been run: to look at it, and to record it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner._compat import FakeTensor, TorchDispatchMode
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.capture.state.effects import attributes_kept
from planner.errors import PlannerError
from planner.measure.step import backward, device_of, held, passed_on, tangents_for, undone
from planner.regions.recorder import Recorder
from planner.regions.session import Session
from planner.regions.steps.seen import Seen

__all__ = ["NotInRegions", "apart", "observe"]

LOOKS = 4  # steps that may be looked at until one brings nothing new


class NotInRegions(PlannerError):
    """A step that cannot be planned in regions, though a part of the model may be planned."""


def observe(session: Session, inputs: Inputs, loss_fn: LossFn | None) -> None:
    """Record a step of ``session``'s model at ``inputs``; everything is put back.

    Parameters, gradients (required to be None), buffers, the batch, attributes of modules and random states
    are afterwards what they were; what the forward does beyond its module (files, globals, printing) it has
    done.

    Raises ``NotInRegions`` for a model or batch without memory.
    """
    model = session.model
    _refuse_unreal(model, inputs)
    for _ in range(LOOKS):
        eager = session.eager
        session.begin("look")
        with apart(model, inputs):
            backward_of(session, inputs, loss_fn)
        session.ended()
        if session.eager == eager:
            break
    for _ in range(LOOKS):
        session.begin("record")
        session.recorder = recorder = Recorder(device_of(model, inputs, None))
        with apart(model, inputs):
            recorder.register(*held(model, inputs), *_compat.held_by_shards(model))
            try:
                with recorder:
                    backward_of(session, inputs, loss_fn)
            finally:
                recorder.finish()
        if not any(map(_is_news, session.calls)):
            break
        session.ended()  # attributes were set, states are there now: the code has not settled yet


def _is_news(seen: Seen) -> bool:
    """Whether a call was of code that ran for the first time, or gradients came for other outputs of it than
    were planned for.
    """
    planned = seen.able if seen.used is None else seen.used
    return seen.looked or (seen.variant is not None and (seen.present or frozenset()) != planned)


def backward_of(session: Session, inputs: Inputs, loss_fn: LossFn | None) -> None:
    """One step.  ``PlannerError`` for whatever the model's own code raises in it."""
    try:
        outputs = _called(session, inputs)
        if session.stage == "look" and session.leave_spoilt_to_eager():
            return
        passed = passed_on(outputs, loss_fn)
        del outputs
        backward(passed, tangents_for(passed, None))
    except PlannerError:
        raise
    except Exception as error:
        raise PlannerError(
            f"a step of {type(session.model).__name__} raised {type(error).__name__}: {error}"
        ) from error


def _called(session: Session, inputs: Inputs) -> Any:
    """Its forward; of a model that is sharded itself within the hooks that gather its parameters."""
    model = session.model
    if not _compat.is_fully_sharded(model):
        return session.call(*inputs.args, **inputs.kwargs)
    before = vars(model).get("forward")
    vars(model)["forward"] = session.call
    try:
        return model(*inputs.args, **inputs.kwargs)
    finally:
        if before is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = before


@contextlib.contextmanager
def apart(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """What runs of ``model`` meanwhile is as if it had not been; ``PlannerError`` if gradients are held."""
    held_by = (value for module in model.modules() for value in vars(module).values())
    states = [(x, x.get_state()) for x in held_by if isinstance(x, torch.Generator)]
    try:
        with undone(model, inputs), attributes_kept(model), _compat.modes_set_aside(), _WritesUndone(model):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


class _WritesUndone(TorchDispatchMode):
    """Puts back what is written into parameters: each is copied before its first write."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._there = {_compat.storage_key(p): p for p in model.parameters() if p.layout is torch.strided}
        self._was: dict[int, torch.Tensor] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """It only looks on: Dynamo may compile under it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _compat.writes_arguments(func):
            for x in (*args, *(kwargs or {}).values()):
                is_dense = type(x) in (torch.Tensor, nn.Parameter) and x.layout is torch.strided
                key = _compat.storage_key(x) if is_dense else None
                if key in self._there and key not in self._was:
                    self._was[key] = self._there[key].detach().clone()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        with torch.no_grad():
            for key, was in self._was.items():
                if not torch.equal(self._there[key], was):
                    self._there[key].copy_(was)


def without_memory(model: nn.Module, inputs: Iterable[torch.Tensor]) -> str:
    """That ``model`` or the batch has no memory, in words; empty where a step can be run."""
    for where, tensors in (("the model", held(model, None)), ("the batch", inputs)):
        hollow = next((t for t in tensors if t.is_meta or isinstance(t, FakeTensor)), None)
        if hollow is not None:
            return f"{where} has no memory ({'on the meta device' if hollow.is_meta else 'fake tensors'})"
    return ""


def _refuse_unreal(model: nn.Module, inputs: Inputs) -> None:
    hollow = without_memory(model, inputs.tensors())
    if hollow:
        raise NotInRegions(
            f"planning {type(model).__name__} in regions runs a step, for which {hollow}: take real tensors, "
            "for a model by model.to_empty(device=...) and then weights, or plan a part of it that is one "
            "graph"
        )
