"""One problem over a step in regions, and the way from its schedules back to each region's own.

The joined graph has the ops of every call of a region, in the order in which the step ran them, and between
them an op for each stretch of the user's own code ("glue").  A region's values are its own: only its own
forward and backward can make them again.  What passes from one to another (a *crossing*) is one value, made
once, since other code holds that very storage, and there at least as long as it was in the recorded step.

:mod:`planner.regions.join` makes it of a record.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx, nn

from planner.capture.inputs import Inputs
from planner.costs.op_costs import Costs
from planner.graph.captured import fingerprint_of
from planner.graph.step_graph import BETWEEN
from planner.graph.training_graph import TrainingGraph
from planner.regions.record import Record, RegionCall, Sizes

__all__ = ["Joined", "Own", "RecordedStep", "in_order", "numbers_of", "parts"]

# What a call runs: positions in its own graph, and how many of them are the forward's.
Own = tuple[Sequence[int], int]


@dataclass(frozen=True, eq=False)
class Joined:
    """A step in regions as one graph.

    ``graph``     of the whole step; ``costs`` of its ops, with glue's measured seconds.
    ``owners``    per op the number of the call that it is of, and its position in the graph of that;
                  ``None`` for what no region runs.
    ``event_of``  per op the event that it first runs in, ascending.
    ``recorded``  positions in ``graph.ops`` as the recorded step ran them.
    ``sizes``     what the step and those before it held; ``graph`` and ``costs`` have what may come.
    ``values``    of each call, value of its graph -> value of ``graph``.
    """

    record: Record
    graph: TrainingGraph
    costs: Costs
    owners: tuple[tuple[int, int] | None, ...]
    event_of: tuple[int, ...]
    recorded: tuple[int, ...]
    sizes: Sizes
    values: tuple[Mapping[int, int], ...]

    def __repr__(self) -> str:
        return f"Joined({len(self.record.calls)} calls of regions, {self.graph!r})"

    @cached_property
    def windows(self) -> tuple[tuple[int, int | None], ...]:
        """Of each call its forward's event and its backward's, ``None`` if it had none."""
        return tuple(self.record.events_of(number) for number in range(len(self.record.calls)))

    def bounds(self, call: int) -> tuple[int, ...]:
        """Bytes that each value of a call's graph may have, for a plan of this step to be one for it."""
        own = self.values[call]
        return tuple(
            max(value.bytes, self.graph.values[own[v]].bytes if v in own else 0)
            for v, value in enumerate(self.record.calls[call].graph.values)
        )

    def resized(self, graphs: Mapping[int, TrainingGraph]) -> TrainingGraph:
        """``graph`` where calls, by number, are of other sizes; what passes between them is no smaller."""
        values = list(self.graph.values)
        for call, graph in graphs.items():
            passed = numbers_of(self.record.calls[call], self.record.calls[call].gives, made=True)
            for v, k in self.values[call].items():
                owner = None if values[k].producer is None else self.owners[values[k].producer or 0]
                size = graph.values[v].bytes
                own = owner is not None and owner[0] == call and v not in passed
                if own or (values[k].producer is not None and size > values[k].bytes):
                    values[k] = replace(values[k], bytes=size)
        return replace(self.graph, values=tuple(values))

    def sizes_at(self, graphs: Mapping[int, TrainingGraph]) -> Sizes:
        """What a step holds whose calls, by number, are of other sizes."""
        most = list(self.sizes.most)
        for call, graph in graphs.items():
            for v, k in self.values[call].items():
                if self.graph.values[k].producer is not None:
                    most[k] = graph.values[v].bytes
        return replace(self.sizes, count=1, most=tuple(most), least=tuple(most))

    def as_run(self, own: Mapping[int, Own]) -> list[int]:
        """The whole step, in which each call runs what is said, or what it was recorded with."""
        place = {owner: i for i, owner in enumerate(self.owners) if owner is not None}
        return [i for i, _ in in_order(self.record, self.owners, self.event_of, place, own)]

    def named(self, sequence: Sequence[str]) -> list[int] | None:
        """The steps of a plan for a step such as this, by the names of its ops; ``None``: it has others.

        What its glue did lies where this step's does: how that is cut may differ between two processes.
        """
        owned = zip(self.graph.ops, self.owners, strict=True)
        place = {op.name: i for i, (op, owner) in enumerate(owned) if owner is not None}
        own = [name for name in sequence if name.partition("/")[0] not in BETWEEN]
        if set(own) != place.keys():
            return None
        return self.as_run(dict(enumerate(parts(self, [place[name] for name in own]))))

    def normal(self, steps: Sequence[int]) -> list[int]:
        """``steps`` with every recomputation where its region can run it.

        Between a call's forward and its backward it cannot: what is made again there is made when the
        backward begins.  What is made again behind the backward is left out, for nobody reads it.
        """
        return [i for i, _ in self.placed(steps)]

    def placed(self, steps: Sequence[int]) -> list[tuple[int, int]]:
        """:meth:`normal`, with the event that each step runs in."""
        firsts = list(dict.fromkeys(steps))
        events = [self.event_of[i] for i in firsts]
        out: list[tuple[int, int]] = []
        waiting: dict[int, list[int]] = {}  # by call: what runs when its backward begins

        def begin(call: int, event: int) -> None:
            out.extend((i, event) for i in waiting.pop(call, ()))

        k = 0
        for i in steps:
            if k < len(firsts) and i == firsts[k]:
                for call in [c for c in waiting if (self.windows[c][1] or 0) <= events[k]]:
                    begin(call, self.windows[call][1] or 0)
                out.append((i, events[k]))
                k += 1
                continue
            owner, last, following = self.owners[i], events[k - 1], events[min(k, len(events) - 1)]
            if owner is None:  # runs once; whoever judges the schedule says so
                out.append((i, last))
                continue
            forward, backward = self.windows[owner[0]]
            if last <= forward <= following:
                out.append((i, forward))
            elif backward is not None and last <= backward <= following:
                begin(owner[0], backward)
                out.append((i, backward))
            elif backward is not None and last < backward:
                waiting.setdefault(owner[0], []).append(i)
        return out


