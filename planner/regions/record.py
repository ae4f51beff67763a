"""What one step was seen to do: which regions ran, what passed between them, what memory held beside them.

A step is a row of events: the code between regions ("glue"), a call of a region ("forward"), the backward
of that call ("backward").  Between two of the latter kinds there is always glue, perhaps empty, perhaps in
several parts; the first and the last event are glue.

Where sizes follow the data (a mask, lengths, what a miner finds), each step holds other bytes of the same
things (:class:`Sizes`).  A plan is made for the most of each that was seen, and as much beyond as the
largest of some thousand steps is to be expected beyond: where a size of ``n`` steps differed by ``spread``,
``2 * spread / sqrt(n)``.  Of normal numbers the largest of a thousand lies 3.24 deviations above the mean,
that of 4, 8, 16 or 32 lies 1.03, 1.42, 1.77 or 2.04 above it, half their spread; what is missing is 1.07,
0.64, 0.42 or 0.29 of the spread, and this is 1.00, 0.71, 0.50 or 0.35.  Of numbers drawn evenly
``spread / (n - 1)`` would do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from planner.costs.op_costs import Costs
from planner.graph.training_graph import TrainingGraph

__all__ = ["Crossing", "Event", "Record", "RegionCall", "Sizes", "beyond", "last_backwards"]


@dataclass(frozen=True)
class Event:
    """A part of the step in which one side ran.

    ``call``        the number of the region's call; ``None``: glue.
    ``peak_bytes``  most that was alive in it, on the step's device, and ``live_bytes`` what was at its end;
                    both without what the step found there (``Record.found_bytes``).
    ``seconds``     of glue, by its costs.
    ``is_forward``  whether it lies before the backward began.
    """

    kind: Literal["glue", "forward", "backward"]
    call: int | None
    peak_bytes: int
    live_bytes: int
    seconds: float
    is_forward: bool


@dataclass(frozen=True)
class Crossing:
    """A storage that a region took or gave, and that the step made.

    ``born``  the event in which it first existed; ``died`` the one in which it was freed, ``None``: it
    outlives the step.
    """

    bytes: int
    born: int
    died: int | None

    def until(self, end: int) -> Crossing:
        """The same in a step of ``end`` events: what dies behind the last one outlives the step."""
        return self if self.died is None or self.died < end else replace(self, died=None)


@dataclass(frozen=True, eq=False)
class RegionCall:
    """One call of a region, and what it took and gave.

    ``name``       unique in the step, in order of the calls: "r0", "r1".
    ``graph``      the region's step: forward and backward; ``costs`` of its ops, by name.
    ``path``       of the module it was cut from; "" for the model itself.
    ``renamed``    a parameter's or buffer's name in ``graph`` -> in the model.
    ``crossings``  source node's (kind, key) as in ``TrainingGraph.sources`` for kinds "input" and "tangent"
                   -> number of the crossing it is; one that is missing was there before the step (resident).
    ``gives``      likewise for what it makes: ("output", index of the output) and ("gradient", key of
                   ``TrainingGraph.gradients``, inputs only) -> number of the crossing.  Missing: it is
                   another name of something else (of an input, a parameter), or nobody took it.
    ``steps``      positions in ``graph.ops`` that it ran in the recorded step, ``turn`` of them in the
                   forward.
    """

    name: str
    graph: TrainingGraph
    costs: Costs
    path: str
    renamed: Mapping[str, str]
    crossings: Mapping[tuple[str, str | int], int]
    gives: Mapping[tuple[str, str | int], int]
    steps: tuple[int, ...]
    turn: int


@dataclass(frozen=True, eq=False)
class Record:
    """One step.

    ``found_bytes``  what it found on the device: parameters, buffers, inputs, gradients held; without what
                     glue freed of it, which counts as glue's.
    ``cuts``         where the forward was cut and why, a line each.

    Raises ``ValueError`` if the events are no such row, a call has not exactly one forward before at most one
    backward, or names a crossing that there is not.
    """

    events: tuple[Event, ...]
    calls: tuple[RegionCall, ...]
    crossings: tuple[Crossing, ...]
    found_bytes: int
    cuts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        glue = [event.kind == "glue" for event in self.events]
        if not self.calls or not glue or not (glue[0] and glue[-1]):
            raise ValueError("a recorded step has calls of regions, and begins and ends with glue")
        if any(not (a or b) for a, b in pairwise(glue)):
            raise ValueError("two regions follow each other without glue")
        if any((event.call is None) != (event.kind == "glue") for event in self.events):
            raise ValueError("an event is of glue or of a call")
        for number, call in enumerate(self.calls):
            kinds = [event.kind for event in self.events if event.call == number]
            numbers = {*call.crossings.values(), *call.gives.values()}
            if not numbers <= set(range(len(self.crossings))):
                raise ValueError(f"call {call.name!r} names a crossing that there is not")
            if kinds not in (["forward"], ["forward", "backward"]):
                raise ValueError(f"call {call.name!r} ran {kinds}, want a forward and at most one backward")

    def events_of(self, call: int) -> tuple[int, int | None]:
        """The events of a call's forward and of its backward; ``None``: it had none."""
        at = [e for e, event in enumerate(self.events) if event.call == call]
        return at[0], at[1] if len(at) > 1 else None

    def __repr__(self) -> str:
        peak = max(e.peak_bytes for e in self.events)
        return (
            f"Record({len(self.calls)} calls of regions, {len(self.events)} events, peak {peak} bytes over "
            f"what was found, {self.found_bytes} bytes)"
        )


