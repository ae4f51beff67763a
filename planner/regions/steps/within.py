"""Gradients that a region's own code gives to its outputs, where others of them are computed from these.

In a call that runs as eager runs it, an output's node in autograd's graph is given the sum of what comes from
outside and of what the region itself sends back.  Whether anything came from outside is told by comparing it
with the latter.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from planner.capture.pieces import readers

__all__ = ["Within"]


class Within:
    """What the region of one call sends back to its own outputs.

    ``made``     its outputs; ``numbers`` of those from which others are computed; ``taken``: its arguments.
    """

    def __init__(
        self, made: Sequence[torch.Tensor], numbers: Collection[int], taken: Sequence[torch.Tensor]
    ) -> None:
        self._sent: dict[int, list[torch.Tensor]] = defaultdict(list)
        ends: dict[str | int, torch.Tensor] = {f"taken {i}": x for i, x in enumerate(taken)}
        ends.update((i, made[i]) for i in numbers)
        for node, reads in readers(ends, made) if numbers else ():
            own = {i: key for i, key in reads.items() if isinstance(key, int)}
            if own:
                node.register_hook(functools.partial(self._note, own))

    def _note(self, reads: dict[int, int], gradients: Sequence[torch.Tensor | None], _: Any) -> None:
        for i, number in reads.items():
            gradient = gradients[i]
            if gradient is not None:
                self._sent[number].append(gradient)

    def is_all(self, number: int, gradient: torch.Tensor) -> bool:
        """Whether ``gradient``, that of an output, is what the region sent back alone; zeros from outside are
        nothing.
        """
        sent = self._sent.pop(number, None)
        if not sent:
            return False
        with torch.no_grad():
            return torch.equal(functools.reduce(torch.add, sent), gradient)
