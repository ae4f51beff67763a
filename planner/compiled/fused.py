"""A joint graph as inductor stores it: the calls that write memory, and what is written into them.

Inductor writes most elementwise calls into the loops of whoever reads them: they take no memory, hardly any
time, and are made again wherever they are needed.  So they are no ops of the problem.  What is left are the
*stored* values: results of libraries' kernels and what those read, of reductions, and elementwise results
that are smaller than what they are made from, a sum of two others say.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.errors import PlannerError
from planner.graph.training_graph import GraphOp, GraphValue, TrainingGraph

__all__ = ["FusedStep", "Sources"]

aten = torch.ops.aten

# What is stored has to be smaller than what it is made from by so much to be worth it.
WORTH = 0.9

# What the caller knows of each input: its kind and its name, as in ``TrainingGraph.sources``.
Sources = Sequence[tuple[str, str | int]]


@dataclass(frozen=True, eq=False)
class FusedStep:
    """The stored values of a joint graph, and the calls that make them.

    ``joint``     the graph; ``forwards``: how many of its outputs are the forward's.
    ``graph``     ops and values; an op's ``node`` is the last call of those that are written into one.
    ``stored``    nodes that are values, by their number.
    ``inputs``    placeholders of the forward, ``tangents`` those of output gradients.
    """

    joint: fx.GraphModule
    forwards: int
    graph: TrainingGraph
    stored: dict[fx.Node, int]
    inputs: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]

    @classmethod
    def of(
        cls, joint: fx.GraphModule, forwards: int, sources: Sources, *, same_bits: bool = False
    ) -> FusedStep:
        """``sources``: of each input of the forward.  Raises ``PlannerError`` for a graph of another kind.

        ``same_bits``  what would have other bits when it is made again, in another loop, is stored: sums, and
                       functions that are approximated.
        """
        reader = _Reader(joint, forwards, sources, same_bits)
        step = reader.read()
        left = reader.needless()
        return _Reader(joint, forwards, sources, same_bits, left).read() if left else step

    @property
    def results(self) -> tuple[Any, ...]:
        """What the graph returns: outputs of the forward, then gradients."""
        (output,) = self.joint.graph.find_nodes(op="output")
        return tuple(output.args[0])


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that follows from sizes."""
    return isinstance(meta.value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _bytes(node: fx.Node) -> int:
    value = meta.value(node)
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for n in value.shape:
        count *= _compat.size_hint(n)
    return count * value.element_size()


class _Reader:
    def __init__(
        self,
        joint: fx.GraphModule,
        forwards: int,
        sources: Sources,
        same_bits: bool,
        left: Collection[fx.Node] = (),
    ) -> None:
        self.joint, self.forwards, self.same_bits = joint, forwards, same_bits
        self.left = left  # to the backward, which alone reads them
        self.inexact: set[fx.Node] = set()  # made with what would have other bits another time
        self.read_late: set[fx.Node] = set()  # by the backward, or written into what it reads
        self.nodes = list(joint.graph.nodes)
        given = [n for n in self.nodes if n.op == "placeholder"]
        self.tangents = tuple(n for n in given if n.name.startswith("tangents"))
        self.inputs = tuple(n for n in given if n not in self.tangents)
        if len(self.inputs) != len(sources):
            raise PlannerError(
                f"a graph of {len(sources)} inputs has {len(self.inputs)} when it is compiled: torch gives "
                "it others (tensors that share memory, subclasses, effects)"
            )
        (output,) = joint.graph.find_nodes(op="output")
        self.results = list(output.args[0])
        self.sources = dict(zip(self.inputs, sources, strict=True))
        self.sources |= {n: ("tangent", i) for i, n in enumerate(self.tangents)}
        self.values: list[GraphValue] = []
        self.ops: list[GraphOp] = []
        self.stored: dict[fx.Node, int] = {}
        self.reads: dict[fx.Node, tuple[int, ...]] = {}

    def read(self) -> FusedStep:
        for node in (*self.inputs, *self.tangents):
            self._add_source(node)
        late = self._behind_tangents()
        needed = self._ancestors(self.results[: self.forwards])
        self.taken = self._stored_for_kernels()
        self.returned = {n for n in self.results if isinstance(n, fx.Node)}
        self.returned |= {self._base(n) for n in self.returned}
        self.spanning = self._read_across_kernels()
        live = self._ancestors(self.results)
        live |= {n for n in self.nodes if n.op == "call_function" and n.is_impure()}
        for node in self.nodes:  # of several results all belong to the call
            if node.target is operator.getitem and node.args[0] in needed:
                needed.add(node)
        forward: list[fx.Node] = []
        backward: list[fx.Node] = []
        for node in self.nodes:
            if node.op in ("placeholder", "output") or node not in live:
                continue
            early = node not in late and (node in needed or not self._only_for_later(node))
            (forward if early else backward).append(node)
        self.early = needed
        forward = self._where_made(forward)
        self._find_read_late(forward, backward)
        backward = self._ends_first(backward)
        for node in forward:
            self._add(node, "forward")
        turn = len(self.ops)
        for node in backward:
            self._add(node, "backward")
        for node in self.results[: self.forwards]:
            self._hold(node, "output")
        for node in self.results[self.forwards :]:
            self._hold(node, "gradient")
        self._reuse()
        return FusedStep(
            self.joint, self.forwards, self._graph(turn), self.stored, self.inputs, self.tangents
        )

    # -- what runs when ----------------------------------------------------------------------------

    def _behind_tangents(self) -> set[fx.Node]:
        late = set(self.tangents)
        for node in self.nodes:
            if node.op not in ("placeholder", "output") and any(n in late for n in node.all_input_nodes):
                late.add(node)
        return late

    def _ancestors(self, nodes: Sequence[Any]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = [n for n in nodes if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _only_for_later(self, node: fx.Node) -> bool:
        """Whether what only the backward reads is left to it: all that is not written into its readers.

        Of the rest what is smaller than its operands, a mask say, may be kept instead of them.
        """
        if is_size(node) or _compat.is_view_of_operand(node) or _compat.writes(node):
            return False
        return node in self.left or not _compat.is_fused(node)

    def needless(self) -> set[fx.Node]:
        """What was read as kept for the backward, though this needs all that it is made of in any case.

        The mask of a relu that a convolution reads, say: the convolution's gradient needs the relu.  Kept
        beside it, it would take memory, and the time to write it: on a CPU ten times that of the sum.
        """
        behind = {v for op in self.ops if op.phase == "backward" for v in op.inputs}
        found = set()
        for op in self.ops:
            node = op.node
            if op.phase == "backward" or node is None or node in self.early or not op.recomputable:
                continue
            made = {v for v in op.inputs if self.values[v].producer is not None}
            if _compat.is_fused(node) and node not in self.returned and made and made <= behind:
                found.add(node)
        return found

    def _where_made(self, forward: Sequence[fx.Node]) -> list[fx.Node]:
        """The same calls, those that only the backward reads next to what they are made of.

        In the joint graph they are behind the loss: what they are made of would be held until then, and read
        once more from memory.
        """
        place = {node: i for i, node in enumerate(forward)}
        for node in forward:
            operands = [place[n] for n in node.all_input_nodes if n in place]
            if node not in self.early and operands and not node.is_impure() and not _runs_once(node):
                place[node] = max(operands)
        return sorted(forward, key=place.__getitem__)

    def _ends_first(self, backward: Sequence[fx.Node]) -> list[fx.Node]:
        """The same calls, where of two kernels that read one gradient the one with no reader is first.

        So a weight's gradient comes before the gradient of what the weight was multiplied with: the operand,
        made again for it alone, is gone before the other has memory.
        """
        late, placed, order = set(backward), set[fx.Node](), list[fx.Node]()
        ends: dict[fx.Node, list[fx.Node]] = {}
        goes_on: set[fx.Node] = set()
        for node in reversed(backward):
            inlined = _is_inlined(node) or node.target is operator.getitem
            if any(u in goes_on or (u.op != "output" and not _is_view(u)) for u in node.users):
                goes_on.add(node)
            elif not inlined and not _compat.is_lowered(node):
                for base in {self._base(n) for n in node.all_input_nodes} & late:
                    ends.setdefault(base, []).insert(0, node)

        def place(node: fx.Node) -> None:
            if node not in placed:
                placed.add(node)
                order.append(node)

        def missing(node: fx.Node) -> list[fx.Node] | None:
            """What has to be placed for ``node``, if all of it is written into its readers."""
            found: dict[fx.Node, None] = {}
            stack = [n for n in node.all_input_nodes if n in late and n not in placed]
            while stack:
                n = stack.pop()
                if not _is_inlined(n):
                    return None
                found[n] = None
                stack += [m for m in n.all_input_nodes if m in late and m not in placed and m not in found]
            return [n for n in backward if n in found] if found else []

        for node in backward:
            if node in placed:
                continue
            if not _is_inlined(node) and not _compat.is_lowered(node) and node.target is not operator.getitem:
                for base in {self._base(n) for n in node.all_input_nodes} & late:
                    for end in ends.get(base, ()):
                        before = None if end in placed or end is node else missing(end)
                        for n in () if before is None else (*before, end):
                            place(n)
            place(node)
        return order

    # -- what is stored ----------------------------------------------------------------------------

    def _base(self, node: fx.Node) -> fx.Node:
        while _compat.is_view_of_operand(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _stored_for_kernels(self) -> set[fx.Node]:
        """What kernels of libraries read."""
        found = set()
        for node in self.nodes:
            if node.op != "call_function" or node.target is operator.getitem or is_size(node):
                continue
            if not _compat.is_lowered(node) and not _compat.is_view_of_operand(node):
                found |= {self._base(n) for n in node.all_input_nodes}
        return found

    def _read_across_kernels(self) -> set[fx.Node]:
        """Elementwise results that are read both before and after a library's kernel runs."""
        place = {n: i for i, n in enumerate(self.nodes)}
        kernels, count = [0] * (len(self.nodes) + 1), 0
        for i, node in enumerate(self.nodes):
            kernels[i] = count
            call = node.op == "call_function" and node.target is not operator.getitem
            count += call and not _compat.is_lowered(node) and not _compat.is_view_of_operand(node)
        first: dict[fx.Node, int] = {}
        last: dict[fx.Node, int] = {}
        found = set()
        for node in reversed(self.nodes):
            inlined = (_compat.is_fused(node) and node not in self.taken) or _compat.is_view_of_operand(node)
            places = []
            for user in node.users:
                own = (_compat.is_fused(user) and user not in self.taken) or _compat.is_view_of_operand(user)
                if own and user in first:
                    places += [first[user], last[user]]
                elif user.op != "output":
                    places.append(place[user])
            if inlined and places:
                first[node], last[node] = min(places), max(places)
                if kernels[first[node]] < kernels[last[node]]:
                    found.add(node)
        return found

    def _add_source(self, node: fx.Node) -> None:
        kind, name = self.sources[node]
        if not isinstance(meta.value(node), torch.Tensor):
            self.reads[node] = ()
            return
        self.stored[node] = len(self.values)
        self.reads[node] = (len(self.values),)
        self.values.append(
            GraphValue(str(name) if isinstance(name, str) else node.name, _bytes(node), kind, None, node)
        )

    def _read_of(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(dict.fromkeys(v for n in node.all_input_nodes for v in self.reads.get(n, ())))

    def _find_read_late(self, forward: Sequence[fx.Node], backward: Sequence[fx.Node]) -> None:
        late = set(backward)
        for node in reversed(forward):
            if any(
                u in late or (u in self.read_late and (_is_inlined(u) or u.target is operator.getitem))
                for u in node.users
            ):
                self.read_late.add(node)

    def _add(self, node: fx.Node, phase: str) -> None:
        reads = self._read_of(node)
        if self.same_bits and node.op == "call_function" and node.target is not operator.getitem:
            made_of = (n for n in node.all_input_nodes if n not in self.stored)
            if not _compat.is_exact(node) or any(n in self.inexact for n in made_of):
                self.inexact.add(node)
        if node.op == "get_attr" or is_size(node):
            self.reads[node] = ()
            return
        if node.target is operator.getitem:
            if node not in self.stored:  # of what is no call of ours
                self.reads[node] = reads
            return
        if _compat.is_view_of_operand(node):
            self.reads[node] = reads
            return
        if _compat.is_fused(node) and not self._is_worth_storing(node, reads, phase):
            self.reads[node] = reads
            return
        parts = [u for u in node.users if u.target is operator.getitem]
        made = [node] if isinstance(meta.value(node), torch.Tensor) else parts
        index = len(self.ops)
        outputs = []
        for part in made:
            self.stored[part] = len(self.values)
            self.reads[part] = (len(self.values),)
            outputs.append(len(self.values))
            kind = "activation" if phase == "forward" else "backward"
            self.values.append(
                GraphValue(part.name, _bytes(part), kind, index, part, module=meta.module(node) or "")
            )
        self.reads.setdefault(node, tuple(outputs))
        again = phase == "forward" and not _runs_once(node) and node not in self.inexact
        self.ops.append(
            GraphOp(
                node.name, node, phase, meta.module(node) or "", reads, tuple(outputs), recomputable=again
            )
        )

    def _is_worth_storing(self, node: fx.Node, reads: Sequence[int], phase: str) -> bool:
        if node in self.taken or node in self.returned:
            return True
        if phase == "forward" and node in self.inexact and node in self.read_late:
            return True
        if phase == "backward" and node not in self.spanning:
            return False
        made = [v for v in reads if self.values[v].producer is not None]
        return _bytes(node) < WORTH * sum(self.values[v].bytes for v in made)

    def _hold(self, node: Any, kind: str) -> None:
        """What is returned is held to the end by whoever gets it."""
        for v in self.reads.get(node, ()) if isinstance(node, fx.Node) else ():
            value = self.values[v]
            if value.producer is not None:
                self.values[v] = GraphValue(
                    value.name, value.bytes, kind, value.producer, value.root, True, value.module
                )

    def _reuse(self) -> None:
        """An op of the backward writes over the last reader's operand of its size where inductor does."""
        last: dict[int, int] = {}
        for i, op in enumerate(self.ops):
            for v in op.inputs:
                last[v] = i
        for i, op in enumerate(self.ops):
            if op.node is None or not _compat.is_lowered(op.node) or len(op.outputs) != 1:
                continue
            out = self.values[op.outputs[0]]
            for v in op.inputs:
                value = self.values[v]
                dies = value.producer is not None and not value.final and last[v] == i
                if dies and value.bytes == out.bytes and self.ops[value.producer or 0].phase == op.phase:
                    self.ops[i] = replace(op, reuses=v)
                    break

    def _graph(self, turn: int) -> TrainingGraph:
        outputs = [n for n in self.results[: self.forwards] if isinstance(n, fx.Node)]
        gradients: dict[str | int, fx.Node] = {}
        for node, of in zip(self.inputs, self.results[self.forwards :], strict=False):
            if isinstance(of, fx.Node):
                kind, name = self.sources[node]
                gradients[name if kind == "parameter" else self.inputs.index(node)] = of
        value_of = {n: v for n, vs in self.reads.items() for v in vs[:1]}
        tensors = (meta.value(n) for n in self.nodes)
        device = next((t.device for t in tensors if isinstance(t, torch.Tensor)), torch.device("cpu"))
        return TrainingGraph(
            tuple(self.ops),
            tuple(self.values),
            turn,
            self.joint.graph,
            value_of,
            dict(self.sources),
            tuple(outputs),
            gradients,
            dict(enumerate(self.tangents)),
            device=device,
        )


def _is_inlined(node: fx.Node) -> bool:
    return _compat.is_fused(node) or _compat.is_view_of_operand(node)


def _is_view(node: fx.Node) -> bool:
    return _compat.is_view_of_operand(node)


def _runs_once(node: fx.Node) -> bool:
    """Whether a call may not run again: it draws numbers from a generator, writes, or talks to others."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags and not _draws_nothing(node):
        return True
    return _compat.writes(node) or "inductor_seeds" in str(node.target)


def _draws_nothing(node: fx.Node) -> bool:
    """Whether a call that may draw numbers was told to drop nothing."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if "dropout_p" not in names:
        return False
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return given.get("dropout_p", 0.0) == 0.0
