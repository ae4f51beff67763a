"""The joint graph as memory sees it: operations, and the storages they make.

What is counted is storages, not tensors: a view keeps its base alive and costs nothing, so views
are folded onto their base and re-made for free wherever they are read.  The passes here only
restate the graph; none changes a number that it computes:

* aliases and views that change nothing are removed;
* a gradient that autograd would have to copy (two parameters sharing it, another layout than its
  parameter's, a view into something larger) is copied in the graph, so that the engine always
  takes it as it is and memory is known to the byte;
* ``native_dropout`` becomes the draw of a mask and its application, so that either can be repeated
  without the other;
* each random op is preceded by a note of the generator's state, from which it can be replayed;
* a buffer's new value is copied into it in the forward, once, whatever is recomputed;
* forward work that only the backward reads moves to where the backward first reads it.

A value's ``kind`` is one of ``KINDS``; an op's ``phase`` is "forward", "loss" or "backward".
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from planner import _compat, kernels
from planner.capture import JointGraph, Traced
from planner.errors import TraceError

__all__ = ["KINDS", "GraphOp", "GraphValue", "TrainingGraph", "training_graph"]

aten = torch.ops.aten

KINDS = ("parameter", "buffer", "input", "constant", "tangent", "activation", "gradient", "output", "backward", "loss")
SOURCES = ("parameter", "buffer", "input", "constant", "tangent")


@dataclass(frozen=True)
class GraphValue:
    """A storage.

    ``bytes``     of the storage, not of any tensor on it.
    ``producer``  index of the op that makes it; ``None`` for parameters, inputs and the like.
    ``root``      the node whose tensor is its base; every view is derived from it.
    ``final``     held by the caller until the step ends (an output, a parameter's gradient).
    """

    name: str
    bytes: int
    kind: str
    producer: int | None
    root: fx.Node | None
    final: bool = False
    module: str = ""


@dataclass(frozen=True)
class GraphOp:
    """One kernel call; ``node`` is its call, ``None`` for the gradient of the loss with respect to itself."""

    name: str
    node: fx.Node | None
    phase: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recomputable: bool = True
    workspace: int | None = None  # value index whose bytes the call needs as scratch
    fused_with_previous: bool = False  # its first execution costs nothing beyond the previous op's

    @property
    def target(self) -> str:
        """The op's name, e.g. ``aten.mm``."""
        if self.node is None:
            return "aten.ones_like"
        packet = getattr(self.node.target, "overloadpacket", None)
        return str(packet) if packet is not None else getattr(self.node.target, "__name__", str(self.node.target))


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
    device: torch.device = torch.device("cpu")

    def __repr__(self) -> str:
        forward = sum(op.phase == "forward" for op in self.ops)
        made = sum(v.bytes for v in self.values if v.producer is not None)
        return (
            f"TrainingGraph({len(self.ops)} ops, {forward} of them forward; "
            f"{len(self.values)} storages, {made} bytes made)"
        )

    def bytes_by_kind(self) -> dict[str, int]:
        """Total bytes of all storages by kind."""
        out = dict.fromkeys(KINDS, 0)
        for value in self.values:
            out[value.kind] += value.bytes
        return out


def training_graph(joint: JointGraph) -> TrainingGraph:
    """Restate ``joint`` as ops and storages.  Raises ``TraceError`` for effects a plan cannot repeat."""
    step = _Builder()
    step.load(joint.step)
    step.copy_gradients()
    step.split_dropout()
    step.note_random_state()
    step.update_buffers()
    return step.assemble(joint)


class _Builder:
    """The passes, in order, over one private copy of the graph."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.sources: dict[fx.Node, tuple[str, str | int]] = {}
        self.outputs: list[fx.Node] = []
        self.tangents: dict[int, fx.Node] = {}
        self.gradients: dict[str | int, fx.Node] = {}
        self.mutations: dict[str, fx.Node] = {}
        self.buffers: dict[str, fx.Node] = {}
        self.pinned: set[fx.Node] = set()
        self.updates: list[fx.Node] = []
        self.states: list[fx.Node] = []

    # -- loading ---------------------------------------------------------------------------------

    def load(self, traced: Traced) -> None:
        """Copy the graph without its no-ops; constants become placeholders."""
        new: dict[fx.Node, fx.Node] = {}
        kinds: dict[fx.Node, tuple[str, str | int]] = {}
        kinds |= {n: ("parameter", k) for k, n in traced.parameters.items()}
        kinds |= {n: ("buffer", k) for k, n in traced.buffers.items()}
        kinds |= {n: ("input", k) for k, n in traced.inputs.items()}
        kinds |= {n: ("tangent", k) for k, n in traced.tangents.items()}
        for node in traced.module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "get_attr":
                tensor = getattr(traced.module, node.target)
                new[node] = self.graph.placeholder(node.name)
                new[node].meta = {"val": tensor, **{k: v for k, v in node.meta.items() if k != "val"}}
                self.constants[new[node].name] = tensor
                self.sources[new[node]] = ("constant", new[node].name)
                continue
            if node.op == "call_function" and _changes_nothing(node):
                new[node] = new[node.args[0]]
                continue
            new[node] = self.graph.node_copy(node, new.__getitem__)
            if node in kinds:
                self.sources[new[node]] = kinds[node]
        self.buffers = {k: new[n] for k, n in traced.buffers.items()}
        self.outputs = [new[traced.outputs[i]] for i in sorted(traced.outputs)]
        self.tangents = {i: new[n] for i, n in traced.tangents.items()}
        self.gradients = {k: new[n] for k, n in (*traced.gradients.items(), *traced.input_gradients.items())}
        self.mutations = {k: new[n] for k, n in traced.mutations.items()}
        self._sweep()

    def _roots(self) -> set[fx.Node]:
        return {*self.outputs, *self.gradients.values(), *self.mutations.values(), *self.updates, *self.states}

    def _sweep(self) -> None:
        """Remove what nothing reads, but never a draw of random numbers: later draws depend on it."""
        roots = self._roots()
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and node not in roots and not is_random(node):
                self.graph.erase_node(node)

    # -- passes ----------------------------------------------------------------------------------

    def copy_gradients(self) -> None:
        """Copy, where the engine would, so that it never has to (AccumulateGrad's layout contract)."""
        by_name = {name: n for n, (kind, name) in self.sources.items() if kind in ("parameter", "input")}
        taken = {_compat.storage_key(n.meta["val"]) for n in (*self.sources, *self.outputs)}
        for name, node in self.gradients.items():
            grad, leaf = node.meta["val"], by_name[name].meta["val"]
            key = _compat.storage_key(grad)
            fits = _same_layout(grad, leaf)
            owns = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
            alone = not node.users
            if key in taken or not (fits and owns and alone):
                with self.graph.inserting_after(_last_of(node)):
                    copy = self.graph.call_function(kernels.gradient_like, (node, by_name[name]))
                with _compat.fake_mode_of(grad):
                    copy.meta = {**node.meta, "val": torch.empty_like(leaf)}
                self.gradients[name] = copy
                key = _compat.storage_key(copy.meta["val"])
            taken.add(key)

    def split_dropout(self) -> None:
        """``native_dropout`` -> the draw of its mask, and ``dropout_apply`` on that mask."""
        for node in self.graph.find_nodes(op="call_function", target=aten.native_dropout.default):
            parts = {user.args[1]: user for user in node.users}
            if node.args[2] is not True or set(parts) != {0, 1} or not 0 < node.args[1] < 1:
                continue
            result, mask = parts[0], parts[1]
            x, p = node.args[0], node.args[1]
            with self.graph.inserting_after(_last_of(node)):
                applied = self.graph.call_function(kernels.dropout_apply, (x, mask, p))
            applied.meta = {**result.meta, "draw": node}
            node.meta = {**node.meta, "val": (None, mask.meta["val"])}
            result.replace_all_uses_with(applied)
            self.outputs = [applied if n is result else n for n in self.outputs]
            self.graph.erase_node(result)

    def note_random_state(self) -> None:
        """Before each random op, ``rng_state``: what a replay starts from."""
        for node in list(self.graph.nodes):
            if not is_random(node):
                continue
            device = first_tensor(node).device
            with self.graph.inserting_before(node):
                state = self.graph.call_function(kernels.rng_state, (str(device),))
            with _compat.fake_mode_of(first_tensor(node)):
                size = kernels.rng_state_bytes(str(device))
                state.meta = {"val": torch.empty(size, dtype=torch.uint8), "custom": node.meta.get("custom", {})}
            node.meta["rng_state"] = state
            self.states.append(state)
            self.pinned.add(state)

    def update_buffers(self) -> None:
        """Copy each buffer's new value into it, after the last forward op that reads the old one."""
        position = {n: i for i, n in enumerate(self.graph.nodes)}
        reach = self._reaches((*self.outputs, *self.mutations.values()))
        for name, new in self.mutations.items():
            buffer = self.buffers[name]
            readers = [u for u in _through_views(buffer) if not _ignores_running_stats(u)]
            late = [u for u in readers if u not in reach]
            if late:
                with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op == "call_function")):
                    before = self.graph.call_function(aten.clone.default, (buffer,))
                with _compat.fake_mode_of(new.meta["val"]):
                    before.meta = {"val": torch.empty_like(buffer.meta["val"])}
                buffer.replace_all_uses_with(before, delete_user_cb=lambda u, b=before: u is not b and u not in reach)
                self.pinned.add(before)
            self.pinned.update(readers)
            for user in [u for u in new.users if _ignores_running_stats(u)]:
                user.replace_input_with(new, buffer)  # a backward that does not look at them
            after = max((new, *(u for u in readers if u in reach)), key=lambda n: position.get(n, -1))
            with self.graph.inserting_after(_last_of(after)):
                update = self.graph.call_function(aten.copy_.default, (buffer, new))
            update.meta = {"val": buffer.meta["val"], "custom": new.meta.get("custom", {})}
            self.pinned.add(update)
            self.updates.append(update)
        self.mutations = {}
        self._sweep()

    def _reaches(self, targets: Iterable[fx.Node]) -> set[fx.Node]:
        """Everything the targets are computed from, themselves included."""
        seen: set[fx.Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return seen

    def device(self) -> torch.device:
        """Where the step runs: the device of its gradients."""
        return next(iter(self.gradients.values())).meta["val"].device

    # -- ops and storages ------------------------------------------------------------------------

    def assemble(self, joint: JointGraph) -> TrainingGraph:
        """Order the calls, give every storage a number, and splice in the loss."""
        forward, backward = self._order()
        table = _Table(self.device())
        for node, (kind, name) in self.sources.items():
            table.add_source(node, kind, str(name))
        for node in forward:
            table.add_call(node, "forward", self.pinned)
        if joint.loss is not None:
            self._splice_loss(table, joint.loss)
            turn = next(i for i, op in enumerate(table.ops) if op.node is None)
        else:
            turn = len(table.ops)
            if joint.sees_loss:
                ((_, tangent),) = self.tangents.items()
                table.add_seed(tangent)
        for node in backward:
            table.add_call(node, "backward", self.pinned)
        for node in self.outputs:
            table.hold(node, "output")
        for node in self.gradients.values():
            table.hold(node, "gradient")
        return TrainingGraph(
            tuple(table.finished_ops()),
            tuple(table.finished_values()),
            turn,
            self.graph,
            table.value_of,
            self.sources,
            tuple(self.outputs),
            self.gradients,
            self.tangents,
            self.constants,
            table.device,
        )

    def _order(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Forward calls in program order; backward calls in engine order, each preceded by what only it needs."""
        draws = [n for n in self.graph.nodes if is_random(n)]
        in_forward = self._reaches((*self.outputs, *self.updates, *self.states, *draws))
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        forward = [n for n in calls if n in in_forward]
        tangents = set(self.tangents.values())
        needs_tangent: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in tangents or any(i in needs_tangent for i in node.all_input_nodes):
                needs_tangent.add(node)
        if needs_tangent & in_forward:
            raise TraceError("an output or a buffer depends on the gradients of the outputs; this cannot be planned")
        backward: list[fx.Node] = []
        placed: set[fx.Node] = set(in_forward)
        for node in calls:
            if node in placed or node not in needs_tangent:
                continue
            stack = [node]
            while stack:
                top = stack[-1]
                missing = [i for i in top.all_input_nodes if i.op == "call_function" and i not in placed]
                if missing:
                    stack.extend(reversed(missing))
                else:
                    stack.pop()
                    if top not in placed:
                        placed.add(top)
                        backward.append(top)
        for node in calls:  # gradients that do not depend on any tangent (constants)
            if node not in placed:
                placed.add(node)
                backward.append(node)
        return forward, backward

    def _splice_loss(self, table: _Table, loss: Traced) -> None:
        """``loss_fn`` runs in eager between the model's forward and backward; its ops never run again."""
        inner = _Builder()
        inner.load(loss)
        for i, node in list(inner.sources.items()):
            kind, name = node
            if kind == "input":
                table.alias(i, self.outputs[int(name)])
            elif kind == "tangent":
                continue
            else:
                table.add_source(i, kind, f"loss/{name}")
        forward, backward = inner._order()
        for node in forward:
            table.add_call(node, "loss", None, prefix="loss/")
        ((_, seed),) = inner.tangents.items()
        table.add_seed(seed)
        for node in inner.outputs:
            table.hold(node, "output")
        for node in backward:
            table.add_call(node, "loss", None, prefix="loss/")
        for index, tangent in self.tangents.items():
            gradient = inner.gradients.get(index)
            if gradient is not None:
                table.alias(tangent, gradient)


class _Table:
    """Numbers for storages and ops while they are being collected."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ops: list[GraphOp] = []
        self.values: list[GraphValue] = []
        self.value_of: dict[fx.Node, int] = {}
        self._by_storage: dict[int, int] = {}
        self._held: dict[int, str] = {}
        self._module = ""
        self._keep: list[torch.Tensor] = []  # storage identities are addresses: keep them unique

    def _value(self, tensor: torch.Tensor, name: str, kind: str, producer: int | None, root: fx.Node) -> int:
        index = len(self.values)
        self._by_storage[_compat.storage_key(tensor)] = index
        self._keep.append(tensor)
        counted = tensor.untyped_storage().nbytes() if tensor.device == self.device else 0
        self.values.append(GraphValue(name, counted, kind, producer, root, module=module_of(root) or self._module))
        return index

    def add_source(self, node: fx.Node, kind: str, name: str) -> None:
        tensor = node.meta["val"]
        if not isinstance(tensor, torch.Tensor):
            return
        if kind != "constant" and _compat.storage_key(tensor) in self._by_storage:
            self.value_of[node] = self._by_storage[_compat.storage_key(tensor)]
            return
        self.value_of[node] = self._value(tensor, name, kind, None, node)

    def add_seed(self, tangent: fx.Node) -> None:
        """The ones that ``loss.backward()`` starts from; alive until it returns."""
        tensor = tangent.meta["val"]
        if tangent in self.value_of:
            old = self.value_of[tangent]
            self.values[old] = GraphValue("", 0, "tangent", None, None)
        index = self._value(tensor, "ones_like_loss", "backward", len(self.ops), tangent)
        self.value_of[tangent] = index
        self._held[index] = "backward"
        self.ops.append(GraphOp("ones_like_loss", None, "backward", "", (), (index,), recomputable=False))

    def alias(self, node: fx.Node, other: fx.Node) -> None:
        """``node`` of one graph is ``other`` of the other graph."""
        old = self.value_of.get(node)
        if old is not None:
            self.values[old] = GraphValue("", 0, self.values[old].kind, None, None)
        self.value_of[node] = self.value_of[other]
        self._by_storage[_compat.storage_key(node.meta["val"])] = self.value_of[other]
        self._keep.append(node.meta["val"])

    def add_call(self, node: fx.Node, phase: str, pinned: set[fx.Node] | None, prefix: str = "") -> None:
        """Number the storages ``node`` makes; a node that makes none and changes none is a view."""
        module = module_of(node)
        self._module = self._module if module is None else module
        tensors = tensors_of(node)
        fresh = [t for t in tensors if _compat.storage_key(t) not in self._by_storage]  # storages new here
        mutates = is_mutation(node)
        if node.target is operator.getitem or (not fresh and not mutates):
            if isinstance(node.meta.get("val"), torch.Tensor):
                self.value_of[node] = self._by_storage[_compat.storage_key(node.meta["val"])]
            return
        producer = len(self.ops)
        reads = tuple(dict.fromkeys(v for n in node.all_input_nodes for v in self._values_of(n)))
        outputs: list[int] = []
        root_of = _roots_of(node)
        kind = {"forward": "activation", "loss": "loss", "backward": "backward"}[phase]
        for i, tensor in enumerate(tensors):
            if _compat.storage_key(tensor) in self._by_storage:
                continue
            root = root_of.get(i, node)
            outputs.append(self._value(tensor, prefix + root.name, kind, producer, root))
        if isinstance(node.meta.get("val"), torch.Tensor):
            self.value_of[node] = self._by_storage[_compat.storage_key(node.meta["val"])]
        draw = node.meta.get("draw")
        self.ops.append(
            GraphOp(
                prefix + node.name,
                node,
                phase,
                self._module,
                reads + self._state(node),
                tuple(outputs),
                recomputable=pinned is not None and node not in pinned and not mutates,
                fused_with_previous=draw is not None,
            )
        )
        if draw is not None:
            (drawn,) = (i for i, op in enumerate(self.ops) if op.node is draw)
            self.ops[drawn] = replace(self.ops[drawn], workspace=outputs[0])

    def _state(self, node: fx.Node) -> tuple[int, ...]:
        state = node.meta.get("rng_state")
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

    def finished_ops(self) -> list[GraphOp]:
        """An op whose output the caller holds is pinned: a second copy would not replace the first."""
        return [
            replace(op, recomputable=False) if any(v in self._held for v in op.outputs) else op for op in self.ops
        ]


# -- what a node is ------------------------------------------------------------------------------


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors a node makes, ``None``s and numbers left out, in order."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        mask = output_mask(node, len(value))
        return [t for t, made in zip(value, mask, strict=True) if made and isinstance(t, torch.Tensor)]
    return []


def output_mask(node: fx.Node, length: int) -> list[bool]:
    """Which outputs the kernel makes; fake kernels make some that the real one leaves out."""
    named = hasattr(node.target, "_schema") and node.op == "call_function"
    mask = argument(node, "output_mask") if named else None
    return list(mask) if mask is not None and len(mask) == length else [True] * length


def first_tensor(node: fx.Node) -> torch.Tensor:
    return tensors_of(node)[0]


def argument(node: fx.Node, name: str) -> Any:
    """The value of an operator's argument, given or default; ``None`` if it has no such argument."""
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, a.default_value)
    return None


def is_random(node: fx.Node) -> bool:
    """Whether the call draws from a generator, by torch's own tag and its probability."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    certain = argument(node, "dropout_p") == 0 or argument(node, "p") == 0 or argument(node, "train") is False
    return not certain


def is_mutation(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def module_of(node: fx.Node) -> str | None:
    """Path of the module whose forward made the node (a backward node has its forward's)."""
    return (node.meta.get("custom") or {}).get("module")


_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)|^(\d+)(?:\.|$)")


def layer_of(path: str) -> str:
    """The outermost numbered module of a path: ``h.3.attn.c_proj`` -> ``h.3``; else its first name."""
    match = _LAYER.match(path)
    return (match.group(1) or match.group(2)) if match else path.split(".")[0]


_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


def _changes_nothing(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _ALIASES:
        return True
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)) or is_mutation(node):
        return False
    return (
        _compat.storage_key(before) == _compat.storage_key(after)
        and before.shape == after.shape
        and before.stride() == after.stride()
        and before.storage_offset() == after.storage_offset()
        and before.dtype == after.dtype
        and before.is_conj() == after.is_conj()
        and before.is_neg() == after.is_neg()
    )


