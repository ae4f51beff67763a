"""One of Dynamo's graphs as a module that can be captured.

Dynamo hands a graph all it reads as arguments: parameters, buffers, activations, numbers.  Here parameters
and buffers become those of a module again, under names that hold wherever the same code runs (``attn.weight``
for every block), and the rest its arguments.

Two things about gradients.  A tensor that autograd reads k times in the graph becomes k arguments of its
program, on one storage (:func:`apart`): the engine then adds their gradients one by one to what comes from
elsewhere, in the order of eager; one sum made inside would be rounded otherwise.  And of a checkpoint in the
author's code only the function is kept: what is recomputed is the plan's to say.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from planner import _compat
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, capture_piece
from planner.errors import PlannerError
from planner.graph import kernels
from planner.regions.cut.spread import Layouts, Part, Spreads, parted, parts_of, with_talk

__all__ = ["Piece", "Slot", "apart", "captured_piece", "with_homes"]


@dataclass(frozen=True)
class Slot:
    """What an argument of Dynamo's graph is to the module made of it.

    ``kind``  "parameter", "buffer", "input" (a tensor) or "constant" (a number).
    ``name``  of a parameter or buffer, within the module.
    ``uses``  how often autograd reads it; an input is passed as so many, a parameter as one less.
    """

    kind: str
    name: str = ""
    uses: int = 1

    @property
    def places(self) -> range:
        """As how many arguments of the module it is passed."""
        return range(1 if self.kind in ("input", "constant") else 0)


class Piece(nn.Module):
    """A graph of Dynamo's as a module with parameters and buffers, at ``given``, its arguments.

    ``layouts``   of arguments (by position) that stand for what this rank has of a spread tensor.
    ``tangents``  of the gradients of outputs (by number) that are spread, where these are known.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        slots: Sequence[Slot],
        given: Sequence[Any],
        layouts: Layouts = MappingProxyType({}),
        tangents: Layouts = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.layouts = layouts
        self._spreads = (
            Spreads(tangents=dict(tangents)),
        )  # in a box: what a forward leaves on its module is undone in a trace
        self.graph_of = (graph,)  # no submodule: its constants are the trace's
        self.slots = tuple(slots)
        for slot, tensor in zip(slots, given, strict=True):
            if slot.kind not in ("parameter", "buffer"):
                continue
            home, leaf = self._home(slot.name)
            if slot.kind == "parameter":
                home.register_parameter(leaf, tensor)
            else:
                home.register_buffer(leaf, tensor)

    def _home(self, name: str) -> tuple[nn.Module, str]:
        *parents, leaf = name.split(".")
        home: nn.Module = self
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        return home, leaf

    def forward(self, *args: Any) -> Any:
        """The graph's outputs, of its arguments that are no parameters or buffers."""
        rest = iter(args)
        given: list[Any] = []
        for slot in self.slots:
            if slot.kind in ("parameter", "buffer"):
                home, leaf = self._home(slot.name)
                given.append(getattr(home, leaf))
            else:
                given.append(next(rest))
        if self.layouts:
            given = parts_of(given, self.layouts, self.spreads, rest)
        try:
            made = _Run(self.graph_of[0]).run(*given)
        except BaseException as error:
            # A context that the graph has open (inference mode) is an object, and closes when that goes: now,
            # or it sets back what a trace has on when it is over.
            traceback.clear_frames(error.__traceback__)
            raise
        return parted(made, self.spreads)

    @property
    def spreads(self) -> Spreads:
        """How what it gives is spread, as far as it was traced."""
        return self._spreads[0]

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """What :meth:`forward` takes, of the arguments of Dynamo's graph."""
        pairs = zip(self.slots, given, strict=True)
        return [x for slot, x in pairs if slot.kind in ("input", "constant")]


def captured_piece(
    piece: Piece, inputs: Inputs, used: frozenset[int] | None
) -> tuple[JointGraph, dict[str | int, list[fx.Node]]]:
    """As :func:`planner.capture.joint_graph.capture_piece`; where gradients of spread arguments are of
    another shape, traced again with their carriers, which then are these arguments.
    """
    with _compat.no_draws_of_spread() if piece.layouts else contextlib.nullcontext():
        try:
            joint, terms = capture_piece(piece, inputs, used)
        except PlannerError:
            if not piece.spreads.carried:
                raise
        carried = piece.spreads.carried
        if carried:
            with _compat.fake_mode_of(inputs.tensors()[0]):
                more = [
                    torch.empty(x.shape, dtype=x.dtype, device=x.device, requires_grad=True)
                    for _, x in sorted(carried.items())
                ]
            beside = replace(inputs, args=(*inputs.args, *more))
            joint, terms = capture_piece(piece, beside, used)
            joint, terms = _carried(replace(joint, inputs=inputs, in_spec=inputs.flatten()[1]), terms, piece)
    with_talk(joint.step)
    return joint, terms


