"""What the code that inductor generates for a graph allocates: played on tensors without data.

The generated Python is run as it is, with kernels that do nothing, so buffers that are written over, freed
and reused are those of the compiled step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat import Lowered, pytree, storage_key
from planner.measure.meter import StorageMeter

__all__ = ["Played", "play"]


@dataclass(frozen=True)
class Result:
    """A tensor ``like`` the one returned, without data; ``own``: its storage is that of no argument that is
    held, and of no result before it.
    """

    like: torch.Tensor
    own: bool


@dataclass(frozen=True)
class Played:
    """Bytes of what a call makes.

    ``peak_bytes``   most at once beyond what was there when it began; of arguments that it frees, less.
    ``left_bytes``   of what it returns beyond its arguments.
    ``kernels``      calls of libraries' kernels, and bytes as for ``peak_bytes`` when each has run; each is a
                     node on operands as large, and laid out, as those it was given.
    ``results``      what it returns, ``None`` for what is no tensor.
    """

    peak_bytes: int
    left_bytes: int
    kernels: tuple[tuple[fx.Node, int], ...]
    results: tuple[Result | None, ...] = ()

    def with_scratch(self, scratch_bytes: Callable[[fx.Node], int]) -> int:
        """``peak_bytes`` where kernels take so much beside their operands and results."""
        return max([self.peak_bytes, *(most + scratch_bytes(node) for node, most in self.kernels)])


def play(code: Lowered, args: Sequence[Any], held: Sequence[int], libraries: Collection[str]) -> Played:
    """Run ``code`` on fake ``args``; those at the positions ``held`` stay alive with whoever has them.

    ``libraries``  names of calls that are libraries' kernels, "aten.mm".
    """
    meter = _Meter(libraries)
    with code.mode, torch.no_grad():
        fresh = [_like(a) if isinstance(a, torch.Tensor) else a for a in args]
        meter.register(*(a for a in fresh if isinstance(a, torch.Tensor)))
        before = meter.live_bytes
        kept = [fresh[i] for i in held]
        with meter:
            results = code.run(fresh)
        peak, left = meter.peak_bytes - before, meter.live_bytes - before
        likes = _likes(kept, results)
    del kept
    del results
    return Played(peak, left, tuple((node, live - before) for node, live in meter.kernels), likes)


def _likes(args: Sequence[Any], results: Sequence[Any]) -> tuple[Result | None, ...]:
    there = {storage_key(x) for x in args if isinstance(x, torch.Tensor)}
    found: list[Result | None] = []
    for x in results:
        if not isinstance(x, torch.Tensor):
            found.append(None)
            continue
        key = storage_key(x)
        found.append(Result(_like(x), key not in there))
        there.add(key)
    return tuple(found)


class _Meter(StorageMeter):
    """Keeps what libraries' kernels are called on, and what is alive then."""

    def __init__(self, libraries: Collection[str]) -> None:
        super().__init__()
        self.libraries, self.kernels = libraries, list[tuple[fx.Node, int]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if str(func).rpartition(".")[0] in self.libraries:
            self.kernels.append((_node(func, args, kwargs or {}), self.live_bytes))
        return result


def _node(func: Any, args: Any, kwargs: dict[str, Any]) -> fx.Node:
    """The call as a node of a graph of its own; one that writes into a buffer as one that makes it."""
    if "out" in kwargs:
        func, kwargs = func.overloadpacket.default, {k: x for k, x in kwargs.items() if k != "out"}
    graph = fx.Graph()

    def operand(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = _like(x)
        return node

    args, kwargs = pytree.tree_map(operand, (args, kwargs))
    return graph.call_function(func, args, kwargs)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
