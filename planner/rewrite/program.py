"""The generated program: a forward graph, the segments of a backward, where their arguments come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import fx

__all__ = ["Argument", "Backward", "Key", "Low", "Program", "Segment", "Term"]


class Argument(NamedTuple):
    """Where an argument of a generated graph comes from.

    ``kind``   "parameter", "buffer", "input", "constant", "tangent" (``key``: its name or index), "size"
               (an integer that varies; its expression), "saved" (position in the forward's saved set) or
               "mail" (a value an earlier segment made).
    """

    kind: str
    key: str | int


class Term(NamedTuple):
    """One of the gradients that come for what a step reads several times, and which the engine adds up.

    ``of``      a parameter's name, an input's position.
    ``number``  in their order, from 1; the first one goes by ``of`` alone.
    ``part``    from 1, of one that is a sum itself, where that is parted too.
    """

    of: str | int
    number: int
    part: int = 0


class Low(NamedTuple):
    """A gradient of the copy of a parameter that autocast made; their sum is cast back.

    ``slot``    whose gradient the sum then is; ``number`` in their order.
    """

    slot: str | int | Term
    number: int


# Whose gradient something is.
Key: TypeAlias = "str | int | Term | Low"


@dataclass(frozen=True)
class Segment:
    """A contiguous part of the backward.

    ``gradients``   per leading result, whose gradient it is (a parameter's name, an input's position; parts
                    of those where they are not added up here).
    ``mail``        names of the remaining results, kept for later segments.
    ``overwrites``  arguments that it writes over.
    """

    module: fx.GraphModule
    arguments: tuple[Argument, ...]
    gradients: tuple[Key, ...]
    mail: tuple[str, ...]
    overwrites: frozenset[Argument] = frozenset()


@dataclass(frozen=True, eq=False)
class Backward:
    """The whole backward before it was cut, in aten's own calls: what its prunings are made from.

    ``arguments``  where each placeholder comes from.
    ``gradients``  node -> whose gradient it is.
    ``parts``      the calls of each segment.
    ``sized``      whether sizes vary, so that those of the fake tensors are those planned for only.
    """

    graph: fx.Graph
    arguments: dict[fx.Node, Argument]
    gradients: dict[fx.Node, str | int | Term]
    parts: tuple[tuple[fx.Node, ...], ...]
    sized: bool


@dataclass(frozen=True, eq=False)
class Program:
    """The rewritten step.

    ``forward``    returns the model's output tensors, then the saved set.
    ``segments``   the backward, in execution order; ``backward``: the same before it was cut.
    ``replays``    whether it draws some random numbers again, from the generator's state of the first time.
    ``draws``      whether its forward draws random numbers at all.
    ``updates``    buffers that the forward writes to, and whether what it makes depends on what they were.
    ``feeds``      output -> the outputs that are computed from it.
    ``consumed``   parameters whose gradients a hook takes as soon as they are handed out.
    ``alone``      outputs that may be views, on storages that nobody else has any part of.
    ``watched``    buffers that the backward reads, which must be as the forward left them.
    """

    forward: fx.GraphModule
    arguments: tuple[Argument, ...]
    outputs: int
    saved: int
    segments: tuple[Segment, ...]
    constants: dict[str, torch.Tensor]
    replays: bool
    backward: Backward
    draws: bool = False
    updates: dict[str, bool] = field(default_factory=dict)
    feeds: dict[int, frozenset[int]] = field(default_factory=dict)
    consumed: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()
    alone: frozenset[int] = frozenset()

    @property
    def code(self) -> str:
        """The whole step as Python; a call that runs again is named ``..._recomputed``."""
        parts = [f"# forward: {self.outputs} outputs, {self.saved} saved tensors", self.forward.code.strip()]
        for k, segment in enumerate(self.segments):
            parts += [f"\n# backward, segment {k + 1} of {len(self.segments)}", segment.module.code.strip()]
        return "\n".join(parts)
