"""A schedule of stored values, written out as the forward and the backward that inductor compiles.

The joint graph is written anew: the forward in the schedule's order, then the backward, in which every
further execution is a call of its own.  What a call of the backward reads of the forward's own calls is what
is saved.  Calls that are written into their readers are written out for each reader.
"""

from __future__ import annotations

import operator
from bisect import bisect, bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.compiled.fused import FusedStep, is_size
from planner.graph.training_graph import GraphOp

__all__ = ["Written", "write"]


class Written:
    """``joint`` rewritten, and what its backward reads of its forward."""

    def __init__(
        self, joint: fx.GraphModule, saved: list[fx.Node], sizes: list[fx.Node], forwards: int
    ) -> None:
        self.joint, self.saved, self.sizes, self.forwards = joint, saved, sizes, forwards

    def split(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The two graphs."""
        return _compat.forward_and_backward(
            self.joint, list(self.saved), list(self.sizes), num_fwd_outputs=self.forwards
        )


def write(step: FusedStep, steps: Sequence[int], turn: int) -> Written:
    """``steps``: positions in ``step.graph.ops``, ``turn`` of them in the forward."""
    return _Writer(step).written(steps, turn)


class _Writer:
    def __init__(self, step: FusedStep) -> None:
        self.step = step
        self.graph = fx.Graph()
        self.now: dict[fx.Node, fx.Node] = {}  # of a stored node its latest copy
        self.inlined: dict[fx.Node, fx.Node] = {}  # of the others, while what they are made from stays
        self.early: set[fx.Node] = set()
        self.ran: set[int] = set()

    def written(self, steps: Sequence[int], turn: int) -> Written:
        old = self.step.joint.graph
        for node in old.find_nodes(op="placeholder"):
            self.now[node] = self._copied(node)
        self.apart = self._apart(steps)
        for k, i in enumerate(steps[:turn]):
            self._run(k, i, clear=i in self.ran)
        results = [self._of(n) for n in self.step.results[: self.step.forwards]]
        self.early = set(self.graph.nodes)
        self.inlined.clear()
        for k, i in enumerate(steps[turn:], turn):
            self._run(k, i, clear=True)
        self.inlined.clear()
        results += [self._of(n) for n in self.step.results[self.step.forwards :]]
        (output,) = old.find_nodes(op="output")
        new = self.graph.output(results)
        new.meta = dict(output.meta)
        return self._finished(new)

    def _apart(self, steps: Sequence[int]) -> set[int]:
        """Places of products that are first read when another kernel of a library has run.

        Inductor would join such a product and the sum that reads it to one kernel, which runs where the sum
        does, and what is multiplied would be held until then.
        """
        ops = self.step.graph.ops
        kernels = [k for k, i in enumerate(steps) if not _compat.is_lowered(_node(ops[i]))]
        found = set()
        made: dict[int, int] = {}
        for k, i in enumerate(steps):
            for v in ops[i].inputs:
                at = made.pop(v, None)
                if at is not None and bisect(kernels, at) < bisect_left(kernels, k):
                    found.add(at)
            if _node(ops[i]).target is torch.ops.aten.mm.default:
                made[ops[i].outputs[0]] = k
        return found

    def _run(self, k: int, i: int, *, clear: bool) -> None:
        op = self.step.graph.ops[i]
        assert op.node is not None
        if clear:
            self.inlined.clear()
        made = self._copied(op.node)
        if self.early and i in self.ran:
            made.meta["recompute_of"] = op.node.name
        self.ran.add(i)
        if k in self.apart:
            made = _compat.stored(self.graph, made)
        if op.node in self.step.stored:
            self.now[op.node] = made
        for part in op.node.users:
            if part.target is operator.getitem:
                self.now[part] = new = self.graph.node_copy(part, dict.fromkeys([op.node], made).__getitem__)
                new.meta = dict(part.meta)
        if self.early and isinstance(meta.value(op.node), torch.Tensor) and _compat.is_fused(op.node):
            made.meta[_compat.IS_REALIZED] = True
        if not op.outputs:
            self.now[op.node] = made

    def _of(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node in self.now:
            return self.now[node]
        if node not in self.inlined:
            stack = [node]
            while stack:  # deep chains
                top = stack[-1]
                missing = [n for n in top.all_input_nodes if n not in self.now and n not in self.inlined]
                if missing:
                    stack += missing
                    continue
                stack.pop()
                if top not in self.inlined:
                    self.inlined[top] = self._copied(top)
                    if is_size(top) or top.op == "get_attr":
                        self.now[top] = self.inlined[top]
        return self.inlined[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        for n in node.all_input_nodes:
            self._of(n)
        new = self.graph.node_copy(node, self._of)
        new.meta = dict(node.meta)
        new.meta.pop("partitioner_tag", None)
        new.meta.pop("recompute", None)
        return new

    def _finished(self, output: fx.Node) -> Written:
        old = self.step.joint
        late = [n for n in self.graph.nodes if n not in self.early and n.op != "output"]
        returned: Any = output.args[0]
        results = set(returned[self.step.forwards :])
        read: dict[fx.Node, None] = {}
        for node in self._live(late, results):
            for n in node.all_input_nodes:
                if n in self.early:
                    read[n] = None
        for n in results:
            if isinstance(n, fx.Node) and n in self.early:
                read[n] = None
        tangents = {self.now[n] for n in self.step.tangents}
        saved = [n for n in read if not is_size(n) and n not in tangents]
        sizes = [n for n in read if is_size(n)]
        joint = fx.GraphModule(old, self.graph)
        joint.meta = dict(old.meta)
        return Written(joint, saved, sizes, self.step.forwards)

    @staticmethod
    def _live(late: list[fx.Node], results: set[Any]) -> list[fx.Node]:
        needed = {n for n in results if isinstance(n, fx.Node)}
        for node in reversed(late):
            if node in needed or node.is_impure():
                needed.add(node)
                needed.update(node.all_input_nodes)
        return [n for n in late if n in needed]


def _node(op: GraphOp) -> fx.Node:
    assert op.node is not None
    return op.node