def parts(joined: Joined, steps: Sequence[int]) -> list[tuple[list[int], int]]:
    """What each call runs of a schedule of the joined ops: positions in its own graph, and its turn.

    As :func:`planner.rewrite.emit.emit` takes them: ``emit(call.graph, steps, turn=turn)``.
    """
    found: list[tuple[list[int], int]] = [([], 0) for _ in joined.record.calls]
    for i, event in joined.placed(steps):
        owner = joined.owners[i]
        if owner is not None:
            call, position = owner
            own, turn = found[call]
            own.append(position)
            found[call] = own, turn + (event == joined.windows[call][0])
    return found


def in_order(
    record: Record,
    owners: Sequence[tuple[int, int] | None],
    event_of: Sequence[int],
    place: Mapping[tuple[int, int], int],
    own: Mapping[int, Own],
) -> list[tuple[int, int]]:
    """Ops of a step as they run, and the event of each: of a call as ``own`` says, or as it was recorded.

    ``place``  of a call's op, by number of the call and position in its graph.
    """
    ran: list[tuple[int, int]] = []
    between: dict[int, list[int]] = defaultdict(list)
    for i, (owner, event) in enumerate(zip(owners, event_of, strict=True)):
        if owner is None:
            between[event].append(i)
    for event, what in enumerate(record.events):
        if what.call is not None:
            call = record.calls[what.call]
            steps, turn = own.get(what.call, (call.steps, call.turn))
            now = steps[:turn] if what.kind == "forward" else steps[turn:]
            ran += [(place[what.call, position], event) for position in now]
        ran += [(i, event) for i in between[event]]
    return ran


def numbers_of(call: RegionCall, of: Mapping[tuple[str, str | int], int], *, made: bool) -> dict[int, int]:
    """Value of the call's graph -> number of the crossing that it is; ``made``: of what the call makes.

    What has the storage of something it took is no crossing of its own.
    """
    graph, found = call.graph, dict[int, int]()
    nodes: dict[tuple[str, str | int], fx.Node] = {}
    if made:
        nodes.update((("output", i), node) for i, node in enumerate(graph.outputs))
        nodes.update((("gradient", key), node) for key, node in graph.gradients.items())
    else:
        nodes.update((source, node) for node, source in graph.sources.items())
    for key, k in of.items():
        v = graph.value_of[nodes[key]]
        if (graph.values[v].producer is not None) == made:
            found.setdefault(v, k)
    return found


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One training step of ``model`` on ``inputs``, as it was seen to run in regions."""

    model: nn.Module
    inputs: Inputs
    joined: Joined

    @property
    def graph(self) -> TrainingGraph:
        """The step as ops and storages."""
        return self.joined.graph

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the regions, their order and what passes between them; not of what was measured, nor of
        how glue is cut.
        """
        record = self.joined.record
        h = hashlib.sha256()
        known: dict[int, str] = {}
        for event in (e for e in record.events if e.call is not None):
            h.update(f"{event.kind}|{event.call}|{event.is_forward}\n".encode())
        for call in record.calls:
            graph = known.setdefault(id(call.graph), fingerprint_of(call.graph))
            given, taken = (sorted(of.items(), key=repr) for of in (call.gives, call.crossings))
            renamed = sorted(call.renamed.items())
            h.update(f"{call.name}|{call.path}|{graph}|{renamed}|{taken}|{given}\n".encode())
        return h.hexdigest()
