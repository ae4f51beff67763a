"""What is said of a loss that is computed in chunks; written to plan files, and read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Chunked", "Form"]

# Whether gradients are made in the forward, right behind each chunk's loss, or where they were.
Form: TypeAlias = Literal["ahead", "behind"]


@dataclass(frozen=True)
class Chunked:
    """What was computed in chunks.

    ``head``    path of the module whose product it is; ``rows`` in ``chunks`` chunks, ``columns`` wide.
    ``form``    "ahead": gradients are made in the forward, for a loss's gradient of one; "behind".
    ``is_made`` whether the logits are made whole too, since the model returns them.
    ``feeds``   (output, an output that the step computes from it), by their numbers, before the cut.
    """

    head: str
    rows: int
    columns: int
    chunks: int
    form: Form
    is_made: bool
    feeds: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        size = -(-self.rows // self.chunks)
        made = ", logits made whole" if self.is_made else ""
        return (
            f"{self.head or 'the last product'}: {self.rows} x {self.columns} in {self.chunks} chunks of "
            f"{size} rows, gradients {'in the forward' if self.form == 'ahead' else 'in the backward'}{made}"
        )
