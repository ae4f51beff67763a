"""Whether the caller still holds a model's outputs when their backward begins.

A plan that counts outputs as gone is right only in a loop that lets go of them, and one that counts them as
held wastes their bytes in a loop that does.  So the outputs of a planned call are watched: how many tensors
hold each storage when it is handed out, and how many when the backward begins.  What the plan itself has
saved of an output is among both, so the caller's share is their difference; a view, a detached copy or the
tensor itself in a list are the same to it.

An output that is held may even be there while the next call runs, where a name is only assigned again.

Of each output little is learned: one planned as held turns out to be gone, one planned as gone turns out to
be held, and then stays so, one that is held turns out to lie beside the next call's, and stays so.  The
number of plans is bounded by that, whatever the steps do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from planner import _compat
from planner.errors import InfeasibleBudgetError
from planner.options import OutputsMode
from planner.runtime.step import ExecutableStep, Lifetimes
from planner.units import bytes_text

__all__ = ["HeldOutputs"]

log = logging.getLogger(__name__)


class _Storage(NamedTuple):
    """A storage handed out: the outputs on it, and how many tensors of ours hold it."""

    outputs: tuple[int, ...]
    bytes: int
    ref: Any
    ours: int


@dataclass
class _Known:
    """What is known of outputs that are called so.

    ``released``  names of those to count as gone from now on; ``None``: no backward was seen.
    ``held``      those that were held though they had been planned as gone.
    ``kept``      those that were there when the next call returned.
    ``settled``   whether there is no plan for what was seen, and the one at hand stays.
    """

    released: frozenset[str] | None = None
    held: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    settled: bool = False


class HeldOutputs:
    """What is known of the outputs of one model's planned calls.

    ``mode``  "released": they are to be gone, and a warning says once of each that is not; "auto": that,
              and :meth:`wanted` says what to plan for from what was seen.
    """

    def __init__(self, mode: OutputsMode) -> None:
        self.mode = mode
        self.surprised = False  # whether the last backward began with outputs there that were planned as gone
        self._known: dict[tuple[str, ...], _Known] = {}
        self._said: set[str] = set()
        self._last: tuple[tuple[str, ...], list[_Storage]] = (), []  # of the last call that had its backward

    def handed_out(self, step: ExecutableStep, model_name: str, outputs: Sequence[torch.Tensor]) -> None:
        """A planned call is about to return ``outputs``; nothing else of it holds them but what it saved."""
        names, last = self._last
        self._last = (), []
        for s in last:
            if _compat.storage_uses(s.ref):
                self._known.setdefault(names, _Known()).kept.update(names[i] for i in s.outputs)
        nodes = {id(t.grad_fn): t.grad_fn for t in outputs if t.grad_fn is not None}
        if not step.watched or not nodes:
            return
        watched = []
        for group in step.watched:
            ref, size = _compat.weak_storage(outputs[group[0]])
            ours = _compat.storage_uses(ref) - len({id(outputs[i]) for i in group})
            watched.append(_Storage(group, size, ref, ours))
        look = partial(self._begins, step, model_name, watched)
        for node in nodes.values():
            node.register_prehook(look)

    def wanted(self, step: ExecutableStep) -> Lifetimes | None:
        """What to count on from now on; ``None``: on what ``step`` does."""
        lifetimes, before = self.learned(step.output_names), step.lifetimes
        if lifetimes is None or lifetimes == before or self._known[step.output_names].settled:
            return None
        fewer = lifetimes.released >= before.released and lifetimes.kept <= before.kept
        return None if fewer and not step.is_tight else lifetimes

    def learned(self, names: tuple[str, ...]) -> Lifetimes | None:
        """Until when the outputs called ``names`` are held; ``None``: no backward was seen yet."""
        known = self._known.get(names)
        if known is None or known.released is None or self.mode != "auto":
            return None
        released = frozenset(i for i, name in enumerate(names) if name in known.released)
        kept = frozenset(i for i, name in enumerate(names) if name in known.kept)
        return Lifetimes(released, kept - released)

    def settle(self, step: ExecutableStep, model_name: str, error: InfeasibleBudgetError) -> None:
        """There is no plan for what was seen, as ``error`` says: the one at hand stays."""
        known = self._known[step.output_names]
        known.settled = True
        held = ", ".join(name for name in step.output_names if name in known.held | known.kept)
        log.warning(
            "no plan for %s fits %.4g GB in a loop that holds %s through the backward, or still beside the "
            "next call; the least takes %s. The plan at hand stays, over the budget by what is held: let go "
            "of it before the backward (del outputs), or raise the budget",
            model_name,
            step.budget_bytes / 1e9,
            held,
            bytes_text(error.minimum_bytes),
        )

    def _begins(self, step: ExecutableStep, model_name: str, watched: list[_Storage], _: Any) -> None:
        """The backward begins: look once."""
        if not watched:
            return
        held = {i: s.bytes for s in watched if _compat.storage_uses(s.ref) > s.ours for i in s.outputs}
        seen = [i for s in watched for i in s.outputs]
        self._last = step.output_names, watched.copy()
        watched.clear()
        names = step.output_names
        surprising = sorted(step.lifetimes.released & held.keys())
        self.surprised = bool(surprising)
        new = [i for i in surprising if names[i] not in self._said]
        if new:
            self._said.update(names[i] for i in new)
            log.warning("%s", self._warning(model_name, step, {names[i]: held[i] for i in new}))
        if self.mode == "auto":
            known = self._known.setdefault(names, _Known())
            known.held.update(names[i] for i in surprising)
            gone = frozenset(names[i] for i in seen if i not in held)
            known.released = gone - known.held

    def _warning(self, model_name: str, step: ExecutableStep, held: dict[str, int]) -> str:
        which = ", ".join(f"{name} ({bytes_text(size)})" for name, size in held.items())
        after = (
            "From the next step on it is planned as held"
            if self.mode == "auto"
            else "Where the loop needs it, plan with outputs='held'"
        )
        return (
            f"the backward of {model_name} begins while {which} is still held, which its plan for "
            f"{step.budget_bytes / 1e9:.4g} GB counts as gone: the step may take so much more than planned. "
            "Let go of it before the backward: loss = model(**batch).loss, or del outputs; a view or a "
            f"detached copy holds it too. {after}"
        )
