"""Weights that autocast casts: once per context, however often they are read, as a training loop does.

Autocast keeps the cast of each trainable weight until its outermost context ends, around the forward or
within it, so a weight that several layers share is cast once, and its gradients are added in the low
precision before they are cast back. The tracer runs without that cache: it casts at every use and adds in
the weight's own precision, which are other bits and more memory. Here the casts of one weight in one
context become one, with their gradients added in the order in which they arrive.

Known limits: a model that casts a shared weight to autocast's type by itself, twice in one context, is taken
for autocast.  What several forwards inside one context share is seen where they run
(:mod:`planner.runtime.shared_casts`).
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import fx

from planner import _compat
from planner.capture import meta

__all__ = ["cast_once", "contexts_noted"]

aten = torch.ops.aten
_LOW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def contexts_noted() -> Iterator[None]:
    """What is traced meanwhile knows the outermost context of autocast it was traced in."""
    number = 0
    began: fx.Node | None = None

    def begin() -> None:
        nonlocal began
        graph = _compat.graph_in_tracing()
        began = None if graph is None else _compat.last_node(graph)

    def end() -> None:
        nonlocal number, began
        number += 1
        node, began = began, None
        while node is not None and node.next.op != "root":
            node = node.next
            meta.note_cast_in(node, number)

    if _compat.autocast_depth():
        begin()
    with _compat.autocast_watched(begin, end):
        yield
    if began is not None:
        end()


def cast_once(
    module: fx.GraphModule, parameters: dict[str, fx.Node], gradients: dict[str, fx.Node]
) -> Counter[str | int]:
    """Merge each weight's casts in ``module``; how many fewer gradients each weight is then given.

    ``gradients`` by name of a parameter, brought up to date.  What casts them back is noted.
    """
    fewer: Counter[str | int] = Counter()
    for name, parameter in parameters.items():
        groups: dict[tuple[int, torch.dtype], list[fx.Node]] = defaultdict(list)
        for node in parameter.users:
            if _is_autocasts(node):
                groups[meta.cast_in(node), node.kwargs["dtype"]].append(node)  # type: ignore[index]
        own = {meta.formula(cast) for casts in groups.values() for cast in casts}
        several = [casts for casts in groups.values() if len(casts) > 1]
        formulas = [{meta.formula(cast) for cast in casts} for casts in several]
        for first, *others in several:
            for other in others:
                other.replace_all_uses_with(first)
                module.graph.erase_node(other)
        if name in gradients and several:
            fewer[name] = _add_low(module.graph, gradients, name, formulas)
        if name in gradients and own:
            _note_casts_back(gradients[name], own)
    module.recompile()
    return fewer


def _note_casts_back(gradient: fx.Node, formulas: set[int | None]) -> None:
    """Note the calls that cast a weight's gradient back from autocast's type, and the sums before them."""
    for term in _terms(gradient)[0]:
        if term.target is aten._to_copy.default and meta.formula(term) in formulas:
            meta.note_casts_back(term)
            for add in _terms(term.all_input_nodes[0])[1]:
                meta.note_adds_reads(add)


def _is_autocasts(node: fx.Node) -> bool:
    return (
        meta.cast_in(node) is not None
        and node.target is aten._to_copy.default
        and node.kwargs.get("dtype") in _LOW
        and len(node.kwargs) == 1
    )


def _add_low(
    graph: fx.Graph, gradients: dict[str, fx.Node], name: str, formulas: list[set[int | None]]
) -> int:
    """Add the terms of a gradient that are of one cast before they are cast back."""
    gradient = gradients[name]
    terms, adds = _terms(gradient)
    of = [
        next((g for g, numbers in enumerate(formulas) if meta.formula(term) in numbers), None)
        if term.target is aten._to_copy.default
        else None
        for term in terms
    ]
    last = {g: k for k, g in enumerate(of) if g is not None}  # where the sum of a group arrives
    if all(of.count(g) < 2 for g in last):
        return 0
    arrived: list[fx.Node] = []
    for k, (term, g) in enumerate(zip(terms, of, strict=True)):
        if g is None or of.count(g) < 2:
            arrived.append(term)
        elif last[g] == k:
            low, *more = [terms[i].all_input_nodes[0] for i, its in enumerate(of) if its == g]
            for other in more:
                low = _add(graph, low, other, gradient)
            with graph.inserting_after(low):
                back = graph.call_function(aten._to_copy.default, (low,), dict(term.kwargs))
            meta.describe(back, meta.value(term), term)
            arrived.append(back)
    total, *rest = arrived
    for other in rest:
        total = _add(graph, total, other, gradient)
    gradient.replace_all_uses_with(total)
    gradients[name] = total
    for node in [*adds, *(term for term, g in zip(terms, of, strict=True) if g is not None)]:
        if not node.users:
            graph.erase_node(node)
    return len(terms) - len(arrived)


def _terms(gradient: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What the engine added up, in the order of arrival, and the calls that did, last first."""
    terms: list[fx.Node] = []
    adds: list[fx.Node] = []
    node = gradient
    while node.target is aten.add.Tensor and meta.sums_gradients(node) and (not adds or len(node.users) == 1):
        before, term = node.args
        if not (isinstance(before, fx.Node) and isinstance(term, fx.Node)):
            break
        adds.append(node)
        terms.append(term)
        node = before
    return [node, *reversed(terms)], adds


def _add(graph: fx.Graph, a: fx.Node, b: fx.Node, like: fx.Node) -> fx.Node:
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_after(max(a, b, key=order.__getitem__)):
        node = graph.call_function(aten.add.Tensor, (a, b))
    with _compat.fake_mode_of(meta.tensor(a)):
        meta.describe(node, torch.empty_like(meta.tensor(a)), like)
    return node
