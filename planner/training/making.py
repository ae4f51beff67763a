"""Makes the plan for one call: captures its step, counts what is resident, solves for the room it has.

A step is captured for each of the first two shapes that come and, when others come, once more for sizes
that vary (:class:`~planner.training.plan_cache.StepCache`); from then on one plan serves them all
(:mod:`planner.runtime.variants`), or, where calls share the budget, each shape is planned from that capture.

What is resident is that of the whole model: parameters, gradients and optimizer state outside the planned
module count too.  Of the ranks of a distributed job one makes each plan and the others take it over
(:mod:`planner.training.distributed`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.errors import InfeasibleBudgetError, StalePlanError
from planner.graph.training_graph import TrainingGraph
from planner.memory.consumed_gradients import ConsumedGradients
from planner.memory.live_optimizers import resident_in_training
from planner.memory.resident import Resident
from planner.options import Search
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.ranks.once import is_shared, made_once
from planner.runtime.guard import Guard
from planner.runtime.held_outputs import HeldOutputs
from planner.runtime.variants import Varying
from planner.solving.better import FIRST_S
from planner.solving.chunked import in_chunks_instead, with_loss_in_chunks
from planner.solving.priced import PricedStep, prepare
from planner.training import huggingface
from planner.training.calls import Call
from planner.training.plan_cache import StepCache
from planner.training.settings import Settings
from planner.training.sharing import PROBES, Room, plan_that_holds
from planner.training.step_calls import StepCalls

__all__ = ["PlanMaker"]

# Of search for the least peak of a first step, which is run once: that it is near is enough.
FIRST_STEP_S = 2.0


class PlanMaker:
    """Makes plans for calls of ``planned``, a part of ``root`` or all of it, each from a step it keeps.

    ``calls``   those of the step, which share the budget.
    ``around``  the context in which steps are captured in the middle of training.
    ``outputs`` what was seen of the outputs of its calls.
    """

    def __init__(
        self,
        root: nn.Module,
        planned: nn.Module,
        settings: Settings,
        calls: StepCalls,
        around: Callable[[], AbstractContextManager[None]],
        outputs: HeldOutputs,
    ) -> None:
        self.root, self.planned, self.settings, self.outputs = root, planned, settings, outputs
        self.calls, self.around = calls, around
        self.around_bytes = 0  # that a training loop was seen to hold beside the calls
        self.gradients = ConsumedGradients(planned, settings.gradients)
        self._steps = StepCache(settings.max_plans)

    def change(self, settings: Settings) -> None:
        """From the next plan on; steps captured already are not captured again."""
        if (settings.loss_fn, settings.costs) != (self.settings.loss_fn, self.settings.costs):
            self.forget()
        self.settings = settings
        self._steps.most = settings.max_plans

    def forget(self) -> None:
        """Drop every captured step."""
        self._steps = StepCache(self.settings.max_plans)

    def check(self, call: Call) -> None:
        """``StalePlanError`` if the model was edited since a step for this call was captured.

        Not if only a setting is another one: then another step may be there, or is captured beside it.
        """
        for step in self._steps.find(call.signature.of_step):
            self._is_current(step)

    def _is_current(self, step: PricedStep) -> bool:
        try:
            Guard(self.planned, step.captured.expected).check_modules()
        except StalePlanError as changed:
            if changed.setting is None:
                raise
            return False
        return True

    @staticmethod
    def _has_answers_of(step: PricedStep, call: Call) -> bool:
        """Whether the call's batch is one for this graph; of varying sizes there are several."""
        return step.varying is not None or step.joint.asked.hold(call.inputs.tensors())

    def make(self, call: Call, search: Search, hint: Plan | None) -> Plan:
        """The plan for this call; ``hint``, one of a like call, is where the search starts.

        ``search`` is that of the settings, with its reporter open.  Errors as :func:`planner.plan`.
        """
        self.gradients.watch()
        step = self._captured(call, search).consuming(self.gradients.taken)
        resident_at = partial(self._resident, call.signature.has_gradients)
        resident = resident_at(step.graph, step.joint.inputs)
        limit_s = search.time_limit_s
        if self.calls.per_step is None:
            limit_s = min(limit_s, FIRST_STEP_S)
        step = replace(step.with_resident(resident, resident_at), least_limit_s=limit_s)
        step = self._letting_go(step.with_margin(self.around_bytes))
        step = self._in_chunks(call, step, search)
        try:
            return self._in_seconds(call, step, search, hint) or self._made_once(call, step, search, hint)
        except InfeasibleBudgetError as error:
            left_bytes = self._room(call).left_bytes
            fewer = in_chunks_instead(
                self._at_its_size(call, step), left_bytes, self.settings.chunk_loss, search
            )
            if fewer is None:
                raise self._in_company(error, call) from None
        try:
            return self._made_once(call, fewer, search, None)
        except InfeasibleBudgetError as error:
            raise self._in_company(error, call) from None

    def is_bettered(self, call: Call) -> bool:
        """Whether plans for such calls may be made in seconds and bettered beside the training.

        Not where calls share the budget, whose plans are made for one another's room, and not in a job of
        several ranks, which all run the plan that one of them made.
        """
        alone = self.calls.per_step == 1 and self._room(call).most_bytes is None
        return alone and self.settings.search.solver == "auto" and not is_shared()

    def _in_seconds(self, call: Call, step: PricedStep, search: Search, hint: Plan | None) -> Plan | None:
        """A plan found at once, to be bettered later; ``None`` where finding one takes the whole search."""
        if search.time_limit_s <= FIRST_S or not self.is_bettered(call):
            return None
        soon = replace(search, time_limit_s=FIRST_S)
        try:
            return self._made_once(call, replace(step, least_limit_s=FIRST_S), soon, hint)
        except InfeasibleBudgetError as error:
            if error.budget_bytes < error.floor_bytes:
                raise
            return None

    # -- the step ----------------------------------------------------------------------------------

    def _captured(self, call: Call, search: Search) -> PricedStep:
        signature, s = call.signature.of_step, self.settings
        at_hand = filter(self._is_current, self._steps.find(signature))
        step = next((step for step in at_hand if self._has_answers_of(step, call)), None)
        if step is None:
            step = prepare(
                self.planned,
                call.inputs.without_data(until_captured=True),  # plans outlive the batch they were made from
                loss_fn=s.loss_fn,
                costs=s.costs,
                dynamic=self._steps.is_to_vary(signature),
                search=Search(progress=search.tell),
            )
            self._steps.keep(signature, step)
        if step.varying is None:
            return step
        return self._sized(step, call, self._steps.largest(signature))

    def _sized(self, step: PricedStep, call: Call, largest: list[torch.Tensor]) -> PricedStep:
        """A step of varying sizes, ready to be planned: at these where calls share the budget, else for any.

        In the latter case at the largest sizes seen if these are no larger.
        """
        assert step.varying is not None
        s, alone, sizes = self.settings, self.calls.per_step == 1, call.inputs.tensors()
        joint = step.varying.captures.of(self.planned, call.inputs, s.loss_fn)
        if joint.sizes is not None:
            if alone and largest and _no_smaller(largest, sizes) and joint.sizes.admit(largest):
                sizes = largest
            joint = joint.at(joint.sizes.read(sizes), fixed=not alone)
        asked = Varying(step.varying.captures, "replan", replace(s.search, progress=None), self.around)
        return replace(step.recaptured(self.planned, joint), varying=asked if alone else None)

    def _resident(self, adds: bool, graph: TrainingGraph, inputs: Inputs) -> Resident:
        """What the device holds through a step of the whole model, not only of the part that is planned.

        ``adds``: the step adds to gradients that are there.
        """
        arguments = (inputs.args, inputs.kwargs)
        device = graph.device
        found = resident_in_training(self.root, arguments, self.settings.optimizer, device)
        named = self.planned.named_parameters()
        inside = {id(p) for name, p in named if not adds or name in self.gradients.taken}
        coming = sum(
            p.nbytes
            for p in self.root.parameters()
            if id(p) not in inside and p.requires_grad and p.grad is None and p.device == device
        )
        outputs = sum(v.bytes for v in graph.values if v.kind == "output")
        behind = huggingface.outside_bytes(self.root, outputs)
        return replace(
            found,
            gradients_bytes=found.gradients_bytes + coming,
            buffers_bytes=found.buffers_bytes + behind,
        )

    def _letting_go(self, step: PricedStep) -> PricedStep:
        """The step whose outputs live as they were told to, or seen to, or, until then, as will fit."""
        mode = self.settings.outputs
        if mode == "released":
            return step.all_released
        if mode == "unread":
            return step.reading_the_loss()
        if mode == "held" or self.calls.per_step != 1:
            return step
        seen = self.outputs.learned(tuple(leaf.name for leaf in step.joint.template.leaves))
        return replace(step, outputs="auto") if seen is None else step.releasing(*seen)

    def _in_chunks(self, call: Call, step: PricedStep, search: Search) -> PricedStep:
        """The step with its loss in chunks where that is asked for, or nothing fits without: at this size."""
        wish = self.settings.chunk_loss
        left_bytes = self._room(call).left_bytes
        spare = not step.joint.sees_loss or left_bytes >= step.lightest.floor_bytes
        if wish is False or (wish == "auto" and spare):
            return step
        alone = self._at_its_size(call, step)
        chunked = with_loss_in_chunks(alone, left_bytes, wish, search)
        return step if chunked is alone else chunked

    def _at_its_size(self, call: Call, step: PricedStep) -> PricedStep:
        """``step`` at the sizes of this call, and for these only."""
        if step.varying is None:
            return step
        joint = step.varying.captures.of(self.planned, call.inputs, self.settings.loss_fn)
        if joint.sizes is not None:
            joint = joint.at(joint.sizes.read(call.inputs.tensors()), fixed=True)
        return replace(step.recaptured(self.planned, joint), varying=None)

    # -- the plan ----------------------------------------------------------------------------------

    def _made_once(self, call: Call, step: PricedStep, search: Search, hint: Plan | None) -> Plan:
        """The plan, from whichever rank of a distributed job asked for it first."""
        room, place = self._room(call), call.signature.place
        needs = (
            room.left_bytes, step.problem.resident_bytes, room.most_bytes, self.calls.per_step, place
        )  # fmt: skip
        sizes = [tuple(tensor.shape) for tensor in step.joint.inputs.tensors()]
        varies, around = step.varying is not None, self.around_bytes
        key = (
            f"{step.captured.fingerprint} {sizes} {varies} {around} {needs} {search.solver} "
            f"{search.time_limit_s} {self.settings.costs} {step.outputs} {sorted(step.graph.released)} "
            f"{sorted(step.graph.kept)} {sorted(self.gradients.taken.items())}"
        )

        def adopt(received: PlanData) -> Plan:
            self._learn_need(call, step, received.known_minimum_bytes)
            return Plan.of(received, step.as_planned(received))

        wait_s = 60.0 + 4 * PROBES * search.time_limit_s
        return made_once(key, lambda: self._solved(call, step, search, hint), adopt, wait_s=wait_s)

    def _solved(self, call: Call, step: PricedStep, search: Search, hint: Plan | None) -> Plan:
        room = self._room(call)
        if self.calls.per_step is None:
            if 2 * step.baseline_peak_bytes - step.problem.resident_bytes <= room.left_bytes:
                return step.plan_bytes(room.left_bytes, search, hint=hint)
            self._learn_need(call, step)
            if step.minimum_peak_bytes > room.left_bytes:
                raise step.infeasible(room.left_bytes)
            return step.least_plan()
        self._learn_need(call, step)
        room = self._room(call)
        if room.most_bytes is None:
            last = hint if hint is not None and hint.budget_bytes == room.left_bytes else None
            same = None if last is None else step.beside_last(last)
            if same is not None:
                return same
            return step.plan_bytes(room.left_bytes, search, hint=hint)
        probe = replace(search, time_limit_s=search.time_limit_s / PROBES)

        def make(budget_bytes: int) -> Plan:
            return step.plan_bytes(budget_bytes, probe, hint=hint)

        low = step.problem.resident_bytes + room.most_bytes
        return plan_that_holds(room.most_bytes, low, room.left_bytes, make)

    def _room(self, call: Call) -> Room:
        assert self.settings.budget_bytes is not None
        return self.calls.room(self.settings.budget_bytes, call.signature.place)

    def _learn_need(self, call: Call, step: PricedStep, known_bytes: int | None = None) -> None:
        elements = sum(call.signature.sizes)
        if self.calls.is_largest(elements):
            self.calls.learn_need(elements, known_bytes or step.minimum_peak_bytes)

    def _in_company(self, error: InfeasibleBudgetError, call: Call) -> InfeasibleBudgetError:
        place, calls, held = call.signature.place, self.calls.per_step, self.calls.held_bytes
        # Trainers look for these words, to halve the batch (accelerate's should_reduce_batch_size).
        out = "Within this budget the step runs out of memory."
        if calls == 1:
            return error.saying(f"{error}. {out}")
        known = f"of {calls}" if calls else "in the first step, which tells how many there are,"
        way_out = (
            ". Those before it were planned before it was known of: say so, planner.enable(..., "
            f"calls_per_step={max(place, calls or 0)}) or however many there are, and each leaves room for "
            "the others"
        )
        return error.saying(
            f"call {place} {known} of {type(self.planned).__name__} before the backward, {held / 1e9:.4g} GB "
            f"held by those before it: {error}{'' if self.calls.told or place == 1 else way_out}. {out}"
        )


def _no_smaller(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(a >= b for x, y in pairs for a, b in zip(x.shape, y.shape, strict=True))
