"""One of Dynamo's graphs as a module that can be captured.

Dynamo hands a graph all it reads as arguments: parameters, buffers, activations, numbers.  Here parameters
and buffers become those of a module again, under names that hold wherever the same code runs (``attn.weight``
for every block), and the rest its arguments.

Two things about gradients.  An argument that the graph reads k times becomes k arguments on one storage, last
use first: the engine then adds their gradients one by one to what comes from elsewhere, in the order of
eager; one sum made inside would be rounded otherwise.  And of a checkpoint in the author's code only the
function is kept: what is recomputed is the plan's to say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from planner import _compat

__all__ = ["Piece", "Slot", "told_apart"]

# Uses of one argument that are told apart; of more, the gradients are added inside.
MOST_USES = 8


@dataclass(frozen=True)
class Slot:
    """What an argument of Dynamo's graph is to the module made of it.

    ``kind``  "parameter", "buffer", "input" (a tensor) or "constant" (a number).
    ``name``  of a parameter or buffer, within the module.
    ``uses``  how many arguments of the graph with uses told apart it is; an input is passed as so many.
    """

    kind: str
    name: str = ""
    uses: int = 1


class Piece(nn.Module):
    """A graph of Dynamo's as a module with parameters and buffers, at ``given``, its arguments.

    ``graph``  with the uses of its inputs told apart (:func:`told_apart`).
    """

    def __init__(self, graph: fx.GraphModule, slots: Sequence[Slot], given: Sequence[Any]) -> None:
        super().__init__()
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
        """The graph's outputs; an input of several uses is as many arguments."""
        rest = iter(args)
        given: list[Any] = []
        for slot in self.slots:
            if slot.kind in ("parameter", "buffer"):
                home, leaf = self._home(slot.name)
                given += [getattr(home, leaf)] * slot.uses
            else:
                given += [next(rest) for _ in range(slot.uses)]
        return _Run(self.graph_of[0]).run(*given)

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """What :meth:`forward` takes, of the arguments of Dynamo's graph."""
        pairs = zip(self.slots, given, strict=True)
        return [x for slot, x in pairs if slot.kind in ("input", "constant") for _ in range(slot.uses)]


class _Run(fx.Interpreter):
    """Runs a graph; what its author checkpointed runs as any other code."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _compat.is_checkpoint(target):
            inner, *given = args
            return _Run(inner).run(*given)
        return super().call_function(target, args, kwargs)


def told_apart(graph: fx.GraphModule, homes: Mapping[int, str]) -> tuple[fx.GraphModule, list[int]]:
    """A copy whose inputs are read once each, and how many there are now for each that there was.

    ``homes``: path of each module of the model, by its identity; each call is given that of the innermost.
    """
    twin = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    uses: list[int] = []
    for node in twin.graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), "module": _home_of(node, homes)}
    for node in list(twin.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        found = _read_by(node)
        tracked = isinstance(value, torch.Tensor) and value.requires_grad
        if not tracked or isinstance(value, nn.Parameter) or not 1 < len(found) <= MOST_USES:
            uses.append(1)
            continue
        uses.append(len(found))
        names = [node]
        for k in range(1, len(found)):
            with twin.graph.inserting_after(names[-1]):
                names.append(twin.graph.placeholder(f"{node.name}_use_{k}"))
            names[-1].meta = dict(node.meta)
        for reader in dict.fromkeys(found):
            mine = iter([name for name, of in zip(names, found, strict=True) if of is reader])

            def told(x: fx.Node, node: fx.Node = node, mine: Any = mine) -> fx.Node:
                return next(mine) if x is node else x

            reader.args, reader.kwargs = fx.map_arg(reader.args, told), fx.map_arg(reader.kwargs, told)
    twin.recompile()
    return twin, uses


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Who reads ``node``, as often as it does, as autograd comes by: the last first."""
    found: list[fx.Node] = []
    for reader in reversed(list(node.graph.nodes)):
        if reader.op != "output":
            given: list[fx.Node] = []
            fx.map_arg((reader.args, reader.kwargs), given.append)
            found += [reader] * given.count(node)
    return found


def _home_of(node: fx.Node, homes: Mapping[int, str]) -> str:
    for key in reversed(node.meta.get("nn_module_stack") or {}):
        number = str(key).split("@")[0]
        path = homes.get(int(number)) if number.isdigit() else None
        if path is not None:
            return path
    return ""
