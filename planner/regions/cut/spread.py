"""Tensors that are spread over ranks (DTensors: tensor parallelism), where a region's code reads them.

A region is captured on what this rank has of them, with the collectives of its code as calls of their own,
which run once (:mod:`planner.graph.nodes`).  Inside, code sees the tensors that it was written for: each is
put together from this rank's part where the region begins, and taken apart where it ends.  What lies outside,
autograd's leaves among it, goes on with the tensors themselves.

A *layout* says how a tensor is spread: torch's own description, of a mesh, placements and whole sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner.capture.traced import Traced
from planner.errors import PlannerError
from planner.graph import kernels

__all__ = [
    "Layouts",
    "Locals",
    "Part",
    "Spreads",
    "gathered",
    "joined_up",
    "parted",
    "parts_of",
    "with_talk",
]

Layouts = Mapping[int, Any]


class Locals:
    """What this rank has of spread tensors, as tensors of their own; of a parameter the same each time."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor, nn.Parameter]] = {}

    def of(self, args: Sequence[Any], names: MutableMapping[int, str]) -> tuple[Sequence[Any], Layouts]:
        """``args`` with these, and by position the layout of each that is spread.

        ``names``  of the model's tensors, to which the new ones are added.
        """
        layouts: dict[int, Any] = {}
        out = list(args)
        for i, x in enumerate(args):
            if type(x) in _PLAIN or not isinstance(x, torch.Tensor):
                continue
            if _compat.is_spread(type(x)):
                layouts[i] = _compat.layout_of(x)
                out[i] = self._parameter(x, names) if isinstance(x, nn.Parameter) else _apart(x)
            elif _compat.is_in_flight(type(x)):
                layouts[i] = None
                out[i] = _apart(x)
        return (out, layouts) if layouts else (args, layouts)

    def _parameter(self, whole: torch.Tensor, names: MutableMapping[int, str]) -> nn.Parameter:
        here = _compat.local_of(whole)
        found = self._known.get(id(whole))
        if found is None or found[0]() is not whole or found[1] is not here:
            local = nn.Parameter(here, requires_grad=whole.requires_grad)
            self._known[id(whole)] = found = weakref.ref(whole), here, local
        local = found[2]
        if local.requires_grad != whole.requires_grad:
            local.requires_grad_(whole.requires_grad)
        name = names.get(id(whole))
        if name is not None:
            names[id(local)] = name
        return local


_PLAIN = frozenset({torch.Tensor, nn.Parameter, int, float, bool, type(None)})


def _apart(x: torch.Tensor) -> torch.Tensor:
    """What this rank has of ``x``, as a leaf."""
    return _compat.local_of(x).detach().requires_grad_(x.requires_grad)


@dataclass
class Spreads:
    """How what a region gives is spread, as a trace shows it.

    ``gradients``  by position, of those of its spread arguments; ``outputs``: by number, and ``tangents``: of
                   their gradients, where that was seen.
    ``carried``    of gradients that are no part of the whole as the argument is, but of another shape (a
                   row-wise embedding's: all rows, to be added up over the ranks), one such tensor.  No
                   gradient of autograd's can have another shape than what it is of, so that a tensor beside
                   the argument, the *carrier*, is given it in the trace.
    """

    gradients: dict[int, Any] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    tangents: dict[int, Any] = field(default_factory=dict)
    carried: dict[int, torch.Tensor] = field(default_factory=dict)

    def note(self, position: int, gradient: Any) -> None:
        """One has come."""
        layout = _compat.layout_of(gradient)
        known = self.gradients.setdefault(position, layout)
        if not _compat.alike_spread(known, layout):
            raise PlannerError(
                f"gradients of a spread argument are spread in several ways, {known} and {layout}: their sum "
                "takes a collective"
            )


@dataclass(frozen=True)
class Part:
    """An argument that is spread, of which this rank has ``local``."""

    local: torch.Tensor
    layout: Any
    position: int
    spreads: Spreads
    carrier: torch.Tensor | None

    def whole(self) -> Any:
        """The spread tensor, for one who reads it: autograd adds up what each sends back, as it does where
        there is no region.
        """
        return _Whole.apply(self.local, self.carrier, self)