def _carried(
    joint: JointGraph, terms: dict[str | int, list[fx.Node]], piece: Piece
) -> tuple[JointGraph, dict[str | int, list[fx.Node]]]:
    step, first = joint.step, len(joint.inputs.tensors())
    gradients, inputs = dict(step.gradients), dict(step.inputs)
    input_gradients = dict(step.input_gradients)
    terms = dict(terms)
    for k, position in enumerate(sorted(piece.spreads.carried), start=first):
        slot = piece.slots[position]
        before = sum(s.kind == "input" for s in piece.slots[:position])
        key: str | int = slot.name if slot.kind == "parameter" else before
        step.module.graph.erase_node(inputs.pop(k))
        gradient = input_gradients.pop(k, None)
        if gradient is not None and isinstance(key, str):
            gradients[key] = gradient
        elif gradient is not None:
            input_gradients[before] = gradient
        if k in terms:
            terms[key] = terms.pop(k)
    step = replace(step, gradients=gradients, inputs=inputs, input_gradients=input_gradients)
    return replace(joint, step=step), terms


class _Run(fx.Interpreter):
    """Runs a graph; what its author checkpointed runs as any other code, and spread tensors are put together
    for each call that reads them.
    """

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        keeps = _compat.is_checkpoint(n.target)

        def value(of: fx.Node) -> Any:
            found = self.env[of]
            return found.whole() if isinstance(found, Part) and not keeps else found

        return fx.map_arg(args, value)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _compat.is_checkpoint(target):
            inner, *given = args
            return _Run(inner).run(*given)
        return super().call_function(target, args, kwargs)


def apart(
    joint: JointGraph,
    terms: Mapping[str | int, Sequence[fx.Node]],
    slots: Sequence[Slot],
    like: Sequence[Slot] | None = None,
) -> tuple[JointGraph, tuple[Slot, ...]]:
    """``joint`` with an argument for each use of a tensor, and the slots with their uses.

    ``terms``  the gradients of what is used more than once, by name of a parameter or position of an input
               (:func:`planner.capture.joint_graph.capture_piece`).
    ``like``   slots with the uses that there are to be, those of a call that runs: what is more is added up.
    """
    step = joint.step
    position = {node: i for i, node in enumerate(step.module.graph.nodes)}
    inputs: dict[int, fx.Node] = {}
    gradients: dict[str, fx.Node] = dict(step.gradients)
    input_gradients: dict[int, fx.Node] = {}
    out: list[Slot] = []
    number = 0
    for at, slot in enumerate(slots):
        key: str | int = slot.name if slot.kind == "parameter" else number
        if slot.kind == "input":
            number += 1
        elif slot.kind != "parameter":
            out.append(slot)
            continue
        own = _one_by_one(list(terms.get(key, ())), position)
        uses = max(1, len(own)) if like is None else like[at].uses
        own = _at_most(uses, own)
        out.append(replace(slot, uses=uses))
        if isinstance(key, int):
            whole = step.input_gradients.get(key)
            inputs[len(inputs)] = placeholder = step.inputs[key]
            if own or whole is not None:
                input_gradients[len(inputs) - 1] = own[0] if own else whole  # type: ignore[assignment]
        elif own:
            placeholder, gradients[key] = step.parameters[key], own[0]
        for k in range(1, uses):
            with step.module.graph.inserting_after(placeholder):
                use = step.module.graph.placeholder(f"{placeholder.name}_use")
            use.meta = dict(placeholder.meta)
            if k < len(own):
                input_gradients[len(inputs)] = own[k]
            inputs[len(inputs)] = use
    moved = replace(step, inputs=inputs, gradients=gradients, input_gradients=input_gradients)
    return replace(joint, step=moved), tuple(out)


def _one_by_one(terms: list[fx.Node], position: Mapping[fx.Node, int]) -> list[fx.Node]:
    """``terms``, each made behind the one before: one that was there already is copied there."""
    for k in range(1, len(terms)):
        before, term = terms[k - 1], terms[k]
        if _at(term, position) < _at(before, position):
            with term.graph.inserting_after(before):
                terms[k] = term.graph.call_function(kernels.gradient_apart, (term,))
            with _compat.fake_mode_of(meta.tensor(term)):
                meta.describe(terms[k], kernels.gradient_apart(meta.tensor(term)), term)
    return terms


def _at_most(count: int, terms: list[fx.Node]) -> list[fx.Node]:
    """``terms``, the first of them added up, as the engine does that comes to them with nothing else."""
    while len(terms) > count:
        first, second, *rest = terms
        with second.graph.inserting_after(second):
            added = second.graph.call_function(torch.ops.aten.add.Tensor, (first, second))
        with _compat.fake_mode_of(meta.tensor(second)):
            meta.describe(added, torch.add(meta.tensor(first), meta.tensor(second)), second)
        terms = [added, *rest]
    return terms


def _at(node: fx.Node, position: Mapping[fx.Node, int]) -> int:
    """Where ``node`` is made; of a copy, where the term before it is."""
    while node not in position:
        node = node.prev
    return position[node]


def with_homes(graph: fx.GraphModule, homes: Mapping[int, str]) -> fx.GraphModule:
    """A copy whose calls know the path of the innermost module that they are of.

    ``homes``: path of each module of the model, by its identity.
    """
    twin = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    inner = [part for part in twin.modules() if isinstance(part, fx.GraphModule)]  # what is checkpointed, say
    for node in (node for part in inner for node in part.graph.nodes):
        node.meta["custom"] = {**node.meta.get("custom", {}), "module": _home_of(node, homes)}
    return twin


def _home_of(node: fx.Node, homes: Mapping[int, str]) -> str:
    for key in reversed(node.meta.get("nn_module_stack") or {}):
        number = str(key).split("@")[0]
        path = homes.get(int(number)) if number.isdigit() else None
        if path is not None:
            return path
    return ""
