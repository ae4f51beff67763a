"""Plans for the calls of one module as they come, each made when it is first needed and then kept.

A plan is for one :class:`~planner.training.calls.Signature`: sizes, dtypes, constants, autocast, and whether
gradients of earlier batches are held.  Which plans are kept and which serves a call is decided by a
:class:`~planner.training.plan_cache.PerShape` and nowhere else.

A step is captured for each of the first two shapes that come and, when others come, once more for sizes
that vary; from then on one plan serves them all (:mod:`planner.runtime.variants`), or, where calls share the
budget, each shape is planned from that capture.

The budget is for the whole step of the whole model: parameters, gradients and optimizer state outside the
planned module count, and calls that wait for their backward share it (:mod:`planner.training.sharing`).
How many there are is told by the first step, which is then run at the lowest peak that is found.

Of the ranks of a distributed job one makes each plan and the others take it over
(:mod:`planner.training.distributed`).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._compat import modes_set_aside
from planner.capture.inputs import Inputs
from planner.errors import InfeasibleBudgetError, PlannerError, StalePlanError
from planner.graph.training_graph import TrainingGraph
from planner.memory.live_optimizers import found_optimizer_bytes
from planner.memory.resident import Resident, resident_of
from planner.options import Search
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.progress import Reporter
from planner.runtime.forward import PlannedForward
from planner.runtime.guard import Guard
from planner.runtime.variants import Varying
from planner.solving.priced import PricedStep, prepare
from planner.training import huggingface
from planner.training.calls import Call
from planner.training.distributed import made_once
from planner.training.plan_cache import Kept, PerShape, StepCache
from planner.training.settings import Settings
from planner.training.sharing import PROBES, most_held, plan_that_holds

__all__ = ["OnDemand"]

log = logging.getLogger(__name__)

# Steps after which a number of calls that was not seen again is forgotten.
REMEMBERED = 32

# A plan made for so much less room than there is now recomputes more than it must.
ENOUGH = 1.15


class OnDemand:
    """Plans for the training calls of ``planned``, a part of ``root`` or all of it.

    ``last``    the plan of the last training call, ``None`` before the first.
    ``around``  the context in which steps are captured.
    """

    def __init__(self, root: nn.Module, planned: nn.Module, settings: Settings) -> None:
        self.root, self.planned, self.settings = root, planned, settings
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        self.last: Plan | None = None
        self._announced = False
        self._calls: int | None = None
        self._tell = Reporter()
        self.forget()

    def change(self, settings: Settings) -> None:
        """From the next training call on; steps captured already are not captured again."""
        if settings == self.settings:
            return
        if (settings.loss_fn, settings.costs) != (self.settings.loss_fn, self.settings.costs):
            self._steps = StepCache(settings.max_plans)
        self.settings = settings
        self._steps.most = settings.max_plans
        self._plans = PerShape(settings.max_plans)
        if settings.calls_per_step is not None:
            self._calls = settings.calls_per_step

    def forget(self) -> None:
        """Drop every plan and every captured step."""
        self._steps = StepCache(self.settings.max_plans)
        self._parameters: list[nn.Parameter] | None = None  # of root: listing them takes longer than the rest
        self._plans = PerShape(self.settings.max_plans)
        known = self.settings.calls_per_step
        self._calls = known or huggingface.calls_per_step(self.root)
        self._seen = 0  # calls of this step so far
        self._recent: deque[int] = deque(maxlen=REMEMBERED)  # calls of each of the last steps
        self._waiting: list[tuple[weakref.ref[Any], int]] = []  # those without their backward, bytes held
        self._need_bytes = self._need_size = 0  # the least peak of the largest call, and its elements

    @property
    def calls(self) -> int | None:
        """How many calls a step is taken to have; ``None`` until its first one has told."""
        return self._calls

    # -- each call ---------------------------------------------------------------------------------

    def arrived(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call about to run, and its place in its step."""
        alive = [(ref, held, ref()) for ref, held in self._waiting]
        self._waiting = [(ref, held) for ref, held, waiting in alive if waiting is not None and waiting.waits]
        if not self._waiting and self._seen:
            self._recent.append(self._seen)
            self._seen = 0
            if self.settings.calls_per_step is None:  # a step whose backward was left out may have misled
                self._calls = max(self._recent)
        place = len(self._waiting) + 1
        self._seen = max(self._seen, place)
        if self._calls is not None:
            self._calls = max(self._calls, place)
        if self._parameters is None:
            self._parameters = list(self.root.parameters())
        adds = self._calls != 1 or any(p.grad is not None for p in self._parameters)
        device = next(self.planned.parameters()).device
        return Call.of(args, kwargs, device=device, has_gradients=adds, place=place)

    def find(self, call: Call) -> Kept | None:
        """The plan that serves this call and what runs it; ``None`` where one has to be made."""
        kept = self._plans.find(call)
        if kept is None or not self._has_room(kept, call):
            return None
        if kept.any_size and self.settings.on_larger == "raise" and self._plans.exceeds(call):
            return None
        try:
            kept.runner.check(call.leaves, call.in_spec)
        except StalePlanError as edited:
            self._edited(edited)
            return None
        self.last = kept.plan
        return kept

    def started(self, kept: Kept) -> None:
        """The forward of a call has run; from here to its backward it holds memory."""
        variants, held = kept.runner.step.variants, kept.plan.held_bytes
        if variants is not None:
            last, held = variants.last, variants.held_bytes
            self.last = last if isinstance(last, Plan) else Plan.of(last)
        if kept.runner.last_call is not None:
            self._waiting.append((kept.runner.last_call, held))

    def _has_room(self, kept: Kept, call: Call) -> bool:
        """Whether the plan fits the room there is now, and was not made for much less."""
        plan, left, most = kept.plan, self._left_bytes(), self._most_held(call)
        if self._calls is None or plan.peak_bytes > left or (most is None) != (kept.most_held_bytes is None):
            return False
        if most is not None and kept.most_held_bytes is not None:
            if plan.held_bytes > most and most * ENOUGH < kept.most_held_bytes:
                return False
            if plan.recompute_flops and most > ENOUGH * kept.most_held_bytes:
                return False
        return not plan.recompute_flops or left <= ENOUGH * kept.left_bytes

    def _left_bytes(self) -> int:
        assert self.settings.budget_bytes is not None
        return self.settings.budget_bytes - sum(held for _, held in self._waiting)

    def _most_held(self, call: Call) -> int | None:
        return most_held(self._left_bytes(), self._need_bytes, self._calls or 1, call.signature.place)

    def _edited(self, why: StalePlanError) -> None:
        log.info("%s is planned again: %s", type(self.root).__name__, why)
        waiting = self._waiting
        self.forget()
        self._waiting = waiting

    # -- making plans ------------------------------------------------------------------------------

    def make(self, call: Call, original: Callable[..., Any]) -> Kept:
        """A plan for this call and what runs it.  Errors as :func:`planner.plan`."""
        self._refuse(call)
        began = time.perf_counter()
        # A meter that watches training is not to count this.
        with self.settings.search.reporting() as search, self.around(), modes_set_aside():
            self._tell = search.tell
            step = self._captured(call)
            resident_at = partial(self._resident, call.signature.has_gradients)
            resident = resident_at(step.graph, step.joint.inputs)
            limit_s = self.settings.search.time_limit_s
            step = replace(step.with_resident(resident, resident_at), least_limit_s=limit_s)
            try:
                plan = self._made_once(call, step)
            except InfeasibleBudgetError as error:
                raise self._in_company(error, call) from None
            runner = PlannedForward(self.planned, plan.executable(), original=original)
        any_size = runner.step.variants is not None
        kept = Kept(plan, runner, self._left_bytes(), self._most_held(call), any_size)
        self._plans.keep(call, kept)
        self.last = plan
        level = logging.DEBUG if self._announced or self._calls is None else logging.INFO
        self._announced = self._announced or self._calls is not None
        log.log(level, "%s", _announcement(plan, call, self._calls or 1, time.perf_counter() - began))
        return kept

    def _captured(self, call: Call) -> PricedStep:
        exact = replace(call.signature, has_gradients=False, place=1)
        step = self._steps.find(exact)
        if step is not None:
            try:
                guard = Guard(self.planned, step.captured.expected)
                guard.check_modules()
            except StalePlanError as edited:
                self._edited(edited)
                step = None
        if step is None:
            s = self.settings
            step = prepare(
                self.planned,
                call.inputs.without_data(),  # plans outlive the batch they were made from
                loss_fn=s.loss_fn,
                costs=s.costs,
                dynamic=self._steps.is_to_vary(exact),
                search=Search(progress=self._tell),
            )
            self._steps.keep(exact, step)
        if step.varying is None:
            return step
        return self._sized(step, call, self._steps.largest(exact))

    def _sized(self, step: PricedStep, call: Call, largest: list[torch.Tensor]) -> PricedStep:
        """A step of varying sizes, ready to be planned: at these where calls share the budget, else for any.

        In the latter case at the largest sizes seen if these are no larger.
        """
        assert step.varying is not None
        s, alone, sizes = self.settings, self._calls == 1, call.inputs.tensors()
        joint = step.varying.captures.of(self.planned, call.inputs, s.loss_fn)
        if joint.sizes is not None:
            if alone and largest and _no_smaller(largest, sizes) and joint.sizes.admit(largest):
                sizes = largest
            joint = joint.at(joint.sizes.read(sizes), fixed=not alone)
        search = replace(s.search, progress=None)
        asked = Varying(step.varying.captures, "replan", search, self.around)
        return replace(step.recaptured(self.planned, joint), varying=asked if alone else None)

    def _made_once(self, call: Call, step: PricedStep) -> Plan:
        """The plan, from whichever rank of a distributed job asked for it first."""
        s, left = self.settings, self._left_bytes()
        needs = (left, step.problem.resident_bytes, self._most_held(call), self._calls, call.signature.place)
        sizes = [tuple(tensor.shape) for tensor in step.joint.inputs.tensors()]
        varies = step.varying is not None
        options = f"{s.search.solver} {s.search.time_limit_s} {s.costs}"
        key = f"{step.captured.fingerprint} {sizes} {varies} {needs} {options}"

        def adopt(received: PlanData) -> Plan:
            self._learn_need(call, step, received.known_minimum_bytes)
            return Plan.of(received, step)

        wait_s = 60.0 + 4 * PROBES * s.search.time_limit_s
        return made_once(key, lambda: self._solved(call, step), adopt, wait_s=wait_s)

    def _learn_need(self, call: Call, step: PricedStep, known_bytes: int | None = None) -> None:
        size = sum(call.signature.sizes)
        if self._calls != 1 and size > self._need_size:
            self._need_bytes, self._need_size = known_bytes or step.minimum_peak_bytes, size

    def _solved(self, call: Call, step: PricedStep) -> Plan:
        s, left = self.settings, self._left_bytes()
        self._learn_need(call, step)
        if self._calls is None:
            if step.minimum_peak_bytes > left:
                raise step.infeasible(left)
            return step.least_plan()
        most = self._most_held(call)
        limit_s = s.search.time_limit_s if most is None else s.search.time_limit_s / PROBES

        def make(budget_bytes: int) -> Plan:
            return step.plan_bytes(
                budget_bytes, replace(s.search, time_limit_s=limit_s, progress=self._tell), hint=self.last
            )

        if most is None:
            return make(left)
        return plan_that_holds(most, step.problem.resident_bytes + most, left, make)

    def _resident(self, adds: bool, graph: TrainingGraph, inputs: Inputs) -> Resident:
        """What the device holds through a step of the whole model, not only of the part that is planned.

        ``adds``: the step adds to gradients that are there.
        """
        chosen = self.settings.optimizer
        arguments = (inputs.args, inputs.kwargs)
        device = graph.device
        found = resident_of(self.root, arguments, None if chosen == "find" else chosen, device=device)
        if chosen == "find":
            taken = found_optimizer_bytes(self.root, device)
            found = replace(
                found,
                optimizer_state_bytes=taken.state_bytes,
                optimizer_step_bytes=taken.step_transient_bytes,
            )
        inside = set() if adds else {id(p) for p in self.planned.parameters()}
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

    # -- saying no ---------------------------------------------------------------------------------

    def _refuse(self, call: Call) -> None:
        where = next(self.planned.parameters()).device
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

    def _in_company(self, error: InfeasibleBudgetError, call: Call) -> InfeasibleBudgetError:
        place, held = call.signature.place, sum(held for _, held in self._waiting)
        if self._calls == 1:
            return error
        known = f"of {self._calls}" if self._calls else "in the first step, which tells how many there are,"
        return error.saying(
            f"call {place} {known} of {type(self.planned).__name__} before the backward, {held / 1e9:.4g} GB "
            f"held by those before it: {error}"
        )


def _no_smaller(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(a >= b for x, y in pairs for a, b in zip(x.shape, y.shape, strict=True))


def _announcement(plan: Plan, call: Call, calls: int, seconds: float) -> str:
    gb = 1e9
    shared = f", call {call.signature.place} of {calls}" if calls > 1 else ""
    return (
        f"{plan.model_name} planned to {plan.budget_bytes / gb:.4g} GB for {call}{shared}: peak "
        f"{plan.peak_bytes / gb:.4g} GB (nothing recomputed: {plan.baseline_peak_bytes / gb:.4g} GB), "
        f"overhead {plan.overhead:.2%} (proved >= {plan.overhead_bound:.2%}), {seconds:.1f} s to plan"
    )
