"""Into how many chunks the loss goes: chosen with the plan, by predicted seconds within the budget.

More chunks are smaller and cost more launches and smaller products, fewer leave more of the logits there at a
time; which of the two a budget wants depends on what else is recomputed.  So numbers of chunks are tried from
two up, each as a step with costs of its own and a quick plan, until one of them recomputes next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from planner.errors import PlannerError
from planner.graph.chunks.region import NotInRows
from planner.options import ChunkLoss, Search
from planner.plans.plan_data import PlanData
from planner.solving.fit import Answer, fitted
from planner.solving.priced import PricedStep
from planner.units import bytes_text

__all__ = [
    "asked_in_chunks",
    "chunked_as",
    "in_chunks_instead",
    "lowest_in_chunks",
    "refuse_chunks",
    "with_loss_in_chunks",
]

log = logging.getLogger(__name__)

MOST_CHUNKS = 64
FEWEST_ROWS = 16  # in a chunk
TRY_S = 1.0  # of search for each number of chunks
FREE = 1.001  # of a step's seconds, what recomputes next to nothing takes
FASTER = 0.999  # share of the seconds of fewer chunks below which more of them are worth it


def with_loss_in_chunks(
    step: PricedStep, budget_bytes: int, chunk_loss: ChunkLoss, search: Search
) -> PricedStep:
    """``step`` with its loss in chunks, as ``chunk_loss`` says of it for this budget; see
    :func:`planner.plan`.

    Raises ``PlannerError`` where it must be and cannot, with the call in the way.
    """
    if chunk_loss is False:
        return step
    if chunk_loss == "auto":
        if budget_bytes >= step.floor_bytes or budget_bytes >= (floor_bytes := step.lightest.floor_bytes):
            return step
        try:
            found = _fastest(step, budget_bytes, search)
        except PlannerError as error:
            log.debug("the loss stays whole: %s", error)
            return step
        if found is None:
            return lowest if (lowest := _lowest(step)).lightest.floor_bytes < floor_bytes else step
        _tell(found, budget_bytes, f"at least {bytes_text(floor_bytes)}, proved")
        return found
    refuse_chunks(chunk_loss, step.loss_fn, step.varying, False)
    if chunk_loss is True:
        return _fastest(step, budget_bytes, search) or _lowest(step)
    return _within(step, chunk_loss, budget_bytes)


def in_chunks_instead(
    step: PricedStep, budget_bytes: int, chunk_loss: ChunkLoss, search: Search
) -> PricedStep | None:
    """``step``, of which no plan was found, with its loss in chunks; ``None`` where none is then either."""
    if chunk_loss != "auto" or step.graph.chunked or search.tell.stopped:
        return None
    try:
        found = _fastest(step, budget_bytes, search)
    except PlannerError as error:
        log.debug("the loss stays whole: %s", error)
        return None
    if found is not None:
        _tell(found, budget_bytes, "none was found")
    return found


def _tell(step: PricedStep, budget_bytes: int, why: str) -> None:
    log.warning(
        "no plan of %s fits %s with its loss whole (%s): it is computed in %s; gradients then differ from "
        "eager's in their last bits, which plan.verify() tells beside eager's own error",
        type(step.model).__name__, bytes_text(budget_bytes), why, "; ".join(map(str, step.graph.chunked)),
    )  # fmt: skip


def chunked_as(step: PricedStep, plan: PlanData) -> PricedStep:
    """``step`` with its loss as that of ``plan`` is, which was made of the same step elsewhere."""
    unread = bool({*plan.unread} - {*step.joint.template.dropped})
    if not plan.chunked:
        return step.reading_the_loss() if unread else step
    return step.in_chunks(max(of.chunks for of in plan.chunked), unread=unread)


def refuse_chunks(
    chunk_loss: ChunkLoss, loss_fn: object, dynamic: object, regions: bool, why: str = ""
) -> None:
    """``PlannerError`` where the loss must be computed in chunks and cannot, whatever the model is.

    ``why``  the step is in regions.
    """
    if chunk_loss in ("auto", False):
        return
    if loss_fn is not None:
        raise NotInRows(
            "loss_fn is computed by the training loop, on outputs that exist whole by then: for a loss in "
            "chunks put it into the module, with a forward that takes the labels and returns the loss, and "
            "plan that without loss_fn; or pass chunk_loss=False"
        )
    if dynamic:
        raise NotInRows(
            "chunk_loss cuts the tokens of one size of batch, and dynamic asks for many: pass one of the two"
        )
    if regions:
        raise NotInRows(
            "a step in regions is captured piece by piece, and chunk_loss cuts a step of one graph, which "
            f"this one is not: {why or 'capture is regions'}. Pass chunk_loss=False, or take that out of it "
            "(capture='one graph' tells more)"
        )


def _within(step: PricedStep, chunks: int, budget_bytes: int) -> PricedStep:
    """So many chunks; the outputs held, let go of or not made, whichever the budget wants of these first."""
    made = step.in_chunks(chunks)
    if step.outputs != "auto" or budget_bytes >= made.lightest.floor_bytes or not step.joint.sees_loss:
        return made
    fewer = step.in_chunks(chunks, unread=True)
    return fewer if fewer.floor_bytes < made.lightest.floor_bytes else made


def _numbers(step: PricedStep) -> Iterator[int]:
    """Numbers of chunks worth trying, upwards: each half as large as before."""
    rows = max(of.rows for of in step.in_chunks(2).graph.chunked)
    chunks = 2
    while chunks <= max(2, min(MOST_CHUNKS, rows // FEWEST_ROWS)):
        yield chunks
        chunks *= 2


def _fastest(step: PricedStep, budget_bytes: int, search: Search) -> PricedStep | None:
    """The number of chunks of the fastest quick plan; ``None`` where no such plan was found."""
    refuse_chunks(True, step.loss_fn, step.varying, False)
    best: PricedStep | None = None
    best_s = float("inf")
    for chunks in _numbers(step):
        if search.tell.stopped and best is not None:
            break
        tried = _within(step, chunks, budget_bytes)
        answer = _quick(tried, budget_bytes, search)
        log.debug("%d chunks: %s s", chunks, answer.seconds)
        if answer.fits and answer.seconds < best_s * FASTER:
            best, best_s = tried, answer.seconds
        if best is not None and best_s <= tried.problem.total_seconds * FREE:
            break  # nothing to speak of is recomputed: more chunks only cost more
    return best


def _quick(step: PricedStep, budget_bytes: int, search: Search) -> Answer:
    lightest = step.lightest
    quick = Search("auto", min(TRY_S, search.time_limit_s), None)
    none = Answer(budget_bytes, None, float("inf"), lightest.floor_bytes)
    if budget_bytes < max(lightest.floor_bytes, lightest.memory.optimizer_step_bytes):
        return none
    for one in (step, lightest) if step is not lightest else (step,):
        found = fitted(one.problem, budget_bytes, one.execution_of, quick)
        if found.fits:
            one.begin_from(found)
            return found
    return none


def _lowest(step: PricedStep, least: int = 2) -> PricedStep:
    """The number of chunks, of ``least`` or more where there are as many, with the lowest floor: what a
    refusal is to speak of.
    """
    best: PricedStep | None = None
    numbers = list(_numbers(step))
    for chunks in [n for n in numbers if n >= least] or numbers[-1:]:
        tried = _within(step, chunks, 0)
        if best is not None and tried.lightest.floor_bytes >= best.lightest.floor_bytes:
            break  # the floor is at another op by now
        best = tried
    assert best is not None
    return best


def lowest_in_chunks(step: PricedStep, least: int = 2) -> PricedStep | None:
    """``step`` with its loss in the number of chunks with the lowest floor; fewer than ``least`` are tried
    only where there are no more.

    ``None`` where it cannot be cut, or that is no lower.
    """
    try:
        refuse_chunks(True, step.loss_fn, step.varying, False)
        found = _lowest(step, least)
    except PlannerError as error:
        log.debug("the loss stays whole: %s", error)
        return None
    return found if found.lightest.floor_bytes < step.lightest.floor_bytes else None


def asked_in_chunks(step: PricedStep, chunk_loss: ChunkLoss) -> PricedStep:
    """``step`` with its loss in so many chunks, without a budget in mind; True: that of the lowest floor.

    Raises ``PlannerError`` where it cannot be cut.
    """
    if chunk_loss in (False, "auto"):
        return step
    refuse_chunks(chunk_loss, step.loss_fn, step.varying, False)
    return _lowest(step) if chunk_loss is True else _within(step, int(chunk_loss), 0)
