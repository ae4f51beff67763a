"""Devices: their rates and memory, by name and as they are found, and what their libraries keep.

Rates and sizes are the data sheets'; what real kernels reach of them differs from kernel to kernel, and
no figure for all of them has a source, so none is applied.

CUDA's caching allocator rounds every block up to 512 bytes (``kMinBlockSize`` in
``c10/cuda/CUDACachingAllocator.cpp``); memory on a CPU is counted to the byte.

``library_bytes`` is what cuBLAS keeps on a CUDA device.  PyTorch hands every handle a workspace from its
caching allocator and never takes it back (``aten/src/ATen/cuda/CublasHandlePool.cpp``,
``parseChosenWorkspaceSize``): 32 MiB on compute capability 9, and in later versions 10 and 12, else 8 MiB +
128 KiB, or what ``CUBLAS_WORKSPACE_CONFIG`` says.  Handles belong to threads, and the backward of a step runs
in a thread of the autograd engine, so a training step has two.  Products with a bias go through cuBLASLt,
which has a workspace of its own, of ``CUBLASLT_WORKSPACE_SIZE`` KiB or 1 MiB, unless
``TORCH_CUBLASLT_UNIFIED_WORKSPACE=1`` has it share the other: so torch 2.11 for CUDA 13, asked with a made
driver under its own allocator.

What that allocator hands out beyond what it is asked for is computed in :mod:`planner.devices.allocator`.

:func:`memory_of`, :func:`segments_of` and :func:`capability_of` are the only places that ask a device
for its state.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from planner.errors import PlannerError
from planner.units import bytes_text

__all__ = [
    "DEVICES",
    "Device",
    "DeviceMemory",
    "Segment",
    "allocation_grain",
    "capability_of",
    "cublas_workspace_bytes",
    "cublaslt_workspace_bytes",
    "device_named",
    "library_blocks",
    "library_bytes",
    "memory_of",
    "memory_on_paper",
    "reachable",
    "rounded_up",
    "segments_of",
    "warn_of_little_memory",
]

log = logging.getLogger(__name__)


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


def allocation_grain(device: torch.device) -> int:
    """Bytes to which the device's allocator rounds every block."""
    return 512 if device.type == "cuda" else 1


def rounded_up(count: int, grain: int) -> int:
    """The least multiple of ``grain`` that is not below ``count``."""
    return -(-count // grain) * grain


# --- What a device is now ---------------------------------------------------------------------


class DeviceMemory(NamedTuple):
    """Bytes of a CUDA device.

    ``free_bytes``      that the driver has left, for any process.
    ``reserved_bytes``  that this process's caching allocator has taken from the driver.
    """

    name: str
    total_bytes: int
    free_bytes: int
    reserved_bytes: int

    @property
    def others_bytes(self) -> int:
        """Held by other processes, and by CUDA contexts, this process's own among them."""
        return max(0, self.total_bytes - self.free_bytes - self.reserved_bytes)


class Segment(NamedTuple):
    """A piece of device memory that the caching allocator cuts blocks from.

    ``blocks``  address -> bytes of each that is handed out.
    ``small``   of the pool of small blocks.
    """

    address: int
    bytes: int
    small: bool
    blocks: Mapping[int, int]


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The device's memory as it is now; ``None`` for what is not a CUDA device."""
    if device.type != "cuda":
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return DeviceMemory(name, total_bytes, free_bytes, torch.cuda.memory_reserved(device))


def segments_of(device: torch.device) -> list[Segment]:
    """What this process's caching allocator has taken from the driver there; none where it was never used."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return []
    index = torch.cuda.current_device() if device.index is None else device.index
    found: list[Segment] = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != index:
            continue
        live, address = {}, segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                live[address] = block["size"]
            address += block["size"]
        small = segment["segment_type"] == "small"
        found.append(Segment(segment["address"], segment["total_size"], small, live))
    return found


def memory_on_paper(device: Device) -> DeviceMemory:
    """The memory of a device that is elsewhere, all of it free."""
    return DeviceMemory(device.name, device.memory_bytes, device.memory_bytes, 0)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability of the device; ``None`` for what is not a CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def reachable(device: torch.device) -> torch.device:
    """The device itself.

    ``PlannerError`` for a CUDA device that torch cannot reach; tracing on it would end the process.
    """
    here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if here or device.type != "cuda":
        return device
    there = f"{torch.cuda.device_count()} of them" if torch.cuda.is_available() else "none"
    raise PlannerError(
        f"the model is on {device}, but torch {torch.__version__} (built for CUDA "
        f"{torch.version.cuda or 'none'}) finds {there} on this machine. Build the model on the CPU, under "
        f"FakeTensorMode if it is large, and plan for a GPU by its name: costs={_names()}"
    )


def _names() -> str:
    return " or ".join(f'"{d.name}"' for d in DEVICES.values() if d.capability is not None)


def warn_of_little_memory(budget_bytes: int, peak_bytes: int, memory: DeviceMemory | None) -> None:
    """One line in the log where the device has not what a plan needs, with the numbers."""
    if memory is None:
        return
    ours_bytes = memory.free_bytes + memory.reserved_bytes
    if budget_bytes > memory.total_bytes:
        log.warning(
            "the budget is %s, but %s has %s in total; the plan takes %s",
            bytes_text(budget_bytes),
            memory.name,
            bytes_text(memory.total_bytes),
            bytes_text(peak_bytes),
        )
    elif peak_bytes > ours_bytes:
        log.warning(
            "the plan takes %s, but of the %s of %s only %s can be had now: %s are held by other processes "
            "and CUDA contexts",
            bytes_text(peak_bytes),
            bytes_text(memory.total_bytes),
            memory.name,
            bytes_text(ours_bytes),
            bytes_text(memory.others_bytes),
        )


# --- What libraries keep ----------------------------------------------------------------------


def cublas_workspace_bytes(capability: tuple[int, int], environ: Mapping[str, str] | None = None) -> int:
    """Bytes that PyTorch gives each cuBLAS handle."""
    environ = os.environ if environ is None else environ
    default_bytes = 32 * 2**20 if capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024
    config = environ.get("CUBLAS_WORKSPACE_CONFIG")
    pairs = re.findall(r":([0-9]+):([0-9]+)", config) if config else []
    return sum(int(kib) * 1024 * int(count) for kib, count in pairs) if pairs else default_bytes


def cublaslt_workspace_bytes(environ: Mapping[str, str] | None = None) -> int:
    """Bytes that PyTorch gives a thread's cuBLASLt beyond its cuBLAS workspace."""
    environ = os.environ if environ is None else environ
    if environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") == "1":
        return 0
    own = environ.get("CUBLASLT_WORKSPACE_SIZE", "")
    return (int(own) if own.isdecimal() else 1024) * 1024


def library_blocks(capability: tuple[int, int] | None, *, products: bool, biased: bool) -> tuple[int, ...]:
    """Bytes of each workspace that cuBLAS keeps through a step with matrix products, some with a bias.

    Both threads of the step are counted for both: a product of the forward may be recomputed in the other.
    None where ``capability`` is ``None``: other devices have no such workspace.
    """
    if capability is None:
        return ()
    of_a_thread = [cublas_workspace_bytes(capability)] * products + [cublaslt_workspace_bytes()] * biased
    return tuple(2 * of_a_thread)


def library_bytes(capability: tuple[int, int] | None, *, products: bool, biased: bool) -> int:
    """Bytes of all of :func:`library_blocks`."""
    return sum(library_blocks(capability, products=products, biased=biased))
