"""Plans for the calls of one module as they come, each made when it is first needed and then kept.

A plan is for one :class:`~planner.training.calls.Signature`: sizes, dtypes, constants, autocast, and whether
gradients of earlier batches are held.  This file decides whether a plan at hand serves a call or one is to
be made.  What it asks lies beside it:

* :mod:`planner.training.step_calls` counts the calls of a step and the room each has;
* :mod:`planner.training.plan_cache` keeps plans by signature;
* :mod:`planner.training.making` makes one.

The budget is for the whole step of the whole model, and calls that wait for their backward share it
(:mod:`planner.training.sharing`).  How many there are is told by the first step.  Where its first call,
planned as the only one, would leave no room for another, it is run at the lowest peak that is found; that
plan is for the steps after it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import modes_set_aside
from planner.capture.module import home_of
from planner.errors import InfeasibleBudgetError, PlannerError, StalePlanError, TraceError
from planner.memory.consumed_gradients import ConsumedGradients
from planner.options import Search
from planner.plan import Plan
from planner.runtime.forward import PlannedForward
from planner.runtime.guard import OtherAnswerError
from planner.runtime.held_outputs import HeldOutputs
from planner.solving.better import Betterment
from planner.training import huggingface
from planner.training.as_run import AsRun
from planner.training.calls import Call, Signature
from planner.training.making import PlanMaker
from planner.training.plan_cache import KeptPlan, PlanCache
from planner.training.settings import Settings
from planner.training.sharing import Room
from planner.training.step_calls import StepCalls
from planner.units import bytes_text

__all__ = ["OnDemand"]

log = logging.getLogger(__name__)

# Plans made because one and the same attribute had a new value, after which that is said.
OFTEN = 4

# Plans made because the batch answered otherwise what the forward asks of it, after which it asks for itself.
MOST_ANSWERS = 8


class OnDemand:
    """Plans for the training calls of ``planned``, a part of ``root`` or all of it.

    ``around``  the context in which steps are captured.
    ``last``    the plan of the last training call, ``None`` before the first.
    """

    def __init__(
        self,
        root: nn.Module,
        planned: nn.Module,
        settings: Settings,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.root, self.planned, self.settings, self.around = root, planned, settings, around
        self.last: Plan | None = None
        self._announced = False
        self._calls = StepCalls(settings.calls_per_step, huggingface.usual_calls(root))
        self._outputs = HeldOutputs(settings.outputs)
        self._as_run = AsRun(self._found)
        self._predicted_bytes = self._state_bytes = 0  # of the step being metered
        self._said_over = False
        self._maker = PlanMaker(root, planned, settings, self._calls, around, self._outputs)
        self._gradients = self._maker.gradients = ConsumedGradients(planned, settings.gradients)
        self._changes: Counter[str] = Counter()  # how often each setting made for a plan
        self._told = ""
        self._plans = PlanCache(settings.max_plans)
        self._parameters: list[nn.Parameter] | None = None  # of root: listing them takes longer than the rest
        self._kept: tuple[KeptPlan, Signature] | None = None  # the plan made last
        self._betterment = Betterment()

    def change(self, settings: Settings) -> None:
        """Settings for the next training call on; steps captured already are not captured again."""
        if settings == self.settings:
            return
        if settings.outputs != self.settings.outputs:
            self._outputs = self._maker.outputs = HeldOutputs(settings.outputs)
        if settings.gradients != self.settings.gradients:
            self._gradients = self._maker.gradients = ConsumedGradients(self.planned, settings.gradients)
        self.settings = settings
        self._maker.change(settings)
        self._betterment.end()
        self._plans = PlanCache(settings.max_plans)
        self._calls.tell(settings.calls_per_step)

    @property
    def calls(self) -> int | None:
        """How many calls a step is taken to have; ``None`` where only its first one can tell."""
        return self._calls.seen

    # -- each call ---------------------------------------------------------------------------------

    def arrived(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call about to run, and its place in its step."""
        place = self._calls.arrive()
        return Call.of(
            args, kwargs, module=self.planned, has_gradients=self._adds, place=place, trains=self._trains
        )  # fmt: skip

    @property
    def _trains(self) -> tuple[bool, ...]:
        return self.planned.training, *[p.requires_grad for p in self._held]

    @property
    def _held(self) -> list[nn.Parameter]:
        if self._parameters is None:
            self._parameters = list(self.root.parameters())
        return self._parameters

    @property
    def _adds(self) -> bool:
        """Whether the backward may find gradients to add to."""
        return self._calls.per_step != 1 or any(p.grad is not None for p in self._held)

    def find(self, call: Call) -> KeptPlan | None:
        """The plan that serves this call and what runs it; ``None`` where one has to be made."""
        if self._gradients.learned():
            self._plans = PlanCache(self.settings.max_plans)
        changed: StalePlanError | None = None
        for kept in self._plans.find(call):
            if self._calls.per_step is None or not self._room(call).suits(kept.plan, kept.room):
                continue
            if kept.any_size and self.settings.on_larger == "raise" and self._plans.exceeds(call):
                return None
            try:
                kept.runner.check(call.leaves, call.in_spec)
            except StalePlanError as edited:
                if edited.setting is None:
                    self._edited(edited)
                    return None
                changed = changed or edited
                continue
            if self._betterment.is_busy:
                kept = self._bettered(call, kept)
            self._plans.keep(call, kept)
            if self._calls.per_step == 1 and kept.runner.unforeseen is not None:
                return None
            self.last = kept.plan
            return kept
        if changed is not None:
            self._moved(changed)
        return None

    def make(self, call: Call, original: Callable[..., Any]) -> KeptPlan:
        """A plan for this call and what runs it.  Errors as :func:`planner.plan`."""
        self._refuse(call)
        began = time.perf_counter()
        # A meter that watches training is not to count this.
        with self.settings.search.reporting() as search, self.around(), modes_set_aside():
            try:
                self._maker.check(call)
            except StalePlanError as edited:
                self._edited(edited)
            self._note_freezing(call)
            call = call.but(trains=self._trains)
            if self._calls.per_step is None and self._calls.usual and call.signature.place == 1:
                with self._calls.supposed(self._calls.usual):
                    alone = call.but(has_gradients=self._adds)
                    kept = self._keep(alone, self._made(alone, search, original))
                    self._announce(kept.plan, alone, time.perf_counter() - began)
                    self._seek_better(kept, alone)
                return kept if self._leaves_room(kept) else self._in_first_step(call, search, original, kept)
            kept = self._keep(call, self._made(call, search, original))
        self._announce(kept.plan, call, time.perf_counter() - began)
        self._seek_better(kept, call)
        return kept

    def _seek_better(self, kept: KeptPlan, call: Call) -> None:
        if self._maker.is_bettered(call):
            self._betterment.ask(kept.plan, self.settings.search)

    def _made(self, call: Call, search: Search, original: Callable[..., Any]) -> KeptPlan:
        standing = next(iter(self._plans.find(call)), None)
        try:
            plan = self._maker.make(call, search, self.last)
        except InfeasibleBudgetError as error:
            if standing is not None and standing.runner.unforeseen is not None:
                self._outputs.settle(standing.runner.step, type(self.root).__name__, error)
                return standing
            if not self._maker.around_bytes:
                raise
            log.warning("%s; it trains on without regard to what lies beside the planned call", error)
            self._maker.around_bytes = 0
            self._as_run.give_up()
            plan = self._maker.make(call, search, self.last)
        runner = PlannedForward(self.planned, plan.executable(), original=original)
        runner.outputs = self._outputs if self.settings.outputs != "held" else None
        room = self._room(call)
        if self._calls.per_step is None:  # as little as can be, and no measure for the steps to come
            room = replace(room, left_bytes=min(room.left_bytes, plan.peak_bytes))
        return KeptPlan(plan, runner, room, any_size=runner.step.variants is not None)

    def _keep(self, call: Call, kept: KeptPlan) -> KeptPlan:
        self._plans.keep(call, kept)
        self.last, self._kept = kept.plan, (kept, call.signature)
        return kept

    def _bettered(self, call: Call, kept: KeptPlan) -> KeptPlan:
        """``kept``, or what takes its place between two steps: the same with a better plan, if one was found.

        Where the backwards came for other outputs than were planned for, the program that serves those stays.
        """
        runner = kept.runner
        if call.signature.place != 1 or runner.sets.now is not runner.step:
            return kept
        better = self._betterment.of(kept.plan)
        if better is None:
            return kept
        if better.sequence != kept.plan.sequence:
            with self.around(), modes_set_aside():
                outputs, runner = (
                    runner.outputs,
                    PlannedForward(self.planned, better.executable(), original=runner.original),
                )
                runner.outputs = outputs
        return self._in_place_of(kept, kept._replace(plan=better, runner=runner))

    def _in_place_of(self, old: KeptPlan, new: KeptPlan) -> KeptPlan:
        self._plans.replace(old, new)
        if self._kept is not None and self._kept[0] is old:
            self._kept = new, self._kept[1]
        return new

    def _leaves_room(self, kept: KeptPlan) -> bool:
        """Whether another call like this one fits beside it."""
        return kept.plan.held_bytes + kept.plan.peak_bytes <= kept.room.left_bytes

    def _in_first_step(
        self, call: Call, search: Search, original: Callable[..., Any], alone: KeptPlan
    ) -> KeptPlan:
        """For a step that may have more calls: the least peak.  Where that is too much, it has to be the only
        one, for which there is a plan."""
        try:
            return self._made(call, search, original)
        except InfeasibleBudgetError:
            return alone

    def run(self, kept: KeptPlan, call: Call) -> Any:
        """The call as planned; the first ones are metered."""
        if call.signature.place == 1:
            self._as_run.end()
        if not self._as_run.runs:
            self._predicted_bytes = 0
            self._as_run.begin(lambda: self._there(call), home_of(self.planned, call.leaves))
        before_bytes = self._calls.held_bytes
        try:
            outputs = kept.runner.run(call.leaves, call.in_spec)
        except BaseException:  # Ctrl-C too: the meter must not stay on
            self._as_run.end()
            raise
        self._started(kept)
        if self._as_run.runs:
            plan = self.last if self.last is not None and kept.any_size else kept.plan
            self._state_bytes = max(plan.timeline_by_kind.get("optimizer_state", ()), default=0)
            own_bytes = max(plan.timeline, default=0) - self._state_bytes - self._maker.around_bytes
            self._predicted_bytes = max(self._predicted_bytes, before_bytes + int(own_bytes))
            last = kept.runner.last_call
            self._as_run.ran(outputs, None if last is None else last())
        return outputs

    def settle(self) -> None:
        """Another call than a planned one comes: a meter that is still on has done its work."""
        self._as_run.end()

    def _there(self, call: Call) -> list[torch.Tensor]:
        """What a step finds on the device."""
        gradients = [p.grad for p in self._held if p.grad is not None]
        return [*self._held, *self.root.buffers(), *gradients, *call.inputs.tensors()]

    def _found(self, peak_bytes: int) -> None:
        """A metered step took so much, without the optimizer's state."""
        assert self.settings.budget_bytes is not None
        over = peak_bytes + int(self._state_bytes) - self.settings.budget_bytes
        beside = peak_bytes - self._predicted_bytes
        if over <= 0 or beside <= 0 or self._outputs.surprised:  # that was said, and is planned for
            return
        self._maker.around_bytes = max(beside, self._maker.around_bytes + over)
        self._plans = PlanCache(self.settings.max_plans)
        if not self._said_over:
            self._said_over = True
            log.warning(
                "a step of %s took %s, %s over its budget: the loop holds %s beside the planned "
                "call (a loss outside the model, outputs or inputs that are kept, metrics). It is planned "
                "for from here on; with loss_fn= the loss is part of the plan",
                type(self.root).__name__,
                bytes_text(peak_bytes + int(self._state_bytes)),
                bytes_text(over),
                bytes_text(beside),
            )

    def _started(self, kept: KeptPlan) -> None:
        """The forward of a call has run; from here to its backward it holds memory."""
        step, held = kept.runner.sets.now, kept.plan.held_bytes
        variants = step.variants
        if step is not kept.runner.step and isinstance(step.plan, Plan):
            self.last, held = step.plan, step.plan.held_bytes  # made for other outputs than were foreseen
        if variants is not None:
            last, held = variants.last, variants.held_bytes
            self.last = last if isinstance(last, Plan) else Plan.of(last)
        if kept.runner.last_call is not None:
            self._calls.started(kept.runner.last_call, held)

    def _room(self, call: Call) -> Room:
        assert self.settings.budget_bytes is not None  # the switch is not turned on without
        return self._calls.room(self.settings.budget_bytes, call.signature.place)

    def _edited(self, why: StalePlanError) -> None:
        """Every plan and every captured step is of the model as it was; calls that wait still do."""
        log.info("%s is planned again: %s", type(self.root).__name__, why)
        self._calls.restart()
        self._maker.forget()
        self._betterment.end()
        self._plans = PlanCache(self.settings.max_plans)
        self._kept = None
        self._parameters = None

    def _note_freezing(self, call: Call) -> None:
        """Say it where parameters were frozen or freed.  Plans are kept: it may be to and fro, as in a GAN.

        Whatever else was edited makes plans stale.
        """
        if self._kept is None or self._kept[1].trains == call.signature.trains:
            return
        kept, signature = self._kept
        if signature.trains[0] is not call.signature.trains[0]:
            return
        try:
            kept.runner.guard.check_modules()
        except StalePlanError as edited:
            self._edited(edited)
            return
        try:
            kept.runner.guard.tensors()
        except StalePlanError as frozen:
            log.info("%s is planned again: %s", type(self.root).__name__, frozen)

    def _moved(self, why: StalePlanError) -> None:
        """What the forward reads is another than for any plan at hand; those are kept, it may come back."""
        if isinstance(why, OtherAnswerError):
            self._answered_otherwise(why)
            return
        if str(why) == self._told:  # a call of another kind after the same change
            return
        self._told = str(why)
        log.info("%s is planned again: %s", type(self.root).__name__, why)
        assert why.setting is not None
        self._changes[why.setting] += 1
        if self._changes[why.setting] == OFTEN:
            owner, _, name = why.setting.partition(": ")
            log.warning(
                "%s was planned again %d times because %s of %s changes, which its forward reads: the step "
                "is traced anew at each new value. If it is a number that changes from step to step, make it "
                "a tensor: self.register_buffer('%s', torch.tensor(...)) in __init__, and write it in place "
                "(.fill_(value)); if the forward does not need it, move it to an attribute that is not read",
                type(self.root).__name__,
                OFTEN,
                name,
                owner,
                name.rpartition(".")[2].partition("[")[0],
            )

    def _answered_otherwise(self, why: OtherAnswerError) -> None:
        """The batch is one for another graph than those at hand, which are kept.

        Raises ``TraceError`` where there are too many, and the step may be planned in regions.
        """
        log.info("%s is planned again: %s", type(self.root).__name__, why.what)
        assert why.setting is not None
        self._changes[why.setting] += 1
        if self._changes[why.setting] >= MOST_ANSWERS and self.settings.capture == "auto":
            raise TraceError(f"{why.what}. It was planned again {MOST_ANSWERS} times for that")
        if self._changes[why.setting] == OFTEN:
            log.warning(
                "%s was planned again %d times, each for other answers of the batch: %s",
                type(self.root).__name__,
                OFTEN,
                why.what,
            )

    def _refuse(self, call: Call) -> None:
        where = home_of(self.planned, call.leaves)
        strange = [x for x in call.leaves if isinstance(x, torch.Tensor) and x.dim() and x.device != where]
        if strange:
            raise PlannerError(
                f"{type(self.root).__name__} is on {where} and was called with a tensor on "
                f"{strange[0].device}: move the batch to the model. (nn.DataParallel cannot be planned: "
                "start one process per device, with torchrun, and use DistributedDataParallel)"
            )
        if self.settings.on_larger == "raise" and self._plans.exceeds(call):
            raise StalePlanError(
                f"a batch of {call.signature} came after the plan was made for {self._plans.largest}, which "
                "is smaller; start with the largest batch, or use planner.enable(..., on_larger='replan')"
            )

    def _announce(self, plan: Plan, call: Call, seconds: float) -> None:
        """A line in the log for the first plan that is not of a step run only to count its calls."""
        calls = self._calls.per_step
        level = logging.DEBUG if self._announced or calls is None else logging.INFO
        self._announced = self._announced or calls is not None
        log.log(level, "%s", _announcement(plan, call, calls or 1, seconds))


def _announcement(plan: Plan, call: Call, calls: int, seconds: float) -> str:
    gb = 1e9
    shared = f", call {call.signature.place} of {calls}" if calls > 1 else ""
    released = f", {', '.join(plan.released)} let go of before the backward" if plan.released else ""
    return (
        f"{plan.model_name} planned to {plan.budget_bytes / gb:.4g} GB for {call}{shared}{released}: peak "
        f"{plan.peak_bytes / gb:.4g} GB (nothing recomputed: {plan.baseline_peak_bytes / gb:.4g} GB), "
        f"overhead {plan.overhead:.2%} (proved >= {plan.overhead_bound:.2%}), {seconds:.1f} s to plan"
    )
