"""Which inner values of a block to save: the best sets for every price of a byte.

A value that the block's backward needs is either saved, at its bytes, or recomputed, at the seconds
of its op, and then the inputs of that op are needed in turn.  For one price of a byte the cheapest
choice is a minimum cut; the breakpoints over all prices are the lower convex hull of (bytes kept,
seconds recomputed), found by bisection.  Sets between breakpoints are not found, which is the price
of speed.  Blocks that look alike are solved once.

Sources: the set for one price is the maximum-weight closure problem of Picard, "Maximal closure of a graph"
(Management Science 1976); the search over prices is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from ortools.graph.python.max_flow import SimpleMaxFlow

from solvers.core.problem import Problem

__all__ = ["BlockGraph", "saved_sets"]

# Capacities are integers; all seconds and bytes of a block together are this many units.
UNITS = 2.0**44
# The least and the greatest price of a byte: all bytes of the block against all its seconds.
EXTREME = 1e6


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
    total_bytes = sum(block.bytes)
    network = _Network(block, total_s or 1.0, total_bytes or 1)

    def priced(price: float) -> tuple[int, float, frozenset[int]]:
        """The best set when all bytes cost ``price`` times all seconds: (bytes, seconds, set)."""
        saved, seconds = network.cheapest(price)
        return sum(block.bytes[k] for k in saved), seconds, saved

    everything, nothing = priced(1 / EXTREME), priced(EXTREME)
    found = {everything[2]: everything, nothing[2]: nothing}
    intervals = [(everything, nothing)]
    while intervals and len(found) < most:
        # The interval with the largest triangle under its chord promises most.
        intervals.sort(key=lambda pair: (pair[0][0] - pair[1][0]) * (pair[1][1] - pair[0][1]))
        more, less = intervals.pop()
        if more[0] <= less[0] or less[1] <= more[1]:
            continue
        middle = priced((less[1] - more[1]) / (total_s or 1.0) * total_bytes / (more[0] - less[0]))
        if middle[2] not in found:
            found[middle[2]] = middle
            intervals += [(more, middle), (middle, less)]
    return tuple(saved for _, _, saved in sorted(found.values(), key=lambda f: (-f[0], f[1])))


class _Network:
    """The flow network of a block; only the capacities depend on the price of a byte.

    Nodes: source, sink, one per value (on the source's side: needed), one per op (recomputed).
    """

    def __init__(self, block: BlockGraph, total_s: float, total_bytes: int) -> None:
        self.block = block
        first_op = 2 + len(block.bytes)
        arcs: list[tuple[int, int, float, float]] = [(0, 2 + k, 0.0, np.inf) for k in sorted(block.needed)]
        for i, (seconds, inputs, outputs) in enumerate(block.ops):
            arcs.append((first_op + i, 1, seconds / total_s, 0.0))
            arcs += [(2 + k, first_op + i, 0.0, block.bytes[k] / total_bytes) for k in outputs]
            arcs += [(first_op + i, 2 + k, 0.0, np.inf) for k in inputs]
        table = np.array(arcs, dtype=np.float64).reshape(-1, 4)
        self.tails, self.heads = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
        self.seconds, self.bytes = table[:, 2], table[:, 3]
        self.first_op = first_op

    def cheapest(self, price: float) -> tuple[frozenset[int], float]:
        """The saved set least in seconds + ``price`` times bytes, both as shares; its seconds."""
        scale = UNITS / (1.0 + price)
        amount = np.minimum(scale * (self.seconds + price * self.bytes), 4.0 * UNITS)
        flow = SimpleMaxFlow()
        flow.add_arcs_with_capacity(self.tails, self.heads, np.rint(amount).astype(np.int64))
        needed: set[int] = set()
        if self.block.needed and self.block.ops:
            flow.solve(0, 1)
            needed = set(flow.get_source_side_min_cut())
        ops = self.block.ops
        saved = frozenset(
            k
            for i, (_, _, outputs) in enumerate(ops)
            if self.first_op + i not in needed
            for k in outputs
            if 2 + k in needed
        )
        return saved, sum(seconds for i, (seconds, _, _) in enumerate(ops) if self.first_op + i in needed)
