"""The rows of every picture: placements gathered by layer, and layers that are alike folded into one.

A *layer* is what a reader of the model would call one: the part of a module path up to its first
number (``transformer.h.3``, ``stages.0.1``), and for the rest of the model one name below whatever
holds numbered layers (``transformer.wte``, ``bert.embeddings``).  Layers of one parent that make the
same values fold into a row, ``transformer.h.[0-11]``: first those that also decide alike, and where
that leaves more rows than asked for, those of the same structure; what is still too much becomes
one last row of the smallest.  Nothing is lost: rows always add up to the plan.
Pictures that run over depth fold neighbours only, the same number to a row everywhere.

A weakness: a placement does not say which call made it.  Outputs of one call stand side by side, so
neighbours of the same module, op and price count as one; two such calls in a row, of an op with
several outputs, would be charged as one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.plans.plan_data import Placement, PlanData

__all__ = ["ROOT", "TEXT_ROWS", "Layer", "Row", "depth_rows", "layers_of", "recompute_seconds", "rows_of"]

ROOT = "(model itself)"  # what happens in no submodule
TEXT_ROWS = 16  # of a summary; names of its rows can be asked about

_FEW = 4  # a model of fewer layers is shown by its modules


@dataclass(frozen=True)
class Layer:
    """A part of the model and what happens to its values; ``seconds`` spent on recomputing each."""

    path: str
    numbered: bool
    placements: tuple[Placement, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One or more layers that are alike, with their sums.

    ``name``          of the layers, e.g. ``h.[0-11]``; ``layers`` are they, ``alike`` if of one structure.
    ``kept_bytes``    saved for the backward; ``recomputed_bytes`` dropped and computed again;
                      ``freed_bytes`` never needed again.
    ``recompute_s``   predicted seconds of recomputation.
    """

    name: str
    layers: tuple[Layer, ...]
    alike: bool = True

    @property
    def kept_bytes(self) -> int:
        return self._bytes("save")

    @property
    def recomputed_bytes(self) -> int:
        return self._bytes("recompute")

    @property
    def freed_bytes(self) -> int:
        return self._bytes("free")

    @property
    def total_bytes(self) -> int:
        return sum(p.bytes for layer in self.layers for p in layer.placements)

    @property
    def recompute_s(self) -> float:
        return sum(sum(layer.seconds) for layer in self.layers)

    def _bytes(self, decision: str) -> int:
        return sum(p.bytes for layer in self.layers for p in layer.placements if p.decision == decision)


def recompute_seconds(plan: PlanData) -> tuple[float, ...]:
    """Seconds of recomputation by placement; of a call with several outputs the first one carries them.

    They add up to ``plan.recompute_s``.
    """
    charged: set[str] = set()
    out: list[float] = []
    for p in plan.placements:
        out.append(0.0 if p.call in charged else p.seconds * p.times_recomputed)
        if p.times_recomputed:
            charged.add(p.call)
    return tuple(out)


def layers_of(plan: PlanData) -> tuple[Layer, ...]:
    """The layers of the model in order of their first value."""
    paths = [p.module for p in plan.placements]
    cut = _layer_names(paths)
    seconds = recompute_seconds(plan)
    members: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        members.setdefault(cut[path], []).append(i)
    return tuple(
        Layer(
            path,
            path.rpartition(".")[2].isdigit(),
            tuple(plan.placements[i] for i in where),
            tuple(seconds[i] for i in where),
        )
        for path, where in members.items()
    )


def rows_of(layers: Sequence[Layer], limit: int) -> tuple[Row, ...]:
    """At most ``limit`` rows over ``layers``, in order, alike ones in one."""
    for alike in (_decided, _structure):
        rows = _fold(layers, alike)
        if len(rows) <= limit:
            return rows
    return _within(rows, limit)


