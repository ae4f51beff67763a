"""One call of a region that waits for its backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from planner.errors import PlannerError
from planner.regions.cut.region import Region
from planner.regions.cut.spread import joined_up
from planner.rewrite.apart import argument_of
from planner.rewrite.program import Argument
from planner.runtime.autograd import PendingCall

__all__ = ["Pending", "Watches"]


class Watches(Protocol):
    """Whoever is told of a call's backward."""

    def backward_begins(self, call: Any, tangents: tuple[Any, ...]) -> None: ...
    def gave(self, call: Any, index: int, gradients: list[Any]) -> None: ...


class Pending(PendingCall):
    """One call of a region, and what its backward still needs.

    ``began``  whether a backward came; ``turn``: how many of the step's had begun before the call.
    ``kept``   what is kept instead of each tensor, in a step that is recorded.
    ``spread``  the tensors that arguments are this rank's part of, and how their gradients are spread.
    """

    def __init__(
        self,
        *given: Any,
        session: Watches,
        seen: Any,
        holder: Any,
        region: Region,
        turn: int,
        kept: Callable[[Any], Any] | None,
        spread: Mapping[Argument, tuple[Any, Any]],
        **more: Any,
    ) -> None:
        super().__init__(*given, **more)
        self.spread = spread
        if kept is not None:
            self.keep = [[kept(x) for x in of] for of in self.keep]
        self.session, self.seen, self.holder, self.region, self.turn = session, seen, holder, region, turn
        self.began = False

    def differentiated_twice(self) -> None:
        """A backward comes that is to be differentiated itself."""
        self.region.is_eager = True
        raise PlannerError(
            "a backward through a planned region is to be differentiated itself (create_graph=True: a "
            "gradient penalty), and none was in the first step. From the next step on this region runs as "
            "eager runs it. Let the first step have the penalty too, or call planner.disable(model) before "
            "such a step (plan.restore(model) for an applied plan) and enable the model after it"
        )

    def was_written(self, argument: Argument) -> None:
        """A buffer that the backward reads was written to: from the next step on eager runs the region."""
        self.region.is_eager = True
        self.region.why = self.region.why or f"the buffer {argument.key} is written to behind it"

    def begin(self, tangents: tuple[Any, ...]) -> None:
        """The backward of the call begins."""
        self.began = True
        self.session.backward_begins(self, tangents)
        super().begin(tangents)

    def run(
        self, index: int, held: Callable[[], tuple[torch.Tensor, ...]], tangents: tuple[Any, ...]
    ) -> list[Any]:
        """Run the node ``index`` of the call in autograd's graph: one segment of its backward."""
        gradients = super().run(index, held, tangents)
        self.session.gave(self, index, gradients)
        return self._whole(index, gradients) if self.spread else gradients

    def leaves_of(self, index: int, given: Mapping[Argument, Any]) -> list[Any]:
        """The tensors that the gradients of a node are for."""
        leaves = super().leaves_of(index, given)
        if not self.spread:
            return leaves
        arguments = map(argument_of, self.names[index])
        return [self.spread.get(a, (x,))[0] for a, x in zip(arguments, leaves, strict=True)]

    def _whole(self, index: int, gradients: list[Any]) -> list[Any]:
        layouts = [self.spread.get(argument_of(key), (None, None))[1] for key in self.names[index]]
        return joined_up(gradients, layouts)
