"""One call of a region that waits for its backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from planner.errors import PlannerError
from planner.graph import kernels
from planner.measure.step import tensors_in
from planner.regions.region import Region
from planner.rewrite.program import Argument
from planner.runtime.autograd import PendingCall, pass_of

__all__ = ["Pending", "Watches"]


class Watches(Protocol):
    """Whoever is told of a call's backward."""

    def backward_begins(self, call: Any, tangents: tuple[Any, ...]) -> None: ...
    def gave(self, call: Any, index: int, gradients: list[Any]) -> None: ...


class Pending(PendingCall):
    """One call of a region, and what its backward still needs.

    ``args``  what the region was given, and ``state`` of the generator then, in a step that is looked at: a
              backward that is itself differentiated runs the region again from them, as eager runs it, and
              from then on it always does.  Later only what is there anyway is known.
    ``kept``  what is kept instead of each tensor, in a step that is recorded.
    ``step``  lives as long as any call of its step.
    """

    def __init__(
        self,
        *given: Any,
        session: Watches,
        seen: Any,
        step_of: Any,
        region: Region,
        args: Sequence[Any],
        hold: bool,
        state: torch.Tensor | None,
        kept: Callable[[Any], Any] | None,
        **more: Any,
    ) -> None:
        super().__init__(*given, **more)
        if kept is not None:
            self.keep = [[kept(x) for x in of] for of in self.keep]
        self.session, self.seen, self.step_of, self.region = session, seen, step_of, region
        self.hold, self.state = hold, state
        self.began = False  # a backward came
        self._args = [x if hold or not isinstance(x, torch.Tensor) else weakref.ref(x) for x in args]

    def differentiated_twice(self) -> None:
        """Allowed while what the region was given is there."""

    def begin(self, tangents: tuple[Any, ...]) -> None:
        """The first of its nodes runs."""
        self.began = True
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
        if self.hold and not self.waits:
            self._args = []
        self.session.gave(self, index, gradients)
        return gradients

    def _given(self) -> list[Any]:
        """What the region was given; ``PlannerError`` where that is gone."""
        args = [x() if isinstance(x, weakref.ref) else x for x in self._args]
        program = self.step.program
        reads = [name for name, read in program.updates.items() if read]
        gone = len(args) < len(self._args) or any(x is None for x in args)
        if gone or not args or (program.draws and self.state is None) or reads:
            what = (
                f"buffers that it changes ({', '.join(reads)})" if reads else "its inputs or random numbers"
            )
            raise PlannerError(
                "a backward is to be differentiated itself (create_graph=True: a gradient penalty), and came "
                "through a region that was planned without it, as no such backward came in the first steps; "
                f"{what} are not there any more as they were. From the next step on this region runs as "
                "eager runs it: run the step again, let one of the first two steps have the penalty, or call "
                "plan.restore(model), or planner.disable(model)"
            )
        return args

    def _as_eager(self, tangents: tuple[Any, ...]) -> None:
        region, forward = self.region, self.region.plain.forward
        region.is_eager = True
        args = self._given()
        present = frozenset(i for i, t in zip(self.tracked, tangents, strict=True) if t is not None)
        names = [name for of in self.names for name in of]
        given = self.seen.variant.given(args)
        leaves = [given[Argument("parameter" if isinstance(n, str) else "input", n)] for n in names]
        buffers = [(t, t.clone()) for a, t in given.items() if a.kind == "buffer"]
        on, dtype = self.step.expected.autocast
        kind = self.step.device.type
        with torch.enable_grad():
            with torch.autocast(kind, dtype=getattr(torch, dtype[6:] or "bfloat16"), enabled=on):
                if self.state is None:
                    made = tensors_in(forward(*args))
                else:
                    made = tensors_in(kernels.replay(self.state, str(self.step.device), forward, *args))
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
