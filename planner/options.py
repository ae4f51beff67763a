"""How to search for a plan: the options that every way of planning takes, checked where they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from planner.progress import Progress, Reporter, reporting
from solvers import SOLVERS
from solvers.fixed_order import checked_time_limit

__all__ = [
    "BackendMode",
    "CaptureMode",
    "ChunkLoss",
    "GradientsMode",
    "OnLarger",
    "OrderMode",
    "OutputsMode",
    "RecomputeMode",
    "Search",
    "check_options",
]

# Until when the caller holds what the model returns: to the step's end, to the start of the backward, not at
# all but for the loss, or as the first steps show.
OutputsMode: TypeAlias = Literal["held", "released", "unread", "auto"]

# Whether the step is to be one captured graph, pieces of one with other code between them, or whichever it
# can.
CaptureMode: TypeAlias = Literal["one graph", "regions", "auto"]

# What runs the step: the dispatcher, call by call, or code that inductor generates for it.
BackendMode: TypeAlias = Literal["eager", "inductor"]

# What may be recomputed in compiled code: whatever is worth it, or what then has the same bits again.
RecomputeMode: TypeAlias = Literal["fastest", "same bits"]

# Until when the gradients of parameters are there: beyond the step, until a hook uses them up inside the
# backward, or as the first step shows.
GradientsMode: TypeAlias = Literal["held", "consumed", "auto"]

# Of the backward: as the trace has it, or with gradients of weights as soon as that holds less.
OrderMode: TypeAlias = Literal["given", "free"]

# Whether the loss is computed in chunks of tokens: where nothing fits without, always, never, or in so many.
ChunkLoss: TypeAlias = bool | int | Literal["auto"]

# What happens to a batch that a plan for varying sizes cannot serve within the budget.
OnLarger: TypeAlias = Literal["replan", "raise"]

_VALUES: dict[str, tuple[str, ...]] = {
    "outputs": get_args(OutputsMode),
    "gradients": get_args(GradientsMode),
    "capture": get_args(CaptureMode),
    "backend": get_args(BackendMode),
    "recompute": get_args(RecomputeMode),
    "order": get_args(OrderMode),
    "on_larger": get_args(OnLarger),
}


def check_options(given: object) -> None:
    """``ValueError`` where an attribute of ``given`` that is named as an option has none of its values.

    The error names the option, what it is and what it may be.
    """
    for name, values in _VALUES.items():
        value = getattr(given, name, values[0])
        if value not in values:
            *others, last = map(repr, values)
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")
    _check_chunk_loss(getattr(given, "chunk_loss", False))


def _check_chunk_loss(chunk_loss: object) -> None:
    if isinstance(chunk_loss, bool) or (isinstance(chunk_loss, str) and chunk_loss == "auto"):
        return
    if not isinstance(chunk_loss, int) or chunk_loss < 2:
        raise ValueError(
            f"chunk_loss must be 'auto', True, False or a number of chunks from 2 up, not {chunk_loss!r}"
        )


@dataclass(frozen=True)
class Search:
    """Who searches for a plan, for how long, and who is told.

    ``solver``        a name in ``solvers.SOLVERS``.
    ``time_limit_s``  seconds for the search, 0 or more; ``math.inf``: until nothing better is found.
    ``progress``      as for :func:`planner.plan`: True, False, None or a callable; or the
                      :class:`~planner.progress.Reporter` made of one, inside :meth:`reporting`.

    Raises ``TypeError`` or ``ValueError``, which name the argument, what it is and what it may be.
    """

    solver: str = "auto"
    time_limit_s: float = 30.0
    progress: bool | Progress | Reporter | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, want one of {', '.join(SOLVERS)}")
        checked_time_limit(self.time_limit_s)
        known = self.progress is None or isinstance(self.progress, bool | Reporter)
        if not known and not callable(self.progress):
            raise TypeError(f"progress must be True, False, None or a callable, not {self.progress!r}")

    @contextmanager
    def reporting(self) -> Iterator[Search]:
        """The same search with its reporter open: what ``progress=True`` draws is closed at the end.

        Raises ``PlannerError`` for ``progress=True`` without tqdm.
        """
        if isinstance(self.progress, Reporter):
            yield self
            return
        with reporting(self.progress) as tell:
            yield replace(self, progress=tell)

    @property
    def tell(self) -> Reporter:
        """Who is told.  ``ValueError`` for ``progress=True`` outside :meth:`reporting`: it has no bar."""
        if isinstance(self.progress, Reporter):
            return self.progress
        if self.progress is True:
            raise ValueError("progress=True draws a bar: open it with Search.reporting()")
        return Reporter(self.progress or None)
