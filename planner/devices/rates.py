"""Rates and memory of devices by name.

They are the data sheets'; what real kernels reach of them differs from kernel to kernel, and no figure for
all of them has a source, so none is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["DEVICES", "Device", "device_named"]


@dataclass(frozen=True)
class Device:
    """The rates of a device.

    ``fp64_flops`` ... ``half_flops``  dense matrix FLOP/s by operand type; ``tf32`` is what a GPU uses
                                       for fp32 operands when allowed, ``half`` is bf16 and fp16.
    ``bandwidth``                      bytes/s of device memory.
    ``launch_s``                       seconds any kernel takes, however small.
    ``capability``                     CUDA's compute capability; ``None``: not a CUDA device.
    ``memory_bytes``                   of the device, in GB of 10**9 as on its data sheet; 0: not known.

    Raises ``ValueError`` for a rate that is not a positive number.
    """

    name: str
    fp64_flops: float
    fp32_flops: float
    tf32_flops: float
    half_flops: float
    bandwidth: float
    launch_s: float
    capability: tuple[int, int] | None = None
    memory_bytes: int = 0

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


# Dense rates (sparsity off), bandwidths and memory from NVIDIA's data sheets: H100 and H200 Tensor Core GPU
# (SXM), A100 80GB (SXM), L4; for the RTX 4090 the Ada architecture white paper's appendix, half with
# fp32 accumulation.  A launch is what an eager step spends between two small kernels.  "cpu" stands for
# a core or two of a desktop where nothing may be measured.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H200", 67e12, 67e12, 494.7e12, 989.4e12, 4.8e12, 5e-6, (9, 0), 141 * 10**9),
        Device("H100", 67e12, 67e12, 494.7e12, 989.4e12, 3.35e12, 5e-6, (9, 0), 80 * 10**9),
        Device("A100", 19.5e12, 19.5e12, 156e12, 312e12, 2.039e12, 5e-6, (8, 0), 80 * 10**9),
        Device("L4", 0.47e12, 30.3e12, 60e12, 121e12, 0.3e12, 5e-6, (8, 9), 24 * 10**9),
        Device("RTX 4090", 1.29e12, 82.6e12, 82.6e12, 165.2e12, 1.008e12, 5e-6, (8, 9), 24 * 10**9),
        Device("cpu", 5e10, 1e11, 1e11, 1e11, 1e10, 3e-6),
    )
}


def device_named(name: str) -> Device | None:
    """The CUDA device that ``name`` means, in any case, with or without spaces; ``None`` if there is none."""
    wanted = _squeezed(name)
    return next(
        (d for d in DEVICES.values() if d.capability is not None and _squeezed(d.name) == wanted), None
    )


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
