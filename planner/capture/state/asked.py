"""What a forward asked of the values of its batch, and the answers that its capture went by.

``if mask.all():`` chooses the ops of a step, and a graph has only those of one answer.  The question is kept
as a program of its own, of the batch alone: each batch is asked before it is run, and one with another answer
is for another graph.  That is what eager asks too, and costs what it costs there: a few ops on what is of the
size of a mask and, on CUDA, one wait for the device, however many questions there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture.sizes import Sizes

__all__ = ["Asked"]


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions with a yes or a no, and what was answered.

    ``program``  of the tensors ``reads`` (positions among those of the inputs), then of ``lengths``: a tuple
                 of tensors of one truth value each.
    ``lengths``  expressions of the symbols of ``sizes``; empty where sizes are fixed.
    ``which``    of each question the number of its result in that tuple.
    ``answers``, ``places``  to each question, and the line that asks it.
    ``of_values``  the answers to those that hang on values, not on sizes alone.
    """

    program: fx.GraphModule | None = None
    reads: tuple[int, ...] = ()
    lengths: tuple[Any, ...] = ()
    sizes: Sizes | None = None
    which: tuple[int, ...] = ()
    answers: tuple[bool, ...] = ()
    places: tuple[str, ...] = ()
    of_values: tuple[bool, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.which)

    def __repr__(self) -> str:
        pairs = zip(self.places, self.answers, strict=True)
        return f"Asked({'; '.join(f'{place}: {answer}' for place, answer in pairs)})"

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[bool, ...]:
        """The answers that a batch gives, by its tensors."""
        if self.program is None:
            return ()
        given = [tensors[i] for i in self.reads]
        lengths = self._lengths(*self.sizes.read(tensors)) if self.sizes is not None else ()
        with _by_itself(given):
            results = self.program(*given, *lengths)
            if len({t.device for t in results}) == 1:  # one wait for all
                truths = torch.stack(results).tolist()
            else:
                truths = [bool(t) for t in results]
        return tuple(truths[k] for k in self.which)

    def hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a batch gives the same answers; one without memory gives none that differ."""
        return self.difference(tensors) is None

    def difference(self, tensors: Sequence[torch.Tensor]) -> tuple[str, bool] | None:
        """The line whose question a batch answers otherwise, and its answer; ``None`` if there is none."""
        if not self or any(isinstance(tensors[i], _compat.FakeTensor) for i in self.reads):
            return None
        try:
            answers = self.of(tensors)
        except (RuntimeError, IndexError, ValueError):  # eager asks it only where another answer was the same
            return self.places[-1], not self.answers[-1]
        found = zip(self.places, self.answers, answers, strict=True)
        return next(((place, now) for place, was, now in found if was is not now), None)

    @cached_property
    def _lengths(self) -> Any:
        return _compat.compiled(self.lengths, () if self.sizes is None else self.sizes.symbols)


@contextlib.contextmanager
def _by_itself(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Outside of traces, meters, autograd and autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_compat.modes_set_aside())
        stack.enter_context(_compat.no_python_kernels())
        stack.enter_context(torch.no_grad())
        for kind in {t.device.type for t in tensors}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
