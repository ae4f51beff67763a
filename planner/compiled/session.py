"""The graphs of one compiled model: a step of them is seen, planned as one, and then runs compiled.

A step that is seen runs each graph call by call, in a training loop with little kept, and is recorded as one
in regions is (:mod:`planner.regions.record`): in which order its graphs ran, what passed between them, and
what else was held.
Steps with other graphs than those planned for are seen and planned anew.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from planner import _compat
from planner.alive import instances_of, kinds_of
from planner.compiled.kinds import MOST_CALLS, Kind, Kinds, UnderWay, kind_of
from planner.compiled.piece import Own, Piece
from planner.compiled.sizes import BySize, is_by_size
from planner.costs.target import Target
from planner.errors import PlannerError
from planner.measure.step import held
from planner.ranks.company import Company
from planner.regions import record
from planner.regions.cut.piece import with_homes
from planner.regions.recorder import Recorder
from planner.regions.steps.seen import Step
from planner.regions.watching import Watch

__all__ = ["CompiledSession"]

log = logging.getLogger(__name__)

TRIES = 3  # steps that are seen before it is said that they cannot be planned


@dataclass(eq=False)
class _Call:
    """One call of a graph in the step that is seen."""

    piece: Piece
    number: int
    renamed: dict[str, str] = field(default_factory=dict)
    crossings: dict[tuple[str, str | int], int] = field(default_factory=dict)
    gives: dict[tuple[str, str | int], int] = field(default_factory=dict)
    is_through: bool = False


class CompiledSession:
    """``backend`` is what ``torch.compile`` is given.

    ``model``  whose graphs they are, if that is known.
    ``plan``   makes a plan of a recorded step and gives it to the graphs (:meth:`follow`).

    ``same_bits``  nothing is recomputed but what has the bits again that it had in the forward.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module | None = None,
        plan: Callable[[CompiledSession], None] | None = None,
        *,
        same_bits: bool = False,
    ) -> None:
        self.target, self.model, self.plan, self.same_bits = target, model, plan, same_bits
        if same_bits and not _compat.keeps_products_apart(target.here):
            raise PlannerError(
                f"recompute='same bits' is not for {target.here.type}: a product and a sum are rounded there "
                "as one, or apart, as the loop has it that they are compiled into (on the CPU while "
                "torch._inductor.config.cpp.enable_floating_point_contract_flag is not 'off'). Train there "
                "with recompute='fastest', or in eager, where all bits are the same"
            )
        self.pieces: list[Piece] = []
        self.calls: list[_Call] = []
        self.recorder: Recorder | None = None
        self.parameters: dict[int, nn.Parameter] = {}
        self.watching = Watch(self, target.here)
        self.called = 0  # calls of graphs so far
        self._tries = 0
        self._alive: weakref.ref[Step] | None = None  # dies with the last node of the step that is seen
        self._held: Step | None = None
        self._sharding: Any = None  # of the step that was planned
        self.is_sharded = model is not None and any(map(_compat.is_fully_sharded, model.modules()))
        # of a sharded model's first step what its hooks set up would be counted
        self.kinds = Kinds(0 if self.is_sharded else _compat.recompile_limit())
        self.company: Company | None = None  # of ranks that wait for this one
        if self.is_sharded and model is not None and plan is not None:
            self.company = Company.of(model, target.here)
        self._refused: Exception | None = None  # why there is no plan, while the others are yet to hear
        self._is_unheard = False  # whether the step that is seen has a backward that nothing was seen of
        self.is_closed = False  # whether what is not planned by now is not to be
        self.is_told = False  # whether whoever calls the model says so (:meth:`begins`), outside of its code
        self._told_of: weakref.WeakSet[Any] = weakref.WeakSet()  # compiled code that says when it is called
        self._under_way = UnderWay()

    # -- what torch.compile calls ------------------------------------------------------------------

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A graph that Dynamo cut out."""
        if _compat.is_last_compile():
            log.warning(
                "a piece of code was compiled for the last time: torch.compile gives up on it at %d kinds of "
                "calls (torch._dynamo.config.recompile_limit), and what comes next runs as eager runs it, "
                "outside the plan and its budget. Pad batches to few sizes, or raise the limit",
                _compat.recompile_limit(),
            )
        return BySize(gm, inputs, self._cut) if is_by_size(gm, inputs) else self._cut(gm, inputs)

    def _cut(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        homes = {} if self.model is None else {id(m): n for n, m in self.model.named_modules()}
        piece = Piece(
            len(self.pieces), _compat.as_dynamos(with_homes(gm, homes), gm), inputs, self, self.target,
            same_bits=self.same_bits, seen_low=self.plan is not None,
        )  # fmt: skip
        self.pieces.append(piece)
        if piece.step is None and piece.is_trained:
            self._tell(piece)

        def run(*args: Any) -> Any:
            return self._call(piece, args)

        return run

    def _tell(self, piece: Piece) -> None:
        log.warning(
            "graph %d is compiled as torch compiles it, outside the plan and its budget: %s",
            piece.number,
            piece.why,
        )

    def _call(self, piece: Piece, args: Sequence[Any]) -> Any:
        self.called += 1
        if piece.step is None or not torch.is_grad_enabled():
            return piece.run(args)
        if self.called == 1 and self.model is None:
            self._find_shards(args)
        if self.plan is not None and not self.is_told and piece.planned is None:
            self._be_told(_compat.outermost_compiled())
        recording = self.recorder is not None and self.recorder.counts
        if not recording and self.is_closed and piece.planned is None and not piece.why:
            piece.why = "the plan that is applied is for other sizes, settings or paths"
            self._tell(piece)
        if recording:
            return self._see(piece, args)
        if piece.planned is not None or piece.why:
            outputs = piece.run(args)
        else:
            self.kinds.lacks()
            outputs = piece.see(args, None)
        if self.plan is not None:
            self._under_way.note(outputs)
        return outputs

    # -- seeing ------------------------------------------------------------------------------------

    def begin(self, recorder: Recorder | None) -> None:
        """Forget the last step; the next is recorded."""
        self.calls, self.recorder, self._is_unheard = [], recorder, False
        self._alive = self._held = None

    def _see(self, piece: Piece, args: Sequence[Any]) -> Any:
        recorder = self.recorder
        assert recorder is not None
        call = _Call(piece, len(self.calls))
        self.calls.append(call)
        names = self._names()
        for i, (name, x) in enumerate(zip(piece.given, args, strict=True)):
            if isinstance(x, nn.Parameter):
                call.renamed[name] = names.get(id(x), name)
                self.parameters[id(x)] = x
            elif isinstance(x, torch.Tensor):
                self._note(call.crossings, ("input", i), x)
        recorder.enter("forward", call.number)
        outputs = piece.see(args, call)
        made = (
            [x for x in outputs if isinstance(x, torch.Tensor)]
            if isinstance(outputs, (tuple, list))
            else [outputs]
        )
        for i, x in enumerate(made):
            self._note(call.gives, ("output", i), x)
        self._settle_behind(made)
        del made
        recorder.leave()
        return outputs

    def _settle_behind(self, made: Sequence[Any]) -> None:
        """The autograd nodes of the step's calls hold it: the recorder is taken off when they are gone."""
        holder = None if self._alive is None else self._alive()
        if holder is None:
            holder = Step()
            self._alive = weakref.ref(holder)
            self.watching.settle_with(holder)
        self._held = self._held if _hold(holder, made) else holder  # until the next step begins

    def _names(self) -> dict[int, str]:
        """Of the model's tensors, by identity; of sharded ones what is gathered of them now too."""
        if self.model is None:
            return {}
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {id(t): n for n, t in tensors} | _compat.gathered_names(self.model)

    @property
    def _there(self) -> Iterable[torch.Tensor]:
        """What a step finds."""
        if self.model is None:
            return self.parameters.values()
        return (*self.parameters.values(), *held(self.model, None), *_compat.held_by_shards(self.model))

    def _note(self, into: dict[tuple[str, str | int], int], key: tuple[str, str | int], x: Any) -> None:
        number = None if self.recorder is None else self.recorder.passes(x)
        if number is not None:
            into[key] = number

    def backward_begins(self, seen: _Call, tangents: Sequence[Any]) -> None:
        recorder = self.recorder
        if recorder is None or not recorder.counts:
            return
        self._is_unheard |= not _compat.is_heard(recorder)
        for i, x in enumerate(tangents):
            if isinstance(x, torch.Tensor):
                self._note(seen.crossings, ("tangent", i), x)
        recorder.enter("backward", seen.number)

    def backward_ends(self, seen: _Call, made: Sequence[Any]) -> None:
        recorder = self.recorder
        seen.is_through = True
        if recorder is None or not recorder.counts:
            return
        for i, x in enumerate(made):
            if isinstance(x, torch.Tensor) and seen.piece.given[i] not in seen.renamed:
                self._note(seen.gives, ("gradient", i), x)
        recorder.leave()
        # others may yet have a backward, or none ever (what a discriminator is shown is detached)
        is_over = all(call.is_through for call in self.calls)
        _compat.after_backward(recorder.finish if is_over else recorder.close)

    # -- in a training loop ------------------------------------------------------------------------

    @property
    def seen_bytes(self) -> int:
        """Most that the device held while the step was seen, of what that step touches."""
        recorder = self.recorder
        if recorder is None:
            return 0
        found = recorder.live_bytes - recorder.made_bytes
        return found + max((event.peak_bytes for event in recorder.seen), default=0)

    @property
    def is_called(self) -> bool:
        return False

    @property
    def is_under_way(self) -> bool:
        awaits = self.recorder is not None and self.recorder.counts and not self.calls
        return awaits or not all(call.is_through for call in self.calls)

    def _find_shards(self, args: Sequence[Any]) -> None:
        """What gathers these parameters, if they are of a sharded model (FSDP2), of which nobody told: it is
        the model, and says when a call begins.
        """
        kinds = kinds_of(*_compat.fully_sharded_kinds())
        ids = frozenset(id(x) for x in args if isinstance(x, nn.Parameter))
        root = _compat.root_of_shards(instances_of(kinds), ids) if kinds else None
        if root is not None:
            self.model, self.is_sharded, self.kinds.most = root, True, 0
            self.company = Company.of(root, self.target.here)

    def _be_told(self, code: Any) -> None:
        """Have :meth:`begins` called before the compiled ``code`` that runs now, whenever it is called again.

        What watches a step is entered outside of compiled code: of one that is entered within, the end of
        that code takes the dispatch key along, and what is computed behind it (a loss) is not heard.
        """
        session = weakref.ref(self)
        if code is not None and code not in self._told_of:
            if not (self.is_sharded and self._told_of):  # all ranks are told as often
                _compat.before_compiled_calls(code, functools.partial(_begins, session))
            self._told_of.add(code)
        elif code is None and self.is_sharded and self.model is not None:
            self.is_told = True
            self.model.register_forward_pre_hook(lambda _, args: _begins(session, args, {}), prepend=True)
        elif code is None:
            self._between_steps(None)

    def called_by_us(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call of the model begins, perhaps within compiled code of somebody else's."""
        code = _compat.outermost_compiled()
        if code is None:
            self.begins(args, kwargs)
        elif self.plan is not None and torch.is_grad_enabled():
            self._be_told(code)

    def begins(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call of the model does, or of compiled code.  A step is recorded from there: of a sharded model
        what its hooks gather for the first graph is part of it.
        """
        if self.plan is None or not torch.is_grad_enabled():
            return
        if self.company is not None:
            try:
                self.company.begins()
            except Exception:
                self._refused = None  # all have heard
                raise
        parameters = self.parameters.values() if self.model is None else self.model.parameters()
        self._between_steps(kind_of(args, kwargs, parameters, self.target.here))
        if self.is_sharded:
            self._note_sharding()

    def _note_sharding(self) -> None:
        """What FSDP2 holds follows its settings; a plan is for those of the step that was seen."""
        assert self.model is not None
        now = _compat.sharding_now(_compat.shard_groups(self.model))
        if self.recorder is not None and self.recorder.counts:
            self._sharding = now
        elif self._sharding not in (None, now):
            self._sharding = None
            log.warning(
                "%s runs with other settings of FSDP2 (set_requires_gradient_sync, resharding) than the step "
                "that its compiled graphs were planned by: what it holds more with them is beside the "
                "budget. Let the second step be one that holds most, or plan it in eager, where each kind of "
                "step has a plan", type(self.model).__name__,
            )  # fmt: skip

    def _between_steps(self, kind: Kind) -> None:
        """At a call that begins a step: plan what was seen, or begin to see."""
        recorder = self.recorder
        if recorder is not None and recorder.counts:
            if _compat.current_backward() != -1 or not self._is_over(recorder):
                return
            recorder.finish()
        if recorder is not None:
            self.watching.settle()
            self._plan_seen()
        elif self._refused is not None and self.company is not None:
            self.company.failed(self._refused)
            return
        if self._under_way.is_within() or _compat.current_backward() != -1:
            return
        for number, own in self.kinds.begins(kind).items():
            self.pieces[number].planned = own
        if self.kinds.is_to_see and (recorder is None or not self.is_sharded) and self.watching.may_begin():
            self.begin(self.watching.begin(self._there))
            log.info("a step is seen: it runs call by call, uncompiled, with little kept")

    def _is_over(self, recorder: Recorder) -> bool:
        """Whether the step that is seen is, where a call begins in no backward."""
        if not self.calls:
            return recorder.turned
        return any(call.is_through for call in self.calls) or len(self.calls) >= MOST_CALLS

    def _plan_seen(self) -> None:
        """Plan the step that was seen, if something in it has no plan; what cannot be planned in a few of
        them is compiled as torch would.
        """
        assert self.plan is not None
        known = all(call.piece.planned is not None or call.piece.why for call in self.calls)
        if not self.calls or (known and self.kinds.is_planned):
            self.kinds.seen()
            self.calls, self.recorder = [], None
            return
        try:
            self.plan(self)
        except ValueError as error:
            self._tries += 1
            if self._tries >= TRIES:
                for call in self.calls:
                    if call.piece.planned is None:
                        call.piece.why = str(error)
                log.warning(
                    "the graphs of this step are compiled as torch compiles them, without a plan, and the "
                    "budget does not hold: %d steps were seen, and %s",
                    self._tries, error,
                )  # fmt: skip
                self.kinds.planned({})
                self._tries = 0
        except Exception as error:
            if self.company is None:
                raise
            self._refused = error
            self.company.failed(error)
        self.calls, self.recorder = [], None

    # -- planning ----------------------------------------------------------------------------------

    def record(self) -> record.Record:
        """What the seen step did.  Raises ``ValueError`` for one that was not seen to its end."""
        recorder = self.recorder
        if recorder is None or not recorder.seen or not any(call.is_through for call in self.calls):
            raise ValueError("no backward came through any of its graphs")
        if self._is_unheard:
            raise ValueError(
                "what is held beside the graphs cannot be seen, since the recorder was entered within "
                "compiled code. Compile the model or its blocks with torch.compile, or use planner.enable"
            )
        numbers = {n for c in self.calls for n in (*c.crossings.values(), *c.gives.values())}
        order = {n: k for k, n in enumerate(sorted(numbers))}
        events = record.last_backwards(recorder.seen)
        crossings = [of.until(len(events)) for of in recorder.crossings(order).values()]
        calls = []
        for k, call in enumerate(self.calls):
            step, costs = call.piece.step, call.piece.costs
            assert step is not None and costs is not None
            seen = call.piece.seen_as
            calls.append(
                record.RegionCall(
                    f"r{k}", step.graph, costs, "", call.renamed,
                    {key: order[n] for key, n in call.crossings.items()},
                    {key: order[n] for key, n in call.gives.items()},
                    seen.steps, seen.turn,
                )
            )  # fmt: skip
        gone = recorder.gone_bytes
        found = recorder.live_bytes - recorder.made_bytes - gone
        events = [  # what a graph takes is what its schedule takes, and not what its calls one by one did
            replace(
                e, peak_bytes=e.peak_bytes + gone if e.call is None else 0, live_bytes=e.live_bytes + gone
            )
            for e in events
        ]
        return record.Record(tuple(events), tuple(calls), tuple(crossings), found)

    def follow(self, parts: Sequence[Own]) -> None:
        """Let each graph run as planned.  Raises ``PlannerError`` for one that is called in two ways."""
        wanted: dict[int, Own] = {}
        for call, own in zip(self.calls, parts, strict=True):
            # a graph that is called several times is compiled once: it recomputes what one call of it does
            known = wanted.get(call.piece.number)
            if known is None or len(own.steps) > len(known.steps):
                wanted[call.piece.number] = own
        self.is_closed = self.plan is None
        self.kinds.planned(wanted)
        for number, own in wanted.items():
            self.pieces[number].planned = own
            self.pieces[number].forget(self.kinds.owns(number))


def _hold(holder: Step, made: Sequence[Any]) -> bool:
    """Let the autograd nodes of a graph's outputs hold it, if there are any."""
    nodes = [getattr(x, "grad_fn", None) for x in made]
    ours = [node for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)]
    for node in ours:
        node._planner_step = holder  # type: ignore[attr-defined]
    return bool(ours)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begins(session: weakref.ref[CompiledSession], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A call begins of code whose graphs are compiled."""
    found = session()
    if found is not None:
        found.begins(args, kwargs)
