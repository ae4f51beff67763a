"""The executable step: a program and what its callers must agree with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from planner.capture.expectation import Expectation
from planner.capture.inputs import Inputs
from planner.capture.outputs import OutputTemplate
from planner.plans.plan_data import PlanData
from planner.rewrite.apart import Apart
from planner.rewrite.program import Argument, Key, Program
from planner.rewrite.prune import Prunings

__all__ = ["ExecutableStep", "Lifetimes", "StepsBySize"]


class Lifetimes(NamedTuple):
    """Until when a caller holds a model's outputs, by number; those that are in neither, to the step's end.

    ``released``  gone when the backward begins.
    ``kept``      there until the next call has returned.
    """

    released: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()


HELD = Lifetimes()


class StepsBySize(Protocol):
    """The programs at hand for batches of many sizes; see :class:`planner.runtime.variants.Variants`."""

    last: PlanData
    held_bytes: int

    def step_for(
        self, model: nn.Module, leaves: Sequence[Any], in_spec: Any
    ) -> tuple[ExecutableStep, dict[Argument, Any]]:
        """The program for a batch, and the sizes it is given."""
        ...


@dataclass(frozen=True)
class ExecutableStep:
    """A program and what its callers must agree with; the same for every instance of the model.

    ``budget_bytes``  that it was planned to.
    ``variants``  finds the program for a batch where sizes vary; ``None``: this one, at its sizes.
    ``replan``    makes the step with other outputs differentiated; ``None``: nobody can.
    ``for_batch``  makes the step for a batch that answers otherwise what the forward asks of it; as above.
    ``plan``      that it runs.
    ``lifetimes``  of the outputs, as it counts them.
    ``watched``   the outputs (numbers) that it counts as released, and others whose bytes matter, by storage.
    ``unread``    outputs of the model (by number) that it does not make.
    ``is_tight``  whether it recomputes for want of memory, so that fewer bytes could make it faster.
    """

    program: Program
    template: OutputTemplate
    expected: Expectation
    device: torch.device
    budget_bytes: int
    variants: StepsBySize | None = None
    lifetimes: Lifetimes = HELD
    watched: tuple[tuple[int, ...], ...] = ()
    is_tight: bool = True
    replan: Callable[[nn.Module, Inputs, frozenset[int]], ExecutableStep] | None = None
    for_batch: Callable[[nn.Module, Inputs], ExecutableStep] | None = None
    plan: PlanData | None = None
    unread: frozenset[int] = frozenset()

    @cached_property
    def differentiated(self) -> frozenset[int]:
        """The outputs that it can give gradients of."""
        return frozenset(i for i, leaf in enumerate(self.template.leaves) if leaf.differentiated)

    @cached_property
    def held(self) -> tuple[tuple[Argument, ...], ...]:
        """What autograd holds for each segment."""
        kinds = ("saved", "parameter", "input")
        return tuple(tuple(a for a in s.arguments if a.kind in kinds) for s in self.program.segments)

    @cached_property
    def direct(self) -> tuple[Argument, ...]:
        """What segments read of the caller's, and nobody holds for them."""
        kinds = ("buffer", "constant", "size")
        return tuple({a: None for s in self.program.segments for a in s.arguments if a.kind in kinds})

    @cached_property
    def others(self) -> tuple[Argument, ...]:
        """What may get a gradient if an output does that is not differentiated."""
        own = {name for segment in self.program.segments for name in segment.gradients}
        leaves, reached = self.template.leaves, self.template.reached
        if all(leaf.differentiated for leaf in leaves if leaf.requires_grad):
            return ()
        return tuple(
            a
            for a in self.program.arguments
            if a.kind in ("parameter", "input") and a.key not in own and (reached is None or a.key in reached)
        )

    @cached_property
    def fed(self) -> dict[int, tuple[int, ...]]:
        """Outputs that are computed from others, and from which; after those."""
        above: dict[int, list[int]] = {}
        for i, below in self.program.feeds.items():
            for j in below:
                if self.template.leaves[i].requires_grad and self.template.leaves[j].requires_grad:
                    above.setdefault(j, []).append(i)
        return {j: tuple(above[j]) for j in sorted(above, key=lambda j: len(above[j]))}

    @cached_property
    def apart(self) -> Apart:
        """Its backward with the gradients of what is read several times one by one."""
        return Apart(self.program.backward)

    @cached_property
    def slots(self) -> tuple[tuple[Key, ...], ...]:
        """Whose gradients, or parts of them, each segment may hand out."""
        pairs = zip(self.program.segments, self.apart.slots, strict=True)
        return tuple(segment.gradients + more for segment, more in pairs)

    @cached_property
    def prunings(self) -> Prunings:
        """Its backward for some of them."""
        return Prunings(self.program.backward)

    def names(self, outputs: Collection[int]) -> str:
        """Outputs as one would write them."""
        return ", ".join(self.template.leaves[i].name for i in sorted(outputs)) or "none of its outputs"

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """The place of each output, as one would write it."""
        return tuple(leaf.name for leaf in self.template.leaves)
