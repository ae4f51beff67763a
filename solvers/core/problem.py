"""The rematerialization problem: a DAG of operations, the bytes of their values, and an order.

An :class:`Op` reads values and makes values.  A :class:`Value` occupies ``bytes`` from the step
that computes it until its last use.  Any op that is not pinned may run again later, so that a
value can be dropped in between.  The question is which ops to run again, and when, so that the
bytes alive at any moment stay within a budget and the extra seconds are least.

Nothing here is particular to training.  A joint forward/backward graph sets ``turn``, the number
of ops that come before the backward pass; a general DAG leaves it ``None``.

Sources: the problem is that of Griewank and Walther (2000) for chains, of Jain et al. ("Checkmate",
MLSys 2020) for DAGs.  The memory model follows the executor that runs the answer: while an op
runs, its inputs, its outputs, its workspace and every other live value are resident.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx

__all__ = ["Op", "Problem", "ProblemError", "Value"]

# The simulator counts in 64 bits, and may have two copies of a value at once.
_MOST_BYTES = 2**62


class ProblemError(ValueError):
    """The problem is malformed; the message names the op or value and what is wrong with it."""


@dataclass(frozen=True)
class Value:
    """What an op makes, or what is there from the start.

    ``bytes``     size of its storage.
    ``producer``  index of the op that makes it; ``None`` for a source, which is always resident and
                  is accounted for in ``Problem.resident_bytes``, not here.
    ``final``     it must be alive when the schedule ends, and never dies once computed.
    ``replay_only``  held only where a reader of it runs more than once; counted as 0 bytes in a schedule
                  where none does.  So is the state of a random generator before a random op: a first run
                  draws from the generator itself, only a replay starts from the state.
    """

    name: str
    bytes: int
    producer: int | None = None
    final: bool = False
    replay_only: bool = False


@dataclass(frozen=True)
class Op:
    """One step of work.

    ``inputs``, ``outputs``   indices into ``Problem.values``, without repetition.
    ``seconds``               cost of its first execution.
    ``recompute_seconds``     cost of each further execution; ``None`` means ``seconds``.
    ``workspace_bytes``       scratch that lives only while the op runs, less the bytes of ``reuses``.
    ``reuses``                an input whose storage the op writes its result over where that input's copy
                              dies with it, so that the two are never there together; else it has its bytes.
    ``recomputable``          ``False`` pins it: it runs exactly once (mutation, collectives).
    ``group``                 label of the layer it belongs to, for solvers that cut by layers.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    workspace_bytes: int = 0
    recompute_seconds: float | None = None
    recomputable: bool = True
    group: str | None = None
    reuses: int | None = None

    @property
    def again_s(self) -> float:
        """Seconds of one further execution."""
        return self.seconds if self.recompute_seconds is None else self.recompute_seconds


