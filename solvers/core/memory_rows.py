"""Rows that bound the bytes at each slot of a sequence, made only where a solution is over the limit.

A program over a sequence of slots knows the bytes at each of them as a constant and segments: ``size`` bytes
from slot ``lo`` up to ``hi`` where a column is 1, or where one of several is.  All rows would be dense, one
per slot, and of thousands a few dozen bind.  So each starts with one row per stretch of slots, and a
solution, fractional or whole, is looked through in one vectorised pass; where it is over the limit, the
worst slots get rows and the program is solved again.

Source: the cutting planes of Dantzig, Fulkerson and Johnson, "Solution of a large-scale traveling-salesman
problem" (1954); the layout is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from solvers.core.linear import LinearProgram

__all__ = ["MemoryRows"]

# Rows of one round and stretch are more than this many slots apart, and slots this share of a unit over.
APART, TOLERANCE = 3, 1e-6
# Rows of one round and stretch, at most.
PER_STRETCH = 2


class MemoryRows:
    """The bytes at the slots of a program ``lp``, ``Problem.resident_bytes`` left out.

    ``edges``        first slot of each stretch, ascending, the first 0; and one past the last slot.
    ``limit_bytes``  what may be there, shape (slots,) or one for all.
    ``unit_bytes``   bytes that are 1 in a row.
    ``excess``       a column, in units, by which the slots of a range may exceed their limits.

    ``always`` and ``put`` lay the bytes out; all of them before the first question or row.
    """

    def __init__(
        self,
        lp: LinearProgram,
        edges: Sequence[int],
        limit_bytes: float | np.ndarray,
        *,
        unit_bytes: float,
        excess: tuple[int, range] | None = None,
    ) -> None:
        self.lp, self.unit_bytes, self.excess = lp, unit_bytes, excess
        self.edges = [int(edge) for edge in edges]
        self.limit_bytes = np.broadcast_to(np.asarray(limit_bytes, dtype=float), (self.edges[-1],))
        self._change = np.zeros(self.edges[-1] + 1)
        self._segments: list[tuple[int, int, float, bool, tuple[int, ...]]] = []
        self._larger_of: dict[tuple[int, ...], int] = {}
        self._row_at: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"MemoryRows({len(self._row_at)} of {self.edges[-1]} slots)"

    def __len__(self) -> int:
        return len(self._row_at)

    def always(self, lo: int, hi: int, size: float) -> None:
        """``size`` bytes at slots ``lo`` up to ``hi``, whatever the columns say."""
        self._change[lo] += size
        self._change[hi] -= size

    def put(self, lo: int, hi: int, size: float, columns: tuple[int, ...], *, adds: bool = True) -> None:
        """``size`` bytes at slots ``lo`` up to ``hi`` times the sum of ``columns``, or their largest.

        ``adds``  whether the columns exclude each other, so that their sum is at most 1 in whole numbers.
        """
        if lo < hi and size and columns:
            self._segments.append((int(lo), int(hi), float(size), adds or len(columns) == 1, columns))

    @cached_property
    def base(self) -> np.ndarray:
        """Bytes at each slot that no column changes, shape (slots,)."""
        return np.cumsum(self._change)[:-1]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each segment its first slot, one past its last, and its bytes; shapes (segments,)."""
        lo, hi, size = ([segment[k] for segment in self._segments] for k in range(3))
        return np.array(lo, dtype=np.int64), np.array(hi, dtype=np.int64), np.array(size, dtype=float)

    @cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All segments' columns in a row; where each segment's begin, and whether they are added."""
        counts = [len(segment[4]) for segment in self._segments]
        starts = np.cumsum([0, *counts])[:-1]
        adds = np.array([segment[3] for segment in self._segments], dtype=bool)
        return np.array([c for s in self._segments for c in s[4]], dtype=np.int64), starts, adds

    def bytes_at(self, x: np.ndarray) -> np.ndarray:
        """Bytes at every slot for the columns' values ``x``, shape (slots,)."""
        change = np.zeros(len(self.base) + 1)
        if self._segments:
            (lo, hi, size), (columns, starts, adds) = self._table, self._columns
            there = x[columns]
            if len(columns) > len(starts):
                added = np.minimum(np.add.reduceat(there, starts), 1.0)
                there = np.where(adds, added, np.maximum.reduceat(there, starts))
            np.add.at(change, lo, size * there)
            np.add.at(change, hi, -(size * there))
        return self.base + np.cumsum(change)[:-1]

    def add(self, slot: int) -> bool:
        """Bound the bytes at ``slot``; ``False`` if that row is there already."""
        if slot in self._row_at:
            return False
        lo, hi, _ = self._table
        weight: dict[int, float] = {}
        for n in np.flatnonzero((lo <= slot) & (slot < hi)).tolist():
            _, _, size, adds, columns = self._segments[n]
            for column in columns if adds else (self._larger(columns),):
                weight[column] = weight.get(column, 0.0) + size / self.unit_bytes
        if self.excess is not None and slot in self.excess[1]:
            weight[self.excess[0]] = -1.0
        self._row_at[slot] = self.lp.row(list(weight), weight.values(), upper=self._room(slot))
        return True

    def _room(self, slot: int) -> float:
        return float(self.limit_bytes[slot] - self.base[slot]) / self.unit_bytes

    def _larger(self, columns: tuple[int, ...]) -> int:
        """A column that is at least each of ``columns``."""
        key = tuple(sorted(columns))
        if key not in self._larger_of:
            new = self._larger_of[key] = self.lp.column()
            for column in columns:
                self.lp.covered(column, [new])
        return self._larger_of[key]

    def retarget(self, limit_bytes: float) -> None:
        """Change the limit of the rows there are and of those to come."""
        self.limit_bytes = np.full(self.edges[-1], float(limit_bytes))
        for slot, row in self._row_at.items():
            self.lp.row_upper[row] = self._room(slot)

    def add_first(self) -> None:
        """One row per stretch, where the bytes that no column changes are most above the limit."""
        over = self.base - self.limit_bytes
        for a, b in zip(self.edges, self.edges[1:], strict=False):
            if b > a:
                self.add(int(a + over[a:b].argmax()))

    def add_violated(self, x: np.ndarray) -> int:
        """Rows where ``x`` is over the limit, the worst of each stretch; how many were new."""
        over = self.bytes_at(x) - self.limit_bytes
        if self.excess is not None:
            column, slots = self.excess
            over[slots.start : slots.stop] -= x[column] * self.unit_bytes
        added = 0
        for a, b in zip(self.edges, self.edges[1:], strict=False):
            worst = a + np.argsort(-over[a:b], kind="stable")[: 4 * PER_STRETCH]
            taken: list[int] = []
            for s in worst.tolist():
                apart = all(abs(s - t) > APART for t in taken)
                if over[s] > TOLERANCE * self.unit_bytes and apart and len(taken) < PER_STRETCH:
                    taken.append(s)
                    added += self.add(s)
        return added
