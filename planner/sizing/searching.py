"""The last size at which something holds, with few looks: memory is nearly a line in a batch's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

__all__ = ["last_within"]

_GROWTH = 8  # at most so many times what is known to hold: a batch of that size is made
_SLOW = 3  # looks in a row that left more than half of what was open


def last_within(
    value_of: Callable[[int], float], limit: float, low: int, high: int, known: Mapping[int, float]
) -> int:
    """The largest of ``low`` to ``high`` with a value within ``limit``; ``low - 1`` if not even that has one.

    ``known``  values that were seen before, by size.

    Values are taken never to fall with the size: what was not looked at below the answer is taken to hold,
    above it not to.
    """
    seen = {n: v for n, v in known.items() if low <= n <= high}
    slow = 0
    while True:
        holds = max((n for n, v in seen.items() if v <= limit), default=low - 1)
        fails = min((n for n, v in seen.items() if v > limit and n > holds), default=high + 1)
        open_before = fails - holds
        if open_before <= 1:
            return holds
        middle = (holds + fails) // 2 if fails <= high else max(2 * holds, low)
        guess = middle if slow >= _SLOW else _on_the_line(seen, limit, holds, fails) or middle
        guess = min(max(guess, holds + 1), fails - 1, max(_GROWTH * holds, low))
        seen[guess] = value_of(guess)
        left = fails - guess if seen[guess] <= limit else guess - holds
        slow = slow + 1 if slow < _SLOW and 2 * left > open_before else 0


def _on_the_line(seen: Mapping[int, float], limit: float, holds: int, fails: int) -> int | None:
    """Where the line through the two sizes nearest to the limit meets it; ``None`` without two."""
    finite = [n for n, value in seen.items() if math.isfinite(value)]
    if len(finite) < 2:
        return None
    a, b = sorted(sorted(finite, key=lambda n: (abs(seen[n] - limit), n))[:2])
    slope = (seen[b] - seen[a]) / (b - a)
    if slope <= 0:
        return None
    at = a + int((limit - seen[a]) // slope)
    return at + 1 if at == holds and fails - holds > 1 else at
