"""Which kinds of steps a training loop has, what each runs, and whether one is under way.

A step's kind is what its first call is given, shapes and dtypes, what autocast does, and whether it finds
gradients, to which it adds.  Each is seen once, and again when a graph came in it that has no plan.  A graph
that two kinds share runs in each as that one's plan says.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from planner._compat import pytree
from planner.compiled.piece import Own

__all__ = ["Kind", "Kinds", "UnderWay", "kind_of"]

Kind = Hashable

MOST_CALLS = 256  # of a step: there is no end to one that has no backward
LOOKS = 3  # steps of a kind that are seen for a graph of it: it may come in each second or third alone


def kind_of(
    args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Iterable[torch.Tensor], device: torch.device
) -> Kind:
    """Of a step of these ``parameters`` that begins now."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    adds = any(parameter.grad is not None for parameter in parameters)
    return autocast, adds, *((x.shape, x.dtype) for x in leaves if isinstance(x, torch.Tensor))


class Kinds:
    """``most``  kinds that are seen although nothing is known of them; others when a graph without a plan has
    come in them.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now: Kind = None  # of the step that runs
        self._to_see: dict[Kind, int] = {}  # steps of it that are to be
        self._plans: dict[Kind, dict[int, Own]] = {}

    def begins(self, kind: Kind) -> Mapping[int, Own]:
        """A step of this kind does: what graphs run in it, by their numbers."""
        if kind not in self._to_see:
            before = self._to_see.pop(None, 0)  # a graph had no plan before anything was known of kinds
            self._to_see[kind] = int(before > 0 or len(self._to_see) < self.most)
        self.now = kind
        return self._plans.get(kind, {})

    @property
    def is_to_see(self) -> bool:
        """Whether the step that begins is."""
        return self._to_see.get(self.now, 0) > 0

    @property
    def is_planned(self) -> bool:
        """Whether its kind has a plan."""
        return self.now in self._plans

    def lacks(self) -> None:
        """A graph without a plan has come in it."""
        self._to_see[self.now] = LOOKS

    def seen(self) -> None:
        """A step of this kind was, and there is nothing to plan in it."""
        self._to_see[self.now] -= 1

    def planned(self, plans: Mapping[int, Own]) -> None:
        """A step of this kind was seen, and planned so."""
        self._to_see[self.now] = 0
        self._plans.setdefault(self.now, {}).update(plans)

    def owns(self, number: int) -> list[Own]:
        """All that a graph runs in one or another kind."""
        return list(dict.fromkeys(plans[number] for plans in self._plans.values() if number in plans))


class _Token:
    """Held by an autograd node, and called before it runs."""

    def __init__(self) -> None:
        self.is_through = False

    def __call__(self, *_: Any) -> None:
        self.is_through = True


class UnderWay:
    """Whether a step is of which no recorder knows: in the middle of it none begins."""

    def __init__(self) -> None:
        self._token: weakref.ref[_Token] | None = None
        self._calls = 0

    def note(self, outputs: Any) -> None:
        """A graph gave these."""
        if self._goes_on:
            return
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            node = getattr(x, "grad_fn", None)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                token = _Token()
                node.register_prehook(token)
                self._token, self._calls = weakref.ref(token), 0
                return

    @property
    def _goes_on(self) -> bool:
        token = None if self._token is None else self._token()
        return token is not None and not token.is_through

    def is_within(self) -> bool:
        """Whether a call that begins now is one more of it."""
        self._calls += 1
        if not self._goes_on or self._calls > MOST_CALLS:
            self._token = None
        return self._token is not None
