"""How to search for a plan: the options that every way of planning takes, checked where they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from planner.progress import Progress, Reporter, reporting
from solvers import SOLVERS
from solvers.fixed_order import checked_time_limit

__all__ = [
    "BackendMode",
    "CaptureMode",
    "ChunkLoss",
    "GradientsMode",
    "OrderMode",
    "OutputsMode",
    "RecomputeMode",
    "Search",
    "checked_backend",
    "checked_capture",
    "checked_chunk_loss",
    "checked_gradients",
    "checked_order",
    "checked_outputs",
    "checked_recompute",
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


def checked_chunk_loss(chunk_loss: ChunkLoss) -> ChunkLoss:
    """``chunk_loss`` if it is "auto", a bool or a number of chunks from 2 up; ``ValueError`` if not."""
    if isinstance(chunk_loss, bool) or (isinstance(chunk_loss, str) and chunk_loss == "auto"):
        return chunk_loss
    if not isinstance(chunk_loss, int) or chunk_loss < 2:
        raise ValueError(
            f"chunk_loss must be 'auto', True, False or a number of chunks from 2 up, not {chunk_loss!r}"
        )
    return chunk_loss


def checked_outputs(outputs: OutputsMode) -> OutputsMode:
    """``outputs`` if it is one of the four; ``ValueError`` if not."""
    if outputs not in ("held", "released", "unread", "auto"):
        raise ValueError(f"outputs must be 'held', 'released', 'unread' or 'auto', not {outputs!r}")
    return outputs


def checked_order(order: OrderMode) -> OrderMode:
    """``order`` if it is one of the two; ``ValueError`` if not."""
    if order not in ("given", "free"):
        raise ValueError(f"order must be 'given' or 'free', not {order!r}")
    return order


def checked_capture(capture: CaptureMode) -> CaptureMode:
    """``capture`` if it is one of the three; ``ValueError`` if not."""
    if capture not in ("one graph", "regions", "auto"):
        raise ValueError(f"capture must be 'one graph', 'regions' or 'auto', not {capture!r}")
    return capture


def checked_backend(backend: BackendMode) -> BackendMode:
    """``backend`` if it is one of the two; ``ValueError`` if not."""
    if backend not in ("eager", "inductor"):
        raise ValueError(f"backend must be 'eager' or 'inductor', not {backend!r}")
    return backend


def checked_recompute(recompute: RecomputeMode) -> RecomputeMode:
    """``recompute`` if it is one of the two; ``ValueError`` if not."""
    if recompute not in ("fastest", "same bits"):
        raise ValueError(f"recompute must be 'fastest' or 'same bits', not {recompute!r}")
    return recompute


def checked_gradients(gradients: GradientsMode) -> GradientsMode:
    """``gradients`` if it is one of the three; ``ValueError`` if not."""
    if gradients not in ("held", "consumed", "auto"):
        raise ValueError(f"gradients must be 'held', 'consumed' or 'auto', not {gradients!r}")
    return gradients


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
