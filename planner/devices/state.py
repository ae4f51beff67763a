"""What a device is now: its memory, what this process's allocator has of it, whether torch reaches it.

CUDA's caching allocator rounds every block up to :data:`GRAIN` bytes; memory on a CPU is counted to the byte.
What it hands out beyond what it is asked for is computed in :mod:`planner.devices.allocator`.

:func:`memory_of`, :func:`segments_of` and :func:`capability_of` are the only places that ask a device
for its state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch

from planner.devices.rates import DEVICES, Device
from planner.errors import PlannerError
from planner.units import bytes_text

__all__ = [
    "GRAIN",
    "DeviceMemory",
    "DeviceSegment",
    "allocation_grain",
    "capability_of",
    "memory_of",
    "memory_on_paper",
    "reachable",
    "segments_of",
    "warn_of_little_memory",
]

log = logging.getLogger(__name__)

GRAIN = 512  # bytes: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp


def allocation_grain(device: torch.device) -> int:
    """Bytes to which the device's allocator rounds every block."""
    return GRAIN if device.type == "cuda" else 1


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


class DeviceSegment(NamedTuple):
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


def segments_of(device: torch.device) -> list[DeviceSegment]:
    """What this process's caching allocator has taken from the driver there; none where it was never used."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return []
    index = torch.cuda.current_device() if device.index is None else device.index
    found: list[DeviceSegment] = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != index:
            continue
        live, address = {}, segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                live[address] = block["size"]
            address += block["size"]
        small = segment["segment_type"] == "small"
        found.append(DeviceSegment(segment["address"], segment["total_size"], small, live))
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
