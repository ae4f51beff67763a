"""A plan as the memory snapshot that PyTorch's viewers read, to lie beside a recorded one.

The file has the format of ``torch.cuda.memory._dump_snapshot`` (torch/csrc/cuda/memory_snapshot.cpp):
https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` read it.  Its trace is the whole
step as planned: what is resident first (parameters, optimizer state, inputs), then an ``alloc`` for every
copy of every value and for kernels' scratch, a ``free`` where it dies, and last the optimizer's own step.
The most that is ever allocated at once is ``plan.peak_bytes``, to the byte; on CUDA it is that less what
the allocator hands out beyond what the step's ops ask for.

The file is a pickle because the viewers read nothing else.  It holds dicts, lists, strings and numbers
only, which is all the web viewer's own reader knows, so reading it needs no class of this package.

What a recorded snapshot has and this one has not: addresses are first-fit in one arena that begins empty,
not those of the caching allocator, so fragmentation and reserved bytes say nothing; times are the plan's
predicted seconds from 0.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError
from planner.files import write_whole
from planner.memory.lifetimes import Copy
from planner.plans.outline import Outline

if TYPE_CHECKING:
    from planner.plans.plan_data import PlanData

__all__ = ["memory_snapshot", "save"]

# The web viewer's reader knows protocols 2 to 4.
PROTOCOL = 4
# Where a CUDA arena might lie; the viewers take numbers up to 2**53.
BASE = 0x7F0000000000
# The web viewer wants this category to occur where any does.
UNNAMED = "unknown"
_SOURCES = {"parameter": "parameters", "buffer": "buffers", "input": "inputs"}


def save(plan: PlanData, path: str | Path) -> None:
    """Write :func:`memory_snapshot` of ``plan``; the file appears whole or not at all.

    Raises ``PlannerError`` as :func:`memory_snapshot`, ``OSError`` if the file cannot be written.
    """
    write_whole(path, pickle.dumps(memory_snapshot(plan), protocol=PROTOCOL))


def memory_snapshot(plan: PlanData) -> dict[str, Any]:
    """The snapshot as dicts and lists: ``segments``, and ``device_traces`` with a list per device.

    Each event has ``action``, ``addr``, ``size`` (bytes), ``stream``, ``time_us``, ``frames`` and, if it
    allocates, ``category``: the kind of memory, one of ``lifetimes.MEMORY_KINDS``.  Frames name the kernel
    and its value, then the module and those around it; what runs again is called "recomputed".

    Raises ``PlannerError`` for a plan from a file that was written without its step.
    """
    outline = plan.outline
    if outline is None:
        raise PlannerError(
            "the plan's file holds no graph of the step (it was written by an earlier version), so it cannot "
            "be played through; plan the model again"
        )
    device = _device_index(plan.device)
    trace = _Trace(plan.model_name)
    _play(plan, outline, trace)
    arena = trace.top - BASE
    opened = trace.event("segment_alloc", BASE, arena, 0, [], UNNAMED)
    segment = {
        "device": device,
        "address": BASE,
        "total_size": arena,
        "allocated_size": sum(size for size, _ in trace.live.values()),
        "active_size": sum(size for size, _ in trace.live.values()),
        "requested_size": sum(size for size, _ in trace.live.values()),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": [0, 0],
        "is_expandable": False,
        "frames": [],
        "blocks": trace.blocks(),
    }
    traces: list[list[dict[str, Any]]] = [[] for _ in range(device + 1)]
    traces[device] = [opened, *trace.events]
    return {
        "segments": [segment],
        "device_traces": traces,
        "allocator_settings": {},
        "predicted_by": f"rematplan: {plan!r}",
    }


def _device_index(device: str) -> int:
    name, _, index = device.partition(":")
    return int(index) if name == "cuda" and index else 0


# -- the step -------------------------------------------------------------------------------------


def _play(plan: PlanData, outline: Outline, trace: _Trace) -> None:
    """The step's allocations in order."""
    resident = [(trace.alloc(size, kind, [label]), kind) for kind, label, size in _resident(outline)]
    steps = outline.steps(plan.sequence)
    line = outline.judge(steps)
    born: dict[int, list[Copy]] = {}
    dying: dict[int, list[Copy]] = {}
    last = len(steps) - 1
    for copy in outline.copies(line):
        born.setdefault(copy.born, []).append(copy)
        if not (copy.died == last and outline.values[copy.value].final):
            dying.setdefault(copy.died, []).append(copy)
    where: dict[tuple[int, int], int] = {}
    held: list[tuple[int, str]] = []  # to the end, and what kind it is
    scratch_of = outline.problem.ops
    ran: set[int] = set()
    for t, i in enumerate(steps):
        op = outline.ops[i]
        phase = "recomputed" if i in ran else op.phase
        for copy in born.get(t, ()):
            value = outline.values[copy.value]
            label = value.name + (" (recomputed)" if i in ran else "")
            at = trace.alloc(copy.bytes, copy.kind, [f"{op.target}: {label}", *_modules(op.module, phase)])
            where[copy.value, t] = at
            if value.final and copy.died == last:
                held.append((at, copy.kind))
        scratch_bytes = scratch_of[i].workspace_bytes + outline.problem.reused_bytes(i)
        if scratch_bytes:
            frames = [f"{op.target}: scratch of {op.name}", *_modules(op.module, phase)]
            trace.free(trace.alloc(scratch_bytes, "workspace", frames))
        again = scratch_of[i].again_s if i in ran else scratch_of[i].seconds
        trace.time_us += again * 1e6
        for copy in dying.get(t, ()):
            trace.free(where[copy.value, copy.born])
        ran.add(i)
    for at, kind in held:  # what the backward began with dies as it returns
        if kind not in ("gradients", "outputs"):
            trace.free(at)
    if plan.optimizer_step_bytes:
        for at, kind in (*held, *resident):  # the caller lets go of the outputs and their gradients
            if kind in ("outputs", "output_gradients"):
                trace.free(at)
        more = max(0, plan.optimizer_step_bytes - trace.now)
        trace.free(trace.alloc(more, "workspace", ["optimizer.step: temporaries", "optimizer"]))


