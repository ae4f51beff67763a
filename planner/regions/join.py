"""Makes one graph of a recorded step in regions (:class:`planner.regions.joined.Joined`).

What glue holds beside that is known by measurement alone.  The recorded step is played through on the joined
problem; where more was measured than comes out, the difference is held from the glue before to the glue at
which the level falls again, or is scratch of the glue it was seen in.  So the problem takes at every event at
least what was measured.

Two calls may make gradients of one parameter.  Autograd adds the second to the first in place where nothing
else holds that (``InputBuffer``), so the sum has no storage of its own; where it had, the peak that was
measured shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import fx

from planner.costs.op_costs import Costs
from planner.graph.step_graph import GLUE, GRADIENT_SUM
from planner.graph.training_graph import GraphOp, GraphValue, TrainingGraph
from planner.plans.lowering import lower
from planner.regions.joined import Joined, in_order, numbers_of
from planner.regions.record import Crossing, Record, Sizes
from solvers.core.simulate import simulate_steps

__all__ = ["BETWEEN_REGIONS", "join"]

BETWEEN_REGIONS = "(between regions)"  # where a module's path would stand, of what no region makes


def join(
    record: Record,
    known: Mapping[Any, Sizes] | None = None,
    *,
    margin: float = 1.0,
    beside: tuple[list[int], dict[int, int]] | None = None,
) -> Joined:
    """The whole step of ``record`` as one graph.

    ``known``   what steps before held, by their shape: what is as large in none of them is as large here as
                it was at most, and as much more as may be expected of one that is yet to come, or the
                share ``margin`` of it.
    ``beside``  what glue holds, where that was not measured: bytes behind each glue to the next, and scratch
                by its event.

    Raises ``ValueError`` if something is read before it is made.
    """
    table = _Table(record)
    for event in range(len(record.events)):
        table.add_event(event)
    table.hold_crossings()
    graph, costs = table.graph(), table.costs()
    ran = table.recorded()
    levels, scratch = _beside(record, graph, costs, table.glue, ran) if beside is None else beside
    glue = sorted(table.glue)
    workspaces = table.workspace_bytes
    seen = Sizes.of(
        tuple((op.name, op.inputs, op.outputs) for op in table.ops),
        [v.bytes for v in table.values],
        [workspaces[op.name] for op in table.ops],
        levels,
        [scratch[event] for event in glue],
    )
    if known is not None and seen.shape in known:
        seen = known[seen.shape].then(seen)
    sizes, workspace, levels, scratches = seen.foreseen(margin=margin)
    table.values = [
        replace(v, bytes=b) if v.bytes != b else v for v, b in zip(table.values, sizes, strict=True)
    ]
    for op, scratch_bytes in zip(table.ops, workspace, strict=True):
        workspaces[op.name] = scratch_bytes
    table.hold(_stacked(glue, levels))
    for event, scratch_bytes in zip(glue, scratches, strict=True):
        workspaces[graph.ops[table.glue[event]].name] = scratch_bytes
    return Joined(
        record,
        table.graph(),
        table.costs(),
        tuple(table.owners),
        tuple(table.event_of),
        tuple(i for i, _ in ran),
        seen,
        table.own,
    )


@dataclass
class _Held:
    """Bytes that glue holds: from the glue event ``born`` on, to the end of ``died`` or of the step."""

    born: int
    bytes: int
    died: int | None = None


class _Table:
    """The joined ops and values while they are being collected."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.ops: list[GraphOp] = []
        self.values: list[GraphValue] = []
        self.owners: list[tuple[int, int] | None] = []
        self.event_of: list[int] = []
        self.glue: dict[int, int] = {}  # event -> its op
        self.seconds: dict[str, float] = {}
        self.workspace_bytes: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._own: list[dict[int, int]] = [{} for _ in record.calls]  # value of a call's graph -> value
        self._crossing: dict[int, int] = {}
        self._there: dict[tuple[str, str], int] = {}  # parameters and buffers by their name in the model
        self._loose: list[tuple[int, int]] = []  # values that a region hands to nobody, and the event
        self._sums: list[tuple[str, int]] = []  # gradients that are yet to be added up
        self._gradients: dict[str, int] = {}
        self._given = [numbers_of(call, call.gives, made=True) for call in record.calls]
        self._taken = [numbers_of(call, call.crossings, made=False) for call in record.calls]
        self._givers = {k: number for number, given in enumerate(self._given) for k in given.values()}

    # -- events ------------------------------------------------------------------------------------

    def add_event(self, event: int) -> None:
        """Add the ops that run in it."""
        what = self.record.events[event]
        if what.call is None:
            self._add_sums(event)
            self._add_glue(event)
            return
        graph, forward = self.record.calls[what.call].graph, what.kind == "forward"
        positions = range(graph.turn) if forward else range(graph.turn, len(graph.ops))
        for index, position in enumerate(positions, len(self.ops)):
            for v in graph.ops[position].outputs:
                self._own[what.call][v] = self._made(what.call, v, index, event)
        for position in positions:
            self._add_op(what.call, position, event)
        if not forward:
            self._collect_gradients(what.call)
        self._end_region(what.call, event)

    def _add(self, op: GraphOp, event: int, owner: tuple[int, int] | None = None) -> int:
        self.ops.append(op)
        self.owners.append(owner)
        self.event_of.append(event)
        return len(self.ops) - 1

    def _value(self, value: GraphValue) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _price(self, name: str, seconds: float = 0.0, workspace_bytes: int = 0, flops: int = 0) -> None:
        self.seconds[name], self.workspace_bytes[name], self.flops[name] = seconds, workspace_bytes, flops

    def _add_glue(self, event: int) -> None:
        what = self.record.events[event]
        born = [  # a region's events begin with the glue before them, as what no region says it made
            k
            for k, crossing in enumerate(self.record.crossings)
            if k not in self._givers and not self._is_sum(crossing) and self._before(crossing.born) == event
        ]
        index, name = len(self.ops), f"{GLUE}/{len(self.glue)}"
        for k in born:
            crossing = self.record.crossings[k]
            kind = self._kind(event, final=crossing.died is None)
            final = crossing.died is None
            made = GraphValue(f"{name}/{k}", crossing.bytes, kind, index, None, final, BETWEEN_REGIONS)
            self._crossing[k] = self._value(made)
        outputs = tuple(self._crossing[k] for k in born)
        phase = "forward" if what.is_forward else "backward"
        self.glue[event] = self._add(
            GraphOp(name, None, phase, BETWEEN_REGIONS, (), outputs, recomputable=False), event
        )
        self._price(name, what.seconds)

    def _kind(self, event: int, *, final: bool) -> str:
        if self.record.events[event].is_forward:
            return "output" if final else "activation"
        return "gradient" if final else "backward"

    def _is_sum(self, crossing: Crossing) -> bool:
        """Whether it is made where a region's backward ends (:meth:`_end_region`)."""
        what = self.record.events[crossing.born]
        if what.kind != "backward" or what.call is None:
            return False
        given = self._given[what.call].values()
        return any(self.record.crossings[k].died == crossing.born for k in given)

    def _before(self, event: int) -> int:
        """The last glue that is no later than ``event``."""
        return next(e for e in range(event, -1, -1) if self.record.events[e].call is None)

    # -- regions -----------------------------------------------------------------------------------

    def _made(self, number: int, v: int, producer: int, event: int) -> int:
        """Number the storage ``v`` that the call's op makes."""
        call = self.record.calls[number]
        value = call.graph.values[v]
        made = replace(
            value,
            name=f"{call.name}/{value.name}",
            producer=producer,
            module=_path(call.path, value.module),
        )
        k = self._given[number].get(v)
        forward = self.record.events[event].kind == "forward"
        if k is not None:
            crossing = self.record.crossings[k]
            final = crossing.died is None
            kind = self._kind(event, final=final)
            made = replace(made, bytes=max(value.bytes, crossing.bytes), kind=kind, final=final)
        elif value.final and (forward or v not in self._trained(number)):
            made = replace(made, kind=self._kind(event, final=False), final=False)
        index = self._value(made)
        if k is not None:
            self._crossing[k] = index
        elif value.final and not made.final:
            self._loose.append((index, event))
        return index

    def _trained(self, number: int) -> dict[int, list[str]]:
        """The values of a call's graph that are gradients of parameters, and the names of these."""
        call = self.record.calls[number]
        found: dict[int, list[str]] = defaultdict(list)
        for key, node in call.graph.gradients.items():
            if isinstance(key, str):
                found[call.graph.value_of[node]].append(call.renamed.get(key, key))
        return found

    def _value_of(self, number: int, v: int) -> int:
        """The joined value that is ``v`` of the call's graph: made, taken, or there before the step."""
        own, call = self._own[number], self.record.calls[number]
        if v not in own:
            value, k = call.graph.values[v], self._taken[number].get(v)
            if k is not None:
                if k not in self._crossing:
                    raise ValueError(f"{call.name} reads {value.name!r}, crossing {k}, before it is made")
                own[v] = self._crossing[k]
            elif value.kind in ("parameter", "buffer"):
                name = self._name_in_model(number, v)
                if (value.kind, name) not in self._there:
                    self._there[value.kind, name] = self._value(replace(value, name=name))
                own[v] = self._there[value.kind, name]
            else:  # a gradient that never came, or one that was there before the step, takes nothing of it
                there = 0 if value.kind == "tangent" else value.bytes
                own[v] = self._value(replace(value, name=f"{call.name}/{value.name}", bytes=there))
        return own[v]

    def _name_in_model(self, number: int, v: int) -> str:
        name = self.record.calls[number].graph.values[v].name
        return self.record.calls[number].renamed.get(name, name)

    def _add_op(self, number: int, position: int, event: int) -> None:
        call, own = self.record.calls[number], self._own[number]
        op = call.graph.ops[position]
        held = any(self.values[own[v]].final or v in self._given[number] for v in op.outputs)
        joined = replace(
            op,
            name=f"{call.name}/{op.name}",
            module=_path(call.path, op.module),
            inputs=tuple(dict.fromkeys(self._value_of(number, v) for v in op.inputs)),
            outputs=tuple(own[v] for v in op.outputs),
            # an output that nobody took is a value as others are
            recomputable=op.recomputable or (position in call.graph.pinned and not held),
            workspace=None if op.workspace is None else own[op.workspace],
            reuses=None if op.reuses is None else own[op.reuses],
        )
        self._add(joined, event, (number, position))
        costs = call.costs
        of = (
            costs.seconds.get(op.name, 0.0),
            costs.workspace_bytes.get(op.name, 0),
            costs.flops.get(op.name, 0),
        )
        self._price(joined.name, *of)

    def _end_region(self, number: int, event: int) -> None:
        """What a region gave and nobody had when it had ended.

        Of a backward that are gradients of one tensor that was given twice: autograd adds them up while the
        region still runs, at the latest when it ends.
        """
        crossings = self.record.crossings
        gone = [self._crossing[k] for k in self._given[number].values() if crossings[k].died == event]
        if not gone:
            return
        if self.record.events[event].kind == "forward":
            self._loose += [(v, event) for v in gone]
            return
        name, index = f"{GRADIENT_SUM}/{event}", len(self.ops)
        for k, crossing in enumerate(crossings):
            if k not in self._givers and crossing.born == event:
                final = crossing.died is None
                kind = self._kind(event, final=final)
                made = GraphValue(f"{name}/{k}", crossing.bytes, kind, index, None, final, BETWEEN_REGIONS)
                self._crossing[k] = self._value(made)
        outputs = tuple(v for v, value in enumerate(self.values) if value.producer == index)
        reads = tuple(dict.fromkeys(gone))
        op = GraphOp(name, None, "backward", BETWEEN_REGIONS, reads, outputs, recomputable=False)
        self._add(op, event)
        self._price(name)

    # -- gradients ---------------------------------------------------------------------------------

    def _collect_gradients(self, number: int) -> None:
        """Note whose gradients a backward has made, and which are to be added to earlier ones."""
        for v, names in self._trained(number).items():
            for name in names:
                if v not in self._own[number]:
                    continue  # it has the storage of something that was there
                index = self._own[number][v]
                if name in self._gradients:
                    self._sums.append((name, index))
                else:
                    self._gradients[name] = index

    def _add_sums(self, event: int) -> None:
        """What autograd adds up between the last region and this glue."""
        for name, new in self._sums:
            old, index = self._gradients[name], len(self.ops)
            title = f"{GRADIENT_SUM}/{event}/{name}"
            value = replace(
                self.values[old], name=title, producer=index, root=None, kind="gradient", final=True
            )
            self._gradients[name] = self._value(value)
            for v in (old, new):  # now a value as others are, unless it is another parameter's gradient too
                if v not in self._gradients.values():
                    self.values[v] = replace(self.values[v], kind="backward", final=False)
            op = GraphOp(
                title,
                None,
                "backward",
                value.module,
                tuple(dict.fromkeys((old, new))),
                (self._gradients[name],),
                recomputable=False,
                reuses=None if self.values[old].final else old,
            )
            self._add(op, event)
            self._price(title)
        self._sums.clear()

    # -- how long what is held lives ---------------------------------------------------------------

    def hold_crossings(self) -> None:
        """Glue reads what it let go of in the recorded step, so that nothing is gone before."""
        reads = [(index, self._glue_after(event)) for index, event in self._loose]
        for k, index in self._crossing.items():
            died = self.record.crossings[k].died
            if died is not None:
                reads.append((index, self._before(died)))
        for index, event in reads:
            self._read(index, event)

    def _read(self, value: int, event: int) -> None:
        """The glue of ``event`` reads ``value``, unless it comes before."""
        at, producer = self.glue[event], self.values[value].producer
        op = self.ops[at]
        if producer is not None and producer < at and value not in op.inputs:
            self.ops[at] = replace(op, inputs=(*op.inputs, value))

    def _glue_after(self, event: int) -> int:
        return next(e for e in range(event, len(self.record.events)) if self.record.events[e].call is None)

    def hold(self, held: Iterable[_Held]) -> None:
        """Add what glue holds without a name."""
        for of in held:
            at, final = self.glue[of.born], of.died is None
            name = f"held/{self.ops[at].name.partition('/')[2]}"
            kind = self._kind(of.born, final=final)
            kind = kind if kind == "gradient" else "held"
            index = self._value(GraphValue(name, of.bytes, kind, at, None, final, BETWEEN_REGIONS))
            self.ops[at] = replace(self.ops[at], outputs=(*self.ops[at].outputs, index))
            if of.died is not None:
                self._read(index, of.died)

    # -- the result --------------------------------------------------------------------------------

    @property
    def own(self) -> tuple[Mapping[int, int], ...]:
        """Of each call, value of its graph -> value here."""
        return tuple(self._own)

    def recorded(self) -> list[tuple[int, int]]:
        """The recorded step: ops, and the event that each ran in."""
        place = {owner: i for i, owner in enumerate(self.owners) if owner is not None}
        return in_order(self.record, self.owners, self.event_of, place, {})

    def graph(self) -> TrainingGraph:
        """What there is so far, as a graph."""
        behind = (e for e, what in enumerate(self.record.events) if not what.is_forward)
        first = next(behind, len(self.record.events))
        turn = next((i for i, event in enumerate(self.event_of) if event >= first), len(self.ops))
        calls = self.record.calls
        constants = {f"{call.name}/{k}": t for call in calls for k, t in call.graph.constants.items()}
        return TrainingGraph(
            tuple(self.ops),
            tuple(self.values),
            turn,
            fx.Graph(),
            {},
            {},
            (),
            {},
            {},
            constants,
            calls[0].graph.device,
            tuple(t for call in calls for t in call.graph.loss_tensors),
        )

    def costs(self) -> Costs:
        """What it costs; a graph that is called twice has its distinct ops once."""
        each = list({id(call.graph): call.costs for call in self.record.calls}.values())
        return replace(
            each[0],
            seconds=dict(self.seconds),
            workspace_bytes=dict(self.workspace_bytes),
            flops=dict(self.flops),
            signatures=sum(costs.signatures for costs in each),
            estimated=sum(costs.estimated for costs in each),
        )


