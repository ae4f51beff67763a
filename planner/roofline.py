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
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from planner._compat import pytree, size_hint, storage_key, writes_arguments
from planner.measure import FLOP_FORMULAS

__all__ = ["DEVICES", "Device", "is_view", "node_bytes", "node_flops", "roofline_seconds"]

aten = torch.ops.aten


def value_of(node: fx.Node) -> Any:
    """The fake value of ``node``; None if it has none."""
    return node.meta.get("val")


def packet_of(node: fx.Node) -> Any:
    """The op without its overload, or the function itself."""
    return getattr(node.target, "overloadpacket", node.target)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a value of any structure."""
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def operands_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that ``node`` is given, each of its input nodes once."""
    return [t for source in node.all_input_nodes for t in tensors_of(value_of(source))]


# --- FLOPs and bytes --------------------------------------------------------------------------


@functools.cache
def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    return FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS)).flop_registry


def node_flops(node: fx.Node) -> int:
    """FLOPs of one execution, as ``planner.measure.step_flops`` counts them; 0 for ops without a formula.

    Symbolic sizes count at the sizes they were traced with.
    """
    formula = _flop_formulas().get(packet_of(node)) if node.op == "call_function" else None
    if formula is None:
        return 0
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    return size_hint(formula(*args, **kwargs, out_val=value_of(node)))


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` moves no bytes: it writes nothing, and its tensors lie in its inputs' storages.

    True of what runs nothing at all (placeholders, the output) and of arithmetic on sizes.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    if writes_arguments(node.target):
        return False
    theirs = {storage_key(t) for t in operands_of(node)}
    return all(storage_key(t) in theirs for t in tensors_of(value_of(node)))


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
    operands, written = operands_of(node), _distinct_bytes(tensors_of(value_of(node)))
    if packet_of(node) in _GATHERS and operands:
        table, *indices = operands
        return min(_touched_bytes(table), written) + _distinct_bytes(indices) + written
    return _distinct_bytes(operands) + written


# --- Devices ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The rates of a device.

    ``fp64_flops`` ... ``half_flops``  dense matrix FLOP/s by operand type; ``tf32`` is what a GPU uses
                                       for fp32 operands when allowed, ``half`` is bf16 and fp16.
    ``bandwidth``                      bytes/s of device memory.
    ``launch_s``                       seconds any kernel takes, however small.

    Raises ``ValueError`` for a rate that is not a positive number.
    """

    name: str
    fp64_flops: float
    fp32_flops: float
    tf32_flops: float
    half_flops: float
    bandwidth: float
    launch_s: float

    def __post_init__(self) -> None:
        for label in ("fp64_flops", "fp32_flops", "tf32_flops", "half_flops", "bandwidth", "launch_s"):
            rate = getattr(self, label)
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"device {self.name!r} has {label}={rate!r}, want a number > 0")

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.fp32_flops / 1e12:.3g} TFLOP/s fp32, {self.half_flops / 1e12:.3g} half, "
            f"{self.bandwidth / 1e9:.4g} GB/s)"
        )

    def flops_per_s(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """Matrix FLOP/s on operands of ``dtype``; types that are not listed count as fp32."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.half_flops
        if dtype in (torch.float64, torch.complex128):
            return self.fp64_flops
        return self.tf32_flops if tf32 else self.fp32_flops


# Dense rates (sparsity off) and bandwidths from NVIDIA's data sheets: H100 and H200 Tensor Core GPU
# (SXM), A100 80GB (SXM), L4; for the RTX 4090 the Ada architecture white paper's appendix, half with
# fp32 accumulation.  A launch is what an eager step spends between two small kernels.  "cpu" stands for
# a core or two of a desktop where nothing may be measured.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H200", 67e12, 67e12, 494.7e12, 989.4e12, 4.8e12, 5e-6),
        Device("H100", 67e12, 67e12, 494.7e12, 989.4e12, 3.35e12, 5e-6),
        Device("A100", 19.5e12, 19.5e12, 156e12, 312e12, 2.039e12, 5e-6),
        Device("L4", 0.47e12, 30.3e12, 60e12, 121e12, 0.3e12, 5e-6),
        Device("RTX 4090", 1.29e12, 82.6e12, 82.6e12, 165.2e12, 1.008e12, 5e-6),
        Device("cpu", 5e10, 1e11, 1e11, 1e11, 1e10, 3e-6),
    )
}


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
