"""The backward of a program for the outputs that really got a gradient.

Which outputs the loss reads is known at the first backward, not when a step is planned.  Autograd leaves
``None`` where no gradient came by; here likewise: the same schedule without the calls that only serve absent
gradients.  It reads no more than the forward has saved, and where the whole one fits, so does it.

* A call whose gradients are all absent is not made; what it would have made is absent.
* A sum by which the engine adds up gradients, with one of them absent, is the other one, if that is laid out
  as the sum; else eager runs other calls behind it, and there is no pruning, as below.
* A backward of several outputs (``split``, ``unbind``) is given zeros for an absent one, as autograd gives
  them.  Any other formula that is given some of its gradients only (a custom ``autograd.Function``,
  ``var_mean``, an LSTM) is not guessed at: there is no pruning then, and the step is captured again with
  those outputs differentiated only (:mod:`planner.runtime.output_sets`).

Without a sum its operand lives on under both names, so what was written in place before, or handed out as a
parameter's gradient, is looked at again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from planner._compat import modes_set_aside, storage_key
from planner.capture import meta
from planner.graph import kernels
from planner.graph.nodes import is_check, is_mutation, is_random, tensors_of
from planner.graph.passes.inplace import destination, write_apart
from planner.rewrite.program import Argument, Backward, Key, Segment
from planner.rewrite.segments import ONCE, segment_of

__all__ = ["MOST_KEPT", "Handed", "Pruned", "Prunings", "pruned"]

aten = torch.ops.aten

MOST_KEPT = 64  # kept of one backward; beyond that all are forgotten, and cost milliseconds again

# Backward formulas of several outputs that read zeros where no gradient came.
_FILLED = (aten.cat.default, aten.stack.default)


class Handed(NamedTuple):
    """A node of the whole backward, whose gradient it is, and the segment that hands it out."""

    node: fx.Node
    key: Key
    part: int


@dataclass(frozen=True, eq=False)
class Pruned:
    """The segments for one set of outputs; as many as the whole backward has.

    ``gradients``  whose gradients they make.
    ``ran``        calls of the whole backward that are made and depend on a gradient.
    ``saved``      positions in the forward's saved set that are read.
    ``given``      what in the whole backward depends on a gradient of an output.
    """

    segments: tuple[Segment, ...]
    gradients: frozenset[Key]
    ran: frozenset[fx.Node]
    saved: frozenset[int]
    given: frozenset[fx.Node]

    def frees(self, other: Pruned) -> bool:
        """Whether autograd, having run this one, has freed what ``other`` needs.

        That is where the two have a formula in common that reads more than gradients.
        """
        return any(
            n not in self.given and _is_tensor(n) and (n.op == "placeholder" or n.all_input_nodes)
            for node in self.ran & other.ran
            for n in node.all_input_nodes
        )


def pruned(
    backward: Backward, present: frozenset[int], handed: Sequence[Handed] | None = None
) -> Pruned | None:
    """The backward where only the outputs ``present`` get a gradient; ``None`` where it cannot be told.

    ``handed``  what it hands out instead of its gradients.
    """
    fates = _fates(backward, present)
    if handed is None:
        whose = backward.gradients
        handed = [Handed(n, whose[n], k) for k, part in enumerate(backward.parts) for n in part if n in whose]
    return None if fates is None else _Pruner(backward, fates, handed).written()


class Prunings:
    """The prunings of one backward that were asked for."""

    def __init__(self, backward: Backward) -> None:
        self.backward = backward
        self._known: dict[frozenset[int], Pruned | None] = {}

    def of(self, present: frozenset[int]) -> Pruned | None:
        """As :func:`pruned`, made when first asked for."""
        if present not in self._known:
            if len(self._known) >= MOST_KEPT:
                self._known.clear()
            with modes_set_aside():  # a meter is not to count what a binding is tried on
                self._known[present] = pruned(self.backward, present)
        return self._known[present]


@dataclass
class _Fates:
    """What becomes of the calls that depend on gradients of outputs.

    ``given``   they, and the placeholders of those gradients.
    ``absent``  those that are not made.
    ``sole``    a sum of gradients -> its only operand that is there.
    ``filled``  a call -> operands in whose place it reads zeros.
    """

    given: set[fx.Node] = field(default_factory=set)
    absent: set[fx.Node] = field(default_factory=set)
    sole: dict[fx.Node, fx.Node] = field(default_factory=dict)
    filled: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)


def _fates(backward: Backward, present: frozenset[int]) -> _Fates | None:
    """``None`` where a formula has some of its gradients only and what it then does is not known."""
    fates = _Fates()
    whole = True
    for node, argument in backward.arguments.items():
        if argument.kind == "tangent":
            fates.given.add(node)
            if argument.key not in present:
                fates.absent.add(node)
                whole = False
    read = {a.key for n, a in backward.arguments.items() if a.kind == "tangent" and n.users}
    if not present <= read:
        return None  # of a formula of several outputs, perhaps, of which it reads another
    runs: dict[int, set[bool]] = defaultdict(set)  # formula -> whether its calls are made
    for node in backward.graph.nodes:
        operands = [n for n in node.all_input_nodes if n in fates.given]
        if node.op == "placeholder" or not operands:
            continue
        fates.given.add(node)
        there = [n for n in operands if n not in fates.absent]
        if not there:
            fates.absent.add(node)
        elif len(there) < len(operands):
            if meta.sums_gradients(node):
                if _layout(node) != _layout(there[0]):
                    return None  # what reads the sum was traced for its layout: eager's calls may be others
                fates.sole[node] = there[0]
            elif node.target in _FILLED and not backward.sized:
                fates.filled[node] = [n for n in operands if n in fates.absent]
            else:
                return None
        formula = None if meta.sums_gradients(node) else meta.formula(node)
        if formula is not None:
            runs[formula].add(bool(there))
    if any(len(ran) > 1 for ran in runs.values()):
        return None
    if not whole and not fates.given >= set(backward.gradients):
        return None  # a gradient that is a constant: whether its formula runs is not to be seen
    return fates


class _Pruner:
    """Writes what is left of a backward, in its order, each call in the segment it was in."""

    def __init__(self, backward: Backward, fates: _Fates, handed: Sequence[Handed]) -> None:
        self.backward, self.fates, self.handed = backward, fates, handed
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # of the whole backward -> of this one
        self.arguments: dict[fx.Node, Argument] = {}
        self.parts: list[list[fx.Node]] = [[] for _ in backward.parts]
        self.gradients: dict[fx.Node, Key] = {}
        self.kept = self._kept()

    def written(self) -> Pruned:
        """The segments of what is left."""
        for node, argument in self.backward.arguments.items():
            if node in self.kept:
                self.new[node] = self.graph.placeholder(node.name)
                self.new[node].meta = node.meta
                self.arguments[self.new[node]] = argument
        for k, part in enumerate(self.backward.parts):
            for node in part:
                if node in self.kept:
                    self._write(node, self.parts[k])
        self._keep_apart()
        self._copy_shared()
        fates = self.fates
        return Pruned(
            tuple(self._segments()),
            frozenset(self.gradients.values()),
            frozenset(n for n in self.kept if n in fates.given and n.op != "placeholder"),
            frozenset(int(a.key) for a in self.arguments.values() if a.kind == "saved"),
            frozenset(fates.given),
        )

    def _kept(self) -> set[fx.Node]:
        """Nodes that a gradient which is there is made from, and writes into what is not ours."""
        fates = self.fates
        stack = [of.node for of in self.handed if of.node not in fates.absent]
        for node in self.backward.graph.nodes:
            if node.op == "call_function" and node not in fates.absent and _acts(node):
                stack.append(node)
        kept: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in kept:
                kept.add(node)
                sole = fates.sole.get(node)
                missing = fates.filled.get(node, ())
                stack.extend([sole] if sole is not None else set(node.all_input_nodes) - set(missing))
        return kept

    def _write(self, node: fx.Node, part: list[fx.Node]) -> None:
        sole = self.fates.sole.get(node)
        if sole is not None:
            self.new[node] = self.new[sole]
            return
        zeros = {n: self._zeros(n, part) for n in self.fates.filled.get(node, ())}
        new = self.graph.node_copy(node, lambda n: zeros.get(n) or self.new[n])
        new.meta = node.meta
        self.new[node] = new
        part.append(new)

    def _zeros(self, absent: fx.Node, part: list[fx.Node]) -> fx.Node:
        """What autograd gives a formula of several outputs for one that got no gradient."""
        like = meta.tensor(absent)
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        zeros = self.graph.call_function(aten.zeros.default, (list(like.shape),), options)
        meta.describe(zeros, like, absent)
        part.append(zeros)
        return zeros

    # -- one tensor under two names ----------------------------------------------------------------

    def _storages(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node those that may lie on its storage, in order."""
        group: dict[fx.Node, list[fx.Node]] = {n: [n] for n in self.graph.nodes}
        for node, new in self.new.items():
            if node.op == "placeholder" or node in self.fates.sole:
                continue
            here = {storage_key(t) for t in tensors_of(node)}
            over = destination(new)
            for operand in node.all_input_nodes:
                below = self.new.get(operand)
                if below is None or group[below] is group[new]:
                    continue
                if below is over or here & {storage_key(t) for t in tensors_of(operand)}:
                    group[below].extend(group[new])
                    for member in group[new]:
                        group[member] = group[below]
        return group

    def _keep_apart(self) -> None:
        """Calls that wrote over an operand which somebody still reads under another name do so no more."""
        position = {n: t for t, n in enumerate(self.graph.nodes)}
        handed = {self.new[of.node] for of in self.handed if of.node in self.new}
        group = self._storages()
        for node in self.graph.nodes:
            over = destination(node) if node.op == "call_function" else None
            if over is None:
                continue
            before = [n for n in group[over] if position[n] < position[node]]
            if any(
                n.op == "placeholder" or n in handed or any(position[u] > position[node] for u in n.users)
                for n in before
            ):
                write_apart(node)
                group = self._storages()

    def _copy_shared(self) -> None:
        """A gradient that somebody else holds too is handed out as a copy."""
        group = self._storages()
        shared: set[int] = set()
        for node, key, k in self.handed:
            if node not in self.new:
                continue
            new = self.new[node]
            alike = group[new]
            again = new not in self.parts[k] or (node in self.fates.sole and new.users)
            if again or id(alike) in shared or any(n.op == "placeholder" for n in alike):
                copy = self.graph.call_function(kernels.gradient_apart, (new,))
                meta.describe(copy, meta.value(new), new)
                self.parts[k].append(copy)
                new = copy
            shared.add(id(alike))
            self.gradients[new] = key

    # -- segments ----------------------------------------------------------------------------------

    def _segments(self) -> list[Segment]:
        """A saved tensor is still given to the segment that had it first."""
        home = {n: k for k, part in enumerate(self.parts) for n in part}
        first: dict[fx.Node, int] = {}
        last: dict[fx.Node, int] = {}
        for k, whole in enumerate(self.backward.parts):
            for node in whole:
                for operand in node.all_input_nodes:
                    if operand in self.new and operand.op == "placeholder":
                        first.setdefault(self.new[operand], k)
        for k, part in enumerate(self.parts):
            for node in part:
                for operand in node.all_input_nodes:
                    first.setdefault(operand, k)
                    last[operand] = k
        out = []
        for k, part in enumerate(self.parts):
            here = {n for node in part for n in node.all_input_nodes}
            passing = [
                n for n, a in self.arguments.items()
                if a.kind in ONCE and first[n] == k and n not in here and n in last
            ]  # fmt: skip
            out.append(segment_of(k, part, home, first, last, self.arguments, self.gradients, passing))
        return out


def _layout(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Sizes and steps, as they are written; of one element the step is nothing."""
    tensor = meta.tensor(node)
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple((str(n), "" if str(n) == "1" else str(step)) for n, step in sizes)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(meta.value(node), torch.Tensor)


def _acts(node: fx.Node) -> bool:
    """Whether a call does more than to make something: it writes, draws or checks."""
    return (is_mutation(node) and destination(node) is None) or is_random(node) or is_check(node)
