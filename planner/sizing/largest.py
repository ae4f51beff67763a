"""``largest_batch``: the largest batch with a plan within a budget, and the one of most examples per second.

The last size whose proved floor is within the budget needs no search, only looks, a handful, since memory is
nearly a line in the size.  There a plan is searched for.  Where none is found, the schedule of lowest peak
that was met is played at smaller sizes: the last one that it fits is certain, and some above it are searched,
each from the nearest plan.  With a bound on overhead the same is done below the answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from planner.capture.outputs import LossFn
from planner.costs.target import CostSource, target_for
from planner.errors import InfeasibleBudgetError, PlannerError, TraceError
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import budget_bytes_of, resident_of
from planner.options import (
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OutputsMode,
    Search,
)
from planner.progress import Progress
from planner.sizing.batches import BatchPoint, LargestBatch, Other, Stop
from planner.sizing.request import BatchRequest, MakeBatch
from planner.sizing.sized import SizedSteps
from planner.solving.budgeted import BudgetedStep
from planner.solving.fit import Answer
from planner.solving.sizes import PlannedSizes, last_within
from planner.units import bytes_text, label

__all__ = ["largest_batch"]

log = logging.getLogger(__name__)

_POINTS = 5  # of the frontier, before the fastest is looked for
_NEARER = 3  # further ones towards the fastest
_ABOVE = 2  # sizes above the last with a floor within the budget that are looked at


def largest_batch(
    model: nn.Module,
    budget_gb: float,
    make_batch: MakeBatch,
    *,
    at_most_overhead: float | None = None,
    low: int = 1,
    high: int = 1 << 16,
    loss_fn: LossFn | None = None,
    make_loss: Callable[[int], LossFn] | None = None,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    solver: str = "auto",
    time_limit_s: float = 10.0,
    outputs: OutputsMode = "auto",
    gradients: GradientsMode = "auto",
    capture: CaptureMode = "auto",
    chunk_loss: ChunkLoss = False,
    progress: bool | Progress | None = None,
) -> LargestBatch:
    """The largest batch for which a training step of ``model`` has a plan within ``budget_gb``.

    ``make_batch``        ``make_batch(n)`` returns the inputs of ``n`` examples: a tuple of positional or a
                          dict of keyword arguments of ``model.forward``.  It is asked for some ten sizes,
                          at most a few times what fits.
    ``at_most_overhead``  share of the step's time that recomputation may take: 0.2 for a fifth.
    ``low``, ``high``     the sizes to look among, both included.
    ``loss_fn``           ``loss_fn(outputs) -> scalar`` for outputs of any size; ``make_loss``, instead:
                          ``make_loss(n)`` returns that of a batch of ``n``, with its targets.
    ``outputs``           "auto": let go of before the backward, where that is what makes room, with a warning
                          that says so; "held" and "released" as for :func:`planner.plan`.
    ``chunk_loss``        False: the loss whole, at every size.  n: in n chunks of tokens; True: in the number
                          with the lowest floor; "auto": so where the floor with the loss whole is above the
                          budget.  Sizes that are compared with the answer have it whole.
    ``time_limit_s``      seconds of search at each size that is planned, about a dozen.

    Other arguments as for :func:`planner.plan`; ``budget_gb`` is GB of 10**9 bytes for the whole step.  The
    step is traced once, with sizes as symbols, and once more for sizes at which the model does something
    else; where that cannot be done, each size is captured by itself, and in regions it is run, as planning in
    regions does.  The models that :func:`planner.estimate` takes are taken, also without memory.

    That a larger batch needs no less memory and no less overhead is an assumption: the sizes next to the
    answer are looked at, and the answer says which bound stopped it.

    Raises ``TypeError`` or ``ValueError`` for arguments that make no sense, before anything is traced, and
    for a ``make_batch`` that makes the same batch at all sizes; ``InfeasibleBudgetError`` where not even
    ``low`` fits; ``PlannerError`` where not even ``low`` is within ``at_most_overhead``, and otherwise as
    :func:`planner.plan`.
    """
    request = BatchRequest(
        model=model, budget_bytes=budget_bytes_of(budget_gb), make_batch=make_batch, low=low, high=high,
        at_most_overhead=at_most_overhead, search=Search(solver, time_limit_s, progress), loss_fn=loss_fn,
        make_loss=make_loss, optimizer=optimizer, costs=costs, outputs=outputs, gradients=gradients,
        capture=capture, chunk_loss=chunk_loss,
    )  # fmt: skip
    with request.reporting() as request:
        steps = SizedSteps(request)
        _refuse_below_resident(steps)
        try:
            found = _Batches(steps).found()
        except TraceError as error:
            if loss_fn is None:
                raise
            raise TraceError(
                f"{error}\nloss_fn is asked for the loss of batches of every size here. Where it has targets "
                "of one size, pass make_loss instead: make_loss(n) returns the loss of a batch of n"
            ) from error
    log.info("%s", found)
    if outputs == "auto" and found.plan.released:
        log.warning(
            "a batch of %d of %s fits only where %s is let go of before the backward, so that is what is "
            "planned for: read model(**batch).loss, or del outputs; or pass outputs='held'",
            found.batch,
            found.model_name,
            ", ".join(found.plan.released),
        )
    return found


def _refuse_below_resident(steps: SizedSteps) -> None:
    """``InfeasibleBudgetError`` where what is there throughout is above the budget, before any trace."""
    budget_bytes, low = steps.request.budget_bytes, steps.request.low
    given, model = steps.batch(low), steps.alone_model
    device = target_for(model, steps.request.costs).device
    there = resident_of(
        model, (given.args, given.kwargs), steps.alone_optimizer, device=target_for(model, "roofline").here,
        as_on=device,
    )  # fmt: skip
    if there.total_bytes <= budget_bytes:
        return
    kinds = {
        "parameters": there.parameters_bytes,
        "buffers": there.buffers_bytes,
        "gradients": there.gradients_bytes,
        "inputs": there.inputs_bytes,
        "optimizer_state": there.optimizer_state_bytes,
    }
    told = ", ".join(f"{label(kind)} {bytes_text(size)}" for kind, size in kinds.items() if size)
    raise InfeasibleBudgetError(
        f"no batch of {type(model).__name__} fits {bytes_text(budget_bytes)}: what is there throughout a "
        f"step, at a batch of {low}, is {bytes_text(there.total_bytes)} ({told}), before any activation or "
        "gradient. Raise the budget, or take an optimizer with less state",
        budget_bytes=budget_bytes,
        minimum_bytes=there.total_bytes,
        floor_bytes=there.total_bytes,
        breakdown=kinds,
    )


class _Batches(PlannedSizes):
    """The search, with the plans that it met."""

    def __init__(self, steps: SizedSteps) -> None:
        request = steps.request
        super().__init__(self._step, request.budget_bytes, request.search, request.low)
        self.steps, self.high, self.at_most_overhead = steps, request.high, request.at_most_overhead
        self.lets_go = request.outputs == "auto"  # of outputs before the backward: most fits so

    def found(self) -> LargestBatch:
        """Raises ``InfeasibleBudgetError`` where not even the smallest has a plan."""
        last = self._last(lambda n: self.steps.at(n).needed_bytes, self.low, self.high)
        if last < self.low:
            raise self._not_even(self.steps.step(self.low).infeasible(self.budget_bytes))
        looked = [n for n in range(last + 1, last + 1 + _ABOVE) if n <= self.high]
        if any(self.steps.at(n).needed_bytes <= self.budget_bytes for n in looked):
            log.warning(
                "the memory of %s does not grow with every example: a batch of %d needs more than the "
                "budget, one of %s does not; the answer is the largest below the first that does",
                type(self.steps.model).__name__,
                last + 1,
                [n for n in looked if self.steps.at(n).needed_bytes <= self.budget_bytes],
            )
        if last == self.high and self.lets_go:  # if all that was asked for fits with them held, they are
            self.lets_go = False
            self.lets_go = not self.has_plan(last) or bool(self.plans[last].released)
            self.plans.clear()
            self.refused.clear()
        limit = self.at_most_overhead
        batch, stop = self._largest(last) if limit is None else self._within_overhead(last, limit)
        others = self._others(batch, last)
        self._look_for_the_fastest(batch, [other.batch for other in others])
        self._handed_down()
        fastest = self._best(batch)
        sizes = [n for n in sorted(self.plans) if n <= batch]
        above = sorted(n for n in self.steps.seen if n > last)
        return LargestBatch(
            model_name=type(self.steps.model).__name__,
            budget_bytes=self.budget_bytes,
            batch=batch,
            fastest=fastest,
            stop=stop,
            points=tuple(map(self._point, sizes)),
            plans={n: self.plans[n] for n in sizes},
            others=tuple(others),
            at_most_overhead=self.at_most_overhead,
            looked_at=tuple(above[:4]),
            traces=self.steps.traces,
            kind=self.steps.kind,
            cost_source=self.plans[batch].cost_source,
        )

    def _last(self, value_of: Callable[[int], float], low: int, high: int) -> int:
        """The last size with so many bytes within the budget; what was looked at before is not again."""
        if not self.steps.seen:
            self.steps.at(self.steps.start)
        known = {n: value_of(n) for n in self.steps.seen if low <= n <= high}
        return last_within(value_of, self.budget_bytes, low, high, known)

    # -- plans -------------------------------------------------------------------------------------

    def _step(self, size: int) -> BudgetedStep:
        step = self.steps.step(size)
        return step.lightest if self.lets_go else step

    def _largest(self, last: int) -> tuple[int, Stop]:
        """The largest of up to ``last``, beyond which the floor is above the budget, that has a plan."""
        found = self.largest(last)
        if found < self.low:
            raise self._not_even(self.refused[self.low])
        if found == last:
            return last, self._at_the_floor(last)
        return found, self._not_found(min(n for n in self.refused if n > found))

    def _not_found(self, fails: int) -> Stop:
        refused = self.refused[fails]
        proved = refused.floor_bytes > self.budget_bytes
        words = (
            f"the search: at {fails} no plan was found in {self.search.time_limit_s:g} s, the least peak met "
            f"is {bytes_text(refused.minimum_bytes)}; the proved floor there is "
            f"{bytes_text(refused.floor_bytes)}, {'above' if proved else 'within'} the budget"
        )
        return Stop("floor" if proved else "search", fails, proved, words)

    def _at_the_floor(self, last: int) -> Stop:
        if last == self.high:
            return Stop("high", last + 1, False, f"high={self.high}: larger batches were not asked for")
        floor = self.steps.at(last + 1).floor_bytes
        if floor is None:
            words = f"the device: at {last + 1} the step, run to be looked at, ran out of memory"
            return Stop("search", last + 1, False, words)
        words = f"the budget: at {last + 1} it is proved that no plan needs less than {bytes_text(floor)}"
        return Stop("floor", last + 1, True, words)

    def _within_overhead(self, last: int, limit: float) -> tuple[int, Stop]:
        """The largest of up to ``last`` whose plan takes no more extra time than ``limit``."""

        def overhead_at(n: int) -> float:
            return self.plans[n].overhead if self.has_plan(n) else math.inf

        unplanned = self._last(lambda n: self.steps.at(n).unplanned_bytes, self.low, last)
        known = {unplanned: overhead_at(unplanned)} if unplanned >= self.low else {}
        found = last_within(overhead_at, limit, self.low, last, known)
        if found < self.low:
            if self.low in self.refused:
                raise self._not_even(self.refused[self.low])
            plan = self.plans[self.low]
            raise PlannerError(
                f"at a batch of {self.low} the plan found for {bytes_text(self.budget_bytes)} takes "
                f"{plan.overhead:.2%} more time (proved >= {plan.overhead_bound:.2%}), and at_most_overhead "
                f"is {limit:.2%}. Raise it, or the budget, or lower low={self.low}"
            )
        if found == last:
            return found, self._at_the_floor(last)
        over = self.plans.get(found + 1)
        if over is None:
            return found, self._not_found(found + 1)
        proved = over.overhead_bound > limit
        words = (
            f"the overhead: at {found + 1} the plan found takes {over.overhead:.2%} more time, and it is "
            f"proved that none takes less than {over.overhead_bound:.2%}"
        )
        return found, Stop("overhead", found + 1, proved, words)

    def _not_even(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        return error.saying(f"not even a batch of {self.low}: {error}")

    # -- the frontier ------------------------------------------------------------------------------

    def _others(self, batch: int, last: int) -> list[Other]:
        """The step as it is and every block checkpointed, each at its largest."""
        found, at = [], self.steps.at
        unplanned = self._last(lambda n: at(n).unplanned_bytes, self.low, last)
        if unplanned >= self.low:
            here = at(unplanned)
            found.append(Other("the step as it is", unplanned, here.unplanned_bytes, 0.0, here.step_s))
        if at(batch).blocks_bytes is not None:
            blocks = self._last(lambda n: at(n).blocks_bytes or math.inf, self.low, last)
            if blocks >= self.low:
                here = at(blocks)
                size = here.blocks_bytes or 0
                found.append(
                    Other("every block checkpointed", blocks, size, here.blocks_overhead, here.step_s)
                )
        return found

    def _look_for_the_fastest(self, batch: int, marks: Sequence[int]) -> None:
        """Plans for sizes up to the answer, more of them around the fastest."""
        first = min([batch, *(n for n in marks if n <= batch)])
        between = [first + (batch - first) * k // (_POINTS - 2) for k in range(1, _POINTS - 2)]
        for n in dict.fromkeys(
            [max(self.low, first // 2), first, *between, *(m for m in marks if m <= batch)]
        ):
            self.has_plan(n)
        for _ in range(_NEARER):
            best, sizes = self._best(batch), sorted(n for n in self.plans if n <= batch)
            i = sizes.index(best)
            beside = sorted((sizes[k] for k in (i - 1, i + 1) if 0 <= k < len(sizes)), key=self._per_s)
            new = [m for n in beside if (m := (n + best) // 2) not in self.plans and m not in self.refused]
            if not new:
                break
            self.has_plan(new[-1])  # towards the faster neighbour

    def _handed_down(self) -> None:
        """Where the schedule of a larger size takes less extra time at a smaller one, that has it too."""
        sizes = sorted(self.plans, reverse=True)
        for larger, size in pairwise(sizes):
            step, own = self.step_at(size), self.plans[size]
            schedule = step.schedule_of(self.plans[larger])
            if schedule is None or self.plans[larger].overhead >= own.overhead:
                continue
            ran, total_s = step.execution_of(schedule), step.problem.total_seconds
            seconds = total_s + ran.timeline.recompute_seconds
            if ran.peak_bytes > self.budget_bytes or seconds >= total_s * (1 + own.overhead):
                continue
            bound_s = min(seconds, total_s * (1 + own.overhead_bound))
            solver, floor = self.plans[larger].solver, own.floor_bytes
            answer = Answer(self.budget_bytes, ran, bound_s, floor, seconds, solver, own.solve_s)
            self.plans[size] = step.plan_of(answer)

    def _best(self, batch: int) -> int:
        return max((n for n in self.plans if n <= batch), key=lambda n: (self._per_s(n), -n))

    def _per_s(self, size: int) -> float:
        return self._point(size).examples_per_s

    def _point(self, size: int) -> BatchPoint:
        plan = self.plans[size]
        return BatchPoint(
            size,
            plan.peak_bytes,
            plan.floor_bytes,
            plan.overhead,
            plan.overhead_bound,
            plan.step_s,
            plan.status,
        )
