"""The step of one model at any batch size, from as few captures as there need be.

What changes between two batches is a symbol in one trace (:mod:`planner.capture.sizes`), and the step at
another size is that trace evaluated there.  A size at which the trace's guards do not hold (1; a length on
which the model branches) begins another.  Where no symbols can be had (the batch has another structure at
every size, the model fixes its sizes, the step is in regions), each size is captured by itself.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner._compat import FakeTensorMode
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.capture.sizes import Dims
from planner.costs.target import target_for
from planner.errors import TraceError
from planner.memory.optimizer_state import OptimizerLike
from planner.sizing.memoryless import is_on_meta, is_without_memory, remade, remade_inputs
from planner.sizing.request import BatchRequest
from planner.sizing.simple import Step, checkpointed, floor_of, overhead_of
from planner.solving.chunked import asked_in_chunks, lowest_in_chunks, refuse_chunks
from planner.solving.in_regions import JoinedStep
from planner.solving.priced import PricedStep

__all__ = ["At", "SizedSteps"]

log = logging.getLogger(__name__)

_KEPT = 6  # steps at hand; of the others the figures are

# Sizes to trace at are odd and none of the model's own: two sizes that are equal by chance are compared, and
# the comparison becomes a guard.
_TRACED_AT = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


@dataclass(frozen=True)
class At:
    """What is known of one size without a search.  Bytes are peaks of the whole step.

    ``floor_bytes``        proved; ``None`` where the step, run to be looked at, ran out of memory.
    ``unplanned_bytes``    nothing recomputed; ``blocks_bytes``: every block checkpointed, which takes
                           ``blocks_overhead`` of the step's time; ``None`` where no blocks can be told.
    ``step_s``             predicted seconds of the step that recomputes nothing.
    """

    batch: int
    floor_bytes: int | None
    unplanned_bytes: int
    blocks_bytes: int | None
    blocks_overhead: float
    step_s: float

    @classmethod
    def of(cls, batch: int, step: Step) -> At:
        """Of a captured, priced step, its outputs let go of where that is left open."""
        floor_bytes = floor_of(step).bytes
        if isinstance(step, PricedStep) and step.unchunked is not None:
            step = step.unchunked  # what one has without a plan has its loss whole
        lightest = step.lightest
        blocks = checkpointed(lightest)
        return cls(
            batch,
            floor_bytes,
            lightest.baseline_peak_bytes,
            None if blocks is None else max(blocks.peak_bytes, lightest.memory.optimizer_step_bytes),
            0.0 if blocks is None else overhead_of(lightest, blocks),
            lightest.problem.total_seconds,
        )

    @property
    def needed_bytes(self) -> float:
        """The floor; infinite where it ran out of memory."""
        return math.inf if self.floor_bytes is None else self.floor_bytes


class _LossAt:
    """The loss of the size that is looked at: a symbolic capture asks for it at every size anew."""

    def __init__(self) -> None:
        self.now: LossFn | None = None

    def __call__(self, outputs: Any) -> torch.Tensor:
        assert self.now is not None
        return self.now(outputs)


class SizedSteps:
    """The steps that ``request`` asks for: on ``make_batch(n)``, for any n from ``low`` to ``high``.

    ``traces``  how often the step was captured; ``by_symbols``: whether one capture serves many sizes.

    Raises ``ValueError`` for batches without a tensor, and for those that are the same at every size.
    """

    def __init__(self, request: BatchRequest) -> None:
        self.request, self.model = request, request.model
        self.traces = 0
        self._loss = _LossAt() if request.has_loss else None
        self._capture = request.capture
        self._chunks = 0  # with the lowest floor, at the last size whose loss went into some
        self._families: list[tuple[PricedStep, Inputs]] = []
        self._steps: OrderedDict[int, Step] = OrderedDict()
        self._at: dict[int, At] = {}
        self._home = FakeTensorMode(allow_non_fake_inputs=True) if is_on_meta(self.model) else None
        self.alone_model, self.alone_optimizer = self.model, request.optimizer
        if self._home is not None:
            self.alone_model, self.alone_optimizer = remade(self.model, request.optimizer, self._home)
        target_for(self.alone_model, request.costs)  # names that are no costs are refused before the rest
        self.start = _traced_at(self.model, request.low, request.high)
        self._dims: Dims | None = None
        if request.low < request.high:
            other = self.start + 1 if self.start < request.high else self.start - 1
            self._dims = _changing(self.batch(self.start), self.batch(other), self.start, other)
        if request.capture == "regions":
            self._dims = None

    @property
    def by_symbols(self) -> bool:
        """Whether one capture serves many sizes."""
        return self._dims is not None

    @property
    def in_regions(self) -> bool:
        """Whether the step is planned in regions, for which each size is run."""
        return self._capture == "regions"

    @property
    def seen(self) -> tuple[int, ...]:
        """The sizes that were looked at."""
        return tuple(self._at)

    @property
    def kind(self) -> str:
        """How sizes were had, in words."""
        if self.in_regions:
            return "in regions, each size run by itself"
        return "with sizes as symbols" if self.by_symbols else "each size by itself"

    def batch(self, size: int) -> Inputs:
        """The batch of so many, checked."""
        made = self.request.make_batch(size)
        if made is None:
            raise TypeError(
                f"make_batch({size}) returned None: it has to return the inputs of that many examples"
            )
        if self._home is not None:
            made = remade_inputs(made, self._home)
        given = Inputs.of(self.model, made)
        if not given.tensors():
            raise ValueError(
                f"make_batch({size}) returned no tensor but {type(made).__name__}: it has to return the "
                "arguments of model.forward for that many examples, as a tuple or a dict"
            )
        given.check(self.model)
        return given

    def at(self, size: int) -> At:
        """What is known of the step at this size."""
        if size not in self._at:
            try:
                self._at[size] = At.of(size, self.step(size))
            except torch.OutOfMemoryError as error:
                if not self.in_regions:
                    raise
                log.info("a batch of %d was run to be looked at, and ran out of memory: %s", size, error)
                self._at[size] = At(size, None, sys.maxsize, None, 0.0, 0.0)
            log.debug("%s", self._at[size])
        return self._at[size]

    def step(self, size: int) -> Step:
        """The captured, priced step at this size."""
        if size not in self._steps:
            given = self.batch(size)
            if self._loss is not None:
                self._loss.now = self.request.loss_of(size)
            self.request.search.tell.phase("capture", f"{type(self.model).__name__} at {size}")
            made = self._of_symbols(given) or self._alone(given)
            self._steps[size] = self._in_chunks(self._with_its_loss(made))
            while len(self._steps) > _KEPT:
                self._steps.popitem(last=False)
        self._steps.move_to_end(size)
        return self._steps[size]

    def _with_its_loss(self, step: Step) -> Step:
        return step if self._loss is None else replace(step, loss_fn=self._loss.now)

    def _in_chunks(self, step: Step) -> Step:
        """With its loss in chunks where that is asked for, or the floor is above the budget without."""
        asked = self.request.chunk_loss
        if isinstance(step, JoinedStep):
            refuse_chunks(asked, step.loss_fn, None, True, step.why)
            return step
        if asked != "auto":
            return asked_in_chunks(step, asked)
        above = floor_of(step).bytes > self.request.budget_bytes
        found = lowest_in_chunks(step, self._chunks // 2) if above else None
        if found is None:
            return step
        self._chunks = max(of.chunks for of in found.graph.chunked)
        return found

    # -- with symbols ------------------------------------------------------------------------------

    def _of_symbols(self, given: Inputs) -> PricedStep | None:
        """From a capture whose guards hold; ``None`` where sizes are no symbols."""
        if self._dims is None:
            return None
        for family, like in self._families:
            if _alike(given, like) and _sizes_of(family).admit(given.tensors()):
                return _sized(family, given)
        try:
            family = self._family(given, self._dims)
        except TraceError as error:
            if self._families:  # at this size only
                log.debug("captured by itself: %s", error)
                return None
            self._dims = None
            log.info(
                "%s cannot be captured for varying sizes, so each size is captured by itself: %s",
                type(self.model).__name__,
                error,
            )
            return None
        self._families.append((family, given.without_data()))
        return _sized(family, given)

    def _family(self, given: Inputs, dims: Dims) -> PricedStep:
        model, optimizer = self.model, self.request.optimizer
        if is_without_memory(model):
            mode = _compat.symbolic_mode()
            model, optimizer = remade(model, optimizer, mode)
        asked = self._asked(model, optimizer, given)
        step = replace(asked, dynamic=dims, capture="one graph").step()
        assert isinstance(step, PricedStep)
        self.traces += 1
        return step

    def _asked(self, model: nn.Module, optimizer: OptimizerLike | None, given: Inputs) -> BatchRequest:
        """The request for the step on one batch, with the loss of whatever size is looked at."""
        return replace(
            self.request, model=model, optimizer=optimizer, inputs=given, loss_fn=self._loss, make_loss=None
        )

    # -- without -----------------------------------------------------------------------------------

    def _alone(self, given: Inputs) -> Step:
        """Captured at its own sizes only."""
        asked = self._asked(self.alone_model, self.alone_optimizer, given)
        step = replace(asked, capture=self._capture).step()
        self.traces += 1
        if isinstance(step, JoinedStep):
            self._capture, self._dims = "regions", None
        return step


def _sizes_of(family: PricedStep) -> Any:
    assert family.joint.sizes is not None
    return family.joint.sizes


def _sized(family: PricedStep, given: Inputs) -> PricedStep:
    """The step of a symbolic capture at the sizes of a batch, as if it had been captured there."""
    with family.target.capturing(), _compat.modes_set_aside():
        joint = family.joint.at(_sizes_of(family).read(given.tensors()), fixed=True)
        joint = replace(joint, inputs=given.without_data())  # one tensor given twice is one
        return replace(family.recaptured(family.model, joint), varying=None)


def _alike(given: Inputs, like: Inputs) -> bool:
    """Whether what is no tensor is the same in two batches."""
    (flat, spec), (others, other_spec) = given.flatten(), like.flatten()
    return spec == other_spec and all(
        isinstance(a, torch.Tensor) or (type(a) is type(b) and bool(a == b))
        for a, b in zip(flat, others, strict=True)
    )


def _traced_at(model: nn.Module, low: int, high: int) -> int:
    """A size for a trace, between ``low`` and ``high``: one that no tensor of the model has, if there is."""
    taken = {size for t in (*model.parameters(), *model.buffers()) for size in t.shape}
    return next(_free((*_TRACED_AT, *range(low | 1, min(high, low + 200) + 1, 2)), taken, low, high), low)


def _free(sizes: Collection[int], taken: set[int], low: int, high: int) -> Any:
    return (n for n in sizes if n > 1 and low <= n <= high and n not in taken)


def _changing(one: Inputs, other: Inputs, size: int, other_size: int) -> Dims | None:
    """Which dimensions differ between two batches; ``None`` where something else does.

    Raises ``ValueError`` where nothing does.
    """
    (flat, spec), (others, other_spec) = one.flatten(), other.flatten()
    if spec != other_spec or not _alike(one, other):
        return None
    pairs = [(a, b) for a, b in zip(flat, others, strict=True) if isinstance(a, torch.Tensor)]
    if any(a.dim() != b.dim() or a.dtype != b.dtype for a, b in pairs):
        return None
    dims = tuple(tuple(d for d in range(a.dim()) if a.shape[d] != b.shape[d]) for a, b in pairs)
    if not any(dims):
        shapes = ", ".join("x".join(map(str, a.shape)) or "scalar" for a, _ in pairs)
        raise ValueError(
            f"make_batch({size}) and make_batch({other_size}) return tensors of the same shapes ({shapes}): "
            "it has to make a batch of as many examples as it is asked for"
        )
    return dims