@dataclass(frozen=True)
class Problem:
    """Ops in the order of their first execution, the values between them, what is always resident.

    ``ops``             in execution order; every op runs at least once.
    ``values``          indexed by the ops' ``inputs`` and ``outputs``.
    ``turn``            number of leading ops that form the forward pass, or ``None``.
    ``resident_bytes``  bytes alive throughout (parameters, inputs, optimizer state).

    Budgets and peaks always include ``resident_bytes``.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    turn: int | None = None
    resident_bytes: int = 0
    name: str = "problem"
    _index: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._index.update((op.name, i) for i, op in enumerate(self.ops))
        self.validate()

    def __len__(self) -> int:
        return len(self.ops)

    def __repr__(self) -> str:
        turn = "" if self.turn is None else f", turn={self.turn}"
        return (
            f"Problem({self.name!r}: {len(self.ops)} ops, {len(self.values)} values{turn}, "
            f"{self.total_seconds:.6g} s, {self.resident_bytes} bytes resident)"
        )

    def index(self, op_name: str) -> int:
        """Position of the op called ``op_name``; ``ProblemError`` if there is none."""
        try:
            return self._index[op_name]
        except KeyError:
            raise ProblemError(f"{self.name}: no op is called {op_name!r}") from None

    @property
    def total_seconds(self) -> float:
        """Seconds of a run in which nothing is recomputed."""
        return math.fsum(op.seconds for op in self.ops)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the ops that read it, ascending."""
        out: list[list[int]] = [[] for _ in self.values]
        for i, op in enumerate(self.ops):
            for v in op.inputs:
                out[v].append(i)
        return tuple(map(tuple, out))

    @cached_property
    def counted_inputs(self) -> tuple[tuple[int, ...], ...]:
        """For each op, its inputs that some op produces (sources left out)."""
        values = self.values
        return tuple(tuple(v for v in op.inputs if values[v].producer is not None) for op in self.ops)

    def reused_bytes(self, i: int) -> int:
        """Bytes of the input that op ``i`` may write its result over; 0 if it has none.

        Raises ``ProblemError`` where that is no input of its own that can die.
        """
        op = self.ops[i]
        if op.reuses is None:
            return 0
        if op.reuses not in op.inputs or not 0 <= op.reuses < len(self.values):
            raise ProblemError(f"{self.name}: op {op.name!r} reuses a value that it does not read")
        value = self.values[op.reuses]
        if value.final or value.producer is None:
            raise ProblemError(f"{self.name}: op {op.name!r} reuses {value.name!r}, which never dies")
        return value.bytes

    @cached_property
    def _replay_only(self) -> tuple[int, ...]:
        """The values that count only where a reader of them runs again."""
        return tuple(v for v, value in enumerate(self.values) if value.replay_only)

    def idle_values(self, runs: Sequence[int]) -> set[int]:
        """The ``replay_only`` values of which no reader runs again; ``runs``: per op, how often it runs."""
        readers = self.consumers if self._replay_only else ()
        return {v for v in self._replay_only if all(runs[i] < 2 for i in readers[v])}

    def as_run(self, steps: Iterable[int]) -> Problem:
        """What the schedule ``steps`` (op positions) is counted by: values it does not hold have 0 bytes.

        No value of the answer is ``replay_only``; without such values it is this very problem.
        """
        if not self._replay_only:
            return self
        times = Counter(steps)
        idle = self.idle_values([times[i] for i in range(len(self))])
        return self.relaxed if len(idle) == len(self._replay_only) else self._without(idle)

    @cached_property
    def worked_out(self) -> dict[Any, Any]:
        """What methods have worked out of this problem and ask for again, each under a key of its own."""
        return {}

    @cached_property
    def relaxed(self) -> Problem:
        """The problem with every ``replay_only`` value at 0 bytes; itself if it has none.

        No schedule takes more bytes in it than in this problem, and each takes the same seconds: what is
        proved of all schedules of ``relaxed`` within a budget holds of all of this problem's.
        """
        return self._without(set(self._replay_only)) if self._replay_only else self

    def _without(self, idle: set[int]) -> Problem:
        values = tuple(
            replace(value, bytes=0 if v in idle else value.bytes, replay_only=False)
            if value.replay_only
            else value
            for v, value in enumerate(self.values)
        )
        return replace(self, values=values)

    def validate(self) -> None:
        """Raise ``ProblemError`` unless every field is consistent (see the class docstrings)."""

        def bad(what: str) -> ProblemError:
            return ProblemError(f"{self.name}: {what}")

        if len(self._index) != len(self.ops):
            # The index keeps the last op of each name.
            twice = next(op.name for i, op in enumerate(self.ops) if self._index[op.name] != i)
            raise bad(f"two ops are called {twice!r}")
        if not _is_bytes(self.resident_bytes):
            raise bad(f"resident_bytes is {self.resident_bytes!r}, want an int >= 0")
        if self.turn is not None and not 0 <= self.turn <= len(self.ops):
            raise bad(f"turn is {self.turn}, want 0..{len(self.ops)}")
        makes = {(i, v) for i, op in enumerate(self.ops) for v in op.outputs}
        for v, value in enumerate(self.values):
            if not _is_bytes(value.bytes):
                raise bad(f"value {value.name!r} has bytes={value.bytes!r}, want an int >= 0")
            if value.producer is not None and (value.producer, v) not in makes:
                raise bad(f"value {value.name!r} names producer {value.producer}, which does not make it")
            if value.final and value.replay_only:
                raise bad(f"value {value.name!r} is final and replay_only: to the end it is held in any case")
        made: set[int] = {v for v, value in enumerate(self.values) if value.producer is None}
        for i, op in enumerate(self.ops):
            for label, seconds in (("seconds", op.seconds), ("recompute_seconds", op.again_s)):
                if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0):
                    raise bad(f"op {op.name!r} has {label}={seconds!r}, want a finite number >= 0")
            scratch = op.workspace_bytes if op.reuses is None else op.workspace_bytes + self.reused_bytes(i)
            if not _is_bytes(scratch):
                raise bad(f"op {op.name!r} has workspace_bytes={op.workspace_bytes!r}, want an int >= 0")
            for label, indices in (("inputs", op.inputs), ("outputs", op.outputs)):
                if len(set(indices)) != len(indices):
                    raise bad(f"op {op.name!r} repeats a value among its {label}")
                if any(not 0 <= v < len(self.values) for v in indices):
                    raise bad(f"op {op.name!r} names a value outside 0..{len(self.values) - 1}")
            for v in op.inputs:
                if v not in made:
                    raise bad(
                        f"op {op.name!r} (position {i}) reads {self.values[v].name!r} before it is made; "
                        "the order is not topological, or the graph has a cycle"
                    )
            for v in op.outputs:
                if self.values[v].producer != i:
                    raise bad(f"op {op.name!r} makes {self.values[v].name!r}, whose producer is another")
            made.update(op.outputs)
        total = self.resident_bytes + sum(value.bytes for value in self.values)
        total += max((op.workspace_bytes for op in self.ops), default=0)
        if total > _MOST_BYTES:
            raise bad(f"its values take {total} bytes in all, more than can be counted (2**62)")

    @classmethod
    def build(
        cls,
        ops: Iterable[Mapping[str, Any]],
        bytes_of: Mapping[str, int],
        *,
        final: Iterable[str] = (),
        replay_only: Iterable[str] = (),
        **fields: Any,
    ) -> Problem:
        """From ops that name their values: ``{"name", "inputs", "outputs", "seconds", ...}``.

        ``bytes_of`` maps every value's name to its bytes; a value that no op makes is a source.
        ``final`` and ``replay_only`` name the values that are.
        """
        rows = list(ops)
        producer = {v: i for i, row in enumerate(rows) for v in row["outputs"]}
        final, replayed = set(final), set(replay_only)
        names = list(bytes_of)
        number = {n: k for k, n in enumerate(names)}
        values = tuple(Value(n, bytes_of[n], producer.get(n), n in final, n in replayed) for n in names)

        def op(row: Mapping[str, Any]) -> Op:
            extra = {k: x for k, x in row.items() if k not in ("name", "inputs", "outputs")}
            ins = tuple(dict.fromkeys(number[v] for v in row["inputs"]))
            return Op(row["name"], ins, tuple(number[v] for v in row["outputs"]), **extra)

        return cls(tuple(map(op, rows)), values, **fields)

    @classmethod
    def from_networkx(cls, graph: nx.DiGraph, *, name: str | None = None) -> Problem:
        """A DAG whose nodes are ops with one value each.

        Node attributes: ``seconds`` and ``bytes`` (required); ``workspace_bytes``, ``final``,
        ``replay_only``, ``recomputable``, ``recompute_seconds``, ``group`` (optional).  Graph attributes:
        ``order`` (all nodes, topological; default: a topological sort that keeps the nodes'
        insertion order where it can), ``turn``, ``resident_bytes``.

        Raises ``ProblemError`` for a graph without directions, a cycle, a missing attribute, an incomplete
        order, or two nodes whose ``str()`` is the same.
        """
        label = name or graph.graph.get("name") or "dag"
        if not graph.is_directed():
            raise ProblemError(f"{label}: the graph is not directed")
        order = graph.graph.get("order")
        if order is None:
            rank = {n: i for i, n in enumerate(graph)}
            try:
                order = list(nx.lexicographical_topological_sort(graph, key=rank.__getitem__))
            except nx.NetworkXUnfeasible:
                edges = nx.find_cycle(graph)
                cycle = " -> ".join(str(node) for node in (*(a for a, _ in edges), edges[-1][1]))
                raise ProblemError(f"{label}: the graph has a cycle: {cycle}") from None
        order = list(order)
        if set(order) != set(graph) or len(order) != len(graph):
            raise ProblemError(
                f"{label}: graph.graph['order'] must list each of the {len(graph)} nodes once; "
                f"it has {len(order)} entries, {len(set(graph) - set(order))} nodes are missing"
            )
        position = {n: i for i, n in enumerate(order)}
        ops, values = [], []
        for i, n in enumerate(order):
            data = graph.nodes[n]
            for attribute in ("seconds", "bytes"):
                if attribute not in data:
                    raise ProblemError(f"{label}: node {n!r} has no attribute {attribute!r}")
            extra = {
                k: data[k]
                for k in ("workspace_bytes", "recomputable", "recompute_seconds", "group")
                if k in data
            }
            ins = tuple(sorted(position[p] for p in graph.predecessors(n)))
            ops.append(Op(str(n), ins, (i,), data["seconds"], **extra))
            flags = bool(data.get("final", False)), bool(data.get("replay_only", False))
            values.append(Value(str(n), data["bytes"], i, *flags))
        return cls(
            tuple(ops),
            tuple(values),
            turn=graph.graph.get("turn"),
            resident_bytes=graph.graph.get("resident_bytes", 0),
            name=label,
        )

    def to_networkx(self) -> nx.DiGraph:
        """The inverse of ``from_networkx`` where every op makes one value.

        An op with several outputs becomes one node whose ``bytes`` is their sum, and which is
        ``replay_only`` if they all are; each edge carries the ``values`` that cross it.
        """
        graph = nx.DiGraph(
            name=self.name,
            order=[op.name for op in self.ops],
            turn=self.turn,
            resident_bytes=self.resident_bytes,
        )
        for op in self.ops:
            graph.add_node(
                op.name,
                seconds=op.seconds,
                bytes=sum(self.values[v].bytes for v in op.outputs),
                workspace_bytes=op.workspace_bytes,
                recomputable=op.recomputable,
                final=any(self.values[v].final for v in op.outputs),
            )
            if op.recompute_seconds is not None:
                graph.nodes[op.name]["recompute_seconds"] = op.recompute_seconds
            if op.group is not None:
                graph.nodes[op.name]["group"] = op.group
            if op.outputs and all(self.values[v].replay_only for v in op.outputs):
                graph.nodes[op.name]["replay_only"] = True
        for v, readers in enumerate(self.consumers):
            producer = self.values[v].producer
            if producer is None:
                continue
            for reader in readers:
                edge = (self.ops[producer].name, self.ops[reader].name)
                if graph.has_edge(*edge):
                    graph.edges[edge]["values"].append(self.values[v].name)
                else:
                    graph.add_edge(*edge, values=[self.values[v].name])
        return graph


def _is_bytes(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def names_to_indices(problem: Problem, names: Sequence[str]) -> list[int]:
    """Op positions of ``names``."""
    return [problem.index(name) for name in names]
