"""How convolutions in the backward are laid out: those made again as the first time, their gradients cheaply.

Inductor lays out a graph's convolutions, and all around them, with the channels last where the graph has any.
A backward has none until something is made again; then all of it would be laid out anew.  The same gradients
would come of other kernels, with other bits, and some of these take much more scratch: a depthwise one 1.6 MB
for what takes 45 kB in rows.  So the backward is compiled without that, and what it needs is written into it:

* operands of a convolution that is made again are laid out as the forward lays them out;
* so is the weight of a convolution's gradient, for the kernel and the bits of ``torch.compile``; or, where
  memory is spared, all its operands on a CPU are in rows where that takes less, the copies counted;
* a plan may have the operands of a grouped convolution's gradient on a CPU with the channels last
  (:func:`swifter`), which inductor hands over in rows or not by what else is in its graph.  A depthwise one
  of 7 by 7 takes a third of the time then, or thirteen times as much, and half to sixty times the memory, by
  its sizes: so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from planner import _compat
from planner.compiled.judge import in_layout, scratch_bytes

__all__ = ["Ways", "lay_out", "swifter"]

aten = torch.ops.aten

CLEARLY = 0.8  # of the seconds in rows: what is less is no noise of a measurement


@dataclass(frozen=True)
class Ways:
    """Seconds of one call on operands in rows, and on such with the channels last; scratch of the latter."""

    rows_s: float
    last_s: float
    last_bytes: int


def swifter(
    calls: Mapping[int, fx.Node], seconds_of: Callable[[list[fx.Node]], list[float]]
) -> dict[int, Ways]:
    """Of ``calls``, gradients of grouped convolutions that are clearly faster with the channels last.

    ``seconds_of``  what calls take, not a number where that is not measured.  Copies into the layout are
                    counted in.
    """
    found = {}
    for i, node in calls.items():
        if node.target is not aten.convolution_backward.default or not _is_grouped_on_cpu(node):
            continue
        rows, last = (in_layout(node, channels_last=way) for way in (False, True))
        copies = [_copy_to_last(n) for n in rows.all_input_nodes[:2]]
        rows_s, last_s, *copies_s = seconds_of([rows, last, *copies])
        if last_s + sum(copies_s) < CLEARLY * rows_s:
            found[i] = Ways(rows_s, last_s, *scratch_bytes([last]))
    return found


def _is_grouped_on_cpu(node: fx.Node) -> bool:
    weight = _weight(node)
    return weight.device.type == "cpu" and weight.dim() == 4 and int(str(node.args[9])) > 1


def _copy_to_last(node: fx.Node) -> fx.Node:
    """The call that copies it, in a graph of its own."""
    graph, value = fx.Graph(), node.meta["val"]
    given = graph.placeholder(node.name)
    given.meta["val"] = value
    copy = graph.call_function(aten.clone.default, (given,), {"memory_format": torch.channels_last})
    copy.meta["val"] = torch.empty_like(value, memory_format=torch.channels_last)
    return copy


def lay_out(
    forward: fx.GraphModule, backward: fx.GraphModule, *, sparing: bool, last: Collection[int] = ()
) -> None:
    """Write layouts into ``backward``.

    ``sparing``  gradients in rows where that takes less memory.
    ``last``     numbers of gradients of convolutions, in the order of their calls, that have their operands
                 with the channels last.
    """
    turned = _compat.has_channels_last(forward)
    again = backward.graph.find_nodes(op="call_function", target=aten.convolution.default)
    for node in again if turned else ():
        if node.meta["val"].dim() == 4:
            _given(node, node.args[:2], torch.channels_last)
    gradients = backward.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    for number, node in enumerate(gradients):
        if number in last:
            _given(node, node.args[:2], torch.channels_last)
        elif sparing and _is_cheaper_in_rows(node):
            _given(node, node.args[:2], torch.contiguous_format)
        elif turned and _weight(node).dim() == 4:
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
