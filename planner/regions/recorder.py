"""Watches one step: the meter of live storages, with marks where regions begin and end.

Each storage that the step makes has a number, the event in which it was born and that in which it died, so
that what one region gives and another takes is known by its storage, whoever holds it in between.

How long a region keeps what it took or gave depends on the schedule it runs.  So that is kept as a tensor of
its own on the same storage, and a storage counts as dead from when no other tensor lies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from planner._compat import current_backward, gone, tensors_on, weak_storage
from planner.costs.profiler import device_for
from planner.costs.roofline import call_seconds
from planner.devices.state import allocation_grain
from planner.measure.meter import StorageMeter
from planner.regions.record import Crossing, Event, Record, RegionCall, last_backwards
from planner.regions.steps.seen import Seen

__all__ = ["Recorder", "record_of"]

Kind = Literal["glue", "forward", "backward"]


@dataclass
class _Life:
    bytes: int
    born: int
    died: int | None = None


class Recorder(StorageMeter):
    """Counts while ``counts``; ``events`` are those that have ended.

    ``seen``        the events of the step up to where it was last said to be over.
    ``gone_bytes``  of what was there before the step, was freed in it, and went through no region: what the
                    last step left, say.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, grain=allocation_grain(device))
        self.counts = True
        self.events: list[Event] = []
        self.seen: tuple[Event, ...] = ()
        self.lives: list[_Life] = []
        self.gone_bytes = 0
        self._left: dict[
            int, int
        ] = {}  # of storages that were there, by key: bytes that were never let go of
        self._through: set[int] = set()  # keys of storages that were there, and that a region took or gave
        self._numbers: dict[int, int] = {}  # of live storages that the step made
        self._passed: set[int] = set()  # of those that a region took or gave
        self._freed = False  # one of these was, since the event began
        self._goes_back = False  # whether the backward has begun
        self._kept: dict[int, tuple[Any, list[Callable[[], bool]]]] = {}  # what regions keep, by number
        self._now: tuple[Kind, int | None] = ("glue", None)
        self._glue_s = 0.0
        self._turned = False
        self._rates = device_for(device, may_measure=False)

    @property
    def turned(self) -> bool:
        """Whether a backward has begun."""
        return self._turned or self._goes_back

    # -- marks -------------------------------------------------------------------------------------

    def enter(self, kind: Kind, call: int) -> None:
        """A region begins."""
        self._mark(kind, call)
        self._turned |= kind == "backward"

    def leave(self) -> None:
        """It has ended."""
        self._mark("glue", None)

    def returned(self) -> None:
        """The forward has: what its variables held is gone, whatever the glue behind it takes."""
        if self._now[0] == "glue":
            self._mark("glue", None, part=True)

    def _comes(self) -> None:
        """Something is about to be counted that was just made."""
        if not self.counts or self._now[0] != "glue":
            return
        begins = not (self._goes_back or self._turned) and current_backward() != -1
        self._goes_back |= begins
        if begins or self._freed:
            self._mark("glue", None, part=True)

    def _mark(self, kind: Kind, call: int | None, *, part: bool = False) -> None:
        if self._now == (kind, call) and not part:
            return
        self.settle()
        was, of = self._now
        if was != "glue" and kind != "glue":
            self._mark("glue", None)
            was, of = self._now
        self._see_who_holds()
        over = self.live_bytes - self._base_bytes
        self.events.append(
            Event(was, of, max(self._peak_over_base, over), over, self._glue_s, not self._turned)
        )
        self.reset_peak()
        self._glue_s = 0.0
        self._now = (kind, call)
        self._freed = False

    def close(self) -> None:
        """The step is over, unless more of it comes."""
        if self.counts:
            if self._now[0] != "glue":
                self.leave()
            self._mark("forward", -1)
            self._now = ("glue", None)
            self.seen = tuple(self.events)

    def finish(self) -> None:
        """The step is over."""
        self.close()
        self.counts = False

    # -- storages ----------------------------------------------------------------------------------

    def passes(self, tensor: torch.Tensor) -> int | None:
        """Number of the storage, which a region takes or gives; ``None`` where it was there before the step,
        is on another device, or is several (a sparse tensor's).
        """
        number = self._number_of(tensor)
        if number is not None:
            self._passed.add(number)
        return number

    def _number_of(self, tensor: torch.Tensor) -> int | None:
        if tensor.layout is not torch.strided:
            return None
        self._see(tensor, there_before=True)  # what the step makes is seen when it is made
        key = id(tensor.untyped_storage())
        if key not in self._numbers:
            self._through.add(key)
        return self._numbers.get(key)

    def kept(self, tensor: Any) -> Any:
        """What a region keeps for its backward instead of ``tensor``."""
        number = self._number_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if number is None:
            return tensor
        alias = tensor.detach()
        self._kept.setdefault(number, (weak_storage(tensor)[0], []))[1].append(gone(alias))
        return alias

    def _see_who_holds(self) -> None:
        """Storages that regions alone still hold died in the event that ends."""
        for number, (storage, aliases) in list(self._kept.items()):
            ours = sum(not is_gone() for is_gone in aliases)
            if ours and tensors_on(storage) <= ours:
                self.lives[number].died = len(self.events)
            if not ours or self.lives[number].died is not None:
                del self._kept[number]

    def crossings(self, numbers: Iterable[int]) -> dict[int, Crossing]:
        """The storages of these numbers."""
        return {n: Crossing(self.lives[n].bytes, self.lives[n].born, self.lives[n].died) for n in numbers}

    def _see(self, tensor: torch.Tensor, *, there_before: bool) -> None:
        storage = tensor.untyped_storage()
        known = id(storage) in self._tracked
        if not known and not there_before and self._counts_on(tensor.device):
            self._comes()
        super()._see(tensor, there_before=there_before)
        if not known and not there_before and id(storage) in self._tracked:
            self._numbers[id(storage)] = len(self.lives)
            self.lives.append(_Life(self._tracked[id(storage)].nbytes, len(self.events)))

    def _forget(self, ref: Any) -> None:
        number = self._numbers.pop(ref.key, None)
        if number is not None and self.counts and self.lives[number].died is None:
            self.lives[number].died = len(self.events)
            self._freed |= number in self._passed
        if number is None and self.counts and ref.key not in self._through:
            self.gone_bytes += self._left.pop(ref.key, ref.nbytes)
        super()._forget(ref)

    def _sized(self, ref: Any, nbytes: int) -> None:
        if nbytes > ref.nbytes:
            self._comes()
        if ref.key not in self._numbers and self.counts:
            left = self._left.get(ref.key, ref.nbytes)
            self._left[ref.key] = min(left, nbytes)
            self.gone_bytes += left - self._left[ref.key]
        super()._sized(ref, nbytes)

    def _resized(self, storage: torch.UntypedStorage, before_bytes: int) -> None:
        if self.counts:
            super()._resized(storage, before_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.counts:
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is not NotImplemented and self._now[0] == "glue":
            self._glue_s += call_seconds(func, args, kwargs or {}, result, self._rates)
        return result


def record_of(recorder: Recorder, calls: Sequence[Seen], cuts: tuple[str, ...]) -> Record:
    """What a step of these calls did, as ``recorder`` has seen it; ``cuts``: where and why it was cut.

    Raises ``ValueError`` where no call can be captured, or gradients came for other outputs than is known.
    """
    ran = [(number, seen) for number, seen in enumerate(calls) if seen.variant is not None]
    if not ran:
        raise ValueError("no part of its forward that trains is a graph that can be captured")
    for seen in calls:
        wanted = seen.able if seen.used is None else seen.used
        if not (seen.present or frozenset()) <= wanted or (wanted and not seen.present):
            raise ValueError("gradients come for other outputs in each of its steps")
    index = {number: k for k, (number, _) in enumerate(ran)}
    numbers = {n for _, seen in ran for n in (*seen.crossings.values(), *seen.gives.values())}
    order = {n: k for k, n in enumerate(sorted(numbers))}
    events = last_backwards(recorder.seen)
    crossings = [of.until(len(events)) for of in recorder.crossings(order).values()]
    made = []
    for k, (_, seen) in enumerate(ran):
        assert seen.variant is not None and seen.variant.costs is not None
        made.append(
            RegionCall(
                f"r{k}",
                seen.variant.graph_at(seen.base),
                seen.variant.costs,
                "",
                seen.args,
                {key: order[n] for key, n in seen.crossings.items()},
                {key: order[n] for key, n in seen.gives.items()},
                seen.steps,
                seen.turn,
            )
        )
    gone = recorder.gone_bytes
    found = recorder.live_bytes - recorder.made_bytes - gone
    events = [
        replace(
            e,
            call=None if e.call is None else index[e.call],
            peak_bytes=e.peak_bytes + gone,
            live_bytes=e.live_bytes + gone,
        )
        for e in events
    ]
    return Record(tuple(events), tuple(made), tuple(crossings), found, cuts)
