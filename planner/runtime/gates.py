"""What a planned call hands out, each output through an autograd node of its own.

So its hooks are called only if a gradient comes for it, as in eager; and who asks for the gradient of what
lies within the planned step is told that none is made.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from planner import _compat
from planner._compat import gathers
from planner.errors import PlannerError
from planner.runtime.step import ExecutableStep

__all__ = ["Gates"]


class Gates:
    """The outputs of one call of ``step`` on their way to the caller.

    ``tracked``  the outputs that require grad, by their index.
    ``task``     the backward that the call's first node ran in last.
    """

    def __init__(self, step: ExecutableStep) -> None:
        self.step = step
        self.tracked = [i for i, leaf in enumerate(step.template.leaves) if leaf.requires_grad]
        self.task = -1
        self._gated: dict[int, torch.Tensor] = {}
        self._watched: dict[int, tuple[weakref.ref[torch.Tensor], dict[int, Any]]] = {}

    def closed(self, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the first node hands out for them, by ``tracked``; of several, each goes through a gate."""
        for position, i in enumerate(self.tracked):
            if len(outputs) > 1:
                self._gated[i] = outputs[position]
                outputs[position] = outputs[position].detach()
        return tuple(outputs)

    def through(self, handed: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The model's outputs by their index, given what the first node handed out.

        Outputs from which others are computed are watched: who asks for their gradients asks for more than
        comes.
        """
        out = dict(zip(self.tracked, handed, strict=True))
        fed = self.step.fed
        for i in (*(i for i in self.tracked if i not in fed), *fed):
            if i in self._gated:
                above = fed.get(i, ())
                out[i] = Gate.apply(self, i, out[i], *(out[k] for k in above if k in out))
        feeds = self.step.program.feeds
        self._watched = {i: (weakref.ref(out[i]), _hooks_on(out[i])) for i in self.tracked if i in feeds}
        return out

    def passed(self, output: int) -> torch.Tensor:
        """The output that goes through a gate; let go of here."""
        return self._gated.pop(output)

    def must_begin(self, output: int, task: int) -> None:
        """At the end of a backward that came for ``output``: error if it went no further than that."""
        if self.task != task:
            within = self.step.names(self.step.fed[output])
            raise PlannerError(
                f"the gradient of {self.step.names({output})} by another output of the model ({within}) was "
                "asked for: a planned step makes no gradients of what lies within. Call plan.restore(model), "
                "or planner.disable(model), before this step"
            )

    def refuse_within(self, present: frozenset[int]) -> None:
        """An output's own gradient is that of what the model computes from it too, which is not made here."""
        for i, (ref, hooks) in self._watched.items():
            tensor, after = ref(), present & self.step.program.feeds[i]
            reads = tensor is not None and tensor.retains_grad
            if not after - {i} or not (reads or any(not gathers(hook) for hook in hooks.values())):
                continue
            raise PlannerError(
                f"the gradient of {self.step.names({i})} is asked for (retain_grad or a hook), and "
                f"{self.step.names(after)}, computed from it, is differentiated: a planned step makes no "
                "gradients of what lies within. Call plan.restore(model), or planner.disable(model), before "
                "this step"
            )


def _hooks_on(tensor: torch.Tensor) -> dict[int, Any]:
    """Where hooks on the gradient of ``tensor`` as it is now are kept.

    They outlive the tensor; and once it is written into, it has others.
    """
    tensor.register_hook(lambda _: None).remove()
    hooks: dict[int, Any] = tensor._backward_hooks  # type: ignore[assignment]
    return hooks


class Gate(torch.autograd.Function):
    """Autograd's view of one output of several: its hooks are called only if a gradient comes, as in eager.

    Outputs that it is computed from are its inputs too, so that a backward which is asked for their gradients
    comes by here; it is refused at its end if it went no further.
    """

    @staticmethod
    def forward(ctx: Any, gates: Gates, output: int, *_: torch.Tensor) -> torch.Tensor:
        ctx.gates, ctx.output, ctx.above = gates, output, len(_) - 1
        ctx.set_materialize_grads(False)
        return gates.passed(output)

    @staticmethod
    @_compat.left_alone
    def backward(ctx: Any, *tangents: Any) -> Any:
        (tangent,) = tangents
        if tangent is not None and ctx.above:
            ctx.gates.refuse_within(frozenset({ctx.output}))  # before a hook is called with None
            check = functools.partial(ctx.gates.must_begin, ctx.output, _compat.current_backward())
            _compat.at_end_of_backward(check)
        return None, None, tangent, *[None] * ctx.above