class _Whole(torch.autograd.Function):
    """Inside a region: the spread tensor of which this rank has ``local``."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, carrier: torch.Tensor | None, part: Part) -> Any:
        ctx.part = part
        return _compat.spread(local.view_as(local), part.layout)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        part: Part = ctx.part
        part.spreads.note(part.position, gradient)
        here = _compat.local_of(gradient)
        if part.carrier is not None:
            return None, here, None
        if here.shape == part.local.shape:
            return here, None, None
        part.spreads.carried[part.position] = here
        return None, None, None


class _Here(torch.autograd.Function):
    """At the end of a region: what this rank has of a spread tensor, whose gradient is of ``layout``."""

    @staticmethod
    def forward(ctx: Any, whole: Any, layout: Any) -> Any:
        ctx.layout = layout
        return _compat.local_of(whole).view_as(_compat.local_of(whole))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _compat.spread(gradient, ctx.layout), None


def parts_of(
    args: Sequence[Any], layouts: Layouts, spreads: Spreads, carriers: Iterable[torch.Tensor]
) -> list[Any]:
    """``args``, what this rank has of them, with a :class:`Part` for each that is spread.

    ``carriers``  those of ``spreads.carried``, by position.
    """
    beside = dict(zip(sorted(spreads.carried), carriers, strict=False))
    return [
        x if layouts.get(i) is None else Part(x, layouts[i], i, spreads, beside.get(i))
        for i, x in enumerate(args)
    ]


def parted(outputs: Any, spreads: Spreads) -> Any:
    """``outputs`` of code with what this rank has of them, which ``spreads`` is told of."""
    number = -1

    def part(x: Any) -> Any:
        nonlocal number
        number += 1
        if not _compat.is_spread(type(x)):
            return x
        layout = spreads.outputs[number] = _compat.layout_of(x)
        if _compat.is_masked(layout):
            raise PlannerError(
                "a row-wise embedding ends a graph before it is added up over the ranks, with a mask of the "
                "rows that are here. Let its output be redistributed in the same function"
            )
        tangent = spreads.tangents.setdefault(number, _compat.gradient_layout(layout))
        return _Here.apply(x, tangent) if x.requires_grad else _compat.local_of(x)

    return _compat.pytree.tree_map_only(torch.Tensor, part, outputs)


class _Gathered(torch.autograd.Function):
    """Behind a region: the spread tensor of which it gave ``local``."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, layout: Any, tangent: Any, region: Any) -> Any:
        ctx.layout, ctx.region = tangent, region
        return _compat.spread(local, layout)

    @staticmethod
    @_compat.left_alone
    def backward(ctx: Any, gradient: Any) -> Any:
        if gradient is None:
            return None, None, None, None
        layout = _compat.layout_of(gradient)
        if not _compat.alike_spread(layout, ctx.layout):
            ctx.region.is_eager = True
            ctx.region.why = ctx.region.why or "the gradient of what it gives comes spread in another way"
            raise PlannerError(
                f"the gradient of a spread tensor came as {layout}, and was planned for as {ctx.layout}: "
                "redistributing it would talk to other ranks where the plain step does not. From the next "
                "step on this region runs as eager runs it; or make the tensor whole (full_tensor, to_local) "
                "at the end of what is planned"
            )
        return _compat.local_of(gradient), None, None, None


def gathered(flat: list[torch.Tensor], spreads: Spreads, region: Any) -> list[torch.Tensor]:
    """A region's outputs as code outside of it sees them."""
    out, tangents = spreads.outputs, spreads.tangents
    return [
        x if i not in out else _Gathered.apply(x, out[i], tangents.get(i), region) for i, x in enumerate(flat)
    ]


def joined_up(gradients: list[Any], layouts: Sequence[Any]) -> list[Any]:
    """Gradients for spread leaves; ``layouts``: of each, ``None`` where it is none."""
    return [
        g if g is None or at is None else _compat.spread(g, at)
        for g, at in zip(gradients, layouts, strict=True)
    ]


def with_talk(traced: Traced) -> None:
    """Each collective and the wait for it become one call, whose result is a storage of its own.

    A trace waits where the collective begins.  Raises ``PlannerError`` for one of several tensors.
    """
    graph = traced.module.graph
    for node in list(graph.nodes):
        if not _compat.is_collective(node.target):
            continue
        waits = [user for user in node.users if _compat.is_wait(user.target)]
        if len(waits) != 1 or len(node.users) != 1:
            raise PlannerError(f"{node.target} of several tensors at once, or without a wait for it")
        (wait,) = waits
        wait.target = kernels.collective
        wait.args, wait.kwargs = (node.target.__name__, *node.args), dict(node.kwargs)
        graph.erase_node(node)
