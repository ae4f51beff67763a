"""The order of a graph's calls after some were added: as written, but for what has to wait."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping

from torch import fx

from planner.graph.nodes import is_check, is_mutation, is_random, talks

__all__ = ["reorder"]


def reorder(graph: fx.Graph, place: Mapping[fx.Node, tuple[float, ...]]) -> bool:
    """Put the calls of ``graph`` in the order of ``place``, each after what it reads; whether that can be.

    Random calls, writes and collectives keep their order among themselves (Kahn 1962, with a heap).
    """
    nodes = list(graph.nodes)
    waits: dict[fx.Node, int] = {}
    then: dict[fx.Node, list[fx.Node]] = {}
    last: fx.Node | None = None
    for node in sorted(nodes, key=place.__getitem__):
        before = set(node.all_input_nodes)
        if node.op == "call_function" and (
            is_random(node) or is_mutation(node) or talks(node) or is_check(node)
        ):
            before |= set() if last is None else {last}
            last = node
        waits[node] = len(before)
        for other in before:
            then.setdefault(other, []).append(node)
    ready = [(place[n], i, n) for i, n in enumerate(nodes) if not waits[n]]
    heapq.heapify(ready)
    number = {n: i for i, n in enumerate(nodes)}
    order: list[fx.Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        order.append(node)
        for user in then.get(node, ()):
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, (place[user], number[user], user))
    if len(order) != len(nodes):
        return False
    for earlier, node in itertools.pairwise(order):
        earlier.append(node)
    return True
