"""What the code that inductor generates for a graph allocates: played on tensors without data.

The generated Python is run as it is, with kernels that do nothing, so buffers that are written over, freed
and reused are those of the compiled step.  What libraries' kernels take on a CPU while they run, beside their
operands and results, is measured, on operands in each layout that inductor may give them, and remembered for
the life of the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner._compat import Lowered, pytree, storage_key
from planner.costs.profiler import Signatures, cpu_scratch_bytes
from planner.errors import PlannerError
from planner.measure.meter import StorageMeter

__all__ = ["Played", "in_layout", "play", "scratch_bytes"]

log = logging.getLogger(__name__)


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


# -- libraries' kernels ------------------------------------------------------------------------

# What a call raises that does not run on made-up operands.
_NOT_RUN = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)

_HERE = torch.device("cpu")
_SCRATCH: dict[str, int] = {}  # by signature

# By number of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_layout(node: fx.Node, *, channels_last: bool) -> fx.Node:
    """The same call, in a graph of its own, on operands that are laid out so where they have channels."""
    graph, operands = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in node.all_input_nodes:
        value = n.meta["val"]
        layout = _CHANNELS_LAST.get(value.dim()) if channels_last else None
        operands[n] = graph.placeholder(n.name)
        operands[n].meta["val"] = torch.empty_like(value, memory_format=layout or torch.contiguous_format)
    return graph.node_copy(node, operands.__getitem__)


def scratch_bytes(nodes: Sequence[fx.Node]) -> list[int]:
    """What each of ``nodes`` takes beside operands and results; 0 of what does not run on made-up ones.

    Raises ``PlannerError`` inside of a profile, for it is one that measures.
    """
    keys = [*map(Signatures(_HERE).of, nodes)]
    new = {key: node for key, node in zip(keys, nodes, strict=True) if key not in _SCRATCH}
    if new and _compat.is_profiled():
        raise PlannerError(
            "what libraries' kernels take on a CPU is measured with torch.profiler, which is at work: plan "
            "before a profile begins, or begin it after the first two steps of a kind of batches"
        )
    try:
        _SCRATCH.update(zip(new, cpu_scratch_bytes(list(new.values())), strict=True))
    except _NOT_RUN:
        for key, node in new.items():  # which of them it is
            try:
                (_SCRATCH[key],) = cpu_scratch_bytes([node])
            except _NOT_RUN as error:
                log.debug("the scratch of %s is not measured: %s", node.target, error)
                _SCRATCH[key] = 0
    return [_SCRATCH[key] for key in keys]
