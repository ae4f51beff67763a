"""PyTorch's CUDA caching allocator on paper: what it hands out and takes from the driver for a step.

A plan counts what is asked for.  The caching allocator hands out more: it takes memory from the driver in
segments, cuts blocks from them, and leaves a block whole where too little would remain of it.  What it
counts as allocated (``max_memory_allocated``) and what it holds (``max_memory_reserved``) follow from the
order of allocations and frees alone, and the schedule says that order; so both are computed here, without a
device, by playing the schedule through a few times as a training loop does.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.11 with its default settings, restated:

* Sizes are rounded up to 512 bytes (``round_size``).
* Blocks of at most 1 MiB come from segments of 2 MiB, larger ones from segments of 20 MiB, and those of
  10 MiB and more from segments of their own size rounded up to 2 MiB (``get_allocation_size``).  The small
  and the large share nothing.
* The smallest free block that is large enough serves, of equal ones that of the lowest address
  (``get_free_block``); if there is none, a segment is taken from the driver.
* A block is cut, its lower part being handed out, if at least 512 bytes of a small one or more than 1 MiB
  of a large one remain (``should_split``); else all of it is handed out and counts as allocated.
* A freed block is joined with free neighbours of its segment (``free_block``).

Exact for one stream, given the order of allocations and frees and the blocks there at the start.

Known weaknesses: an op's outputs are taken to be made in order and its scratch, one block, after them; what
is resident, where it is not seen on the device, is laid out in the order of the model's parameters, buffers
and inputs, as if nothing had been freed between; the driver's addresses are taken to rise, which decides
between free blocks of equal size.  Other streams, private pools of CUDA graphs, and other settings in
``PYTORCH_ALLOC_CONF`` (``expandable_segments``, ``roundup_power2_divisions``, ``max_split_size_mb``,
``backend``) are not modelled; :func:`is_default` says whether there are any.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.devices.state import GRAIN, DeviceSegment
from planner.units import rounded_up
from solvers import Problem, Timeline

__all__ = ["AllocatorPeaks", "Block", "CachingAllocator", "HeldBlocks", "is_default", "simulate_allocator"]

MIB = 2**20
SMALL = MIB  # the largest block of the small pool, and the largest rest that is not cut off a large one
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from here on a block has a segment of its own size
SEGMENT_GRAIN = 2 * MIB
STEPS = 3  # of training: the first starts from an empty cache, the others from what the one before left

_MODELLED = frozenset({"expandable_segments:false", "backend:native", ""})


def is_default(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``PYTORCH_ALLOC_CONF`` leaves the allocator as it is modelled here."""
    environ = os.environ if environ is None else environ
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = ",".join(environ.get(name, "") for name in names)
    return all(s.replace(" ", "").lower() in _MODELLED for s in settings.split(","))


class Block:
    """A part of a segment, between its neighbours there; ``bytes`` of it from ``address`` on."""

    __slots__ = ("address", "after", "before", "bytes", "free", "small")

    def __init__(self, address: int, count: int, small: bool, before: Block | None = None) -> None:
        self.address, self.bytes, self.small, self.free = address, count, small, False
        self.before = before
        self.after: Block | None = None if before is None else before.after
        if before is not None:
            before.after = self
        if self.after is not None:
            self.after.before = self

    @property
    def is_segment(self) -> bool:
        """Whether it has no neighbours."""
        return self.before is None and self.after is None

    def join(self) -> Block:
        """Take in the neighbour above."""
        upper = self.after
        assert upper is not None
        self.bytes += upper.bytes
        self.after = upper.after
        if self.after is not None:
            self.after.before = self
        return self

    def __repr__(self) -> str:
        return f"Block({self.bytes} bytes at {self.address}{', free' if self.free else ''})"


class CachingAllocator:
    """The allocator's state.

    ``allocated_bytes`` in live blocks; ``reserved_bytes`` taken from the driver; ``reserved_peak_bytes`` the
    most of that so far.
    """

    def __init__(self) -> None:
        self.allocated_bytes = self.reserved_bytes = self.reserved_peak_bytes = 0
        self._top = 0  # of the addresses given out
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (bytes, address), ascending
        self._at: dict[int, Block] = {}  # the free ones

    def allocate(self, count: int) -> Block:
        """A block of at least ``count`` bytes, ``count`` being more than 0."""
        count = rounded_up(count, GRAIN)
        small = count <= SMALL
        free = self._free[small]
        k = bisect_left(free, (count, -1))
        block = self._at.pop(free.pop(k)[1]) if k < len(free) else self._segment(count, small)
        block.free = False
        rest = block.bytes - count
        if rest >= GRAIN if small else rest > SMALL:
            block.bytes = count
            self._to_free_list(Block(block.address + count, rest, small, before=block))
        self.allocated_bytes += block.bytes
        return block

    def lay(self, segment: DeviceSegment) -> None:
        """A segment that is there already; what is not handed out of it is free."""
        start, at = self._taken(segment.bytes), segment.address
        block: Block | None = None
        for address, count in [*sorted(segment.blocks.items()), (segment.address + segment.bytes, 0)]:
            if address > at:
                block = Block(start + at - segment.address, address - at, segment.small, block)
                self._to_free_list(block)
            if count:
                block = Block(start + address - segment.address, count, segment.small, block)
                self.allocated_bytes += count
            at = address + count

    def release(self, block: Block) -> None:
        """Take ``block`` back; ``ValueError`` if it is free already."""
        if block.free:
            raise ValueError(f"{block} was released before")
        self.allocated_bytes -= block.bytes
        before, after = block.before, block.after
        if before is not None and before.free:
            self._from_free_list(before)
            block = before.join()
        if after is not None and after.free:
            self._from_free_list(after)
            block.join()
        self._to_free_list(block)

    def trim(self) -> None:
        """Give the driver back what is free of whole segments, as ``torch.cuda.empty_cache`` does."""
        for block in [b for b in self._at.values() if b.is_segment]:
            self._from_free_list(block)
            self.reserved_bytes -= block.bytes

    def _segment(self, count: int, small: bool) -> Block:
        if small:
            size = SMALL_SEGMENT
        else:
            size = LARGE_SEGMENT if count < OWN_SEGMENT else rounded_up(count, SEGMENT_GRAIN)
        return Block(self._taken(size), size, small)

    def _taken(self, count: int) -> int:
        """The address of a new segment."""
        address = self._top
        self._top += count
        self.reserved_bytes += count
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        return address

    def _to_free_list(self, block: Block) -> None:
        block.free = True
        self._at[block.address] = block
        insort(self._free[block.small], (block.bytes, block.address))

    def _from_free_list(self, block: Block) -> None:
        del self._at[block.address]
        free = self._free[block.small]
        del free[bisect_left(free, (block.bytes, block.address))]


