"""Runs a model's forward in regions, and sees what a step does.

Dynamo cuts the forward (:func:`planner._compat.cut_by_dynamo`); each of its graphs is a :class:`Region`,
whose calls come by here.  A call runs by the schedule that is planned for its place in the step; one that has
no place yet by a schedule of its own that saves next to nothing
(:func:`planner.regions.cut.region.recomputing_all`).

Before there is a plan a step is *looked at*: which outputs get gradients, whether a backward is
differentiated itself.  The next one is *recorded* (:class:`planner.regions.recorder.Recorder`), by what was
learned.  Plans are for kinds of steps (what comes in, whether gradients are held); within a kind the calls
themselves tell which plan a step is of, and what runs where it is of none
(:mod:`planner.regions.steps.followed`): then the next one of its kind is recorded.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from planner import _compat
from planner.costs.target import Target
from planner.measure.step import device_of, tensors_in
from planner.regions.cut.checkpointed import SMALL_BYTES
from planner.regions.cut.region import Region, Variant
from planner.regions.cut.spread import Locals, gathered
from planner.regions.cut_forward import CutForward
from planner.regions.kept import ANY, Foresight, Kept, Kind, Own, Parts, Place
from planner.regions.pending import Pending
from planner.regions.plans import Plans
from planner.regions.record import Record
from planner.regions.recorder import Recorder, record_of
from planner.regions.steps.came import Came
from planner.regions.steps.followed import Coming, Followed
from planner.regions.steps.seen import Seen, Step, tracked
from planner.regions.steps.within import Within
from planner.regions.watching import Watch
from planner.rewrite.program import Argument
from planner.runtime.forward import run_step
from planner.runtime.output_sets import Start

__all__ = ["NewCode", "Session", "Stage"]

log = logging.getLogger(__name__)

Stage = Literal["look", "record", "plan"]


class NewCode(ValueError):
    """A recorded step ran code that was not seen before."""


class Session(CutForward):
    """A model whose forward runs in regions.

    ``stage``     what is done with the step that runs.
    ``followed``  the plan that this step is of, or has strayed from.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        budget_bytes: int,
        loops: _compat.Loops | None = None,
    ) -> None:
        super().__init__(model, loops)
        self.target, self.budget_bytes = target, budget_bytes
        self.device = device_of(model, None, None)
        self.stage: Stage = "look"
        self._locals = Locals()
        self.kind: Kind = ANY
        self.recorder: Recorder | None = None  # that has seen the step, or sees it
        self.calls: list[Seen] = []
        self.plans = Plans(type(model).__name__)
        self._came = Came()
        self.followed = Followed((), self.calls, self._lightest)
        self._is_looked = False
        self._eager_before: frozenset[int] = frozenset()
        self._step = Step()
        self._pending: list[weakref.ref[Pending]] = []
        self._backwards = self._last_turn = 0  # backwards of calls; and how many when the last call ran
        self._times: Counter[int] = Counter()  # calls of each region in this step
        self._cast_for: set[frozenset[tuple[int, bool]]] = set()  # calls that shared no cast, or are eager
        self._closes = False  # whether the recorder hears when the backward that runs is through
        self._inside = 0  # calls of the model that are running
        self._awaits = False  # whether a step has begun whose first call is still to come
        self._alive: weakref.ref[Step] | None = None  # dies with the last call that may have a backward
        self.watching = Watch(self, self.device)
        self._known: dict[int, str] | None = None

    @property
    def _names(self) -> dict[int, str]:
        """Of the model's tensors, by identity; as they are in this step."""
        if self._known is None:
            tensors = (*self.model.named_parameters(), *self.model.named_buffers())
            self._known = {id(t): n for n, t in tensors} | _compat.gathered_names(self.model)
        return self._known

    @property
    def _is_whole(self) -> bool:
        """Whether one region is all of the forward, as far as is known."""
        return len(self.regions) == 1 and self._came.is_one_turn and not (self.is_torn or self.breaks)

    def with_loops_turned(self) -> Session:
        """The same model cut anew: in its loops too, or, where those are too long, not in them."""
        return Session(self.model, self.target, self.budget_bytes, self.loops.turned())

    # -- a step ------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a backward of the step is still to come: none has begun since its last call."""
        return self._is_held and self._last_turn == self._backwards

    @property
    def _is_held(self) -> bool:
        return self._alive is not None and self._alive() is not None

    @property
    def is_called(self) -> bool:
        """Whether a call of the model runs."""
        return bool(self._inside)

    @property
    def is_under_way(self) -> bool:
        """Whether a call of the step is about to run, runs, or may yet have a backward."""
        return self._awaits or bool(self._inside) or self._is_held

    def begin(self, stage: Stage, kind: Kind = ANY) -> None:
        """A step begins."""
        self.stage, self.kind = stage, kind
        self.calls, self._pending, self.recorder = [], [], None
        self.followed = Followed(self.plans.serving(kind), self.calls, self._lightest)
        self._step, self._times, self._known, self._alive = Step(), Counter(), None, None
        self._closes = False
        self._eager_before = self.eager
        self._awaits = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in regions."""
        self._inside += 1
        try:
            result = self.run_cut(*args, **kwargs)
        finally:
            self._inside -= 1
            self._awaits = False
        if self.recorder is not None and self.recorder.counts:
            self._returned(self.recorder, result)
        return result

    def _returned(self, recorder: Recorder, result: Any) -> None:
        """The forward has.  Where a backward came within it, another follows or none does."""
        recorder.returned()
        if not recorder.seen or self._inside:
            return
        follows = [t for t in tensors_in(result) if t.requires_grad]
        for tensor in follows:
            tensor.register_hook(lambda _: _compat.after_backward(functools.partial(self._through, recorder)))
        if not follows:
            self._through(recorder)

    @property
    def runs(self) -> Kept | None:
        """The plan that the step is of so far."""
        return self.followed.plan if self.stage == "plan" else None

    def cut_anew(self) -> None:
        """A region was met after one was planned as the only one: every plan is dropped."""
        self.plans.forget()

    def run(self, region: Region, *args: Any) -> Any:
        """A region is called."""
        if region.numbers is None:
            return self._run(region, args)
        rest, numbers = region.numbers.split(args)
        return region.numbers.joined(self._run(region, rest), numbers)

    def _run(self, region: Region, args: Sequence[Any]) -> Any:
        if region.is_eager or not torch.is_grad_enabled() or not any(map(tracked, args)):
            self._times[region.number] += bool(torch.is_grad_enabled() and region.casts_of(args))
            return region.plain.forward(*args)
        whole, (args, layouts) = args, self._locals.of(args, self._names)
        number, key = len(self.calls), region.signature(args, layouts)
        self._last_turn = self._backwards
        turn_of = self._times[region.number]
        self._times[region.number] += 1
        if self.stage == "look" or not self._came.is_known(region.number):
            seen = Seen(self._step, number, region, turn_of, None, key, None)
            self.calls.append(seen)
            return self._looked_at(seen, whole)
        with _compat.modes_set_aside():
            used = self._came.outputs(region.number, turn_of) if self._is_looked else None
            variant_for = functools.partial(self._variant, region, key, args)
            coming = Coming(number, region, key, used, variant_for)
            place = self.followed.place(coming) if self.stage == "plan" else None
            used = used if place is None else place.used
            seen = Seen(self._step, number, region, turn_of, None, key, used)
            region.is_alone = self._is_whole
            if used is None or used:
                variant = region.variants.get((key, used)) or variant_for(used)
                seen.variant = None if variant.captured is None else variant
        self.calls.append(seen)
        variant = seen.variant  # type: ignore[assignment]
        if variant is None:
            return self._plain(seen, whole)
        return self._run_planned(seen, variant, place, (whole, args, layouts))

    def _variant(self, region: Region, key: Any, args: Sequence[Any], used: frozenset[int] | None) -> Variant:
        return region.variant(key, args, self._names, self.target, used)

    def _run_planned(
        self, seen: Seen, variant: Variant, place: Place | None, of: tuple[Sequence[Any], Sequence[Any], Any]
    ) -> Any:
        """Run a call by the schedule of its place, or by one that saves next to nothing.

        ``of``  its arguments, those of them that are on this rank, and how these are spread.
        """
        assert variant.captured is not None
        region, used = seen.region, seen.used
        whole, args, layouts = of
        with _compat.modes_set_aside():
            steps, turn = (place.steps, place.turn) if place is not None else self._lightest(variant)
            step = variant.program(steps, turn, self.budget_bytes)
        seen.steps, seen.turn = tuple(steps), turn
        recorder = self.recorder if self.recorder is not None and self.recorder.counts else None
        given = variant.given(args)
        if recorder is not None:
            seen.base = region.slots(args, self._names)[1]
            self._takes(recorder, seen, given)
        piece = variant.captured.model
        seen.able = frozenset(i for i, leaf in enumerate(step.template.leaves) if leaf.requires_grad)
        leaves = piece.arguments(args)  # type: ignore[operator]
        several = sum(leaf.requires_grad for leaf in step.template.leaves) > 1
        in_spec = variant.captured.joint.in_spec
        hold, inputs = used is not None, variant.inputs
        start = Start(step, given, leaves, in_spec, hold=hold, inputs=inputs) if several else None
        pending = functools.partial(
            Pending,
            sets=variant.sets_of(steps, step),
            start=start,
            session=self,
            seen=seen,
            holder=self._holder(),
            region=region,
            turn=self._backwards,
            kept=None if recorder is None else recorder.kept,
            spread=variant.spread_leaves(whole, layouts) if layouts else {},
        )
        flat, call = run_step(step, given, pending)
        self._pending.append(weakref.ref(call))  # type: ignore[arg-type]
        if recorder is not None:
            for i, tensor in enumerate(flat):
                self._note(recorder, seen.gives, ("output", i), tensor)
            recorder.leave()
        spreads: Any = piece.spreads
        if spreads.outputs:
            flat = gathered(flat, spreads, region)
        return step.template.rebuild(flat)

    def _lightest(self, variant: Variant) -> Own:
        """What saves next to nothing."""
        return variant.lightest(self._room, max(self.plans.longest(self.kind), len(self.calls)))

    @property
    def _room(self) -> int | None:
        """Bytes that a region may take by itself; ``None`` where no budget is known."""
        if not self.budget_bytes:
            return None
        held = (*_compat.sharded_parameters(self.model), *self.model.buffers())
        there = {id(t): t for x in held for t in _compat.dense_parts(x)}
        return self.budget_bytes - sum(t.nbytes for t in there.values())

    def _holder(self) -> Step:
        """What the calls of this step hold: a recorder is taken off when they are gone."""
        holder = None if self._alive is None else self._alive()
        if holder is None:
            holder = Step()
            self._alive = weakref.ref(holder)
            self.watching.settle_with(holder)
        return holder

    def _looked_at(self, seen: Seen, args: Sequence[Any]) -> Any:
        """As eager runs it, which may be differentiated twice, with nothing held but the arguments."""
        seen.looked = True
        tensors = (x for x in args if tracked(x))
        seen.read = [(weakref.ref(x), x._version) for x in tensors]
        if self.stage == "plan":
            self.followed.strayed = True
        region, is_first = seen.region, self.stage == "look"
        region.casts_of(args)
        outputs = region.checkpointed(
            args, note=is_first, spoilt=region.spoilt, budget_bytes=self.budget_bytes
        )
        seen.lend(args, outputs)
        return self._watched(seen, outputs, args)

    def _note_casts(self) -> None:
        """Autocast casts a weight once for all that read it, and their gradients are added before they are
        cast back: calls of a step that share one run as eager runs them.
        """
        called = frozenset((number, times > 1) for number, times in self._times.items())
        if called in self._cast_for:
            return
        self._cast_for.add(called)
        ran = [(self.regions[number], again) for number, again in called]
        reads = Counter(x for region, again in ran for x in (*(region.casts or ()),) * (1 + again))
        for region, _ in ran:
            if any(reads[x] > 1 for x in region.casts or ()):
                region.is_eager = True
                region.why = region.why or "a weight that autocast casts once for this and another region"

    def _watched(self, seen: Seen, outputs: Any, args: Sequence[Any]) -> Any:
        """Learn which of these outputs of a call that runs as eager runs it get gradients."""
        made = tensors_in(outputs)
        seen.able = frozenset(i for i, t in enumerate(made) if t.grad_fn is not None)
        holder = self._holder() if seen.able else None
        within = Within(made, seen.able & seen.region.read_within, [x for x in args if tracked(x)])
        for i in seen.able:
            node: Any = made[i].grad_fn
            came = functools.partial(self._came_for, holder, within, seen, i, made[i].output_nr)
            node.register_prehook(came)
        return outputs

    def _plain(self, seen: Seen, args: Sequence[Any]) -> Any:
        """As eager runs it; a gradient that comes nevertheless is learned of."""
        outputs = seen.region.plain.forward(*args)
        return outputs if seen.used is None else self._watched(seen, outputs, args)

    def _came_for(self, _: Any, within: Within, seen: Seen, output: int, place: int, gradients: Any) -> None:
        self._backwards += 1
        seen.note_writes()
        seen.lent = []
        recorder = self._recorder_of(seen)
        if recorder is not None and not self._closes:
            self._closes = True
            _compat.after_backward(functools.partial(self._through, recorder))
        if gradients[place] is None or within.is_all(output, gradients[place]):
            return
        seen.region.is_eager |= torch.is_grad_enabled()
        seen.region.note_tangent(output, gradients[place])
        seen.present = (seen.present or frozenset()) | {output}
        if seen.step is not self._step:
            self._learn(seen)

    def _takes(self, recorder: Recorder, seen: Seen, given: dict[Argument, Any]) -> None:
        for argument, value in given.items():
            if argument.kind == "input":
                self._note(recorder, seen.crossings, (argument.kind, argument.key), value)
            elif argument.kind in ("parameter", "buffer"):
                seen.args[str(argument.key)] = self._names.get(id(value), str(argument.key))
        recorder.enter("forward", seen.number)

    @staticmethod
    def _note(recorder: Recorder, into: dict[tuple[str, str | int], int], key: Any, tensor: Any) -> None:
        number = recorder.passes(tensor) if isinstance(tensor, torch.Tensor) else None
        if number is not None:
            into[key] = number

    def _recorder_of(self, seen: Seen) -> Recorder | None:
        """Where it is noted what the backward of a call does."""
        recorder = self.recorder
        return recorder if seen.step is self._step and recorder is not None and recorder.counts else None

    def backward_begins(self, call: Pending, tangents: tuple[Any, ...]) -> None:
        """The first node of a call runs, for these gradients of its outputs."""
        seen: Seen = call.seen
        present = frozenset(i for i, t in zip(call.tracked, tangents, strict=True) if t is not None)
        seen.present = present if seen.present is None else seen.present | present
        self._backwards += 1
        if seen.step is not self._step:
            self._learn(seen)
        recorder = self._recorder_of(seen)
        if recorder is not None:
            for i, tangent in zip(call.tracked, tangents, strict=True):
                self._note(recorder, seen.crossings, ("tangent", i), tangent)
            recorder.enter("backward", seen.number)

    def gave(self, call: Pending, index: int, gradients: list[Any]) -> None:
        """A node of a call has run."""
        seen: Seen = call.seen
        recorder = self._recorder_of(seen)
        if recorder is None:
            return
        for name, gradient in zip(call.names[index], gradients, strict=True):
            self._note(recorder, seen.gives, ("gradient", name), gradient)
        if index == len(call.names) - 1:
            recorder.leave()
            if not any((other := ref()) is not None and not other.began for ref in self._pending):
                _compat.after_backward(functools.partial(self._through, recorder))

    def _through(self, recorder: Recorder) -> None:
        """A backward is through, and no call waits for its first one."""
        self._closes = False
        if self._inside or any((call := ref()) is not None and call.waits for ref in self._pending):
            recorder.close()  # another may follow through what is kept
        else:
            recorder.finish()

    # -- from step to step -------------------------------------------------------------------------

    @property
    def is_differentiated(self) -> bool:
        """Whether a backward came through the last step."""
        return any(seen.present is not None for seen in self.calls)

    @property
    def is_late(self) -> bool:
        """Whether none did, where one could."""
        return any(seen.able for seen in self.calls) and not self.is_differentiated

    def leave_spoilt_to_eager(self) -> bool:
        """Whether the forward that was looked at wrote over what a region had read, which no region keeps:
        those run as eager runs them from here on.
        """
        found = False
        for seen in self.calls:
            if seen.looked and not seen.region.is_eager:
                found |= seen.region.checkpointed.mend_if_spoilt()
            now = ((ref(), version) for ref, version in seen.read)
            if any(x is not None and x._version != version for x, version in now):
                seen.region.is_eager = found = True
                seen.region.why = seen.region.why or "code behind it writes over what it reads"
            found |= any(x.nbytes > SMALL_BYTES for x in seen.note_writes())
            seen.read = []
        return found

    @property
    def is_recorded(self) -> bool:
        """Whether the last step was recorded to its end, and is as those that were looked at."""
        return self.stage == "record" and self.recorder is not None and self.is_differentiated

    @property
    def is_counted(self) -> bool:
        """Whether the last step ran as planned, and was counted to its end."""
        return self.stage == "plan" and self.runs is not None and self.is_seen

    @property
    def is_seen(self) -> bool:
        """Whether all of the last step was counted."""
        return self.recorder is not None and bool(self.recorder.seen) and self.is_differentiated

    @property
    def counted_bytes(self) -> int:
        """What the last step took."""
        recorder = self.recorder
        assert recorder is not None
        return recorder.live_bytes - recorder.made_bytes + max(e.peak_bytes for e in recorder.seen)

    def ended(self) -> None:
        """The last step is over: what it showed is kept."""
        self._note_casts()
        if self.stage == "look" and self.is_all_eager:
            self._is_looked = True
        if not self.is_differentiated:
            return
        self.learned()
        self.plans.ran(self.kind, self.trained)
        if self.stage == "look":
            self._is_looked = self.eager == self._eager_before
        elif self.stage == "plan":
            self._note_plan()

    def _note_plan(self) -> None:
        of, exact = self.runs, self.followed.exact
        self.plans.served(self.kind, exact if of is None else [*exact, of])
        if of is None or not exact:
            sizes = self.followed.larger_sizes()
            if sizes is not None:
                self.plans.outgrew(self.kind, sizes)
            self.plans.want(self.kind, self.trained)

    @property
    def trained(self) -> int:
        """How many calls of the step, of regions that can be planned, got gradients."""
        return sum(bool(seen.present) and not seen.region.is_eager for seen in self.calls)

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan for just these calls."""
        return self.plans.are_for(self.kind, [(seen.region, seen.key, seen.used) for seen in self.calls])

    def next_stage(self, kind: Kind = ANY) -> Stage:
        """What is done with the next step, one of ``kind``."""
        if not self._is_looked and not self.plans:
            return "look"
        if self.is_all_eager:
            return "plan"  # nothing is
        return "record" if self.plans.wants(kind) else "plan"

    @property
    def unwatched_stage(self) -> Stage:
        """What is done with a step that should be recorded, and cannot be: what no plan is for runs with next
        to nothing saved.
        """
        return "plan" if self._is_looked else "look"

    def watch(self, there: Iterable[torch.Tensor]) -> None:
        """Record the step that begins, which finds ``there``, until its backward is through."""
        self.recorder = self.watching.begin(there)

    def follow(self, parts: Parts, of: Any = None, foresight: Foresight | None = None) -> None:
        """Plan for steps such as the recorded one: of each call its own steps, and how many are the
        forward's.
        """
        rest = iter(parts)
        bounds = iter(() if foresight is None else foresight.bounds)
        places = []
        for seen in self.calls:
            if seen.variant is None:
                places.append(Place(seen.region, seen.key, seen.used))
                continue
            steps, turn = next(rest)
            if seen.present is None:  # it has no backward to be planned; if one comes, there is one
                steps, turn = seen.variant.lightest()
            bound = next(bounds, None)
            places.append(Place(seen.region, seen.key, seen.used, seen.variant, tuple(steps), turn, bound))
        self.plans.add(self.kind, Kept(tuple(places), of, self.trained, foresight=foresight))
        self.recorder = None

    # -- what was seen -----------------------------------------------------------------------------

    def learned(self) -> None:
        """A step is over, through which a backward came."""
        for seen in self.calls:
            self._learn(seen)

    def _learn(self, seen: Seen) -> None:
        if seen.variant is None and seen.used is None and not seen.looked:
            return
        if self._came.learn(seen):
            self.plans.want(self.kind, self.trained)

    def record(self) -> Record:
        """What the recorded step did.

        Raises ``ValueError`` for one that was interrupted, or is no step that can be planned.
        """
        recorder = self.recorder
        assert recorder is not None
        self.plans.tried(self.kind)
        if any(seen.looked for seen in self.calls):
            raise NewCode(
                "each of its steps runs code that was not seen before: for a number in it that changes with "
                "every step, say, or the order of several sizes (TORCH_LOGS=recompiles tells which)"
            )
        if not recorder.seen or self.eager != self._eager_before:
            raise ValueError("its step was not seen to its end")
        cuts = tuple(f"{where}: {why}" if where else why for where, why in self.breaks) + self.left_to_eager
        return record_of(recorder, self.calls, cuts)
