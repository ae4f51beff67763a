"""Which plan serves a call: the one place that knows that batches come in many shapes.

:class:`PlanCache` keeps a plan per signature, or one for all calls that differ in sizes only where a plan
is for any size (:mod:`planner.runtime.variants`); the least recently used is dropped.  :class:`StepCache`
does the same for the captured steps that plans are made from, and knows when sizes are to vary.

Under one signature there are several where what the forward read was another each time: an attribute that
training changes back and forth (:class:`~planner.capture.state.watched.Watched`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from planner.plan import Plan
from planner.runtime.forward import PlannedForward
from planner.solving.priced import PricedStep
from planner.training.calls import Call, Signature
from planner.training.sharing import Room

__all__ = ["KeptPlan", "PlanCache", "StepCache"]

Key = TypeVar("Key")
Kept = TypeVar("Kept")

# Shapes of a kind captured one by one before sizes become symbols, which takes as long as three or four.
FIXED = 2

# Kinds of call whose captures are counted; a model that is given a new constant every step makes one each.
MOST_KINDS = 64


class KeptPlan(NamedTuple):
    """A plan, what runs it, and the room it was made for.

    ``any_size``  whether it serves calls of other sizes too.
    """

    plan: Plan
    runner: PlannedForward
    room: Room
    any_size: bool = False


class _Latest(Generic[Key, Kept]):
    """Several values under each key, the one last used first; at most so many in all."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[Key, list[Kept]] = OrderedDict()

    def of(self, key: Key) -> Sequence[Kept]:
        return tuple(self._by_key.get(key, ()))

    def use(self, key: Key, kept: Kept) -> None:
        """``kept``, there or new, is the one last used."""
        others = [k for k in self._by_key.get(key, ()) if k is not kept]
        self._by_key[key] = [kept, *others]
        self._by_key.move_to_end(key)

    def replace(self, old: Kept, new: Kept) -> None:
        """``new`` wherever ``old`` is, in its place."""
        for key, several in self._by_key.items():
            self._by_key[key] = [new if k is old else k for k in several]

    def trim(self, most: int) -> None:
        while sum(map(len, self._by_key.values())) > most:
            key = next(iter(self._by_key))  # under the only key that is left, the one last used goes last
            self._by_key[key].pop()
            if not self._by_key[key]:
                del self._by_key[key]


class PlanCache:
    """Plans by signature, ``most`` of them.

    ``largest``  the signature with most elements that has been planned.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.largest: Signature | None = None
        self._kept: _Latest[Signature, KeptPlan] = _Latest()

    def find(self, call: Call) -> Sequence[KeptPlan]:
        """The plans for calls like this one and what runs them, the last used first."""
        return (*self._kept.of(call.signature), *self._kept.of(call.signature.kind))

    def keep(self, call: Call, kept: KeptPlan) -> None:
        """From now on, and before others, this serves calls like ``call``."""
        self._kept.use(call.signature.kind if kept.any_size else call.signature, kept)
        self._kept.trim(self.most)
        if self.largest is None or sum(call.signature.sizes) > sum(self.largest.sizes):
            self.largest = call.signature

    def replace(self, old: KeptPlan, new: KeptPlan) -> None:
        """From now on ``new`` serves what ``old`` served."""
        self._kept.replace(old, new)

    def exceeds(self, call: Call) -> bool:
        """Whether the call has a tensor larger than the same one of ``largest``."""
        if self.largest is None:
            return False
        sizes = call.signature.sizes, self.largest.sizes
        return len(sizes[0]) != len(sizes[1]) or any(a > b for a, b in zip(*sizes, strict=True))


@dataclass
class _Kind:
    """Calls that differ in sizes only: how often one was captured as it is, and the largest such batch.

    ``elements``  of ``largest``, all tensors together.
    """

    captures: int = 0
    elements: int = -1
    largest: list[torch.Tensor] = field(default_factory=list)


class StepCache:
    """Captured steps, ``most`` of them, each under the signature that it serves.

    What is known of a kind outlives its steps, so that a small ``most`` changes only how many are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._steps: _Latest[Signature, PricedStep] = _Latest()
        self._kinds: OrderedDict[Signature, _Kind] = OrderedDict()

    def find(self, signature: Signature) -> Sequence[PricedStep]:
        """The steps for calls of this signature, captured as it is or for any size, the last used first."""
        return (*self._steps.of(signature), *self._steps.of(signature.kind))

    def is_to_vary(self, signature: Signature) -> bool:
        """Whether the next capture for this signature is better made for sizes that vary."""
        kind = self._kinds.get(signature.kind)
        return kind is not None and kind.captures >= FIXED

    def keep(self, signature: Signature, step: PricedStep) -> None:
        """From now on this step serves calls of this signature, or of its kind if sizes vary in it."""
        kind = self._kinds.setdefault(signature.kind, _Kind())
        self._kinds.move_to_end(signature.kind)
        if step.varying is None:
            kind.captures += not self._steps.of(signature)
            elements = sum(signature.sizes)
            if elements > kind.elements:
                kind.elements, kind.largest = elements, step.joint.inputs.tensors()
        self._steps.use(signature if step.varying is None else signature.kind, step)
        self._steps.trim(self.most)
        while len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)

    def largest(self, signature: Signature) -> list[torch.Tensor]:
        """The tensors of the largest batch of this kind captured as it is; empty if none is known."""
        kind = self._kinds.get(signature.kind)
        return [] if kind is None else kind.largest
