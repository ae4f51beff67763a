"""A schedule made executable: a forward graph, and a backward graph cut into segments.

The schedule's steps are replayed into fx graphs, each kernel call exactly where and as often as it
is scheduled.  The generated Python drops each tensor after its last use, and takes its arguments in
one list that it clears, so what is freed is what the schedule frees.  Views are re-made where they
are read.  What crosses from the forward to the backward is the saved set; what crosses from one
segment of the backward to a later one is handed over by name.  How the backward is cut, and why:
:mod:`planner.rewrite.segments`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.consumed import consumed_of, first_handed_out
from planner.graph.nodes import ignores_running_stats, is_mutation, is_random, tensors_of, transposed_twice
from planner.graph.passes.slices import over_form
from planner.graph.step_graph import OPTIMIZER_STEP, forward_length, replayed_states, written_over
from planner.graph.training_graph import TrainingGraph
from planner.rewrite.apart import summands_of
from planner.rewrite.program import Argument, Backward, Program, Segment, Term
from planner.rewrite.segments import cuts_behind, cuts_of, in_order, module_of, segment_of

__all__ = ["emit"]


def emit(
    graph: TrainingGraph, steps: list[int], *, turn: int | None = None, segments: int | None = None
) -> Program:
    """Generate the program of ``steps`` (op positions, as ``simulate`` judged them).

    ``turn``: how many steps belong to the forward; ``None``: those before the first of another
    phase, which is right where ``graph`` has the loss.  ``segments``: into how many parts to cut the
    backward at most; ``None`` chooses by gradient bytes.
    """
    writer = _Writer(graph, replayed_states(graph, steps), segments)
    over = written_over(graph.ops, steps)
    if turn is None:
        turn = forward_length(graph, steps)
    for t in range(turn):
        if graph.ops[steps[t]].node is not None:
            writer.run(steps[t], steps[t - 1] if t else None, over=t in over)
    outputs = [writer.operand(n) for n in graph.outputs]
    writer.turn()
    for t in range(turn, len(steps)):
        op = graph.ops[steps[t]]
        if op.target == OPTIMIZER_STEP:
            writer.hand_out(op.inputs[0])
        elif op.phase != "loss" and op.node is not None:
            writer.run(steps[t], steps[t - 1], over=t in over)
    return writer.finish(outputs)


class _Writer:
    """Copies calls of the training graph into the graph being written, keeping track of current copies."""

    def __init__(self, graph: TrainingGraph, replayed: set[int], segments: int | None) -> None:
        self.source, self.hands_out = graph, first_handed_out(graph)
        self.replayed, self.segments = replayed, segments
        self.op_of = {
            op.node: i for i, op in enumerate(graph.ops) if op.node is not None and op.phase != "loss"
        }
        self.gradient_nodes = {node: name for name, node in graph.gradients.items()}
        self.gradients_of_value: dict[int, list[fx.Node]] = {}
        self.sums: dict[
            fx.Node, str | int
        ] = {}  # that are the engine's -> whose gradient they are, or add to
        for name, node in graph.gradients.items():
            if not meta.is_engines(node):
                self.gradients_of_value.setdefault(graph.value_of[node], []).append(node)
            while meta.is_engines(node):
                self.sums[node] = name
                node = node.all_input_nodes[0]
        self.forward = fx.Graph()
        self.backward = fx.Graph()
        self.out = self.forward
        self.current: dict[fx.Node, fx.Node] = {}
        self.version: dict[int, int] = {}
        self.views: dict[fx.Node, tuple[tuple[fx.Graph, int], fx.Node]] = {}
        self.arguments: dict[fx.Graph, dict[fx.Node, Argument]] = {self.forward: {}, self.backward: {}}
        self.placeholders: dict[tuple[int, fx.Node], fx.Node] = {}
        self.at_turn: dict[fx.Node, fx.Node] = {}
        self.saved: list[fx.Node] = []
        self.gradient_results: dict[fx.Node, str | int | Term] = {}
        self.ends: list[fx.Node] = []  # calls behind which the engine adds what was handed out
        self.waits: dict[fx.Node, fx.Node] = {}  # a consumed gradient -> the call behind which it goes
        self.ran: set[int] = set()
        self.handed_out: fx.Node | None = None  # the call with which the first gradients are

    # -- operands --------------------------------------------------------------------------------

    def operand(self, node: fx.Node) -> fx.Node:
        """The current copy of ``node`` in the graph being written; views are made on the spot."""
        if node in self.source.sources:
            return self._placeholder(node, Argument(*self.source.sources[node]))
        twice = transposed_twice(node)
        if twice is not None:
            return self.operand(twice)
        if self._is_made(node):
            copy = self.current.get(node)
            if copy is not None:
                return copy
            kept = self.at_turn[node]
            if kept not in self.saved:
                self.saved.append(kept)
            return self._placeholder(node, Argument("saved", self.saved.index(kept)))
        stamp = (self.out, self._stamp(node))
        cached = self.views.get(node)
        if cached is None or cached[0] != stamp:
            view = self.out.node_copy(node, self.operand)
            view.meta = node.meta
            cached = self.views[node] = (stamp, view)
        return cached[1]

    def _is_made(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return node.args[0] in self.op_of
        return node in self.op_of

    def _stamp(self, node: fx.Node) -> int:
        value = self.source.value_of.get(node)
        if value is None:
            return sum(self._stamp(n) for n in node.all_input_nodes)
        return self.version.get(value, 0)

    def _placeholder(self, node: fx.Node, argument: Argument) -> fx.Node:
        key = (id(self.out), node)
        if key not in self.placeholders:
            nodes = self.out.nodes
            first = next((n for n in nodes if n.op != "placeholder"), None)
            with (
                self.out.inserting_before(first)
                if first is not None
                else self.out.inserting_after(_compat.last_node(self.out))
            ):
                new = self.out.placeholder(node.name)
            new.meta = node.meta
            self.placeholders[key] = new
            self.arguments[self.out][new] = argument
        return self.placeholders[key]

    # -- calls -----------------------------------------------------------------------------------

    def run(self, index: int, previous: int | None, *, over: bool = False) -> None:
        """Write one step of the schedule; ``over``: on the storage that the op reuses."""
        op = self.source.ops[index]
        node = op.node
        assert node is not None
        if node in self.sums and self._is_left_to_engine(index, node):
            return
        again = index in self.ran
        self.ran.add(index)
        drawn = meta.draw(node)
        just_drawn = previous is not None and self.source.ops[previous].node is drawn
        if drawn is not None and just_drawn and drawn in self.current:
            call = self._call(operator.getitem, (self.current[drawn], 0), {}, node, again)
        elif again and (noted := meta.rng_state(node)) is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.operand)
            state = self.operand(noted)
            device = str(self.source.device)
            if node.target is kernels.dropout_mask:  # as an argument, generated code could not name it
                call = self._call(kernels.dropout_mask_again, (state, device, *args), kwargs, node, again)
            else:
                call = self._call(kernels.replay, (state, device, node.target, *args), kwargs, node, again)
        elif node.target is kernels.rng_state and index not in self.replayed:
            return
        elif again and (other := meta.again(node)) is not None:
            target, args = other
            call = self._call(target, fx.map_arg(args, self.operand), {}, node, again)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.operand)
            call = self._call(over_form(node) if over else node.target, args, kwargs, node, again)
        meta.note_recompute(call, again, node)
        if over:
            meta.note_instead_of(call, node.target)
        if index == self.hands_out:
            self.handed_out = call
        if node in self.sums:
            self.gradient_results.pop(call.all_input_nodes[0], None)
            self.gradient_results[call] = self.sums[node]
        self.current[node] = call
        for user in node.users:
            if user.target is operator.getitem:
                part = self._call(operator.getitem, (call, user.args[1]), {}, user, again)
                part.meta = user.meta
                self.current[user] = part
        for value in op.outputs:
            self.version[value] = self.version.get(value, 0) + 1
            for gradient in self.gradients_of_value.get(value, ()):
                self.gradient_results[self.operand(gradient)] = self.gradient_nodes[gradient]

    def hand_out(self, value: int) -> None:
        """Here the engine is to have this gradient, and hooks run."""
        end = _compat.last_node(self.backward)
        while end.target is operator.getitem:
            end = end.prev
        for gradient in self.gradients_of_value.get(value, ()):
            self.waits[self.operand(gradient)] = end
        if value not in self.gradients_of_value:  # a sum that is the engine's
            self.ends.append(end)

    def _is_left_to_engine(self, index: int, node: fx.Node) -> bool:
        """Hand out what a sum of gradients adds, for the engine to add it, if that can be done here."""
        value_of = self.source.value_of
        is_alone = {*self.source.ops[index].inputs} <= {value_of[n] for n in node.all_input_nodes}
        is_begun = self.hands_out < 0 or self.handed_out is not None or (index == self.hands_out and is_alone)
        if self.segments is not None or not is_begun:
            return False
        before, term = (self.operand(n) for n in node.all_input_nodes)
        end = _compat.last_node(self.backward)
        while end.target is operator.getitem:
            end = end.prev
        if end in self.ends:  # the engine would add up both, in an order of its own
            return False
        of = self.sums[node]
        if before.op == "placeholder":  # handed out as a view, which the engine does not write into
            calls = (n for n in self.backward.nodes if n.op != "placeholder")
            with self.backward.inserting_before(next(calls)):
                view = self.backward.call_function(torch.ops.aten.alias.default, (before,))
            view.meta = before.meta
            before = view
        self.gradient_results[before] = of
        number = 1 + sum(isinstance(key, Term) and key.of == of for key in self.gradient_results.values())
        self.gradient_results[term] = Term(of, number)
        self.current[node] = before
        self.ends.append(end)
        if index == self.hands_out:
            self.handed_out = end
        return True

    def _call(self, target: Any, args: Any, kwargs: Any, like: fx.Node, again: bool) -> fx.Node:
        name = f"{like.name}_recomputed" if again else like.name
        return self.out.create_node("call_function", target, args, kwargs, name=name)

    def turn(self) -> None:
        """From here on calls go to the backward graph; what the forward made is there if it is saved."""
        self.at_turn, self.current = self.current, {}
        self.views = {}
        self.out = self.backward

    # -- graphs ----------------------------------------------------------------------------------

    def finish(self, outputs: list[fx.Node]) -> Program:
        """Close the forward on its outputs and the saved set, and cut the backward."""
        held = set(outputs)
        saved = []
        for node in self.saved:
            if node in held:  # the caller's copy will carry a grad_fn; what is saved must not
                alias = self.forward.call_function(torch.ops.aten.detach.default, (node,))
                alias.meta = node.meta
                node = alias
            saved.append(node)
        distinct: list[fx.Node] = []
        for node in outputs:
            if node in distinct or node.op == "placeholder":
                alias = self.forward.call_function(torch.ops.aten.detach.default, (node,))
                alias.meta = node.meta
                node = alias
            distinct.append(node)
        self.forward.output([*distinct, *saved])
        _drop_dead_getitems(self.forward)
        arguments = self.arguments[self.forward]
        used = {n for n in self.forward.nodes if n.op == "placeholder"}
        parts = self._parts()
        updates = _updates(self.forward, arguments, [*distinct, *saved])
        return Program(
            module_of(self.forward, "Forward"),
            tuple(a for n, a in in_order(self.forward, arguments) if n in used),
            len(outputs),
            len(saved),
            tuple(self._cut(parts)),
            self.source.constants,
            bool(self.replayed),
            self._whole(parts),
            any(
                op.phase == "forward" and op.node is not None and is_random(op.node) for op in self.source.ops
            ),
            updates,
            _feeds(self.source),
            consumed_of(self.source),
            self._watched(),
            self._alone(distinct, saved),
        )

    def _alone(self, outputs: list[fx.Node], saved: list[fx.Node]) -> frozenset[int]:
        """Outputs that share a storage with nothing that is saved, given or another output."""
        given = [n for n in self.forward.nodes if n.op == "placeholder"]
        keys = Counter(
            _compat.storage_key(tensor) for n in (*outputs, *saved, *given) for tensor in tensors_of(n)
        )
        return frozenset(
            i for i, n in enumerate(outputs) if all(keys[_compat.storage_key(t)] == 1 for t in tensors_of(n))
        )

    def _watched(self) -> frozenset[str]:
        """Buffers that the backward reads; not the statistics of a batch norm."""
        return frozenset(
            str(argument.key)
            for node, argument in self.arguments[self.backward].items()
            if argument.kind == "buffer" and not all(map(ignores_running_stats, node.users))
        )

    def _whole(self, parts: list[list[fx.Node]]) -> Backward:
        sized = any(value.symbolic is not None for value in self.source.values)
        arguments, cut = self.arguments[self.backward], tuple(map(tuple, parts))
        return Backward(self.backward, arguments, self.gradient_results, cut, sized)

    def _parts(self) -> list[list[fx.Node]]:
        _drop_dead_getitems(self.backward, keep=set(self.gradient_results))
        calls = [n for n in self.backward.nodes if n.op == "call_function"]
        many = [term for n in self.gradient_results if len(of := summands_of(n)) > 2 for term in of]
        segments, ends = self.segments, set(self.ends)
        starts = cuts_of(calls, self.gradient_results, self.arguments[self.backward], segments, many)
        if self.waits and segments is None:
            starts = cuts_behind(calls, self.waits, starts, self.handed_out)
        starts = sorted({*starts, *(i for i in _behind(calls, ends) if i < len(calls))})
        return [calls[a:b] for a, b in zip(starts, [*starts[1:], len(calls)], strict=True)]

    def _cut(self, parts: list[list[fx.Node]]) -> list[Segment]:
        home = {n: k for k, part in enumerate(parts) for n in part}
        first_use: dict[fx.Node, int] = {}
        last_use: dict[fx.Node, int] = {}
        for k, part in enumerate(parts):
            for node in part:
                for operand in node.all_input_nodes:
                    first_use.setdefault(operand, k)
                    last_use[operand] = k
        arguments = self.arguments[self.backward]
        return [
            segment_of(k, part, home, first_use, last_use, arguments, self.gradient_results)
            for k, part in enumerate(parts)
        ]


def _behind(calls: Sequence[fx.Node], ends: Collection[fx.Node]) -> Iterator[int]:
    """The positions behind ``ends`` and the parts of what those make."""
    for i, node in enumerate(calls, start=1):
        if node in ends:
            while i < len(calls) and calls[i].target is operator.getitem:
                i += 1
            yield i


def _drop_dead_getitems(graph: fx.Graph, keep: set[fx.Node] | None = None) -> None:
    """Parts of a result that nothing reads, and views made for nobody."""
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users and node not in (keep or ()):
            graph.erase_node(node)


def _updates(forward: fx.Graph, arguments: dict[fx.Node, Argument], made: list[fx.Node]) -> dict[str, bool]:
    """The buffers that the forward writes to, and whether what it made depends on what they were."""
    buffers = {n: str(a.key) for n, a in arguments.items() if a.kind == "buffer"}
    calls = [n for n in forward.nodes if n.op == "call_function"]
    written = {n for call in calls if is_mutation(call) for n in call.all_input_nodes if n in buffers}
    read: set[fx.Node] = set()
    stack = list(made)
    while stack:
        node = stack.pop()
        if node not in read:
            read.add(node)
            moves = node.op == "call_function" and ignores_running_stats(node)
            stack.extend(n for n in node.all_input_nodes if not (moves and n in written))
    return {buffers[n]: n in read for n in written}


def _feeds(graph: TrainingGraph) -> dict[int, frozenset[int]]:
    """Which outputs are computed from which, by the graph: a gradient may or may not flow there."""
    at: dict[fx.Node, set[int]] = {}
    for i, node in enumerate(graph.outputs):
        at.setdefault(node, set()).add(i)
    found: dict[int, set[int]] = {}
    for i, j in (pair for of in graph.chunked for pair in of.feeds):  # of what is made beside the loss
        found.setdefault(i, set()).add(j)
    for j, node in enumerate(graph.outputs):
        seen, stack = {node}, list(node.all_input_nodes)
        while stack:
            above = stack.pop()
            if above not in seen:
                seen.add(above)
                for i in at.get(above, ()):
                    found.setdefault(i, set()).add(j)
                stack.extend(above.all_input_nodes)
    return {i: frozenset(js) for i, js in found.items()}