def last_backwards(events: Sequence[Event]) -> list[Event]:
    """Of a call with several backwards (``retain_graph=True``) the last is its backward, others are glue."""
    last = {event.call: e for e, event in enumerate(events) if event.kind == "backward"}
    return [
        replace(event, kind="glue", call=None)
        if event.kind == "backward" and last[event.call] != e
        else event
        for e, event in enumerate(events)
    ]


def beyond(most: int, least: int, count: int) -> int:
    """Bytes that a step to come may take more than the most of ``count`` steps."""
    return math.ceil(2 * (most - least) / math.sqrt(count)) if count > 1 else 0


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes of all that steps of one shape hold: values, scratch of ops, and beside them at each glue.

    ``shape``   what steps have in common that do the same.
    ``count``   of steps.
    ``most``    likewise ``least``: over the steps, in the order in which :meth:`of` takes them.
    ``parts``   how many there are of each of the four.
    """

    shape: Hashable
    count: int
    most: tuple[int, ...]
    least: tuple[int, ...]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, shape: Hashable, *given: Sequence[int]) -> Sizes:
        """Those of one step."""
        flat = tuple(size for part in given for size in part)
        return cls(shape, 1, flat, flat, tuple(map(len, given)))

    def then(self, later: Sizes) -> Sizes:
        """With those of a later step."""
        return replace(
            self,
            count=self.count + later.count,
            most=tuple(map(max, self.most, later.most)),
            least=tuple(map(min, self.least, later.least)),
        )

    @property
    def differ(self) -> bool:
        """Whether steps held other sizes."""
        return self.most != self.least

    def foreseen(self, *, margin: float = 1.0) -> tuple[list[int], ...]:
        """What is planned for, each of the parts by itself; ``margin``: the share of :func:`beyond`."""
        pairs = zip(self.most, self.least, strict=True)
        flat = [most + math.ceil(margin * beyond(most, least, self.count)) for most, least in pairs]
        found, at = [], 0
        for size in self.parts:
            found.append(flat[at : at + size])
            at += size
        return tuple(found)

    def __repr__(self) -> str:
        differ = sum(a != b for a, b in zip(self.most, self.least, strict=True))
        return f"Sizes({self.count} steps, {differ} of {len(self.most)} differ)"