@dataclass(frozen=True)
class AllocatorPeaks:
    """What the allocator would count over some steps of training.

    ``requested_peak_bytes``  of live blocks, as asked for (in units of 512).
    ``allocated_peak_bytes``  of live blocks, as handed out.
    ``reserved_peak_bytes``   taken from the driver.
    ``allocated_bytes``       while each step of the schedule runs, the most of all rounds, shape (T,).
    """

    requested_peak_bytes: int
    allocated_peak_bytes: int
    reserved_peak_bytes: int
    allocated_bytes: np.ndarray = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.requested_peak_bytes <= self.allocated_peak_bytes <= self.reserved_peak_bytes:
            raise ValueError(
                "requested, allocated and reserved peaks must ascend, got "
                f"{self.requested_peak_bytes}, {self.allocated_peak_bytes}, {self.reserved_peak_bytes}"
            )


@dataclass(frozen=True)
class HeldBlocks:
    """Blocks that are there when a step begins, and through all of it.

    ``there``  segments that blocks were seen in, with these blocks only.
    ``made``   bytes of each block that is yet to be asked for, in the order in which that will be.
    """

    there: tuple[DeviceSegment, ...]
    made: tuple[int, ...]

    def allocator(self) -> CachingAllocator:
        """An allocator with these blocks in it."""
        allocator = CachingAllocator()
        for segment in self.there:
            allocator.lay(segment)
        for count in self.made:
            if count:
                allocator.allocate(count)
        return allocator

    @property
    def asked_bytes(self) -> int:
        """The same before the allocator's slack for ``made``."""
        return sum(self.made) + sum(sum(s.blocks.values()) for s in self.there)

    @property
    def handed_out_bytes(self) -> int:
        """Bytes of these blocks, the allocator's slack included."""
        return self.allocator().allocated_bytes


def simulate_allocator(
    problem: Problem, timeline: Timeline, held: HeldBlocks, *, steps: int = STEPS
) -> AllocatorPeaks:
    """The peaks of ``steps`` training steps that run as ``timeline`` of ``problem`` says.

    Gradients and outputs (final values) are dropped at the end of each step.
    """
    allocator = held.allocator()
    moves = _moves(problem, timeline)
    allocated = np.zeros(len(moves), dtype=np.int64)
    for _ in range(steps):
        live: dict[int, Block] = {}
        for t, (made, scratch, dropped) in enumerate(moves):
            for key, count in made:
                live[key] = allocator.allocate(count)
            if scratch:
                block = allocator.allocate(scratch)
                allocated[t] = max(allocated[t], allocator.allocated_bytes)
                allocator.release(block)
            else:
                allocated[t] = max(allocated[t], allocator.allocated_bytes)
            for key in dropped:
                allocator.release(live.pop(key))
        for block in live.values():
            allocator.release(block)
    moving = timeline.live_bytes - timeline.resident_bytes
    return AllocatorPeaks(
        held.asked_bytes + int(moving.max(initial=0)),
        int(allocated.max(initial=allocator.allocated_bytes)),
        allocator.reserved_peak_bytes,
        allocated,
    )


_Move = tuple[list[tuple[int, int]], int, list[int]]  # made (key, bytes), scratch bytes, keys dropped


def _moves(problem: Problem, timeline: Timeline) -> list[_Move]:
    """Per step: the blocks it makes, its scratch, and the blocks dropped after it."""
    moves: list[_Move] = []
    current: dict[int, int] = {}  # value -> key of its copy
    keys = 0
    for t, i in enumerate(timeline.steps.tolist()):
        op = problem.ops[i]
        made: list[tuple[int, int]] = []
        dropped: list[int] = []
        for v in op.outputs:
            value = problem.values[v]
            if not value.bytes:
                continue
            if op.reuses in timeline.frees[t] and op.reuses in current:
                current[v] = current.pop(op.reuses)
                continue
            keys += 1
            made.append((keys, value.bytes))
            if value.final and v in current:  # a second copy, made for the sake of another output
                dropped.append(keys)
            else:
                current[v] = keys
        dropped += [current.pop(v) for v in timeline.frees[t] if v in current]
        moves.append((made, op.workspace_bytes + problem.reused_bytes(i), dropped))
    return moves
