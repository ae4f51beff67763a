"""Which inner values of a block to save: the best sets for every price of a byte.

A value that the block's backward needs is either saved, at its bytes, or recomputed, at the seconds
of its op, and then the inputs of that op are needed in turn.  For one price of a byte the cheapest
choice is a minimum cut; the breakpoints over all prices are the lower convex hull of (bytes kept,
seconds recomputed), found by bisection.  Sets between breakpoints are not found, which is the price
of speed.  Blocks that look alike are solved once.

Paper: the closure is the maximum-weight closure problem of Picard (Management Science 1976).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

from solvers.problem import Problem

__all__ = ["BlockGraph", "saved_sets"]

# Capacities are integers, so that the cut is exact: the whole block's seconds are this many units.
UNITS = 10**12


@dataclass(frozen=True)
class BlockGraph:
    """A block with its inner values renumbered from 0, so that equal blocks compare equal.

    ``ops``      per op: seconds of a recomputation, inner inputs, inner outputs.
    ``bytes``    per inner value; 0 for those that are kept anyway.
    ``needed``   inner values that the backward reads.
    ``values``   the problem's value index of each; not part of the comparison.
    """

    ops: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...]
    bytes: tuple[int, ...]
    needed: frozenset[int]
    values: tuple[int, ...] = field(compare=False)

    @classmethod
    def of(
        cls,
        problem: Problem,
        forward: Sequence[int],
        inner: Sequence[int],
        needed: Collection[int],
        kept_anyway: Collection[int],
    ) -> BlockGraph:
        """The block whose forward ops are ``forward`` and whose recomputable values are ``inner``."""
        number = {v: k for k, v in enumerate(inner)}

        def local(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(number[v] for v in values if v in number)

        ops = tuple(
            (op.again_s, local(op.inputs), local(op.outputs))
            for op in (problem.ops[i] for i in forward)
            if op.recomputable
        )
        size = tuple(0 if v in kept_anyway else problem.values[v].bytes for v in inner)
        return cls(ops, size, frozenset(number[v] for v in needed if v in number), tuple(inner))


def saved_sets(block: BlockGraph, most: int) -> list[frozenset[int]]:
    """Up to ``most`` sets of the problem's value indices, bytes descending."""
    return [frozenset(block.values[k] for k in chosen) for chosen in _saved_sets(block, most)]


@lru_cache(maxsize=4096)
def _saved_sets(block: BlockGraph, most: int) -> tuple[frozenset[int], ...]:
    total_s = sum(seconds for seconds, _, _ in block.ops)
    per_second = UNITS / total_s if total_s > 0 else 0.0
    costs = [max(1, round(seconds * per_second)) for seconds, _, _ in block.ops]
    total_bytes = sum(block.bytes)

    def priced(numerator: int, denominator: int) -> tuple[int, int, frozenset[int]]:
        """The best set when ``denominator`` bytes are worth ``numerator`` units: (bytes, units, set)."""
        saved, units = _minimum_cut(block, costs, numerator, denominator)
        return sum(block.bytes[k] for k in saved), units, saved

    nothing = priced(1 + 2 * sum(costs), 1)
    everything = priced(1, 1 + 2 * total_bytes)
    found = {nothing[:2]: nothing, everything[:2]: everything}
    intervals = [(everything, nothing)]
    while intervals and len(found) < most:
        # The interval with the largest triangle under its chord promises most.
        intervals.sort(key=lambda pair: (pair[0][0] - pair[1][0]) * (pair[1][1] - pair[0][1]))
        more, less = intervals.pop()
        if more[0] <= less[0] or less[1] <= more[1]:
            continue
        middle = priced(less[1] - more[1], more[0] - less[0])
        if middle[:2] in found:
            continue
        found[middle[:2]] = middle
        intervals += [(more, middle), (middle, less)]
    return tuple(saved for _, _, saved in sorted(found.values(), key=lambda f: (-f[0], f[1])))


def _minimum_cut(
    block: BlockGraph, costs: Sequence[int], numerator: int, denominator: int
) -> tuple[frozenset[int], int]:
    """The saved set least in ``costs * denominator + bytes * numerator``, and its costs."""
    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for k in block.needed:
        graph.add_edge("source", ("value", k))
    for i, (_, inputs, outputs) in enumerate(block.ops):
        graph.add_edge(("op", i), "sink", capacity=costs[i] * denominator)
        for k in outputs:
            graph.add_edge(("value", k), ("op", i), capacity=block.bytes[k] * numerator)
        for k in inputs:
            graph.add_edge(("op", i), ("value", k))
    _, (needed, _) = nx.minimum_cut(graph, "source", "sink", flow_func=boykov_kolmogorov)
    rerun = {node[1] for node in needed if node[0] == "op"}
    saved = frozenset(
        k
        for i, (_, _, outputs) in enumerate(block.ops)
        if i not in rerun
        for k in outputs
        if ("value", k) in needed
    )
    return saved, sum(costs[i] for i in rerun)