def _resident(outline: Outline) -> Iterator[tuple[str, str, int]]:
    """Kind, name and bytes of what is there throughout: by name where names are known, the rest by kind."""
    named: dict[str, list[tuple[str, int]]] = {}
    for value, sized in zip(outline.values, outline.problem.values, strict=True):
        kind = _SOURCES.get(value.kind)
        if kind is not None and sized.producer is None and sized.bytes:
            named.setdefault(kind, []).append((value.name, sized.bytes))
    for kind, total in outline.resident.items():
        parts = named.get(kind, [])
        rest = total - sum(size for _, size in parts)
        if rest < 0:  # rounded up by the allocator, or one storage under two names
            parts, rest = [], total
        label = kind.replace("_", " ")
        yield from ((kind, f"{label}: {name}", size) for name, size in parts)
        if rest:
            yield kind, f"{label}: the rest" if parts else label, rest


def _modules(module: str, phase: str) -> list[str]:
    """The module, those around it, and the part of the step."""
    parts = module.split(".") if module else []
    return [".".join(parts[: k + 1]) for k in range(len(parts) - 1, -1, -1)] + [phase]


# -- the allocator --------------------------------------------------------------------------------


@dataclass
class _Trace:
    """Events so far, and a first-fit allocator that gives them addresses.

    ``live``  address -> size and frames; ``now`` bytes of them all; ``top`` the end of the arena.
    """

    model_name: str
    events: list[dict[str, Any]] = field(default_factory=list)
    live: dict[int, tuple[int, list[dict[str, Any]]]] = field(default_factory=dict)
    now: int = 0
    top: int = BASE
    time_us: float = 0.0
    _gaps: list[tuple[int, int]] = field(default_factory=list)  # address, size; by address, never adjacent
    _frames: dict[tuple[str, ...], list[dict[str, Any]]] = field(default_factory=dict)

    def event(
        self,
        action: str,
        addr: int,
        size: int,
        time_us: float,
        frames: list[dict[str, Any]],
        category: str = "",
    ) -> dict[str, Any]:
        when = int(time_us)
        made = {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": when, "frames": frames}
        return {**made, "category": category} if category else made

    def alloc(self, size: int, category: str, names: list[str]) -> int:
        """Take ``size`` bytes; none take no place, as with the allocator."""
        if not size:
            return 0
        at = self._place(size)
        frames = self._stack((*names, self.model_name))
        self.live[at] = size, frames
        self.now += size
        self.events.append(self.event("alloc", at, size, self.time_us, frames, category))
        return at

    def free(self, at: int) -> None:
        """Give back what ``alloc`` took."""
        if not at:
            return
        size, frames = self.live.pop(at)
        self.now -= size
        for action in ("free_requested", "free_completed"):
            self.events.append(self.event(action, at, size, self.time_us, frames))
        self._give_back(at, size)

    def blocks(self) -> list[dict[str, Any]]:
        """The arena from end to end as it is now."""
        out: list[dict[str, Any]] = []
        at = BASE
        for addr in sorted(self.live):
            size, frames = self.live[addr]
            if addr > at:
                out.append(_block(at, addr - at, [], "inactive"))
            out.append(_block(addr, size, frames, "active_allocated"))
            at = addr + size
        if at < self.top:
            out.append(_block(at, self.top - at, [], "inactive"))
        return out

    def _stack(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Frames, innermost first; the viewers print them as file:line:name."""
        if names not in self._frames:
            self._frames[names] = [{"name": name, "filename": "plan", "line": 0} for name in names]
        return self._frames[names]

    def _place(self, size: int) -> int:
        for k, (at, room) in enumerate(self._gaps):
            if room >= size:
                if room == size:
                    del self._gaps[k]
                else:
                    self._gaps[k] = at + size, room - size
                return at
        at = self.top
        self.top += size
        return at

    def _give_back(self, at: int, size: int) -> None:
        k = bisect_left(self._gaps, (at, 0))
        if k < len(self._gaps) and self._gaps[k][0] == at + size:
            size += self._gaps.pop(k)[1]
        if k and sum(self._gaps[k - 1]) == at:
            before, room = self._gaps.pop(k - 1)
            at, size = before, room + size
        insort(self._gaps, (at, size))


def _block(at: int, size: int, frames: list[dict[str, Any]], state: str) -> dict[str, Any]:
    return {"address": at, "size": size, "requested_size": size, "state": state, "frames": frames}