def _within(rows: tuple[Row, ...], limit: int) -> tuple[Row, ...]:
    """The largest of ``rows`` by themselves, the others in one last row."""
    if len(rows) <= limit:
        return rows
    kept = frozenset(sorted(range(len(rows)), key=lambda i: -rows[i].total_bytes)[: limit - 1])
    rest = tuple(layer for i, row in enumerate(rows) if i not in kept for layer in row.layers)
    return (
        *(row for i, row in enumerate(rows) if i in kept),
        Row(f"({len(rest)} smaller)", rest, alike=False),
    )


def depth_rows(layers: Sequence[Layer], limit: int) -> tuple[Row, ...]:
    """At most ``limit`` rows in order of depth: neighbours of one parent and structure share one.

    As many to a row as it takes, no more, and the same number everywhere; what is still too much becomes
    one last row.
    """
    runs: list[list[Layer]] = []
    before: Hashable = None
    for layer in layers:
        key = (layer.path.rpartition(".")[0], _structure(layer)) if layer.numbered else layer.path
        if runs and key == before:
            runs[-1].append(layer)
        else:
            runs.append([layer])
        before = key
    longest = max(map(len, runs), default=1)
    each = next(
        (n for n in range(1, longest) if sum(-(-len(run) // n) for run in runs) <= limit), max(1, longest)
    )
    rows = tuple(
        Row(_folded_name(part), tuple(part))
        for run in runs
        for part in (run[k : k + each] for k in range(0, len(run), each))
    )
    return _within(rows, limit)


# -- names ----------------------------------------------------------------------------------------


def _layer_names(paths: Iterable[str]) -> dict[str, str]:
    """Layer by module path."""
    distinct = list(dict.fromkeys(paths))
    nested = frozenset(above for path in distinct for above in _above(path))
    numbered = {path: _numbered(path, nested) for path in distinct}
    holders = frozenset(above for layer in numbered.values() if layer for above in _above(layer))
    cut = {path: numbered[path] or _below(path, holders) for path in distinct}
    return cut if len(set(cut.values())) >= _FEW else {path: path for path in distinct}


def _above(path: str) -> list[str]:
    """Every proper prefix of a module path, the root ``""`` included."""
    parts = path.split(".") if path else []
    return [".".join(parts[:k]) for k in range(len(parts))]


def _numbered(path: str, nested: frozenset[str]) -> str | None:
    """``path`` up to its first number, and on through directly following numbers.

    A number only counts where modules lie below it: the second one in ``down.0.3``, an item of a
    ``Sequential``, is no layer.
    """
    parts = path.split(".")
    found = None
    for k, part in enumerate(parts):
        if part.isdigit():
            name = ".".join(parts[: k + 1])
            if name not in nested:
                return found
            found = name
        elif found is not None:
            return found
    return found


def _below(path: str, holders: frozenset[str]) -> str:
    """``path`` cut one name below the deepest module that holds numbered layers."""
    parts = path.split(".") if path else []
    depth = max(
        (len(above.split(".")) if above else 0 for above in _above(path) if above in holders), default=0
    )
    return ".".join(parts[: depth + 1])


# -- folding --------------------------------------------------------------------------------------


def _structure(layer: Layer) -> Hashable:
    cut = len(layer.path)
    return tuple((p.module[cut:], p.op, p.bytes) for p in layer.placements)


def _decided(layer: Layer) -> Hashable:
    return _structure(layer), tuple((p.decision, p.times_recomputed) for p in layer.placements)


def _fold(layers: Sequence[Layer], alike: Callable[[Layer], Hashable]) -> tuple[Row, ...]:
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        key = (layer.path.rpartition(".")[0], alike(layer)) if layer.numbered else layer.path
        groups.setdefault(key, []).append(layer)
    return tuple(Row(_folded_name(group), tuple(group)) for group in groups.values())


def _folded_name(group: Sequence[Layer]) -> str:
    if len(group) == 1:
        return group[0].path or ROOT
    parent = group[0].path.rpartition(".")[0]
    numbers = sorted(int(layer.path.rpartition(".")[2]) for layer in group)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{parent}.[{shown}]" if parent else f"[{shown}]"
