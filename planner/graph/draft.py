"""A private copy of a captured graph, for passes to work on.

Loading it is the first pass: aliases and views that change nothing go, so does what nothing reads; constants
and sizes that vary become placeholders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.capture.traced import Traced
from planner.graph.nodes import changes_nothing, is_check, is_mutation, is_random, tensors_of

__all__ = ["Did", "Draft", "loaded"]

# What a pass did: how often, by what.
Did = Mapping[str, int]


@dataclass(eq=False)
class Draft:
    """The graph and what is known of its nodes.

    ``sources``        placeholder -> (kind, name).
    ``constants``      tensors the trace baked in, by placeholder name.
    ``outputs``        node per tensor leaf of the model's output.
    ``tangents``       index of an output -> placeholder of its gradient.
    ``gradients``      parameter name, or input position -> node.
    ``buffers``        placeholder by name; ``mutations``: node of the new value by name.
    ``rebound``        names of buffers that get a new tensor: the old one stays as it was for who read it.
    ``sizes``          placeholder by expression of a size that varies.
    ``storage_bytes``  storage -> expression of its bytes, where they vary.
    ``pinned``         calls that no plan may run twice.
    ``updates``        calls that write to buffers.
    ``states``         notes of a generator's state.
    ``early``          what only the backward reads, and the forward makes all the same.
    ``chunked``        losses that are computed in chunks.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    sources: dict[fx.Node, tuple[str, str | int]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    tangents: dict[int, fx.Node] = field(default_factory=dict)
    gradients: dict[str | int, fx.Node] = field(default_factory=dict)
    buffers: dict[str, fx.Node] = field(default_factory=dict)
    mutations: dict[str, fx.Node] = field(default_factory=dict)
    rebound: frozenset[str] = frozenset()
    sizes: dict[str, fx.Node] = field(default_factory=dict)
    storage_bytes: dict[int, Any] = field(default_factory=dict)
    pinned: set[fx.Node] = field(default_factory=set)
    updates: list[fx.Node] = field(default_factory=list)
    states: list[fx.Node] = field(default_factory=list)
    early: list[fx.Node] = field(default_factory=list)
    chunked: list[Any] = field(default_factory=list)

    def sweep(self) -> int:
        """Remove what nothing reads, but never a draw of random numbers: later draws depend on it."""
        roots = {
            *self.outputs,
            *self.gradients.values(),
            *self.mutations.values(),
            *self.updates,
            *self.states,
        }
        before = len(self.graph.nodes)
        for node in reversed(self.graph.nodes):
            needless = not node.users and node not in roots and not is_random(node) and not is_check(node)
            if node.op == "call_function" and needless:
                self.graph.erase_node(node)
        return before - len(self.graph.nodes)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """``new`` for all who read ``node``; views of it lie on the storage of ``new``."""
        node.replace_all_uses_with(new)
        before, stack = _compat.storage_key(meta.tensor(node)), [new]
        with _compat.fake_mode_of(meta.tensor(new)):
            while stack:
                for user in stack.pop().users:
                    on_it = any(_compat.storage_key(t) == before for t in tensors_of(user))
                    if on_it and not is_mutation(user):
                        args, kwargs = fx.map_arg((user.args, user.kwargs), meta.value)
                        meta.set_value(user, user.target(*args, **kwargs))  # type: ignore[operator]
                        stack.append(user)
        self.outputs = [new if n is node else n for n in self.outputs]
        self.gradients.update({k: new for k, n in self.gradients.items() if n is node})
        self.mutations.update({k: new for k, n in self.mutations.items() if n is node})

    def reaches(self, targets: Iterable[fx.Node]) -> set[fx.Node]:
        """Everything the targets are computed from, themselves included."""
        seen: set[fx.Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return seen


def loaded(traced: Traced) -> tuple[Draft, Did]:
    """A copy of the graph without its no-ops; constants become placeholders."""
    draft = Draft(storage_bytes=traced.storage_bytes, rebound=frozenset(traced.rebound))
    new: dict[fx.Node, Any] = {}  # a node, or a number
    kinds: dict[fx.Node, tuple[str, str | int]] = {}
    kinds.update({n: ("parameter", k) for k, n in traced.parameters.items()})
    kinds.update({n: ("buffer", k) for k, n in traced.buffers.items()})
    kinds.update({n: ("input", k) for k, n in traced.inputs.items()})
    kinds.update({n: ("tangent", k) for k, n in traced.tangents.items()})
    aliases = 0
    for node in traced.module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            new[node] = _constant(draft, node, getattr(traced.module, node.target))
        elif meta.size(node) is not None:
            new[node] = _size(draft, node)
        elif node.op == "call_function" and changes_nothing(node):
            new[node] = new[node.args[0]]
            aliases += 1
        else:
            new[node] = draft.graph.node_copy(node, new.__getitem__)
            meta.forget_symbolic(new[node])  # a pass may give the copy another value
            if node in kinds:
                draft.sources[new[node]] = kinds[node]
    draft.buffers = {k: new[n] for k, n in traced.buffers.items()}
    draft.outputs = [new[traced.outputs[i]] for i in sorted(traced.outputs)]
    draft.tangents = {i: new[n] for i, n in traced.tangents.items()}
    draft.gradients.update({k: new[n] for k, n in traced.gradients.items()})
    draft.gradients.update({i: new[n] for i, n in traced.input_gradients.items()})
    draft.mutations = {k: new[n] for k, n in traced.mutations.items()}
    unread = draft.sweep()
    return draft, {"no-ops": aliases, "unread": unread, "sizes": len(draft.sizes)}


def _constant(draft: Draft, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
    placeholder = draft.graph.placeholder(node.name)
    meta.describe(placeholder, tensor, node)
    draft.constants[placeholder.name] = tensor
    draft.sources[placeholder] = ("constant", placeholder.name)
    return placeholder


def _size(draft: Draft, node: fx.Node) -> Any:
    """A size that varies is an argument of the program, by its expression; others are numbers."""
    expression = meta.size(node)
    key = str(expression)
    if not getattr(expression, "free_symbols", None):
        return meta.value(node)
    if key not in draft.sizes:
        draft.sizes[key] = draft.graph.placeholder(f"size{len(draft.sizes)}")
        meta.describe(draft.sizes[key], meta.value(node))
        meta.note_size(draft.sizes[key], expression)
        draft.sources[draft.sizes[key]] = ("size", key)
    return draft.sizes[key]
