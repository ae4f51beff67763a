"""How tensors carry rows, and whether operands of a call carry the same ones.

A tensor *carries rows* where its leading dims, flattened, are the tokens: ``(batch, sequence, vocabulary)``
carries ``batch * sequence``.  Over some of the rows it is a tensor ``(rows, *rest)``, whatever its leading
dims were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from planner.capture import meta

__all__ = ["ROWS_LAST", "Carried", "InRows", "Rows", "aligned", "first_of", "lead_of", "met", "shape_of"]


@dataclass(frozen=True)
class Rows:
    """How a tensor carries rows: in its first ``lead`` dims or, a matrix turned round, in its last.

    ``padded``  it has more rows than are worked on, and the others are zero.
    """

    lead: int = 1
    turned: bool = False
    padded: bool = False


ROWS_LAST = -1  # of a matrix from outside that carries rows in its last dim


@dataclass(frozen=True, eq=False)
class InRows:
    """How one call is made for some of the rows.

    ``rows``    how its result carries them; ``None``: it sums over them.
    ``args``    its arguments for so many rows, of the nodes that the whole call reads.
    ``sliced``  operands from outside that carry rows, and in how many leading dims (``ROWS_LAST``).
    ``single``  operands from outside whose leading dims are ones, and how many dims stay behind them.
    ``is_end``  whether its result is no longer of the loss: the product that goes back into the model.
    ``padded``  whether what it reads from outside has the rows that a padded tensor has.
    """

    rows: Rows | None
    args: Callable[[int], tuple[Any, ...]]
    sliced: Mapping[fx.Node, int] = field(default_factory=dict)
    single: Mapping[fx.Node, int] = field(default_factory=dict)
    is_end: bool = False
    padded: bool = False


# Node -> how it carries rows; ``None``: not at all.
Carried = Callable[[fx.Node], Rows | None]


def lead_of(shape: Sequence[int], count: int) -> int | None:
    """In how many leading dims a shape carries ``count`` rows; ``None``: in none."""
    return next((k for k in range(1, len(shape) + 1) if math.prod(shape[:k]) == count), None)


def met(
    nodes: Sequence[fx.Node], made: tuple[int, ...], lead: int
) -> tuple[dict[fx.Node, int], dict[fx.Node, int]] | None:
    """Of operands from outside those that carry rows, and those with ones there; ``None``: neither."""
    sliced: dict[fx.Node, int] = {}
    single: dict[fx.Node, int] = {}
    for n in nodes:
        shape = shape_of(n)
        rest = len(made) - lead
        if len(shape) == len(made) and shape[:lead] == made[:lead]:
            sliced[n] = lead
        elif len(shape) > rest:
            if set(shape[: len(shape) - rest]) != {1}:
                return None
            single[n] = rest
    return sliced, single


def aligned(carried: Carried, operands: Sequence[Any]) -> tuple[Rows, dict[fx.Node, int]] | None:
    """Operands that all carry the same rows: how, and those of them that are from outside."""
    nodes = [n for n in operands if isinstance(n, fx.Node)]
    own = [r for n in nodes if (r := carried(n)) is not None]
    if not own or any(r.turned or r.lead != own[0].lead for r in own):
        return None
    lead = own[0].lead
    leads = {shape_of(n)[:lead] for n in nodes}
    if len(leads) != 1:
        return None
    return own[0], {n: lead for n in nodes if carried(n) is None}


def shape_of(node: Any) -> tuple[int, ...]:
    """The sizes of the tensor that it makes."""
    return tuple(meta.tensor(node).shape)


def first_of(node: fx.Node) -> fx.Node:
    """Its first operand."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x
