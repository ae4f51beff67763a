"""What is asked of a search for the largest batch, checked before anything is traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from planner.capture.outputs import LossFn
from planner.solving.chunked import refuse_chunks
from planner.solving.request import StepRequest

__all__ = ["BatchRequest", "MakeBatch"]

MakeBatch: TypeAlias = Callable[[int], object]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BatchRequest(StepRequest):
    """Which training step at which sizes, in which budget; named as the arguments of
    :func:`planner.largest_batch`.

    ``inputs`` and ``loss_fn`` are those of any size; ``make_batch`` and ``make_loss`` make them for one.

    Raises ``TypeError`` or ``ValueError`` for arguments that make no sense, ``PlannerError`` for a loss that
    is to be computed in chunks where none of that kind can.
    """

    budget_bytes: int
    make_batch: MakeBatch
    make_loss: Callable[[int], LossFn] | None = None
    low: int = 1
    high: int = 1 << 16
    at_most_overhead: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.make_batch):
            raise TypeError(
                "make_batch must be a function of a number of examples that returns the inputs, not "
                f"{self.make_batch!r}"
            )
        self._check_sizes()
        self._check_overhead()
        super().__post_init__()

    def _refuse_together(self) -> None:
        if self.loss_fn is not None and self.make_loss is not None:
            raise ValueError(
                "pass loss_fn, for outputs of any size, or make_loss, which makes it by size; not both"
            )
        refuse_chunks(self.chunk_loss, self.loss_fn or self.make_loss, None, self.capture == "regions")

    def _check_sizes(self) -> None:
        for name, size in (("low", self.low), ("high", self.high)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be a whole number of examples, not {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be 1 or more examples, not {size}")
        if self.high < self.low:
            raise ValueError(f"high={self.high} is below low={self.low}: no size lies between them")

    def _check_overhead(self) -> None:
        share = self.at_most_overhead
        if share is None:
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"at_most_overhead must be a share of step time, not {share!r}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(
                f"at_most_overhead must be 0 or more of the step's time (0.2 is a fifth), not {share}"
            )

    @property
    def has_loss(self) -> bool:
        """Whether the loss is computed outside the model."""
        return self.loss_fn is not None or self.make_loss is not None

    def loss_of(self, size: int) -> LossFn | None:
        """The loss of a batch of so many, outside the model; ``None`` where there is none."""
        return self.loss_fn if self.make_loss is None else self.make_loss(size)
