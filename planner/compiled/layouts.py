"""How convolutions in the backward are laid out: those made again as the first time, their gradients cheaply.

Inductor lays out a graph's convolutions, and all around them, with the channels last where the graph has any.
A backward has none until something is made again; then all of it would be laid out anew.  The same gradients
would come of other kernels, with other bits, and some of these take much more scratch: a depthwise one 1.6 MB
for what takes 45 kB in rows.  So the backward is compiled without that, and what it needs is written into it:

* operands of a convolution that is made again are laid out as the forward lays them out;
* so is the weight of a convolution's gradient, for the kernel and the bits of ``torch.compile``; or, where
  memory is spared, all its operands on a CPU are in rows where that takes less, the copies counted.
"""

from __future__ import annotations

import torch
from torch import fx

from planner import _compat
from planner.compiled.scratch import in_layout, scratch_bytes

__all__ = ["lay_out"]

aten = torch.ops.aten


def lay_out(forward: fx.GraphModule, backward: fx.GraphModule, *, sparing: bool) -> None:
    """Write layouts into ``backward``; ``sparing``: gradients in rows where that takes less memory."""
    last = _compat.has_channels_last(forward)
    again = backward.graph.find_nodes(op="call_function", target=aten.convolution.default)
    for node in again if last else ():
        if node.meta["val"].dim() == 4:
            _given(node, node.args[:2], torch.channels_last)
    gradients = backward.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    for node in gradients:
        if sparing and _is_cheaper_in_rows(node):
            _given(node, node.args[:2], torch.contiguous_format)
        elif last and _weight(node).dim() == 4:
            _given(node, node.args[2:3], torch.channels_last)
    for node in backward.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # of what lies otherwise now; inductor does so too
    backward.recompile()


def _weight(node: fx.Node) -> torch.Tensor:
    weight: torch.Tensor = node.args[2].meta["val"]  # type: ignore[union-attr]
    return weight


def _is_cheaper_in_rows(node: fx.Node) -> bool:
    values = [n.meta["val"] for n in node.all_input_nodes]
    if any(not isinstance(x, torch.Tensor) or x.device.type != "cpu" for x in values):
        return False
    rows, last = scratch_bytes([in_layout(node, channels_last=way) for way in (False, True)])
    copies_bytes = sum(n.meta["val"].nbytes for n in node.args[:2] if isinstance(n, fx.Node))
    return rows + copies_bytes < last + _weight(node).nbytes


def _given(node: fx.Node, operands: tuple[object, ...], layout: torch.memory_format) -> None:
    """Let ``node`` have ``operands`` laid out so."""
    for n in operands:
        if isinstance(n, fx.Node):
            with node.graph.inserting_before(node):
                strides = torch.empty(n.meta["val"].shape, device="meta").to(memory_format=layout).stride()
                node.replace_input_with(n, _compat.laid_out(node.graph, n, strides))
