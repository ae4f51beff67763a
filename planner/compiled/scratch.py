"""What libraries' kernels take on a CPU while they run, beside their operands and results.

It is measured, on operands in each layout that inductor may give them, and remembered for the life of the
process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import fx

from planner import _compat
from planner.costs.profiler import Signatures, cpu_scratch_bytes
from planner.errors import PlannerError

__all__ = ["in_layout", "scratch_bytes"]

log = logging.getLogger(__name__)

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
