"""The step as it runs: what a training loop holds beside the planned call.

A loss outside the model, outputs that are kept and metrics lie beside what the plan counts.  So the first
planned steps are metered op by op, from the call to the end of its backward, on the CPU; what is over the
budget then is said once, and set aside in the plans that follow.

A meter is a mode that looks at every op.  It begins in the call, and can be taken off only where the training
loop itself is running: when what the call held is gone, or at the next call.  In between it looks on and
counts nothing.  Where somebody else's mode is on, nothing is metered.  Inside ``torch.inference_mode`` it
stays on: that puts the thread's dispatch keys back on leaving, the meter's among them.

Known limits: CUDA steps are not metered; nor is what an optimizer does in its own step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from planner._compat import after_backward, dispatch_state, is_top_mode, watching_modes
from planner.measure.meter import StorageMeter
from planner.training.unplanned import when_differentiated

__all__ = ["AsRun"]

STEPS = 4  # metered in all


class _Meter(StorageMeter):
    """A meter that can stop counting before it can be taken off."""

    counts = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.counts:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class AsRun:
    """Meters the first planned steps.

    ``found(peak_bytes)``  hears what each took, forward and backward, in the training loop's own time.
    """

    def __init__(self, found: Callable[[int], None]) -> None:
        self.found = found
        self._left = STEPS
        self._meter: _Meter | None = None
        self._thread = 0
        self._keys = (0, 0)

    @property
    def runs(self) -> bool:
        """Whether a step is being metered."""
        return self._meter is not None

    def begin(self, there: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> None:
        """A planned call is about to run; ``there()`` is what the step finds, where it is metered."""
        if self._meter is not None or not self._left or device.type != "cpu" or watching_modes():
            return
        self._left -= 1
        self._thread = threading.get_ident()
        meter = _Meter(device)
        meter.register(*there())
        meter.__enter__()
        self._meter, self._keys = meter, dispatch_state()

    def ran(self, outputs: Any, call: Any) -> None:
        """Its forward has returned ``outputs``; ``call`` lives as long as its backward may come."""
        meter = self._meter
        if meter is None:
            return

        def stop() -> None:
            meter.counts = False

        when_differentiated(outputs, lambda _: after_backward(stop))
        if call is not None:
            weakref.finalize(call, self.end).atexit = False

    def give_up(self) -> None:
        """Meter no further step."""
        self._left = 0

    def end(self) -> None:
        """Take the meter off, if this is the place to do it."""
        meter = self._meter
        if meter is None or threading.get_ident() != self._thread or not is_top_mode(meter):
            return
        if dispatch_state() != self._keys:
            return
        self._meter = None
        meter.__exit__(None, None, None)
        if not meter.counts:  # else its backward never came
            self.found(meter.peak_bytes)
