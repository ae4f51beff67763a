"""What can be said of an op without running it: FLOPs, bytes, and the least seconds they take.

The roofline (Williams, Waterman and Patterson, CACM 2009) divides FLOPs by a device's rate and bytes
by its bandwidth and takes the longer; here plus a launch.  FLOPs are those of
``torch.utils.flop_counter``, so what is predicted is what a counter sees at run time.

It needs no device, no memory and no time, and never varies.  Known weaknesses: it takes the data
sheet at its word, when real kernels reach half to nine tenths of it, and it knows nothing of
kernels that go over their operands more than once.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from planner._compat import dense_parts, pytree, size_hint, storage_key, writes_arguments
from planner.capture import meta
from planner.devices.rates import Device
from planner.graph import kernels
from planner.measure.flops import FLOP_FORMULAS

__all__ = [
    "call_seconds",
    "is_view",
    "node_bytes",
    "node_flops",
    "operands_of",
    "outputs_of",
    "packet_of",
    "roofline_seconds",
]

aten = torch.ops.aten


def packet_of(node: fx.Node) -> Any:
    """The op without its overload, or the function itself."""
    return getattr(node.target, "overloadpacket", node.target)


def outputs_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that ``node`` makes, in a value of any structure."""
    return [x for x in pytree.tree_leaves(meta.value(node)) if isinstance(x, torch.Tensor)]


def operands_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that ``node`` is given, each of its input nodes once."""
    return [t for source in node.all_input_nodes for t in outputs_of(source)]


# --- FLOPs and bytes --------------------------------------------------------------------------


@functools.cache
def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    ours = {**FLOP_FORMULAS, kernels.lstm_layer: FLOP_FORMULAS[aten.mkldnn_rnn_layer]}
    return FlopCounterMode(display=False, custom_mapping=ours).flop_registry


def node_flops(node: fx.Node) -> int:
    """FLOPs of one execution, as ``planner.measure.step_flops`` counts them; 0 for ops without a formula.

    Symbolic sizes count at the sizes they were traced with.
    """
    formula = _flop_formulas().get(packet_of(node)) if node.op == "call_function" else None
    if formula is None:
        return 0
    args, kwargs = map_arg((node.args, node.kwargs), meta.value)
    return size_hint(formula(*args, **kwargs, out_val=meta.value(node)))


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` moves no bytes: it writes nothing, and its tensors lie in its inputs' storages.

    True of what runs nothing at all (placeholders, the output) and of arithmetic on sizes.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    if writes_arguments(node.target):
        return False
    theirs = {storage_key(t) for t in operands_of(node)}
    return all(storage_key(t) in theirs for t in outputs_of(node))


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements; an expanded dimension counts once."""
    pairs = zip(map(size_hint, tensor.shape), map(size_hint, tensor.stride()), strict=True)
    return math.prod(n for n, stride in pairs if stride or n == 0) * tensor.element_size()


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    largest: dict[int, int] = {}
    for t in tensors:
        key = storage_key(t)
        largest[key] = max(largest.get(key, 0), _touched_bytes(t))
    return sum(largest.values())


# Ops that read from their first operand only as many elements as they write.
_GATHERS = frozenset({aten.embedding, aten.index_select, aten.index, aten.gather})


def node_bytes(node: fx.Node) -> int:
    """Bytes one execution must read and write at least: each storage once each way; views 0."""
    if is_view(node):
        return 0
    operands, written = operands_of(node), _distinct_bytes(outputs_of(node))
    if node.target is kernels.written:  # mostly over its first operand, of which a part is touched
        return 2 * min(_distinct_bytes(operands[1:]), written)
    if packet_of(node) in _GATHERS and operands:
        table, *indices = operands
        return min(_touched_bytes(table), written) + _distinct_bytes(indices) + written
    return _distinct_bytes(operands) + written


# --- Seconds -----------------------------------------------------------------------------------


def roofline_seconds(node: fx.Node, device: Device) -> float:
    """Launch plus the longer of FLOPs over rate and bytes over bandwidth; 0 for views."""
    if is_view(node):
        return 0.0
    compute_s = 0.0
    if flops := node_flops(node):
        dtype = next((t.dtype for t in operands_of(node) if t.dtype.is_floating_point), torch.float32)
        # torch's defaults: convolutions may use TF32, matrix products only on request.
        convolution = "conv" in str(packet_of(node))
        tf32 = convolution or torch.get_float32_matmul_precision() != "highest"
        compute_s = flops / device.flops_per_s(dtype, tf32=tf32)
    return device.launch_s + max(compute_s, node_bytes(node) / device.bandwidth)


def call_seconds(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, device: Device
) -> float:
    """:func:`roofline_seconds` of a call that ran, by its real tensors; 0 where it gave views only."""
    leaves = pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(result)
    given, made = ([t for x in of if isinstance(x, torch.Tensor) for t in dense_parts(x)] for of in leaves)
    theirs = {storage_key(t) for t in given}
    if all(storage_key(t) in theirs for t in made) and not writes_arguments(func):
        return 0.0
    formula = _flop_formulas().get(getattr(func, "overloadpacket", func))
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
    dtype = next((t.dtype for t in given if t.dtype.is_floating_point), torch.float32)
    moved = _distinct_bytes(given) + _distinct_bytes(made)
    return device.launch_s + max(flops / device.flops_per_s(dtype), moved / device.bandwidth)
