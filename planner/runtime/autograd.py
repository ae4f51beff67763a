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
captured, a step that replays random state is refused (:func:`refuse_capture`).

A second backward, a gradient of a gradient, or a gradient for an output that was not planned for is an error
that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from planner import _compat
from planner.errors import PlannerError
from planner.graph import kernels
from planner.rewrite.program import Argument
from planner.runtime.step import ExecutableStep

__all__ = ["PendingCall", "SegmentNode", "memory_explained", "refuse_capture", "without_autocast"]


class PendingCall:
    """One forward of a planned step, and what its backward still needs."""

    def __init__(self, step: ExecutableStep, given: dict[Argument, Any], results: list[torch.Tensor]) -> None:
        self.step = step
        program = step.program
        outputs, saved = results[: program.outputs], results[program.outputs :]
        tracked = [leaf.requires_grad for leaf in step.template.leaves]
        self.tracked = [i for i, t in enumerate(tracked) if t]
        self.outputs = [outputs[i] for i in self.tracked]
        self.like = [(t.shape, t.dtype) for t in self.outputs]
        self.mail: dict[str, Any] = {}
        self.spent = [False] * len(program.segments)
        self.direct: dict[Argument, Any] = {}
        self.versions: dict[Argument, int] = {}  # of buffers that the backward reads
        self.keep: list[list[torch.Tensor]] = []
        for segment in program.segments:
            kept = []
            for argument in segment.arguments:
                if argument.kind == "saved":
                    kept.append(saved[int(argument.key)])
                elif argument.kind in ("parameter", "input"):
                    kept.append(given[argument])
                elif argument.kind in ("buffer", "constant", "size"):
                    self.direct[argument] = given[argument]
                    if argument.key in program.watched and argument.kind == "buffer":
                        self.versions[argument] = _version_of(given[argument])
            self.keep.append(kept)

    @property
    def waits(self) -> bool:
        """Whether some of its backward is still to come."""
        return not all(self.spent)

    def arguments(
        self, index: int, saved: tuple[torch.Tensor, ...], tangents: tuple[Any, ...]
    ) -> list[torch.Tensor]:
        """The boxed arguments of a segment; mail is taken out of the box it lay in."""
        held = iter(saved)
        boxed = []
        for argument in self.step.program.segments[index].arguments:
            if argument.kind == "mail":
                boxed.append(self.mail.pop(str(argument.key)))
            elif argument.kind == "tangent":
                boxed.append(self._tangent(int(argument.key), tangents))
            elif argument.kind in ("buffer", "constant", "size"):
                self._refuse_written(argument)
                boxed.append(self.direct[argument])
            else:
                boxed.append(next(held))
        return boxed

    def _tangent(self, output: int, tangents: tuple[Any, ...]) -> torch.Tensor:
        position = self.tracked.index(output)
        tangent = tangents[position]
        if tangent is None:  # an output that the loss turned out not to use
            shape, dtype = self.like[position]
            tangent = torch.zeros(shape, dtype=dtype, device=self.step.device)
        return tangent

    def _refuse_written(self, argument: Argument) -> None:
        """Autograd sees in-place changes of what it saved; a buffer is not saved."""
        if self.versions.get(argument, -1) not in (-1, _version_of(self.direct[argument])):
            raise PlannerError(
                f"the buffer {argument.key} was written to between a planned forward and its backward, which "
                "reads it: by another forward, or by hand. Run the backward first, or restore the model's "
                "own forward (plan.restore(model)), where autograd refuses what it cannot do"
            )

    def refuse(self, tangents: tuple[Any, ...]) -> None:
        """A gradient arrived for an output the plan does not differentiate."""
        for position, index in enumerate(self.tracked):
            leaf = self.step.template.leaves[index]
            if tangents[position] is not None and not leaf.differentiated:
                chosen = ", ".join(x.name for x in self.step.template.leaves if x.differentiated)
                raise PlannerError(
                    f"a gradient arrived for {leaf.name}, but the plan differentiates {chosen} only; "
                    "plan with loss_fn=... computing the loss you train with"
                )


def _version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


class SegmentNode(torch.autograd.Function):
    """Autograd's view of one segment of the backward."""

    clear_saved_tensors_on_access = True  # else the saved set lives until the segment returns

    @staticmethod
    def forward(
        ctx: Any, call: PendingCall, index: int, token: torch.Tensor | None, *leaves: torch.Tensor
    ) -> Any:
        ctx.call, ctx.index, ctx.leaves = call, index, len(leaves)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.keep[index])
        call.keep[index] = []
        if index == 0:
            outputs, call.outputs = call.outputs, []
            return tuple(outputs)
        return torch.empty(0, device=call.step.device)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        call, index = ctx.call, ctx.index
        if torch.is_grad_enabled():
            raise PlannerError(
                "a planned step has no second derivative (create_graph=True); call plan.restore(model) first"
            )
        if call.spent[index]:
            raise PlannerError(
                "a second backward through one planned step: what it saved was released by the first. "
                "Run the forward again, or call plan.restore(model) for retain_graph=True"
            )
        refuse_capture(call.step)
        call.spent[index] = True
        if index == 0:
            call.refuse(tangents)
        segment = call.step.program.segments[index]
        boxed = call.arguments(index, ctx.saved_tensors, tangents)
        with torch.no_grad(), without_autocast(call.step.device), memory_explained(call.step, "backward"):
            results = segment.module.forward(boxed)
        made = len(segment.gradients)
        call.mail.update(zip(segment.mail, results[made:], strict=True))
        token = None if index == len(call.spent) - 1 else torch.empty(0, device=call.step.device)
        return None, None, token, *results[:made]


def refuse_capture(step: ExecutableStep) -> None:
    """Under CUDA graph capture a generator's state is a place in that graph, and means nothing in another.

    A backward captured apart from its forward would draw other numbers, without an error.
    """
    if step.program.replays and kernels.is_capturing(step.device):
        raise PlannerError(
            "a CUDA graph is being captured, and this plan draws random numbers again from a generator's "
            "state, which a captured graph cannot go back to. Plan with a budget at which masks are kept, "
            "train without dropout, or call plan.restore(model) before capturing"
        )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The graph holds its casts; autocast must not add others."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def memory_explained(step: ExecutableStep, phase: str) -> Iterator[None]:
    """Out of memory, by its own type and message, and what it means for the plan.

    Trainers look at both, to try again with a smaller batch.
    """
    try:
        yield
    except RuntimeError as error:
        if len(error.args) == 1 and _compat.is_out_of_memory(error):
            error.args = (
                f"{error.args[0]}\nThis was in the {phase} of a step planned to "
                f"{step.budget_bytes / 1e9:.4g} GB. What the budget does not know of (other models and "
                "processes, layers outside the planned module, fragmentation) leaves less than that: lower "
                "budget_gb by as much. The model can go on: gradients that had arrived are in .grad, as "
                "after any backward that breaks off",
            )
        raise
