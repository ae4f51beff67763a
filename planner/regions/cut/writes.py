"""What the calls of one of Dynamo's graphs write into, which shows in their names and flags only.

A call writes into its first argument if its name ends in an underscore (``add_``; not Python's own ``and_``,
which is ``x & y``), if it is an assignment (``x[i] = y``, ``x += y``), or if it is asked to
(``relu(x, inplace=True)``); into ``out=``; and a norm that trains, into its running statistics.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

__all__ = ["argument", "base_of", "name_of", "positions", "updates_statistics", "written_by"]

# What names the same memory as its first argument, as Dynamo writes it, without underscores around it.
_VIEWS = frozenset(
    {"as_strided", "chunk", "detach", "diagonal", "expand", "expand_as", "flatten", "get_data_attr"}
    | {"getattr", "getitem", "imag", "movedim", "narrow", "permute", "real", "reshape", "select", "split"}
    | {"squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}
)
_ASSIGNS = frozenset({operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}) | {
    *(operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
    *(operator.ilshift, operator.irshift, operator.imatmul),
}
_NAMED_LIKE_KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
_NORMS = ("batch_norm", "instance_norm")
_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias", "training")


def name_of(node: fx.Node) -> str:
    """Of what a call calls."""
    return getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, names: tuple[str, ...], name: str) -> Any:
    """An argument of a call, by its name; ``names``: of those that may be positional."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name)


def updates_statistics(node: fx.Node) -> bool:
    """Whether a call is of a norm that updates running statistics."""
    if name_of(node) not in _NORMS:
        return False
    trains = node.kwargs.get("use_input_stats", argument(node, _STATISTICS, "training"))
    return argument(node, _STATISTICS, "running_mean") is not None and trains is not False


def written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a call writes into, by itself."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name, first = name_of(node), node.args[0] if node.args else node.kwargs.get("input")
    found: list[Any] = []
    by_name = name.endswith("_") and not name.endswith("__") and node.target not in _NAMED_LIKE_KEYWORDS
    if by_name or node.target in _ASSIGNS or _is_asked_to(node):
        found.append(first)
    out = node.kwargs.get("out")
    found += out if isinstance(out, (tuple, list)) else [out]
    if updates_statistics(node):
        found += (argument(node, _STATISTICS, "running_mean"), argument(node, _STATISTICS, "running_var"))
    return tuple(x for x in found if isinstance(x, fx.Node))


def base_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, or was written into; or itself."""
    while node.op != "placeholder":
        first = node.args[0] if name_of(node).strip("_") in _VIEWS and node.args else None
        written = () if updates_statistics(node) else written_by(node)
        over = written[0] if written else first
        if not isinstance(over, fx.Node):
            break
        node = over
    return node


def positions(graph: fx.Graph) -> frozenset[int]:
    """Of the graph's arguments that a call of it may write into, by themselves or by a view."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    bases = map(base_of, _written(graph))
    return frozenset(places[base] for base in bases if base in places)


def _written(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        yield from written_by(node)


def _is_asked_to(node: fx.Node) -> bool:
    place = _inplace_of(node.target) if callable(node.target) else None
    if place is None:
        return False
    return node.kwargs.get("inplace", node.args[place] if place < len(node.args) else False) is True


@functools.cache
def _inplace_of(function: Callable[..., Any]) -> int | None:
    """The position of the argument ``inplace``."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a function of C's
        return None
    return names.index("inplace") if "inplace" in names else None
