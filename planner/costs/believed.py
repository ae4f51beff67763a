"""Whether what was measured on a CPU in another process still holds: some of it is measured again.

A CPU is shared, and its clock, its cooling and its container's share change: a file cannot say all that its
figures depend on.  So they are believed as far as they are seen to be right.  :data:`SAMPLE` ops, drawn anew
in each process among those that take little time, are measured again; where the median of them takes within
:data:`ALIKE` of what is kept, the rest is believed, else all are measured again and replaced, be it that
another program disturbed the measurement then or that one does now.  An op of the sample that is off by
itself takes what it was measured at now: what was disturbed alone is mended in time.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from planner.costs.cache import Measured

__all__ = ["ALIKE", "SAMPLE", "Believed", "believed"]

log = logging.getLogger(__name__)

SAMPLE = 5  # ops, some 0.03 s each
ALIKE = 1.15  # times as long, or as short: what runs of one op differ by on an idle machine, and some more
_AT_LEAST_S = 2e-5  # below it the clock is measured
_AT_MOST_S = 1e-2  # three calls of it are what the sample may take, if there are enough below


class Believed(NamedTuple):
    """Costs by signature: ``kept`` earlier and taken as they are, and ``again``, measured just now."""

    kept: Mapping[str, Measured]
    again: Mapping[str, Measured]


def believed(
    known: Mapping[str, Measured],
    measured: Callable[[str], Measured | None],
    draw: Callable[[list[str], int], list[str]] | None = None,
) -> Believed:
    """What to believe of ``known``, by signature.

    ``measured``  measures the op of a signature, ``None`` where that fails; ``draw`` chooses so many of some,
    each process others if it is not given.

    With fewer than :data:`SAMPLE` ops that can be sampled nothing is believed: measuring them is as quick.
    """
    fit = sorted((k for k in known if known[k].seconds >= _AT_LEAST_S), key=lambda k: known[k].seconds)
    quick = [k for k in fit if known[k].seconds <= _AT_MOST_S]
    again: dict[str, Measured] = {}
    draw = draw or random.SystemRandom().sample  # of no seed that the user's program set
    for key in draw(quick, SAMPLE) if len(quick) >= SAMPLE else fit[:SAMPLE]:
        now = measured(key)
        if now is not None:
            again[key] = now
    if len(again) < SAMPLE:
        return Believed({}, again)
    times = {key: now.seconds / known[key].seconds for key, now in again.items()}
    usual = statistics.median(times.values())
    if not _alike(usual):
        log.info("costs are measured again: ops take %.2f times what was kept of this CPU", usual)
        return Believed({}, again)
    off = {key: now for key, now in again.items() if not _alike(times[key])}
    return Believed({key: cost for key, cost in known.items() if key not in off}, off)


def _alike(times: float) -> bool:
    return 1 / ALIKE <= times <= ALIKE
