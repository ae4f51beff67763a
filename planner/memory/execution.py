"""What a schedule takes on the device planned for: live storages, and what an allocator makes of them.

The solvers count storages.  On CUDA the caching allocator's own figures are derived from the same schedule
(:mod:`planner.devices.allocator`) and its slack is added step by step, so that a predicted peak is one of
``max_memory_allocated``.  Elsewhere, and under settings of the allocator that are not modelled, storages
are all there is: with ``expandable_segments`` every block is cut to size, and there is no slack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.devices.allocator import HeldBlocks, is_default, simulate_allocator
from solvers import Problem, Timeline
from solvers.core.simulate import simulate_steps

__all__ = ["Execution", "execute"]


@dataclass(frozen=True, eq=False)
class Execution:
    """A schedule played through.

    ``problem``         as it is run: generator states that no replay reads have 0 bytes.
    ``timeline``        of live storages.
    ``slack_bytes``     handed out beyond them while each step runs, shape (T,); ``None``: no allocator.
    ``reserved_bytes``  that the allocator takes from the driver; ``None`` likewise.
    """

    problem: Problem
    timeline: Timeline
    slack_bytes: np.ndarray | None = None
    reserved_bytes: int | None = None

    @cached_property
    def live_bytes(self) -> np.ndarray:
        """Bytes while each step runs, slack included, shape (T,)."""
        live = self.timeline.live_bytes
        return live if self.slack_bytes is None else live + self.slack_bytes

    @property
    def peak_step(self) -> int:
        """The first step at which the peak is reached."""
        return int(self.live_bytes.argmax())

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any step."""
        return int(self.live_bytes.max(initial=0))


def execute(
    problem: Problem,
    steps: list[int],
    blocks: HeldBlocks | None = None,
    margin_bytes: int = 0,
) -> Execution:
    """Play ``steps`` of ``problem`` through.

    ``blocks``        what a CUDA allocator has handed out when the step begins; ``None``: there is none.
    ``margin_bytes``  of what is resident in ``problem`` is nowhere, but set aside.
    """
    executed = problem.as_run(steps)
    timeline = simulate_steps(executed, steps)
    if blocks is None or not is_default():
        return Execution(executed, timeline)
    peaks = simulate_allocator(executed, timeline, blocks)
    slack = peaks.allocated_bytes - (timeline.live_bytes - margin_bytes)
    return Execution(executed, timeline, slack, peaks.reserved_peak_bytes)
