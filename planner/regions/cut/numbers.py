"""Python numbers in a region: counters, rates, temperatures that change from step to step.

Dynamo hands a graph what it saw change as a number (a float as a tensor of no dimensions).  What the graph
computes of numbers alone is computed at each call, by itself; what of that its tensors are made with becomes
an argument of the rest.  Numbers that only go out again, as a counter does that nobody reads, cost nothing.

A number that tensors are multiplied by, and the like, is an argument of the captured program too: the region
is captured at two values of it, and what differs between the captures is what depends on it.  Where that is
not the number or a plain function of it, each value has a capture of its own, as sizes have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner.capture import meta

__all__ = ["Numbers", "Scalar", "class_of", "other_values", "scalars_of"]

# Values at which a formula may be another: for each a capture of its own.
SPECIAL = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

FORMULAS: Mapping[str, Callable[[Any], Any]] = {
    "{0}": lambda x: x,
    "-{0}": lambda x: -x,
    "1 - {0}": lambda x: 1 - x,
    "{0} - 1": lambda x: x - 1,
    "1 + {0}": lambda x: 1 + x,
    "1 / {0}": lambda x: 1 / x,
    "1 / (1 - {0})": lambda x: 1 / (1 - x),
    "2 * {0}": lambda x: 2 * x,
    "{0} ** 2": lambda x: x * x,
}

# Calls that run with whatever number they are given; others are looked into before they run.
_aten = torch.ops.aten
_TAKE_SCALARS = {
    _aten.mul, _aten.div, _aten.add, _aten.sub, _aten.rsub, _aten.pow, _aten.lerp, _aten.addcmul,
    _aten.addcdiv, _aten.clamp, _aten.clamp_min, _aten.clamp_max, _aten.full, _aten.full_like, _aten.fill,
    _aten.scalar_tensor,
    _aten.mul_, _aten.div_, _aten.add_, _aten.sub_, _aten.pow_, _aten.lerp_, _aten.masked_fill,
    _aten.gt, _aten.ge, _aten.lt, _aten.le, _aten.eq, _aten.where,
}  # fmt: skip

_ARITHMETIC = {operator.mul, operator.add, operator.sub, operator.truediv, torch.mul, torch.add, torch.sub}
_ARITHMETIC |= {torch.div, operator.imul, operator.iadd, operator.isub, operator.itruediv}
_METHODS = {"mul", "add", "sub", "div", "mul_", "add_", "sub_", "div_"}


@dataclass(frozen=True)
class Scalar:
    """A number that a captured program is given: what ``formula`` makes of the argument at ``position``."""

    position: int
    formula: str

    @property
    def free_symbols(self) -> frozenset[Scalar]:
        """As of an expression of sizes, which it stands where."""
        return frozenset({self})

    def __str__(self) -> str:
        return self.formula.format(f"number_{self.position}")

    def of(self, args: Sequence[Any]) -> Any:
        """Its value at the arguments of a region."""
        return FORMULAS[self.formula](args[self.position])


class Numbers:
    """What one of Dynamo's graphs computes of numbers, and the rest of it.

    ``rest``  the graph, given its tensors and then what they are made with of numbers.
    """

    def __init__(self, graph: fx.GraphModule, made: set[fx.Node]) -> None:
        (output,) = graph.graph.find_nodes(op="output")
        results = list(output.args[0])
        wanted = [n for n in made if any(user not in made and user is not output for user in n.users)]
        wanted = sorted(wanted, key=list(graph.graph.nodes).index)
        self._out = [i for i, x in enumerate(results) if x in made]
        self._takes = [n not in made for n in graph.graph.find_nodes(op="placeholder")]
        own, mine = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in graph.graph.nodes:
            if node in made:
                mine[node] = own.node_copy(node, mine.__getitem__)
        own.output([mine[n] for n in (*wanted, *(results[i] for i in self._out))])
        self._of = fx.GraphModule(graph, own)
        self._count = len(wanted)
        rest, its = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in graph.graph.nodes:
            if node.op == "placeholder" and node not in made:
                its[node] = rest.node_copy(node)
        for k, node in enumerate(wanted):
            its[node] = rest.placeholder(f"number_{k}")
            its[node].meta = {"example_value": node.meta.get("example_value")}
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "output") and node not in made:
                its[node] = rest.node_copy(node, its.__getitem__)
        rest.output(tuple(fx.map_arg(x, its.__getitem__) for x in results if x not in made))
        self.rest = fx.GraphModule(graph, rest)

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Numbers | None:
        """``None`` for a graph that is given none."""
        made: set[fx.Node] = set()
        for node in graph.graph.nodes:
            given = _is_given(node) or (node.all_input_nodes and made.issuperset(node.all_input_nodes))
            if given and node.op != "output" and _is_number(node):
                made.add(node)
        return cls(graph, made) if made else None

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The arguments of ``rest``, and the numbers that go out again."""
        rest: list[Any] = []
        numbers: list[Any] = []
        for x, takes in zip(args, self._takes, strict=True):
            (rest if takes else numbers).append(x)
        made = self._of(*numbers)
        return [*rest, *made[: self._count]], made[self._count :]

    def joined(self, outputs: Sequence[Any], numbers: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs, of those of ``rest`` and the numbers."""
        rest, out = iter(outputs), dict(zip(self._out, numbers, strict=True))
        return tuple(out[i] if i in out else next(rest) for i in range(len(outputs) + len(out)))


def _is_given(node: fx.Node) -> bool:
    if node.op != "placeholder":
        return False
    value, given = node.meta.get("example_value"), node.meta.get("grapharg")
    wrapped = getattr(given, "pass_arg_as_tensor", False)  # a float of Python's
    return bool(wrapped) or isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return True
    if node.op == "placeholder":
        return all(user.target == "item" for user in node.users)
    return node.target is torch.scalar_tensor and all(user.op == "output" for user in node.users)


def scalars_of(graph: fx.GraphModule) -> frozenset[int]:
    """Positions of the arguments that are numbers which tensors are multiplied by, and the like."""
    return frozenset(k for k, node in enumerate(graph.graph.find_nodes(op="placeholder")) if _is_scalar(node))


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if isinstance(value, (float, torch.SymFloat)):
        return True
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return False

    def scales(user: fx.Node) -> bool:
        known = user.target in (_METHODS if user.op == "call_method" else _ARITHMETIC)
        made = user.meta.get("example_value")
        return known and isinstance(made, torch.Tensor)

    return bool(node.users) and all(map(scales, node.users))


def class_of(value: Any) -> Any:
    """What a capture depends on of a scalar: its sign, and whether it is a special one."""
    if isinstance(value, bool) or not math.isfinite(value) or abs(value) in SPECIAL:
        return type(value), value
    return type(value), value > 0, abs(value) < 1


def other_values(args: Sequence[Any], scalars: frozenset[int]) -> list[Any]:
    """``args`` with another value of its class for each scalar, no two by the same factor."""
    out = list(args)
    for k, position in enumerate(sorted(scalars)):
        value = out[position]
        if class_of(value) != (type(value), value):
            shift = 7 + 2 * k if isinstance(value, int) else value * -(0.03 + 0.0017 * k)
            if isinstance(value, float) and abs(value) > 1:
                shift = -shift
            out[position] = value + (shift if value > 0 or isinstance(value, float) else -shift)
    return out


def told(
    graph: fx.Graph, other: fx.Graph, args: Sequence[Any], others: Sequence[Any], names: Sequence[int]
) -> tuple[list[Scalar], frozenset[int]]:
    """Make what of ``graph``, captured at ``args``, is another at ``others`` a number that is given.

    ``names``: of each of ``args`` its position among the region's.  And the positions, of these, of numbers
    on which it depends in another way; if there are any, nothing is changed.
    """
    pairs = zip(names, args, others, strict=True)
    varied = frozenset(name for name, a, b in pairs if not isinstance(a, torch.Tensor) and a != b)
    if len(graph.nodes) != len(other.nodes):
        return [], varied
    twin: dict[fx.Node, fx.Node] = {}
    known: dict[Scalar, Any] = {}
    wants: list[tuple[fx.Node, dict[int, Scalar]]] = []
    fixed: set[int] = set()
    for mine, theirs in zip(graph.nodes, other.nodes, strict=True):
        twin[theirs] = mine
        if (mine.op, mine.target) != (theirs.op, theirs.target) or not _same_shape(mine, theirs):
            return [], varied
        leaves = pytree.tree_leaves((mine.args, mine.kwargs))
        its = pytree.tree_leaves((theirs.args, theirs.kwargs))
        if len(leaves) != len(its):
            return [], varied
        differ: dict[int, Scalar] = {}
        for i, (a, b) in enumerate(zip(leaves, its, strict=True)):
            if isinstance(a, fx.Node) or isinstance(b, fx.Node):
                if not isinstance(b, fx.Node) or twin.get(b) is not a:
                    return [], varied
            elif a != b and not (a != a and b != b):
                scalar = _formula(a, b, args, others, names)
                if scalar is None:
                    return [], varied
                differ[i] = scalar
                known[scalar] = a
        if differ and getattr(mine.target, "overloadpacket", None) not in _TAKE_SCALARS:
            fixed.update(scalar.position for scalar in differ.values())
        if differ:
            wants.append((mine, differ))
    if fixed:
        return [], frozenset(fixed)
    given: dict[Scalar, fx.Node] = {}
    first = next(iter(graph.nodes))
    for scalar, value in known.items():
        with graph.inserting_before(first):
            given[scalar] = graph.call_function(operator.pos, (value,))
        meta.describe(given[scalar], value)
        meta.note_size(given[scalar], scalar)
    for node, differ in wants:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        node.args, node.kwargs = pytree.tree_unflatten(
            [given[differ[i]] if i in differ else leaf for i, leaf in enumerate(leaves)], spec
        )
    return list(known), frozenset()


def _same_shape(mine: fx.Node, theirs: fx.Node) -> bool:
    a, b = mine.meta.get("val"), theirs.meta.get("val")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return type(a) is type(b)


def _formula(
    a: Any, b: Any, args: Sequence[Any], others: Sequence[Any], names: Sequence[int]
) -> Scalar | None:
    if isinstance(a, bool) or not isinstance(a, (int, float)):
        return None
    for position, (x, y) in enumerate(zip(args, others, strict=True)):
        if isinstance(x, torch.Tensor) or x == y:
            continue
        for text, formula in FORMULAS.items():
            if a == formula(x) and b == formula(y):
                return Scalar(names[position], text)
    return None
