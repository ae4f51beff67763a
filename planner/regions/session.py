"""Runs a model's forward in regions, and sees what a step does.

Dynamo cuts the forward (:func:`planner._compat.cut_by_dynamo`); each of its graphs is a :class:`Region`,
whose calls come by here.  A call runs by the schedule that is planned for its place in the step; one that has
no place yet by a schedule of its own that saves next to nothing
(:func:`planner.regions.region.recomputing_all`).

Before there is a plan a step is *looked at*: which outputs get gradients, whether a backward is
differentiated itself.  The next one is *recorded* (:class:`planner.regions.recorder.Recorder`), by what was
learned.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from planner import _compat
from planner.capture.module import original_forward
from planner.costs.target import Target
from planner.errors import PlannerError
from planner.measure.step import device_of, tensors_in
from planner.regions import record
from planner.regions.recorder import Recorder
from planner.regions.region import Region, Variant
from planner.rewrite.program import Argument
from planner.runtime.autograd import PendingCall, pass_of
from planner.runtime.forward import run_step
from planner.runtime.output_sets import OutputSets, Start

__all__ = ["Place", "Session"]

log = logging.getLogger(__name__)

Stage = Literal["look", "record", "plan"]

# What each call of a recorded step is to run: steps in its own graph, and how many are the forward's.
Parts: TypeAlias = Sequence[tuple[Sequence[int], int]]

MOST_PLANS = 16  # kinds of steps for which one is kept


@dataclass(frozen=True, eq=False)
class Place:
    """What one call of a step is planned to run.

    ``key``   the signature that the region is called with.
    ``used``  its outputs that get gradients, ``None``: all that can; where none does, eager runs it.
    """

    region: Region
    key: Any
    used: frozenset[int] | None
    steps: tuple[int, ...] = ()
    turn: int = 0

    def is_of(self, region: Region, key: Any) -> bool:
        """Whether it is for such a call."""
        return self.region is region and self.key == key


@dataclass(eq=False)
class _Seen:
    """What one call of a region gave and took.

    ``variant``  that ran; ``None`` where eager did.
    ``present``  the outputs that got gradients; ``None`` before its backward.
    """

    region: Region
    variant: Variant | None
    key: Any
    used: frozenset[int] | None
    base: str = ""
    args: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    turn: int = 0
    present: frozenset[int] | None = None
    crossings: dict[tuple[str, str | int], int] = field(default_factory=dict)
    gives: dict[tuple[str, str | int], int] = field(default_factory=dict)


class Pending(PendingCall):
    """One call of a region, and what its backward still needs.

    ``args``  what the region was given, in a step that is looked at: a backward that is itself differentiated
              runs the region again from it, as eager runs it, and from then on it always does.
    """

    def __init__(
        self,
        *given: Any,
        session: Session,
        number: int,
        region: Region,
        args: Sequence[Any] | None,
        **more: Any,
    ) -> None:
        super().__init__(*given, **more)
        self.session, self.number, self.region, self.args = session, number, region, args
        self.before = given[1] if args is not None else {}

    def differentiated_twice(self) -> None:
        """Allowed in a step that is looked at."""
        if self.args is None:
            super().differentiated_twice()

    def begin(self, tangents: tuple[Any, ...]) -> None:
        """The first of its nodes runs."""
        self.session.backward_begins(self, tangents)
        if torch.is_grad_enabled():
            self._as_eager(tangents)
        else:
            super().begin(tangents)

    def run(
        self, index: int, held: Callable[[], tuple[torch.Tensor, ...]], tangents: tuple[Any, ...]
    ) -> list[Any]:
        """One of its nodes."""
        gradients = super().run(index, held, tangents)
        self.session.gave(self, index, gradients)
        return gradients

    def _as_eager(self, tangents: tuple[Any, ...]) -> None:
        assert self.args is not None
        self.region.is_eager = True
        present = frozenset(i for i, t in zip(self.tracked, tangents, strict=True) if t is not None)
        names = [name for of in self.names for name in of]
        given = self.before
        leaves = [given[Argument("parameter" if isinstance(n, str) else "input", n)] for n in names]
        buffers = [(t, t.clone()) for a, t in given.items() if a.kind == "buffer"]
        with torch.enable_grad():
            made = tensors_in(self.region.plain.forward(*self.args))
            roots = [made[i] for i in sorted(present)]
            seeds = [t for t in tangents if t is not None]
            unique = list({id(t): t for t in leaves}.values())
            found = torch.autograd.grad(roots, unique, seeds, create_graph=True, allow_unused=True)
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)
        by_leaf = dict(zip(map(id, unique), found, strict=True))
        gradients = {name: by_leaf.pop(id(leaf), None) for name, leaf in zip(names, leaves, strict=True)}
        self.now = pass_of(present, gradients)


class Session:
    """A model whose forward runs in regions.

    ``stage``  what is done with the step that runs.
    ``plans``  for each kind of step what its calls run, the last one made first.
    """

    def __init__(self, model: nn.Module, target: Target, budget_bytes: int) -> None:
        self.model, self.target, self.budget_bytes = model, target, budget_bytes
        self.device = device_of(model, None, None)
        self.stage: Stage = "look"
        self.regions: list[Region] = []
        self.plans: list[tuple[Place, ...]] = []
        self._open: list[tuple[Place, ...]] = []  # those that the step that runs may still be of
        self.strayed = False  # from what is planned
        self.recorder: Recorder | None = None
        self.calls: list[_Seen] = []
        self._used: dict[int, tuple[Region, frozenset[int]]] = {}
        self._pending: list[weakref.ref[Pending]] = []
        self._last: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._homes: dict[int, str] = {}
        self._was_eager: frozenset[int] = frozenset()
        self._thread = 0
        self._keys: tuple[int, int] | None = (
            None  # the dispatcher's, where a recorder is on in a training loop
        )
        self._know()
        self._before = len(_compat.dynamo_breaks())
        self.original = original_forward(model)
        self._compiled = _compat.cut_by_dynamo(self.original, self._cut)

    def _know(self) -> None:
        model = self.model
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(t): n for n, t in tensors}
        self._homes = {id(m): n for n, m in model.named_modules()}

    def _cut(self, graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        region = Region(len(self.regions), graph, self._homes)
        self.regions.append(region)
        return functools.partial(self.run, region)

    # -- a step ------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the backward of a call is still to come."""
        return any((call := ref()) is not None and call.waits for ref in self._pending)

    def begin(self, stage: Stage) -> None:
        """A step begins."""
        self._open = list(self.plans)
        self.stage = stage
        self.calls, self._pending, self.recorder = [], [], None
        self._know()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in regions."""
        with _compat.dynamo_as_eager():
            return self._compiled(*args, **kwargs)

    @property
    def breaks(self) -> list[tuple[str, str]]:
        """Where (file:line) and why the forward was cut, each once."""
        return list(dict.fromkeys(_compat.dynamo_breaks()[self._before :]))

    @property
    def eager(self) -> frozenset[int]:
        """Numbers of the regions that run as eager runs them."""
        return frozenset(region.number for region in self.regions if region.is_eager)

    def run(self, region: Region, *args: Any) -> Any:
        """A region is called."""
        if region.is_eager or not torch.is_grad_enabled() or not any(map(_tracked, args)):
            return region.plain.forward(*args)
        number, key = len(self.calls), region.signature(args)
        place = self._place(number, region, key)
        used = None if place is None else place.used
        if self.stage == "record" and number in self._used and self._used[number][0] is region:
            used = self._used[number][1]
        if used is not None and not used:  # no gradient ever comes
            self.calls.append(_Seen(region, None, key, used))
            return region.plain.forward(*args)
        with _compat.modes_set_aside():
            variant = region.variant(key, args, self._names, self.target, used)
            if variant.captured is None:
                self.calls.append(_Seen(region, None, key, frozenset()))
                return region.plain.forward(*args)
            steps, turn = (place.steps, place.turn) if place is not None else variant.lightest
            step = variant.program(steps, turn, self.budget_bytes)
        base = region.slots(args, self._names)[1] if self.recorder is not None else ""
        seen = _Seen(region, variant, key, used, base, {}, tuple(steps), turn)
        self.calls.append(seen)
        given = variant.given(args)
        if self.recorder is not None:
            self._takes(self.recorder, seen, given, number)
        piece = variant.captured.model
        leaves = piece.arguments(args)  # type: ignore[operator]
        several = sum(leaf.requires_grad for leaf in step.template.leaves) > 1
        in_spec = variant.captured.joint.in_spec
        start = Start(step, given, leaves, in_spec, hold=self.stage == "look") if several else None
        pending = functools.partial(
            Pending,
            sets=OutputSets(piece, step),
            start=start,
            session=self,
            number=number,
            region=region,
            args=args if self.stage == "look" else None,
        )
        flat, call = run_step(step, given, pending)
        if self._keys is not None and not self._pending:
            weakref.finalize(call, self.settle).atexit = False
        self._pending.append(weakref.ref(call))  # type: ignore[arg-type]
        if self.recorder is not None:
            for i, tensor in enumerate(flat):
                self._note(self.recorder, seen.gives, ("output", i), tensor)
            self.recorder.leave()
        return step.template.rebuild(flat)

    def _place(self, number: int, region: Region, key: Any) -> Place | None:
        """What is planned for the call, by the first plan whose calls are those of this step so far."""
        if self.stage != "plan":
            return None
        self._open = [p for p in self._open if number < len(p) and p[number].is_of(region, key)]
        if not self._open:
            self.strayed = True
            return None
        return self._open[0][number]

    def _takes(self, recorder: Recorder, seen: _Seen, given: dict[Argument, Any], number: int) -> None:
        for argument, value in given.items():
            if argument.kind == "input":
                self._note(recorder, seen.crossings, (argument.kind, argument.key), value)
            elif argument.kind in ("parameter", "buffer"):
                seen.args[str(argument.key)] = self._names.get(id(value), str(argument.key))
        recorder.enter("forward", number)

    @staticmethod
    def _note(recorder: Recorder, into: dict[tuple[str, str | int], int], key: Any, tensor: Any) -> None:
        number = recorder.number_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if number is not None:
            into[key] = number

    def backward_begins(self, call: Pending, tangents: tuple[Any, ...]) -> None:
        """The first node of a call runs, for these gradients of its outputs."""
        seen = self.calls[call.number]
        present = frozenset(i for i, t in zip(call.tracked, tangents, strict=True) if t is not None)
        seen.present = present if seen.present is None else seen.present | present
        if self.recorder is not None:
            for i, tangent in zip(call.tracked, tangents, strict=True):
                self._note(self.recorder, seen.crossings, ("tangent", i), tangent)
            self.recorder.enter("backward", call.number)

    def gave(self, call: Pending, index: int, gradients: list[Any]) -> None:
        """A node of a call has run."""
        recorder = self.recorder
        if recorder is None:
            return
        seen = self.calls[call.number]
        for name, gradient in zip(call.names[index], gradients, strict=True):
            if isinstance(name, int):
                self._note(recorder, seen.gives, ("gradient", name), gradient)
        if index == len(call.names) - 1:
            recorder.leave()
            if not self.waits:
                _compat.after_backward(recorder.finish)

    # -- from step to step -------------------------------------------------------------------------

    @property
    def is_recorded(self) -> bool:
        """Whether the last step was recorded to its end."""
        return self.stage == "record" and self.recorder is not None and self._is_differentiated

    @property
    def _is_differentiated(self) -> bool:
        return any(seen.present is not None for seen in self.calls)

    @property
    def is_counted(self) -> bool:
        """Whether the last step ran as planned, and was counted to its end."""
        return (
            self.stage == "plan"
            and self.recorder is not None
            and not self.strayed
            and self._is_differentiated
        )

    @property
    def counted_bytes(self) -> int:
        """What the last step took."""
        recorder = self.recorder
        assert recorder is not None
        return recorder.live_bytes - recorder.made_bytes + max(e.peak_bytes for e in recorder.events)

    def next_stage(self) -> Stage:
        """What is done with the next step."""
        if self.stage == "look" and self._is_differentiated:
            again = self.eager != self._was_eager
            self._was_eager = self.eager
            self.learned()
            return "look" if again else "record"
        if (self.stage == "plan" and self.strayed) or not self.plans:
            return "look"
        return "plan"

    def watch(self, there: Iterable[torch.Tensor], *, must: bool = True) -> None:
        """Record the step that begins, which finds ``there``, until its backward is through.

        Raises ``PlannerError`` under another mode, if it ``must``.
        """
        if _compat.watching_modes():
            if not must:
                return
            raise PlannerError(
                "a step in regions is recorded by a mode of torch's, and another is active here: let the "
                "first training steps run without it"
            )
        recorder = Recorder(self.device)
        recorder.register(*there)
        recorder.__enter__()
        self.recorder, self._thread = recorder, threading.get_ident()
        self._keys = _compat.dispatch_state()

    def settle(self) -> None:
        """Take a recorder off that has seen its step."""
        recorder = self.recorder
        if recorder is None or self._keys is None or threading.get_ident() != self._thread:
            return
        if not _compat.is_top_mode(recorder) or _compat.dispatch_state() != self._keys:
            return
        self._keys = None
        recorder.finish()
        recorder.__exit__(None, None, None)

    def follow(self, parts: Parts) -> None:
        """Plan for steps such as the recorded one: of each call its own steps, and how many are the
        forward's.
        """
        rest = iter(parts)
        places = []
        for seen in self.calls:
            steps, turn = ((), 0) if seen.variant is None else next(rest)
            places.append(Place(seen.region, seen.key, seen.used, tuple(steps), turn))
        self.plans = [tuple(places), *self.plans][:MOST_PLANS]
        self.stage, self.recorder, self.strayed = "plan", None, False

    # -- what was seen -----------------------------------------------------------------------------

    def learned(self) -> None:
        """A step that was looked at is over."""
        self._used = {}
        for number, seen in enumerate(self.calls):
            if seen.variant is None or seen.variant.captured is None:
                continue
            template = seen.variant.captured.joint.template
            able = frozenset(i for i, leaf in enumerate(template.leaves) if leaf.requires_grad)
            if seen.present != able:
                self._used[number] = seen.region, seen.present or frozenset()

    def record(self) -> record.Record:
        """What the recorded step did."""
        recorder = self.recorder
        assert recorder is not None
        ran = [(number, seen) for number, seen in enumerate(self.calls) if seen.variant is not None]
        index = {number: k for k, (number, _) in enumerate(ran)}
        numbers = {n for _, seen in ran for n in (*seen.crossings.values(), *seen.gives.values())}
        order = {n: k for k, n in enumerate(sorted(numbers))}
        lives = recorder.crossings(order)
        calls = []
        for k, (_, seen) in enumerate(ran):
            assert seen.variant is not None and seen.variant.costs is not None
            calls.append(
                record.RegionCall(
                    f"r{k}",
                    seen.variant.graph_at(seen.base),
                    seen.variant.costs,
                    "",
                    seen.args,
                    {key: order[n] for key, n in seen.crossings.items()},
                    {key: order[n] for key, n in seen.gives.items()},
                    seen.steps,
                    seen.turn,
                )
            )
        found = recorder.live_bytes - recorder.made_bytes
        cuts = tuple(f"{where}: {why}" if where else why for where, why in self.breaks)
        events = [e if e.call is None else replace(e, call=index[e.call]) for e in recorder.events]
        return record.Record(tuple(events), tuple(calls), tuple(lives.values()), found, cuts)


def _tracked(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad
