"""How large what steps that do the same hold has been, and what is planned for.

Where sizes follow the data (a mask, lengths, what a miner finds), each step holds other bytes of the same
things.  A plan is made for the most of each that was seen, and as much beyond as a larger one is to be
expected beyond: of ``n`` steps between which a size differed by ``spread``, ``spread / (n - 1)``, which is
what the largest of ``n`` numbers drawn evenly lies below the end of their range.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

__all__ = ["Sizes", "beyond"]


def beyond(most: int, least: int, count: int) -> int:
    """Bytes that a step to come may take more than the most of ``count`` steps."""
    return -(-(most - least) // (count - 1)) if count > 1 else 0


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes of all that steps of one shape hold: values, scratch of ops, and beside them at each glue.

    ``shape``   what steps have in common that do the same.
    ``count``   of steps.
    ``most``    likewise ``least``: over the steps, in the order in which :meth:`of` takes them.
    ``parts``   how many there are of each of the four.
    """

    shape: Hashable
    count: int
    most: tuple[int, ...]
    least: tuple[int, ...]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, shape: Hashable, *given: Sequence[int]) -> Sizes:
        """Those of one step."""
        flat = tuple(size for part in given for size in part)
        return cls(shape, 1, flat, flat, tuple(map(len, given)))

    def then(self, later: Sizes) -> Sizes:
        """With those of a later step."""
        return replace(
            self,
            count=self.count + later.count,
            most=tuple(map(max, self.most, later.most)),
            least=tuple(map(min, self.least, later.least)),
        )

    @property
    def differ(self) -> bool:
        """Whether steps held other sizes."""
        return self.most != self.least

    def foreseen(self, *, margin: bool = True) -> tuple[list[int], ...]:
        """What is planned for, each of the parts by itself."""
        count = self.count if margin else 1
        flat = [most + beyond(most, least, count) for most, least in zip(self.most, self.least, strict=True)]
        found, at = [], 0
        for size in self.parts:
            found.append(flat[at : at + size])
            at += size
        return tuple(found)

    def __repr__(self) -> str:
        differ = sum(a != b for a, b in zip(self.most, self.least, strict=True))
        return f"Sizes({self.count} steps, {differ} of {len(self.most)} differ)"