def _same_layout(grad: torch.Tensor, leaf: torch.Tensor) -> bool:
    if grad.dtype != leaf.dtype:
        return False
    pairs = zip(grad.shape, grad.stride(), torch.empty_like(leaf).stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def _last_of(node: fx.Node) -> fx.Node:
    """The node, or the last ``getitem`` of its group, so that an insertion does not split the group."""
    last = node if node.target is not operator.getitem else node.args[0]
    assert isinstance(last, fx.Node)
    while last.next.op == "call_function" and last.next.target is operator.getitem:
        last = last.next
    return last if last is not node.args else node


def _through_views(node: fx.Node) -> list[fx.Node]:
    """Calls that read the node's storage, directly or through views."""
    key = _compat.storage_key(node.meta["val"])
    out: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if any(_compat.storage_key(t) == key for t in tensors_of(user)):
            stack.extend(user.users)
        else:
            out.append(user)
    return out


def _ignores_running_stats(node: fx.Node) -> bool:
    """A batch norm in training mode normalizes with the batch's statistics, in both directions."""
    name = str(getattr(node.target, "overloadpacket", ""))
    if "batch_norm" not in name:
        return False
    return (
        argument(node, "training") is True
        or argument(node, "train") is True
        or name in ("aten.cudnn_batch_norm_backward", "aten.miopen_batch_norm_backward")
    )


def _roots_of(node: fx.Node) -> dict[int, fx.Node]:
    """For a call with several outputs: tensor position -> its ``getitem``."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return {0: node}
    made = [isinstance(x, torch.Tensor) and m for x, m in zip(value, output_mask(node, len(value)), strict=True)]
    position = {i: sum(made[:i]) for i, m in enumerate(made) if m}
    out: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is operator.getitem and user.args[1] in position:
            out.setdefault(position[user.args[1]], user)
    return out
