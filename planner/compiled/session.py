"""The graphs of one compiled model: a step of them is seen, planned as one, and then runs compiled.

A step that is seen runs each graph call by call, in a training loop with little kept, and is recorded as one
in regions is (:mod:`planner.regions.record`): in which order its graphs ran, what passed between them, and
what else was held.
Steps with other graphs than those planned for are seen and planned anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from planner import _compat
from planner.compiled.piece import Hears, Own, Piece
from planner.costs.target import Target
from planner.errors import PlannerError
from planner.regions import record
from planner.regions.cut.piece import with_homes
from planner.regions.recorder import Recorder
from planner.regions.watching import Watch

__all__ = ["CompiledSession"]

log = logging.getLogger(__name__)

MOST_CALLS = 256  # of graphs in a step that is seen: there is no end to one that has no backward
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


class CompiledSession(Hears):
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
        if model is not None and any(map(_compat.is_fully_sharded, model.modules())):
            raise PlannerError(
                f"{type(model).__name__} is sharded (FSDP2), and plans under inductor do not count what its "
                "hooks gather: plan it in eager, planner.enable(model, budget_gb) without backend='inductor' "
                "counts them, or compile it unsharded"
            )
        self.pieces: list[Piece] = []
        self.calls: list[_Call] = []
        self.recorder: Recorder | None = None
        self.parameters: dict[int, nn.Parameter] = {}
        self.watching = Watch(self, target.here)
        self.called = 0  # calls of graphs so far
        self._tries = 0
        self.is_closed = False  # whether what is not planned by now is not to be
        self._names = {} if model is None else {
            id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())
        }  # fmt: skip

    # -- what torch.compile calls ------------------------------------------------------------------

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A graph that Dynamo cut out."""
        homes = {} if self.model is None else {id(m): n for n, m in self.model.named_modules()}
        piece = Piece(
            len(self.pieces), with_homes(gm, homes), inputs, self, self.target,
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
        if self.plan is not None:
            self._between_steps()
        recording = self.recorder is not None and self.recorder.counts
        if not recording and self.is_closed and piece.planned is None and not piece.why:
            piece.why = "the plan that is applied is for other sizes, settings or paths"
            self._tell(piece)
        if not recording and (piece.planned is not None or piece.why):
            return piece.run(args)
        return self._see(piece, args)

    # -- seeing ------------------------------------------------------------------------------------

    def begin(self, recorder: Recorder | None) -> None:
        """Forget the last step; the next is recorded."""
        self.calls, self.recorder = [], recorder

    def _see(self, piece: Piece, args: Sequence[Any]) -> Any:
        call = _Call(piece, len(self.calls))
        recorder = self.recorder
        if recorder is None or not recorder.counts:
            return piece.see(args, None)
        self.calls.append(call)
        for i, (name, x) in enumerate(zip(piece.given, args, strict=True)):
            if isinstance(x, nn.Parameter):
                call.renamed[name] = self._names.get(id(x), name)
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
        del made
        recorder.leave()
        return outputs

    def _note(self, into: dict[tuple[str, str | int], int], key: tuple[str, str | int], x: Any) -> None:
        number = None if self.recorder is None else self.recorder.number_of(x)
        if number is not None:
            into[key] = number

    def backward_begins(self, seen: _Call, tangents: Sequence[Any]) -> None:
        recorder = self.recorder
        if recorder is None or not recorder.counts:
            return
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
        if all(call.is_through for call in self.calls):
            _compat.after_backward(recorder.finish)

    # -- in a training loop ------------------------------------------------------------------------

    @property
    def is_called(self) -> bool:
        return False

    @property
    def is_under_way(self) -> bool:
        return bool(self.calls) and not all(call.is_through for call in self.calls)

    def _between_steps(self) -> None:
        """At a call that begins a step: plan what was seen, or begin to see."""
        recorder = self.recorder
        if recorder is not None and recorder.counts:
            is_over = any(call.is_through for call in self.calls) and _compat.current_backward() == -1
            if not is_over and len(self.calls) < MOST_CALLS:
                return
            recorder.finish()
        if recorder is not None:
            self.watching.settle()
            self._plan_seen(recorder)
            return
        if any(p.step is not None and p.planned is None and not p.why for p in self.pieces):
            if not self.watching.may_begin():
                return
            self.begin(self.watching.begin(self.parameters.values()))
            log.info("a step is seen: it runs call by call, uncompiled, with little kept")

    def _plan_seen(self, recorder: Recorder) -> None:
        """Plan the step that was seen; what cannot be planned in a few of them is compiled as torch would."""
        assert self.plan is not None
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
        self.calls, self.recorder = [], None

    # -- planning ----------------------------------------------------------------------------------

    def record(self) -> record.Record:
        """What the seen step did.  Raises ``ValueError`` for one that was not seen to its end."""
        recorder = self.recorder
        if recorder is None or not recorder.seen or not any(call.is_through for call in self.calls):
            raise ValueError("no backward came through any of its graphs")
        numbers = {n for c in self.calls for n in (*c.crossings.values(), *c.gives.values())}
        order = {n: k for k, n in enumerate(sorted(numbers))}
        events, moved = record.last_backwards(recorder.seen)
        crossings = [_moved(of, moved) for of in recorder.crossings(order).values()]
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
        for number, own in wanted.items():
            self.pieces[number].planned = own
            self.pieces[number].forget()


def _moved(crossing: record.Crossing, to: Sequence[int]) -> record.Crossing:
    died = crossing.died
    return replace(
        crossing, born=to[crossing.born], died=None if died is None or died >= len(to) else to[died]
    )
