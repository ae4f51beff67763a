"""Passes that restate the joint graph for memory; none changes a number that it computes.

* aliases and views that change nothing are removed;
* a weight that autocast casts several times is cast once, as its cache does in eager;
* a gradient that autograd would have to copy (two parameters sharing it, another layout than its
  parameter's, a view into something larger) is copied in the graph, so that the engine always
  takes it as it is and memory is known to the byte;
* ``native_dropout`` becomes the draw of a mask and its application, so that either can be repeated
  without the other;
* each random op is preceded by a note of the generator's state, from which it can be replayed;
* a size that varies becomes an argument, and whatever computed it goes;
* a buffer's new value is written into it in the forward, once, whatever is recomputed: by the kernel that
  does so in eager, else by a copy;
* batch norm is cuDNN's where eager's is (:mod:`planner.graph.passes.batch_norm`), LSTM oneDNN's
(:mod:`planner.graph.passes.lstm`);
* forward work that only the backward reads moves to where the backward first reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture.joint_graph import Traced
from planner.errors import TraceError
from planner.graph import kernels
from planner.graph.nodes import (
    changes_nothing,
    first_tensor,
    ignores_running_stats,
    is_check,
    is_random,
    last_of,
    readers_of,
    same_layout,
    tensors_of,
)
from planner.graph.passes import batch_norm, lstm
from planner.graph.passes.autocast import share_weight_casts

__all__ = ["Normalized", "normalize"]

aten = torch.ops.aten


def normalize(traced: Traced) -> Normalized:
    """All passes, in order."""
    graph = Normalized(traced)
    graph.cast_weights_once()
    graph.copy_gradients()
    graph.split_dropout()
    graph.note_random_state()
    graph.update_buffers()
    batch_norm.as_eager(graph.graph)
    lstm.as_eager(graph.graph)
    return graph


class Normalized:
    """A private copy of a captured graph, without its no-ops, and the passes over it."""

    def __init__(self, traced: Traced) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.sources: dict[fx.Node, tuple[str, str | int]] = {}
        self.outputs: list[fx.Node] = []
        self.tangents: dict[int, fx.Node] = {}
        self.gradients: dict[str | int, fx.Node] = {}
        self.mutations: dict[str, fx.Node] = {}
        self.buffers: dict[str, fx.Node] = {}
        self.sizes: dict[str, fx.Node] = {}
        self.storage_bytes = traced.storage_bytes
        self.pinned: set[fx.Node] = set()
        self.updates: list[fx.Node] = []
        self.states: list[fx.Node] = []
        self._load(traced)

    # -- loading ---------------------------------------------------------------------------------

    def _load(self, traced: Traced) -> None:
        """Copy the graph without its no-ops; constants become placeholders."""
        new: dict[fx.Node, Any] = {}  # a node, or a number
        kinds: dict[fx.Node, tuple[str, str | int]] = {}
        kinds.update({n: ("parameter", k) for k, n in traced.parameters.items()})
        kinds.update({n: ("buffer", k) for k, n in traced.buffers.items()})
        kinds.update({n: ("input", k) for k, n in traced.inputs.items()})
        kinds.update({n: ("tangent", k) for k, n in traced.tangents.items()})
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
            if "size" in node.meta:
                new[node] = self._size(node)
                continue
            if node.op == "call_function" and changes_nothing(node):
                new[node] = new[node.args[0]]
                continue
            new[node] = self.graph.node_copy(node, new.__getitem__)
            new[node].meta.pop("symbolic", None)  # a pass may give the copy another value
            if node in kinds:
                self.sources[new[node]] = kinds[node]
        self.buffers = {k: new[n] for k, n in traced.buffers.items()}
        self.outputs = [new[traced.outputs[i]] for i in sorted(traced.outputs)]
        self.tangents = {i: new[n] for i, n in traced.tangents.items()}
        self.gradients.update({k: new[n] for k, n in traced.gradients.items()})
        self.gradients.update({i: new[n] for i, n in traced.input_gradients.items()})
        self.mutations = {k: new[n] for k, n in traced.mutations.items()}
        self._sweep()

    def _size(self, node: fx.Node) -> Any:
        """A size that varies is an argument of the program, by its expression; others are numbers."""
        key = str(node.meta["size"])
        if not getattr(node.meta["size"], "free_symbols", None):
            return node.meta["val"]
        if key not in self.sizes:
            self.sizes[key] = self.graph.placeholder(f"size{len(self.sizes)}")
            self.sizes[key].meta = {"val": node.meta["val"], "size": node.meta["size"]}
            self.sources[self.sizes[key]] = ("size", key)
        return self.sizes[key]

    def _roots(self) -> set[fx.Node]:
        return {
            *self.outputs,
            *self.gradients.values(),
            *self.mutations.values(),
            *self.updates,
            *self.states,
        }

    def _sweep(self) -> None:
        """Remove what nothing reads, but never a draw of random numbers: later draws depend on it."""
        roots = self._roots()
        for node in reversed(self.graph.nodes):
            needless = not node.users and node not in roots and not is_random(node) and not is_check(node)
            if node.op == "call_function" and needless:
                self.graph.erase_node(node)

    # -- passes ----------------------------------------------------------------------------------

    def cast_weights_once(self) -> None:
        """See :mod:`planner.graph.passes.autocast`; runs under the autocast state of the capture."""
        weights = {
            n: self.gradients.get(name) for n, (kind, name) in self.sources.items() if kind == "parameter"
        }
        gradient_of = {n: g for n, g in weights.items() if g is not None}
        replaced = share_weight_casts(self.graph, weights, gradient_of)
        self.gradients = {name: replaced.get(node, node) for name, node in self.gradients.items()}
        self._sweep()

    def copy_gradients(self) -> None:
        """Copy, where the engine would, so that it never has to (AccumulateGrad's layout contract)."""
        by_name = {name: n for n, (kind, name) in self.sources.items() if kind in ("parameter", "input")}
        taken = {_compat.storage_key(t) for n in (*self.sources, *self.outputs) for t in tensors_of(n)}
        for name, node in self.gradients.items():
            grad, leaf = node.meta["val"], by_name[name].meta["val"]
            key = _compat.storage_key(grad)
            fits = same_layout(grad, leaf)
            owns = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
            alone = not node.users
            if key in taken or not (fits and owns and alone):
                with self.graph.inserting_after(last_of(node)):
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
            if node.args[2] is not True or 0 not in parts or not 0 < node.args[1] < 1:
                continue
            result = parts[0]
            mask = parts[1] if 1 in parts else self._mask_of(node)
            x, p = node.args[0], node.args[1]
            made = result.meta["val"]
            scale = kernels.dropout_scale(p, made.dtype, str(made.device))
            with self.graph.inserting_after(last_of(node)):
                applied = self.graph.call_function(kernels.dropout_apply, (x, mask, scale))
            applied.meta = {**result.meta}
            result.replace_all_uses_with(applied)
            self.outputs = [applied if n is result else n for n in self.outputs]
            self.graph.erase_node(result)
            if made.device.type == "cpu":
                self._as_on_cpu(node, mask, scale)
            else:
                applied.meta["draw"] = node
                node.meta = {**node.meta, "val": (None, mask.meta["val"])}

    def _as_on_cpu(self, dropout: fx.Node, mask: fx.Node, scale: float) -> None:
        """Eager's own kernels: the CPU has no fused dropout, and its emulation takes thrice the time."""
        with self.graph.inserting_before(dropout):
            draw = self.graph.call_function(kernels.dropout_mask, dropout.args[:2])
        draw.meta = {**dropout.meta, "val": mask.meta["val"]}
        for user in list(mask.users):
            if user.target is not aten.native_dropout_backward.default:
                continue
            gradient = user.args[0]
            assert isinstance(gradient, fx.Node)
            user.args = (gradient, mask, scale)
            if user.meta["val"].stride() == torch.empty_like(gradient.meta["val"]).stride():
                user.target = kernels.dropout_apply
        mask.replace_all_uses_with(draw)
        self.graph.erase_node(mask)
        self.graph.erase_node(dropout)

    def _mask_of(self, dropout: fx.Node) -> fx.Node:
        """The mask that nothing has asked for yet: no gradient passes here."""
        with self.graph.inserting_after(dropout):
            mask = self.graph.call_function(operator.getitem, (dropout, 1))
        mask.meta = {**dropout.meta, "val": dropout.meta["val"][1]}
        return mask

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
                state.meta = {
                    "val": torch.empty(size, dtype=torch.uint8),
                    "custom": node.meta.get("custom", {}),
                }
            node.meta["rng_state"] = state
            self.states.append(state)
            self.pinned.add(state)

    def update_buffers(self) -> None:
        """Copy each buffer's new value into it, after the last forward op that reads the old one."""
        self._update_running_stats_in_place()
        position = {n: i for i, n in enumerate(self.graph.nodes)}
        reach = self._reaches((*self.outputs, *self.mutations.values()))
        for name, new in self.mutations.items():
            buffer = self.buffers[name]
            readers = [u for u in readers_of(buffer) if not ignores_running_stats(u)]
            late = [u for u in readers if u not in reach]
            if late:
                with self.graph.inserting_before(
                    next(n for n in self.graph.nodes if n.op == "call_function")
                ):
                    before = self.graph.call_function(aten.clone.default, (buffer,))
                with _compat.fake_mode_of(new.meta["val"]):
                    before.meta = {"val": torch.empty_like(buffer.meta["val"])}
                for user in [u for u in buffer.users if u is not before and u not in reach]:
                    user.replace_input_with(buffer, before)
                self.pinned.add(before)
            self.pinned.update(readers)
            for user in [u for u in new.users if ignores_running_stats(u)]:
                user.replace_input_with(new, buffer)  # a backward that does not look at them
            after = max((new, *(u for u in readers if u in reach)), key=lambda n: position.get(n, -1))
            with self.graph.inserting_after(last_of(after)):
                if _counts(new, buffer):
                    update = self.graph.call_function(aten.add_.Tensor, new.args)
                else:
                    update = self.graph.call_function(aten.copy_.default, (buffer, new))
            update.meta = {"val": buffer.meta["val"], "custom": new.meta.get("custom", {})}
            self.pinned.add(update)
            self.updates.append(update)
        self.mutations = {}
        self._sweep()

    def _update_running_stats_in_place(self) -> None:
        """Batch norm's first execution updates its buffers itself, as eager's does.

        A further execution normalizes by the batch's statistics alone (``meta["again"]``), so they move
        once per step.
        """
        functional = aten._native_batch_norm_legit_functional.default
        names = {node: name for name, node in self.buffers.items()}
        for node in self.graph.find_nodes(op="call_function", target=functional):
            x, weight, bias, mean, var, training, momentum, eps = node.args
            parts = {user.args[1]: _to_its_buffer(user) for user in node.users}
            fits = all(
                buffer in names
                and self.mutations.get(names[buffer]) is parts.get(index)
                and all(ignores_running_stats(u) for u in (*readers_of(buffer), *parts[index].users))
                for buffer, index in ((mean, 3), (var, 4))
            )
            if training is not True or not fits:
                continue
            for buffer, index in ((mean, 3), (var, 4)):
                parts[index].replace_all_uses_with(buffer)
                del self.mutations[names[buffer]]
            node.target = aten._native_batch_norm_legit.default
            again = (aten._native_batch_norm_legit.no_stats, (x, weight, bias, True, momentum, eps))
            node.meta = {**node.meta, "val": node.meta["val"][:3], "again": again}
            self.updates.append(node)
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

    # -- order ----------------------------------------------------------------------------------

    def order(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Forward calls in program order; backward calls in engine order, each after what only it needs."""
        tangents = set(self.tangents.values())
        needs_tangent: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in tangents or any(i in needs_tangent for i in node.all_input_nodes):
                needs_tangent.add(node)
        draws = [n for n in self.graph.nodes if is_random(n)]
        checks = [n for n in self.graph.nodes if is_check(n) and n not in needs_tangent]
        in_forward = self._reaches((*self.outputs, *self.updates, *self.states, *draws, *checks))
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        forward = [n for n in calls if n in in_forward]
        if needs_tangent & in_forward:
            raise TraceError(
                "an output or a buffer depends on the gradients of the outputs; this cannot be planned"
            )
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


def _to_its_buffer(statistic: fx.Node) -> fx.Node:
    """What of a batch norm's new running statistic goes into the buffer: it, or its cast.

    Traced formulas make statistics in float32; kernels write them in the buffer's own type.
    """
    casts = [u for u in statistic.users if u.target is aten._to_copy.default]
    return casts[0] if len(casts) == len(statistic.users) == 1 else statistic


def _counts(new: fx.Node, buffer: fx.Node) -> bool:
    """Whether a buffer's ``new`` value is a number more than its last, and read by nobody else."""
    plain = new.target is aten.add.Tensor and not new.kwargs and not new.users
    return plain and new.args[0] is buffer and type(new.args[1]) in (int, float)
