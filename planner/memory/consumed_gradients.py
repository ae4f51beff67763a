"""Whose gradients are used up inside the backward: the optimizer's step in a hook.

That a parameter has a hook for when its gradient is there can be seen; that the hook takes the gradient
away cannot, without training.  So it is told, or seen in the first backward: behind the hooks there are, one
of ours looks once whether ``.grad`` is still there.

Known limit: a hook that takes gradients in some steps only is taken for what it did in the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from planner._compat import post_accumulate_hooks
from planner.errors import PlannerError
from planner.memory.in_backward import InBackward, in_backward
from planner.options import GradientsMode

__all__ = ["ConsumedGradients", "consumed", "hooked"]

log = logging.getLogger(__name__)


def hooked(model: nn.Module) -> frozenset[str]:
    """Names of the parameters with a hook that runs when their gradient is there.

    Raises ``PlannerError`` where there is none.
    """
    found = _hooked(model)
    if not found:
        raise PlannerError(
            f"gradients='consumed', but no parameter of {type(model).__name__} has a hook that could use "
            "its gradient: call p.register_post_accumulate_grad_hook(...) first, or plan with "
            "gradients='held'"
        )
    return found


def _hooked(model: nn.Module) -> frozenset[str]:
    named = model.named_parameters()
    return frozenset(name for name, p in named if p.requires_grad and post_accumulate_hooks(p))


def consumed(
    model: nn.Module, mode: GradientsMode, *, as_on: torch.device | None = None
) -> tuple[dict[str, int], InBackward]:
    """Whose gradients count as gone once they are handed out, with the bytes that each hook takes.

    And what is known of those that step in the backward.

    "auto": those that have an optimizer of their own (:mod:`planner.memory.in_backward`); "consumed": all
    that have a hook.  Raises ``PlannerError`` for "consumed" where there is none.
    """
    known = InBackward({}) if mode == "held" else in_backward(model, as_on=as_on)
    names = hooked(model) if mode == "consumed" else known.scratch_bytes.keys()
    return {name: known.scratch_bytes.get(name, 0) for name in names}, known


class ConsumedGradients:
    """What is known of the gradients of one model.

    ``taken``  parameters whose gradients are to be counted as gone once they are handed out, and the bytes
               that their hooks take besides.
    """

    def __init__(self, model: nn.Module, mode: GradientsMode) -> None:
        self.model, self.mode = model, mode
        self._gone: dict[str, bool] = {}
        self._waits: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._scratch: Mapping[str, int] = {}
        self.taken: dict[str, int] = {}

    def watch(self) -> None:
        """A plan is about to be made: take what was told, or look at the next backward."""
        if self.mode == "held":
            return
        self.taken, known = consumed(self.model, self.mode)
        self._scratch = known.scratch_bytes
        if self.mode != "auto":
            return
        self.taken = self._seen
        for name in _hooked(self.model) - self._gone.keys() - self._waits.keys():
            parameter = self.model.get_parameter(name)
            self._waits[name] = parameter.register_post_accumulate_grad_hook(self._look(name))

    def learned(self) -> bool:
        """Whether a backward has shown what was not known; ``taken`` then says it."""
        seen = self._seen
        if self.mode != "auto" or seen.keys() == self.taken.keys():
            return False
        log.info(
            "%s is planned again: hooks use up the gradients of %d parameters, not of %d, %s among them",
            type(self.model).__name__,
            len(seen),
            len(self.taken),
            min(seen.keys() ^ self.taken.keys()),
        )
        self.taken = seen
        return True

    @property
    def _seen(self) -> dict[str, int]:
        """Those whose gradients were seen to be gone, and those with an optimizer of their own until seen."""
        names = {name for name in self._scratch if self._gone.get(name, True)}
        names |= {name for name, gone in self._gone.items() if gone}
        return {name: self._scratch.get(name, 0) for name in sorted(names)}

    def _look(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(parameter: torch.Tensor) -> None:
            self._gone[name] = parameter.grad is None
            handle = self._waits.pop(name, None)
            if handle is not None:
                handle.remove()

        return look