def _path(above: str, below: str) -> str:
    return f"{above}.{below}" if above and below else above or below


def _beside(
    record: Record,
    graph: TrainingGraph,
    costs: Costs,
    glue: Mapping[int, int],
    ran: Sequence[tuple[int, int]],
) -> tuple[list[int], dict[int, int]]:
    """What was measured beyond what the joined ops make of the recorded step.

    Bytes held behind each glue, to the next one, and bytes of scratch by glue event.
    """
    steps = [i for i, _ in ran]
    problem = lower(graph, costs, resident_bytes=0, name="recorded step").as_run(steps)
    line = simulate_steps(problem, steps)
    peak = [0] * len(record.events)
    kept = [0] * len(record.events)
    at_glue: dict[int, int] = {}
    now = 0
    by_event: dict[int, list[int]] = defaultdict(list)
    for t, (_, event) in enumerate(ran):
        by_event[event].append(t)
    for event in range(len(record.events)):
        own = by_event[event]
        peak[event] = max((int(line.live_bytes[t]) for t in own), default=now)
        now = kept[event] = int(line.kept_bytes[own[-1]]) if own else now
        if event in glue:
            at_glue[event] = int(line.live_bytes[own[-1]])
    starts = sorted(glue)
    levels: list[int] = []
    for first, behind in pairwise([*starts, len(record.events)]):
        above = [record.events[e].live_bytes - kept[e] for e in range(first, behind)]
        above += [record.events[e].peak_bytes - peak[e] for e in range(first + 1, behind)]
        levels.append(max(0, *above))
    scratch: dict[int, int] = {}
    for event, level, before in zip(starts, levels, [0, *levels[:-1]], strict=True):
        scratch[event] = max(0, record.events[event].peak_bytes - at_glue[event] - max(level, before))
    return levels, scratch


def _stacked(glue: Sequence[int], levels: Sequence[int]) -> list[_Held]:
    """Values whose bytes add up to ``levels[j]`` behind the ``j``-th glue; the last to come goes first."""
    found: list[_Held] = []
    stack: list[_Held] = []
    now = 0
    for event, level in zip(glue, levels, strict=True):
        if level > now:
            stack.append(_Held(event, level - now))
        fall = now - level
        while fall > 0:
            top = stack.pop()
            gone = min(fall, top.bytes)
            found.append(_Held(top.born, gone, event))
            if top.bytes > gone:
                stack.append(_Held(top.born, top.bytes - gone))
            fall -= gone
        now = level
    return found + stack
