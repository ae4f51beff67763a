"""Autograd nodes around generated code: what runs a rewritten step.

The forward graph runs once under ``no_grad``.  Then K autograd nodes are made, one per segment of
the backward, tied to each other only by an empty token: the node of the last segment first, the node
that hands out the model's outputs last.  In the backward each node runs its segment's code and
returns the gradients made there, so that hooks fire and gradients accumulate as they come.

What is needed later is held in three places, each released as soon as it is read: tensors of the
forward in the node of the first segment that reads them (``save_for_backward``, so that autograd
notices in-place changes), values that cross segments in a mailbox, parameters and inputs wherever
the caller has them.

Nothing here waits for a device, so the host runs ahead as it does in eager.  While a CUDA graph is being
captured, a step that replays random state is refused (:func:`planner.runtime.running.refuse_capture`).

Which outputs get a gradient is known when the first node runs; it chooses the backward for them, or refuses,
before any gradient is handed out (:meth:`PendingCall.begin`).  What gets none is ``None``, as in eager.  What
only other outputs need is let go then, unless a second backward of the same call was seen to come for them;
with ``retain_graph=True`` everything is held.

A second backward where autograd has freed what it needs, and a gradient of a gradient, are an error that says
so.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from planner import _compat
from planner._compat import version_of
from planner.errors import PlannerError
from planner.graph import kernels
from planner.rewrite.apart import argument_of
from planner.rewrite.program import Argument, Key, Low, Segment, Term
from planner.rewrite.prune import Pruned
from planner.runtime.gates import Gates
from planner.runtime.hooks import left_alone
from planner.runtime.output_sets import OutputSets, Start
from planner.runtime.running import memory_explained, ran, refuse_capture, without_autocast
from planner.runtime.shared_casts import SharedCasts
from planner.runtime.step import ExecutableStep

__all__ = [
    "PendingCall",
    "SegmentNode",
    "pass_of",
]


_BEGUN: deque[int] = deque(maxlen=64)  # backwards that came to a planned call

_KEPT = ("saved", "parameter", "input")  # kinds of arguments that autograd holds for a segment


@dataclass
class _Pass:
    """One backward through a call.

    ``segments``  what the nodes run; ``mail``: what one of them made for a later one.
    ``made``      instead of running anything: gradients that were made at once, by what they are of.
    ``present``   the outputs whose gradients came.
    ``keep``      whether another backward may follow that needs all of it again.
    """

    segments: tuple[Segment, ...]
    present: frozenset[int]
    keep: bool
    made: dict[Key, Any] | None = None
    mail: dict[str, Any] = field(default_factory=dict)


def pass_of(present: frozenset[int], made: dict[Key, Any]) -> _Pass:
    """A backward for the outputs ``present`` whose gradients are ``made`` already."""
    return _Pass((), present, True, made)


class PendingCall:
    """One forward of a planned step, and what its backward still needs."""

    def __init__(
        self,
        step: ExecutableStep,
        given: dict[Argument, Any],
        results: list[torch.Tensor],
        sets: OutputSets,
        start: Start | None,
    ) -> None:
        self.step, self.sets, self.start = step, sets, start
        program = step.program
        outputs, saved = results[: program.outputs], results[program.outputs :]
        self.gates = Gates(step)
        self.tracked = self.gates.tracked
        self.outputs = [outputs[i] for i in self.tracked]
        self._is_summed = True  # whether gradients of what is read several times are added up here
        self.casts: SharedCasts | None = None
        self._low: dict[Key, torch.Tensor] = {}  # parameters that are cast, by whose gradient it is
        self.names = [*step.slots]  # of each node's gradients
        self.names[-1] += tuple(a.key for a in step.others if given[a].requires_grad)
        self.spent = [False] * len(program.segments)
        self.passes: list[frozenset[int]] = []  # whose backwards have run and kept nothing
        self.now: _Pass | None = None
        self.nodes: list[Any] = [None] * len(program.segments)  # weak: they hold this call
        self.direct = {argument: given[argument] for argument in step.direct}
        self.versions = {  # of buffers that the backward reads
            argument: version_of(tensor)
            for argument, tensor in self.direct.items()
            if argument.kind == "buffer" and argument.key in program.watched
        }
        self.keep = [[saved[int(a.key)] if a.kind == "saved" else given[a] for a in at] for at in step.held]
        self.held: list[dict[Argument, tuple[torch.Tensor, int]] | None] = [None] * len(program.segments)

    def share(self, casts: SharedCasts | None, given: dict[Argument, Any]) -> None:
        """The casts of its parameters are those of other calls in the same context of autocast too."""
        if casts is not None:
            self._low = {slot: given[argument_of(slot)] for of in self.step.apart.casts for slot in of}
            self.casts = casts
            casts.join(self)

    def leaves_of(self, index: int, given: Mapping[Argument, Any]) -> list[Any]:
        """What the gradients of a node are of."""
        return [given[argument_of(key)] for key in self.names[index]]

    @property
    def cast(self) -> frozenset[int]:
        """The parameters (identities) that autocast casts for it, and which get gradients."""
        return frozenset(map(id, self._low.values()))

    def handed_out(self) -> tuple[torch.Tensor, ...]:
        """What the first node hands out."""
        outputs, self.outputs = self.outputs, []
        return self.gates.closed(outputs)

    @property
    def task(self) -> int:
        """The backward that the first node ran in last."""
        return self.gates.task

    @property
    def waits(self) -> bool:
        """Whether some of its backward is still to come."""
        return not all(self.spent)

    def differentiated_twice(self) -> None:
        """A backward comes that is to be differentiated itself."""
        raise PlannerError(
            "a planned step has no second derivative (create_graph=True: a gradient penalty, MAML). "
            "Before it call plan.restore(model), or planner.disable(model) where it was enabled, "
            "or take the gradient inside the forward (torch.autograd.grad), which can be planned"
        )

    # -- choosing ----------------------------------------------------------------------------------

    def begin(self, tangents: tuple[Any, ...]) -> None:
        """Choose what runs for the gradients that came; ``PlannerError`` where nothing can."""
        refuse_capture(self.step)
        task = self.gates.task = _compat.current_backward()
        is_first, is_alone = task not in _BEGUN, self.casts is None or not self.casts.begin(self, task)
        _BEGUN.append(task)
        present = frozenset(i for i, t in zip(self.tracked, tangents, strict=True) if t is not None)
        self.gates.refuse_within(present)
        keep = _compat.graph_is_kept()
        if self.passes:
            self._refuse_freed(present)
            self.sets.followed(self.passes[-1])
        part = self._apart(present, is_first=is_first, is_alone=is_alone)
        self.now = self._chosen(present, tangents, keep, part)
        self._is_summed = part is None
        if keep:
            self.sets.tell_kept(self.step)
        else:
            self.passes.append(present)
        self.sets.came(present)

    def _apart(self, present: frozenset[int], *, is_first: bool, is_alone: bool) -> Pruned | None:
        """The backward with gradients one by one, where they are added to what another call made.

        ``is_first``  no other call began in this backward; ``is_alone``: none shares casts with it.
        """
        apart = self.step.apart
        is_added = apart.reads_several and not (is_first and not self.sets.is_joined)
        if not (is_added or not is_alone) or not present <= self.step.differentiated:
            return None
        self.sets.tell_apart(self.step)
        return apart.of(present, low=not is_alone)

    def _chosen(
        self, present: frozenset[int], tangents: tuple[Any, ...], keep: bool, part: Pruned | None
    ) -> _Pass:
        step = self.step
        whole = present == step.differentiated
        if whole and part is None and all(held is None for held in self.held):
            return _Pass(step.program.segments, present, keep)
        if part is None and present <= step.differentiated:
            part = step.prunings.of(present)
        if part is None:
            return self._again(present, tangents, keep)
        for k, segment in enumerate(part.segments):
            held = self.held[k]
            if held is not None and any(a.kind in _KEPT and a not in held for a in segment.arguments):
                return self._again(present, tangents, keep)
        return _Pass(part.segments, present, keep)

    def _refuse_freed(self, present: frozenset[int]) -> None:
        """As autograd does where an earlier backward went through the same formulas."""
        step = self.step
        for earlier in self.passes:
            if not earlier | present <= step.differentiated and self.start is not None:
                step, _ = self.sets.step_for(self.start.leaves(), self.start.in_spec, earlier | present)
            first, second = step.prunings.of(earlier), step.prunings.of(present)
            if first is None or second is None or first.frees(second):
                raise PlannerError(
                    f"a second backward through one planned step, for {step.names(present)}: what it needs "
                    f"was released by the first, for {step.names(earlier)}. Run the forward again, or pass "
                    "retain_graph=True to the first"
                )

    # -- running -----------------------------------------------------------------------------------

    def run(
        self, index: int, held: Callable[[], tuple[torch.Tensor, ...]], tangents: tuple[Any, ...]
    ) -> list[Any]:
        """Run one segment; its gradients, ``None`` for those that nothing was made for."""
        now = self.now
        assert now is not None
        self.spent[index] = not now.keep
        if self.start is not None and not self.waits:
            self.start.let_go()
        if now.made is not None:
            if self.casts is not None:
                self._cast_back(self.casts, index, now.made)
            return [now.made.pop(name, None) for name in self.names[index]]
        segment = now.segments[index]
        plain = segment is self.step.program.segments[index] and self.held[index] is None and not now.keep
        plain = plain and (self.casts is None or not self.casts.low)
        take = self._all if plain else self._some
        boxed = take(index, segment, held, tangents)
        results = ran(self.step, segment, boxed)
        made = len(segment.gradients)
        now.mail.update(zip(segment.mail, results[made:], strict=True))
        if self.step.apart.sums[index] and self._is_summed:
            self._watch_sums(index, dict(zip(segment.gradients, results[:made], strict=True)))
        if plain:
            return [*results[:made], *[None] * (len(self.names[index]) - made)]
        by_name: dict[Key, Any] = dict(zip(segment.gradients, results[:made], strict=True))
        del results
        if self.casts is not None:
            self._cast_back(self.casts, index, by_name)
        gradients = [by_name.pop(name, None) for name in self.names[index]]
        assert not by_name, f"nobody takes the gradients of {[*by_name]}"
        return gradients

    def _watch_sums(self, index: int, by_name: dict[Key, Any]) -> None:
        """See whether something else had come for what gets a sum of gradients, before that."""
        node, names = self.nodes[index](), self.names[index]
        following = node.next_functions[-len(names) :]
        for key in self.step.apart.sums[index]:
            gradient, (end, _) = by_name.get(key), following[names.index(key)]
            if gradient is not None and end is not None:
                _compat.once_in_backward(end, functools.partial(self._came_first, key, gradient.data_ptr()))

    def _came_first(self, key: Key, place: int, gradients: tuple[Any, ...]) -> None:
        """The gradient of something is complete, and lies where what came first did.

        Asking for the storage would make it one that the engine does not write into.
        """
        if all(g is None or g.data_ptr() != place for g in gradients):
            argument = argument_of(key)
            name = str(argument.key) if argument.kind == "parameter" else f"input {argument.key}"
            self.sets.joined(name)

    def _cast_back(self, casts: SharedCasts, index: int, by_name: dict[Key, Any]) -> None:
        """Put what is of autocast's casts to that of other calls, and take the sums that are through."""
        for key in [key for key in by_name if isinstance(key, Low)]:
            casts.add(self._low[key.slot], by_name.pop(key))
        for slot in self.step.apart.casts[index]:
            gradient = casts.taken(self, self._low[slot])
            if gradient is not None:
                own = by_name.get(slot)
                by_name[slot] = gradient if own is None else gradient + own

    def _all(
        self,
        index: int,
        segment: Segment,
        held: Callable[[], tuple[torch.Tensor, ...]],
        tangents: tuple[Any, ...],
    ) -> list[Any]:
        """The arguments of a segment that reads all that is held for it."""
        assert self.now is not None
        here = iter(held())
        boxed = []
        for argument in segment.arguments:
            if argument.kind == "mail":
                boxed.append(self.now.mail.pop(str(argument.key)))
            elif argument.kind == "tangent":
                boxed.append(tangents[self.tracked.index(int(argument.key))])
            elif argument.kind in _KEPT:
                boxed.append(next(here))
            else:
                self._refuse_written(argument)
                boxed.append(self.direct[argument])
        self.held[index] = {}
        return boxed

    def _some(
        self,
        index: int,
        segment: Segment,
        held: Callable[[], tuple[torch.Tensor, ...]],
        tangents: tuple[Any, ...],
    ) -> list[Any]:
        """The arguments of a segment, each taken out of where it lay; the rest stays only if it is wanted."""
        assert self.now is not None
        kept = self.held[index]
        if kept is None:
            here = dict(zip(self.step.held[index], held(), strict=True))
        else:
            here = {a: _unchanged(a, *kept[a]) for a in self.step.held[index] if a in kept}
        boxed = []
        rest = here if not self.now.keep else dict(here)
        for argument in segment.arguments:
            if argument.kind == "mail":
                boxed.append(self._own(argument, segment, self.now.mail.pop(str(argument.key))))
            elif argument.kind == "tangent":
                boxed.append(tangents[self.tracked.index(int(argument.key))])
            elif argument.kind in _KEPT:
                boxed.append(self._own(argument, segment, rest.pop(argument)))
            else:
                self._refuse_written(argument)
                boxed.append(self.direct[argument])
        self.held[index] = {}
        if self.now.keep or self.now.present in self.sets.followed_by_another:
            wanted = here if self.now.keep else rest
            self.held[index] = {a: (t, version_of(t)) for a, t in wanted.items()}
        return boxed

    def _own(self, argument: Argument, segment: Segment, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or a copy where the segment writes over what another backward may read again."""
        assert self.now is not None
        return tensor.clone() if self.now.keep and argument in segment.overwrites else tensor

    def _refuse_written(self, argument: Argument) -> None:
        """Autograd sees in-place changes of what it saved; a buffer is not saved."""
        seen = self.versions.get(argument)
        if seen is not None and seen != version_of(self.direct[argument]):
            self.was_written(argument)
            raise PlannerError(
                f"the buffer {argument.key} was written to between a planned forward and its backward, which "
                "reads it: by another forward, or by hand. Run the backward first, or restore the model's "
                "own forward (plan.restore(model)), where autograd refuses what it cannot do"
            )

    def was_written(self, argument: Argument) -> None:
        """A buffer that the backward reads is no longer what the forward left."""

    # -- running again -----------------------------------------------------------------------------

    def _again(self, present: frozenset[int], tangents: tuple[Any, ...], keep: bool) -> _Pass:
        """Run the forward again, by a program that serves these outputs, and their whole backward at once."""
        step, start = self.step, self.start
        sizes: dict[Argument, Any] = {}
        if start is None:
            raise PlannerError(
                f"a gradient arrived for {step.names(present)}, but the plan differentiates "
                f"{step.names(step.differentiated)}; plan with loss_fn=... computing the loss you train with"
            )
        if not (present <= step.differentiated and step.prunings.of(present) is not None):
            step, sizes = self.sets.step_for(start.leaves(), start.in_spec, present)
        part = step.prunings.of(present)
        segments = step.program.segments if part is None else part.segments
        given = start.again(step.program, segments, sizes)
        self.sets.runs_again()
        if not keep:
            self._release()
        saved = self._saved_again(step, given)
        made: dict[Key, torch.Tensor] = {}
        mail: dict[str, Any] = {}
        for segment in segments:
            boxed = []
            for a in segment.arguments:
                if a.kind == "mail":
                    boxed.append(mail.pop(str(a.key)))
                elif a.kind == "tangent":
                    boxed.append(tangents[self.tracked.index(int(a.key))])
                elif a.kind == "saved":
                    boxed.append(saved.pop(int(a.key)))
                else:
                    boxed.append(given[a])
            results = ran(step, segment, boxed)
            count = len(segment.gradients)
            made.update(zip(segment.gradients, results[:count], strict=True))
            mail.update(zip(segment.mail, results[count:], strict=True))
            del results
        known = {key for names in self.names for key in names}
        for key in [key for key in made if isinstance(key, Term) and key not in known]:
            term = made.pop(key)  # another step's, which is read several times where this one is not
            before = made.get(key.of)
            made[key.of] = term if before is None else before + term
        return _Pass((), present, keep, made)

    def _saved_again(self, step: ExecutableStep, given: dict[Argument, Any]) -> dict[int, torch.Tensor]:
        assert self.start is not None
        program = step.program
        boxed = [given[a] for a in program.arguments]
        if program.draws and self.start.state is None:
            raise PlannerError(
                "the forward was captured in a CUDA graph and would have to be run again with the same "
                "random numbers; plan with loss_fn=... computing the loss you train with"
            )
        with torch.no_grad(), without_autocast(step.device), memory_explained(step, "forward"):
            if self.start.state is None:
                results = program.forward.forward(boxed)
            else:
                device = str(step.device)
                results = kernels.replay(self.start.state, device, program.forward.forward, boxed)
        return dict(enumerate(results[program.outputs :]))

    def _release(self) -> None:
        """Let go of what this call's own backward would have needed."""
        for k, ref in enumerate(self.nodes):
            node = ref()
            if node is not None and self.held[k] is None:
                node.maybe_clear_saved_tensors()
            self.held[k] = {}


def _unchanged(argument: Argument, tensor: torch.Tensor, version: int) -> torch.Tensor:
    if version_of(tensor) != version:
        what = "a saved tensor" if argument.kind == "saved" else f"{argument.kind} {argument.key}"
        raise PlannerError(
            f"{what}, which this backward needs, has been modified by an inplace operation since the last "
            "one; run the forward again"
        )
    return tensor


class SegmentNode(torch.autograd.Function):
    """Autograd's view of one segment of the backward."""

    clear_saved_tensors_on_access = True  # else the saved set lives until the segment returns

    @staticmethod
    def forward(
        ctx: Any, call: PendingCall, index: int, token: torch.Tensor | None, *leaves: torch.Tensor
    ) -> Any:
        ctx.call, ctx.index = call, index
        pairs = zip(leaves, call.names[index], strict=True)  # of what is read again, the first one counts
        ctx.leaves = [leaf if leaf.is_leaf and not isinstance(key, Term) else None for leaf, key in pairs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.keep[index])
        call.keep[index] = []
        call.nodes[index] = weakref.ref(ctx)
        if index == 0:
            return call.handed_out()
        return torch.empty(0, device=call.step.device)

    @staticmethod
    @_compat.left_alone
    def backward(ctx: Any, *tangents: Any) -> Any:
        call, index = ctx.call, ctx.index
        if torch.is_grad_enabled():
            call.differentiated_twice()
        if index == 0:
            call.begin(tangents)
        gradients = call.run(index, lambda: ctx.saved_tensors, tangents)
        for leaf, gradient in zip(ctx.leaves, gradients, strict=True):
            if gradient is None and leaf is not None:
                left_alone(leaf)
        token = None if index == len(call.spent) - 1 else torch.empty(0, device=call.step.device)
        return None, None, token, *gradients
