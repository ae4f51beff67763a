"""The joint graph as memory sees it: operations, and the storages they make.

What is counted is storages, not tensors: a view keeps its base alive and costs nothing, so views
are folded onto their base and re-made for free wherever they are read.

A value's ``kind`` is one of ``VALUE_KINDS``; an op's ``phase`` is "forward", "loss" or "backward".
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.capture.joint_graph import JointGraph
from planner.graph import kernels
from planner.graph.chunks.chunked import Chunked
from planner.graph.nodes import (
    is_check,
    is_mutation,
    keeps_unreduced,
    roots_of,
    spare_bytes,
    talks,
    tensors_of,
)
from planner.graph.normalize import Ordered, normalize
from planner.graph.passes.slices import over_form
from planner.graph.step_graph import BETWEEN, CALLERS, DROPPED, LAST, OPTIMIZER_STEP, RELEASE

__all__ = ["VALUE_KINDS", "GraphOp", "GraphValue", "TrainingGraph", "training_graph"]

VALUE_KINDS = (
    "parameter",
    "buffer",
    "input",
    "constant",
    "tangent",
    "activation",
    "gradient",
    "output",
    "held",
    "backward",
    "loss",
)


@dataclass(frozen=True)
class GraphValue:
    """A storage.

    ``bytes``     of the storage, not of any tensor on it.
    ``producer``  index of the op that makes it; ``None`` for parameters, inputs and the like.
    ``root``      the node whose tensor is its base; every view is derived from it.
    ``final``     held by the caller until the step ends (an output, a parameter's gradient).
    ``symbolic``  expression of ``bytes``, where sizes vary.
    """

    name: str
    bytes: int
    kind: str
    producer: int | None
    root: fx.Node | None
    final: bool = False
    module: str = ""
    symbolic: Any = None


@dataclass(frozen=True)
class GraphOp:
    """One kernel call.

    ``node`` is its call; ``None`` for the gradient of the loss with respect to itself, for what the caller
    does with outputs and in hooks on gradients, and for what runs between regions.
    """

    name: str
    node: fx.Node | None
    phase: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recomputable: bool = True
    workspace: int | None = None  # value index whose bytes the call needs as scratch
    reuses: int | None = None  # value index whose storage it may write its result over, where that dies
    fused_with_previous: bool = False  # its first execution costs nothing beyond the previous op's
    scratch_bytes: int = 0  # that whoever runs it takes besides, where it is not ours

    @property
    def target(self) -> str:
        """The op's name, e.g. ``aten.mm``."""
        if self.node is None:
            what = self.name.partition("/")[0]
            return what if what in CALLERS | BETWEEN | {OPTIMIZER_STEP} else "aten.ones_like"
        packet = getattr(self.node.target, "overloadpacket", None)
        return (
            str(packet)
            if packet is not None
            else getattr(self.node.target, "__name__", str(self.node.target))
        )


@dataclass(frozen=True, eq=False)
class TrainingGraph:
    """Ops in execution order (forward, loss, backward) and the storages between them.

    ``turn``          index of the first op of the backward, the loss's backward included.
    ``graph``         the normalized fx graph of the model's own step.
    ``value_of``      value index by node of ``graph``; a view has its base's.
    ``sources``       placeholder -> (kind, name), in graph order.
    ``outputs``       node per tensor leaf of the model's output.
    ``gradients``     parameter name, or input position -> node.
    ``tangents``      index of an output -> placeholder of its gradient.
    ``constants``     tensors the trace baked in, by placeholder name.
    ``loss_tensors``  tensors that ``loss_fn`` holds itself: targets in a closure, weights of a module.
    ``released``      indices of the outputs that the caller lets go of at the turn (:meth:`releasing`).
    ``kept``          indices of the outputs that it holds until the next call has returned.
    ``pinned``        ops that run once only because the caller holds what they make.
    ``chunked``       losses that are computed in chunks.
    """

    ops: tuple[GraphOp, ...]
    values: tuple[GraphValue, ...]
    turn: int
    graph: fx.Graph
    value_of: dict[fx.Node, int]
    sources: dict[fx.Node, tuple[str, str | int]]
    outputs: tuple[fx.Node, ...]
    gradients: dict[str | int, fx.Node]
    tangents: dict[int, fx.Node]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loss_tensors: tuple[torch.Tensor, ...] = ()
    released: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    pinned: frozenset[int] = frozenset()
    chunked: tuple[Chunked, ...] = ()
    holding: TrainingGraph | None = field(default=None, repr=False)  # the same with all outputs held

    @cached_property
    def releasable(self) -> frozenset[int]:
        """Indices of the outputs whose storages are the step's own, and die if the caller lets go of them.

        A loss that the backward starts from is held until it is over.
        """
        apart = {self.value_of[node] for node in self.gradients.values()}
        for i, tangent in self.tangents.items():
            output, seed = self.value_of[self.outputs[i]], self.value_of.get(tangent)
            producer = None if seed is None else self.values[seed].producer
            starts = producer is not None and self.ops[producer].node is None
            if seed is not None and starts and self.values[seed].bytes == self.values[output].bytes:
                apart.add(output)
        values = [self.value_of[node] for node in self.outputs]
        return frozenset(
            i for i, v in enumerate(values) if self.values[v].kind == "output" and v not in apart
        )

    def releasing(self, outputs: Collection[int], kept: Collection[int] = ()) -> TrainingGraph:
        """The same step where the caller lets go of these outputs (indices) when it has them all.

        That is at the end of the forward or, where the graph has the loss, when the loss has read them.  Such
        an output is then an ordinary value, saved or recomputed, but that what the loss saves of it the loss
        keeps.  Outputs that share a storage are let go of together or not at all.

        ``kept``: of the others those that it holds until the next call has returned, so that each forward
        runs beside what the last one made.
        """
        held = self.holding or self
        value = [held.value_of[node] for node in held.outputs]
        others = {v for i, v in enumerate(value) if i not in outputs}
        released = frozenset(i for i in held.releasable if i in outputs and value[i] not in others)
        beside = frozenset(i for i in held.releasable if i in kept and i not in released)
        return held if not released and not beside else _lived(held, released, beside)

    def moved(self, base: str, path: str) -> TrainingGraph:
        """The same step where the code that was captured below ``base`` runs below ``path``."""
        if base == path:
            return self

        def there(module: str) -> str:
            inside = module == base or module.startswith(f"{base}." if base else "")
            return (path + module[len(base) :]).lstrip(".") if inside else module

        return replace(
            self,
            ops=tuple(replace(op, module=there(op.module)) for op in self.ops),
            values=tuple(replace(value, module=there(value.module)) for value in self.values),
        )

    def __repr__(self) -> str:
        forward = sum(op.phase == "forward" for op in self.ops)
        made = sum(v.bytes for v in self.values if v.producer is not None)
        return (
            f"TrainingGraph({len(self.ops)} ops, {forward} of them forward; "
            f"{len(self.values)} storages, {made} bytes made)"
        )


def training_graph(joint: JointGraph) -> TrainingGraph:
    """Restate ``joint`` as ops and storages.

    Raises ``TraceError`` if an output or a buffer depends on output gradients.
    """
    normalized = normalize(joint)
    step = normalized.step
    table = _Table(step.device, step.storage_bytes)
    for node, (kind, name) in step.sources.items():
        table.add_source(node, kind, str(name))
    for node in step.forward:
        table.add_call(node, "forward", step.pinned)
    loss_tensors: tuple[torch.Tensor, ...] = ()
    if normalized.loss is not None:
        loss_tensors = _splice_loss(step, table, normalized.loss)
        turn = next(i for i, op in enumerate(table.ops) if op.phase == "backward")
    else:
        turn = len(table.ops)
        if joint.sees_loss:
            ((_, tangent),) = step.tangents.items()
            table.add_seed(tangent)
    for node in step.backward:
        table.add_call(node, "backward", step.pinned)
    table.hold_together(step.tangents.values())
    for node in step.outputs:
        table.hold(node, "output")
    for node in step.gradients.values():
        table.hold(node, "gradient")
    ops, pinned = table.finished_ops()
    return TrainingGraph(
        tuple(ops),
        tuple(table.finished_values()),
        turn,
        step.graph,
        table.value_of,
        step.sources,
        step.outputs,
        step.gradients,
        step.tangents,
        step.constants,
        table.device,
        loss_tensors,
        pinned=frozenset(pinned),
        chunked=step.chunked,
    )


def _lived(held: TrainingGraph, released: frozenset[int], kept: frozenset[int]) -> TrainingGraph:
    """``held`` with what the caller does with its outputs as ops of their own; see ``releasing``."""
    gone, beside = ({held.value_of[held.outputs[i]] for i in of} for of in (released, kept))
    old = tuple(range(len(held.values), len(held.values) + len(beside)))
    at = held.turn
    inserted: list[tuple[int, GraphOp]] = []
    if old:
        behind = next((i for i, op in enumerate(held.ops) if op.phase != "forward"), at)
        inserted.append((0, GraphOp(LAST, None, "forward", "", (), old, recomputable=False)))
        inserted.append((behind, GraphOp(DROPPED, None, "loss", "", old, (), recomputable=False)))
    if gone:
        inserted.append((at, GraphOp(RELEASE, None, "loss", "", tuple(sorted(gone)), (), recomputable=False)))
    ops: list[GraphOp] = []
    number: list[int] = []
    for i, op in enumerate((*held.ops, None)):
        ops += [new for place, new in inserted if place == i]
        if op is not None:
            free = i in held.pinned and all(v in gone or not held.values[v].final for v in op.outputs)
            number.append(len(ops))
            ops.append(replace(op, recomputable=True) if free else op)
    theirs = [i for i, op in enumerate(ops) if op.phase == "loss"]
    for v in gone:  # nothing of ours runs within the loss, so what it reads later is not made again there
        last = max(i for i in theirs if v in ops[i].inputs)
        for i in range(theirs[0], last + 1):
            if v not in ops[i].inputs:
                ops[i] = replace(ops[i], inputs=(*ops[i].inputs, v))
    values = [
        replace(
            value,
            producer=None if value.producer is None else number[value.producer],
            final=value.final and v not in gone,
        )
        for v, value in enumerate(held.values)
    ]
    for v in sorted(beside):
        value = held.values[v]
        values.append(
            GraphValue(f"last/{value.name}", value.bytes, "output", 0, None, symbolic=value.symbolic)
        )
    return replace(
        held,
        ops=tuple(ops),
        values=tuple(values),
        turn=at + len(inserted),
        released=released,
        kept=kept,
        holding=held,
    )


def _splice_loss(step: Ordered, table: _Table, loss: Ordered) -> tuple[torch.Tensor, ...]:
    """``loss_fn`` runs in eager between the model's forward and backward; its ops never run again.

    Returns the tensors that it holds itself.
    """
    for source, (kind, name) in loss.sources.items():
        if kind == "input":
            table.alias(source, step.outputs[int(name)])
        elif kind != "tangent":
            table.add_source(source, kind, f"loss/{name}")
    for node in loss.forward:
        table.add_call(node, "loss", None, prefix="loss/")
    ((_, seed),) = loss.tangents.items()
    table.add_seed(seed)
    for node in loss.outputs:
        table.hold(node, "output")
    for _, formula in itertools.groupby(loss.backward, meta.formula):
        first = len(table.ops)
        for node in formula:
            table.add_call(node, "loss", None, prefix="loss/")
        table.hold_through(first)
    for index, tangent in step.tangents.items():
        gradient = loss.gradients.get(index)
        if gradient is not None:
            table.alias(tangent, gradient)
    return tuple(loss.constants.values())


class _Table:
    """Numbers for storages and ops while they are being collected."""

    def __init__(self, device: torch.device, storage_bytes: Mapping[int, Any]) -> None:
        self.device = device
        self.storage_bytes = dict(storage_bytes)
        self.ops: list[GraphOp] = []
        self.values: list[GraphValue] = []
        self.value_of: dict[fx.Node, int] = {}
        self._by_storage: dict[int, int] = {}
        self._held: dict[int, str] = {}
        self._module = ""
        self._keep: list[torch.Tensor] = []  # storage identities are addresses: keep them unique

    def _value(self, tensor: torch.Tensor, name: str, kind: str, producer: int | None, root: fx.Node) -> int:
        index = len(self.values)
        key = _compat.storage_key(tensor)
        self._by_storage[key] = index
        self._keep.append(tensor)
        here = tensor.device == self.device
        counted = tensor.untyped_storage().nbytes() if here else 0
        symbolic = self._symbolic_bytes(key, root) if here else None
        like = keeps_unreduced(root) if here else None
        if like is not None:
            whole = meta.tensor(like)
            counted = whole.numel() * tensor.element_size()
            dense = whole.untyped_storage().nbytes() == counted
            symbolic = self.storage_bytes.get(_compat.storage_key(whole)) if dense else None
        spare = spare_bytes(root) if here else 0
        counted, symbolic = counted + spare, None if symbolic is None else symbolic + spare
        module = meta.module(root) or self._module
        self.values.append(GraphValue(name, counted, kind, producer, root, module=module, symbolic=symbolic))
        return index

    def _symbolic_bytes(self, key: int, root: fx.Node) -> Any:
        """Of a gradient's copy, which the trace did not make, those of the leaf it is laid out like."""
        if key not in self.storage_bytes and root.target is kernels.gradient_like:
            leaf = root.args[1]
            assert isinstance(leaf, fx.Node)
            key = _compat.storage_key(meta.tensor(leaf))
        return self.storage_bytes.get(key)

    def add_source(self, node: fx.Node, kind: str, name: str) -> None:
        tensor = meta.value(node)
        if not isinstance(tensor, torch.Tensor):
            return
        if kind != "constant" and _compat.storage_key(tensor) in self._by_storage:
            self.value_of[node] = self._by_storage[_compat.storage_key(tensor)]
            return
        self.value_of[node] = self._value(tensor, name, kind, None, node)

    def add_seed(self, tangent: fx.Node) -> None:
        """The ones that ``loss.backward()`` starts from; alive until it returns."""
        tensor = meta.tensor(tangent)
        if tangent in self.value_of:
            old = self.value_of[tangent]
            self.values[old] = GraphValue("", 0, "tangent", None, None)
        index = self._value(tensor, "ones_like_loss", "backward", len(self.ops), tangent)
        self.value_of[tangent] = index
        self._held[index] = "backward"
        self.ops.append(GraphOp("ones_like_loss", None, "backward", "", (), (index,), recomputable=False))

    def hold_through(self, first: int) -> None:
        """The ops from ``first`` on are one autograd formula: what it reads and makes lives through it."""
        together = self.ops[first:]
        if len(together) > 1:
            last = together[-1]
            touched = [v for op in together for v in (*op.inputs, *op.outputs) if v not in last.outputs]
            self.ops[-1] = replace(last, inputs=tuple(dict.fromkeys((*last.inputs, *touched))))

    def hold_together(self, tangents: Iterable[fx.Node]) -> None:
        """The engine hands all output gradients to one node and holds them until that has used the last."""
        given = {self.value_of[node] for node in tangents if node in self.value_of}
        readers = [i for i, op in enumerate(self.ops) if op.phase == "backward" and given & {*op.inputs}]
        if len(given) > 1 and readers:
            last = self.ops[readers[-1]]
            self.ops[readers[-1]] = replace(last, inputs=tuple(dict.fromkeys((*last.inputs, *sorted(given)))))

    def alias(self, node: fx.Node, other: fx.Node) -> None:
        """``node`` of one graph is ``other`` of the other graph."""
        old = self.value_of.get(node)
        if old is not None:
            self.values[old] = GraphValue("", 0, self.values[old].kind, None, None)
        self.value_of[node] = self.value_of[other]
        self._by_storage[_compat.storage_key(meta.tensor(node))] = self.value_of[other]
        self._keep.append(meta.tensor(node))

    def add_call(
        self, node: fx.Node, phase: str, pinned: Collection[fx.Node] | None, prefix: str = ""
    ) -> None:
        """Number the storages ``node`` makes; one that makes none, changes none and checks none is a view."""
        module = meta.module(node)
        self._module = self._module if module is None else module
        over = meta.over(node)
        if over is not None:  # the fake result, and every view of it, has a storage of its own
            self._by_storage[_compat.storage_key(meta.tensor(node))] = self.value_of[over]
            self._keep.append(meta.tensor(node))
        tensors = tensors_of(node)
        fresh = [t for t in tensors if _compat.storage_key(t) not in self._by_storage]  # storages new here
        mutates = is_mutation(node)
        if node.target is operator.getitem or not (fresh or mutates or is_check(node)):
            if isinstance(meta.value(node), torch.Tensor):
                self.value_of[node] = self._by_storage[_compat.storage_key(meta.tensor(node))]
            return
        producer = len(self.ops)
        reads = tuple(dict.fromkeys(v for n in node.all_input_nodes for v in self._values_of(n)))
        outputs: list[int] = []
        root_of = roots_of(node) if tensors else {}
        kind = {"forward": "activation", "loss": "loss", "backward": "backward"}[phase]
        for i, tensor in enumerate(tensors):
            if _compat.storage_key(tensor) in self._by_storage:
                continue
            root = root_of.get(i, node)
            outputs.append(self._value(tensor, prefix + root.name, kind, producer, root))
        if isinstance(meta.value(node), torch.Tensor):
            self.value_of[node] = self._by_storage[_compat.storage_key(meta.tensor(node))]
        draw = meta.draw(node)
        self.ops.append(
            GraphOp(
                prefix + node.name,
                node,
                phase,
                self._module,
                reads + self._state(node),
                tuple(outputs),
                recomputable=pinned is not None
                and node not in pinned
                and not is_check(node)
                and not talks(node)
                and (not mutates or meta.again(node) is not None),
                reuses=self._reused(node, outputs),
                fused_with_previous=draw is not None,
            )
        )
        if draw is not None:
            (drawn,) = (i for i, op in enumerate(self.ops) if op.node is draw)
            self.ops[drawn] = replace(self.ops[drawn], workspace=outputs[0])

    def _reused(self, node: fx.Node, outputs: list[int]) -> int | None:
        """The value that ``node`` may write over: its first operand's, made here, that no other lies on."""
        if over_form(node) is None or len(outputs) != 1:
            return None
        first, *others = node.all_input_nodes
        value = self.value_of.get(first)
        if value is None or any(value in self._values_of(n) for n in others):
            return None
        made = self.values[value].producer is not None and self.values[value].bytes
        return value if made == self.values[outputs[0]].bytes else None

    def _state(self, node: fx.Node) -> tuple[int, ...]:
        state = meta.rng_state(node)
        return () if state is None else (self.value_of[state],)

    def _values_of(self, node: fx.Node) -> list[int]:
        if node in self.value_of:
            return [self.value_of[node]]
        return [self._by_storage[_compat.storage_key(t)] for t in tensors_of(node)]

    def hold(self, node: fx.Node, kind: str) -> None:
        """The caller keeps ``node``'s storage until the step ends."""
        self._held[self.value_of[node]] = kind

    def finished_values(self) -> list[GraphValue]:
        out = []
        for i, v in enumerate(self.values):
            held = i in self._held and v.producer is not None
            out.append(replace(v, kind=self._held[i], final=True) if held else v)
        return out

    def finished_ops(self) -> tuple[list[GraphOp], list[int]]:
        """An op whose output the caller holds is pinned: a second copy would not replace the first.

        What the caller holds is never written over.  Beside the ops, the indices of those that are pinned for
        that alone.
        """
        ops, pinned = [], []
        for i, op in enumerate(self.ops):
            if any(v in self._held for v in op.outputs) and op.recomputable:
                op = replace(op, recomputable=False)
                pinned.append(i)
            ops.append(replace(op, reuses=None) if op.reuses in self._held else op)
        return ops, pinned
