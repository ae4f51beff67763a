"""Hooks of a parameter that gets no gradient in some backward are left alone, as in eager.

Autograd never comes to such a parameter in eager.  Behind a planned step it does, with nothing in its hands,
and would call hooks on a gradient with ``None``, and those after accumulation on what was there before.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["left_alone"]


class _IfGiven:
    """A hook on a gradient that is not called where there is none."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, gradient: torch.Tensor | None) -> Any:
        return None if gradient is None else self.hook(gradient)


class _Arrival:
    """Notes whether a gradient came; registered as a hook, it is called before those of accumulation."""

    came = True

    def __call__(self, gradient: torch.Tensor | None) -> None:
        self.came = gradient is not None


class _IfCame:
    """A hook after accumulation that is not called where nothing was accumulated."""

    def __init__(self, hook: Any, arrival: _Arrival) -> None:
        self.hook, self.arrival = hook, arrival

    def __call__(self, leaf: torch.Tensor) -> Any:
        return self.hook(leaf) if self.arrival.came else None


def left_alone(leaf: torch.Tensor) -> None:
    """See to it that the hooks of ``leaf``, which gets no gradient now, are not called."""
    after: dict[int, Any] = getattr(leaf, "_post_accumulate_grad_hooks", None) or {}
    plain = [key for key, hook in after.items() if not isinstance(hook, _IfCame)]
    if plain:
        arrival = next((h.arrival for h in after.values() if isinstance(h, _IfCame)), None)
        if arrival is None:
            arrival = _Arrival()
            leaf.register_hook(arrival)
        for key in plain:
            after[key] = _IfCame(after[key], arrival)
    before: dict[int, Any] = leaf._backward_hooks or {}
    for key, hook in before.items():
        if not isinstance(hook, _IfGiven | _Arrival):
            before[key] = _IfGiven(hook)
