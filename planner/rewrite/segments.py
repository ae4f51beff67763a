"""The backward cut into segments, each a graph of its own.

One autograd node for the whole backward would hand out every gradient at its very end: no overlap with
communication, and under gradient accumulation a second set of gradients.  The *backward* is cut, not the
forward, so any cut is legal and none changes what is recomputed.  The first cut comes right after the last
use of the output gradients, which the engine holds for as long as the node that receives them runs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from planner._compat import BoxedCodeGen, storage_key
from planner.capture import meta
from planner.graph.nodes import layer_of
from planner.graph.passes.inplace import destination
from planner.rewrite.bindings import bind
from planner.rewrite.program import Argument, Key, Segment, Term

__all__ = ["ONCE", "bytes_of", "cuts_behind", "cuts_of", "in_order", "module_of", "segment_of"]

# Kinds of arguments that the first segment to read them is given; it hands them to later ones.
ONCE = ("saved", "tangent")


def segment_of(
    k: int,
    part: list[fx.Node],
    home: dict[fx.Node, int],
    first_use: dict[fx.Node, int],
    last_use: dict[fx.Node, int],
    arguments: dict[fx.Node, Argument],
    gradients: Mapping[fx.Node, Key],
    passing: Sequence[fx.Node] = (),
) -> Segment:
    """Copy ``part`` into a graph of its own; ``passing``: what it is given only for later segments."""
    graph = fx.Graph()
    inside = set(part)
    read = (n for node in part for n in node.all_input_nodes if n not in inside)
    outside = list(dict.fromkeys((*read, *passing)))
    new: dict[fx.Node, fx.Node] = {}
    sources: list[Argument] = []
    for node in outside:
        new[node] = graph.placeholder(node.name)
        new[node].meta = node.meta
        argument = arguments.get(node)
        handed = argument is None or (argument.kind in ONCE and first_use[node] < k)
        sources.append(Argument("mail", node.name) if handed or argument is None else argument)
    for node in part:
        new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = node.meta
    results = sorted((n for n in part if n in gradients), key=lambda n: _place(gradients[n]))
    mail = [n for n in part if last_use.get(n, k) > k]
    mail += [n for n in outside if (n in home or arguments[n].kind in ONCE) and last_use[n] > k]
    graph.output([new[n] for n in (*results, *mail)])
    return Segment(
        module_of(graph, f"Backward{k}"),
        tuple(sources),
        tuple(gradients[n] for n in results),
        tuple(n.name for n in mail),
        frozenset(_overwritten(part, dict(zip(outside, sources, strict=True)))),
    )


def _place(name: Key) -> tuple[int, ...]:
    """Parameters in the order in which their gradients are made; inputs by number: those of the uses of one
    tensor are added up in that order.
    """
    of, *rest = name if isinstance(name, Term) else (name,)
    return (of, *rest) if isinstance(of, int) else (-1,)


def _overwritten(part: list[fx.Node], given: dict[fx.Node, Argument]) -> Iterator[Argument]:
    """What is given to a part of the backward, and lies on a storage that a call of it writes over."""
    for node in part:
        base = destination(node)
        if base is not None:
            key = storage_key(meta.tensor(base))
            yield from (given[n] for n in given if _lies_on(n, key))


def _lies_on(node: fx.Node, key: int) -> bool:
    value = meta.value(node)
    return isinstance(value, torch.Tensor) and storage_key(value) == key


def cuts_of(
    calls: list[fx.Node],
    gradients: Collection[fx.Node],
    arguments: dict[fx.Node, Argument],
    segments: int | None,
    summands: Collection[fx.Node] = (),
) -> list[int]:
    """Positions at which segments start: after the output gradients' last use, then by gradient bytes.

    ``summands``  what gradients are sums of, and may be handed out instead.
    """
    tangents = {n for n, a in arguments.items() if a.kind == "tangent"}
    free = 1 + max((i for i, n in enumerate(calls) if tangents & set(n.all_input_nodes)), default=-1)
    if segments == 1 or not calls:
        return [0]
    size = {n: bytes_of(n) for n in (*gradients, *summands)}
    quota = sum(size.values()) / (segments or 8)
    if segments is None:
        quota = min(quota, 25e6) if quota > 1e6 else max(quota, 1e6)
    starts, have = [0], 0.0
    later_gradients = [0] * (len(calls) + 1)
    for i in range(len(calls) - 1, -1, -1):
        later_gradients[i] = later_gradients[i + 1] + (calls[i] in size)
    for i, node in enumerate(calls[:-1], start=1):
        have += size.get(node, 0)
        layer_ends = layer_of(meta.module(calls[i]) or "") != layer_of(meta.module(node) or "")
        due = (i >= free and len(starts) == 1) or (have >= quota and layer_ends and i > free)
        if due and later_gradients[i] and calls[i].target is not operator.getitem:
            starts.append(i)
            have = 0.0
    return starts


def cuts_behind(
    calls: list[fx.Node], waits: Mapping[fx.Node, fx.Node], starts: list[int], first: fx.Node | None
) -> list[int]:
    """``starts``, and a cut where somebody waits for a gradient.

    ``waits``  gradient -> the call behind which it is handed out; no cut lies between the two.
    ``first``  the call behind which the output gradients are not needed any more; no cut lies before it.
    """
    place = {n: i for i, n in enumerate(calls)}
    begin = 0 if first is None else place[first] + 1
    cuts = {s for s in starts if s >= begin}
    for made, end in waits.items():
        cuts -= {*range(place[made] + 1, place[end] + 1)}
    for end in {*waits.values()}:
        i = max(begin, place[end] + 1)
        while i < len(calls) and calls[i].target is operator.getitem:
            i += 1
        if i < len(calls):
            cuts.add(i)
    return sorted({0, *cuts})


def bytes_of(node: fx.Node) -> int:
    """Bytes of the tensor a node makes; 0 for what is none."""
    value = meta.value(node)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def in_order(graph: fx.Graph, arguments: dict[fx.Node, Argument]) -> list[tuple[fx.Node, Argument]]:
    """A graph's placeholders in order, with what each is given."""
    return [(n, arguments[n]) for n in graph.nodes if n.op == "placeholder"]


def module_of(graph: fx.Graph, name: str) -> fx.GraphModule:
    """The graph as a module: bound to torch's own bindings, its arguments in one list that it clears."""
    for node in graph.nodes:  # a kernel may lay its result out otherwise than the trace believed
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    bind(graph)
    graph.set_codegen(BoxedCodeGen())
    graph.lint()
    return fx.GraphModule({}, graph, name)
