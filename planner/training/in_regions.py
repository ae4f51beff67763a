"""Plans for a model whose step is not one graph, made as its training steps come.

The first step of a kind is looked at, the second recorded, both with next to nothing saved; from the third on
it runs as planned (:mod:`planner.regions.forward`).  All that the step holds was measured then, whatever
holds it: parts of the model around the planned module, a loss outside, several calls before one backward.

The first planned steps are counted too, on the CPU, and where they differ more of them.  What they take
beyond the budget is said, with its bytes, and set aside, and where they differ as much more as a larger one
may take beyond the largest (:func:`planner.regions.record.beyond`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import modes_set_aside
from planner.capture.inputs import Inputs
from planner.capture.refusals import refuse_unplannable
from planner.costs.target import target_for
from planner.errors import InfeasibleBudgetError
from planner.memory.live_optimizers import resident_in_training
from planner.memory.resident import Resident
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.ranks.once import made_once
from planner.regions.forward import DIFFERENT, RegionsForward, Solved
from planner.regions.record import Record, beyond
from planner.regions.session import Session
from planner.solving.in_regions import MOST_LEFT, JoinedStep
from planner.training.settings import Settings
from planner.units import bytes_text

__all__ = ["InRegions"]

log = logging.getLogger(__name__)

WAIT_S = 60.0  # for another rank's plan, beside what its search may take

LESS_MARGIN = 0.5, 0.25, 0.0  # shares of what steps may hold beyond those seen, where all of it does not fit


class InRegions:
    """The training steps of ``planned``, a part of ``root`` or all of it, in regions.

    ``why``   it is not one graph.
    """

    def __init__(self, root: nn.Module, planned: nn.Module, settings: Settings, why: str) -> None:
        self.root, self.planned, self.settings, self.why = root, planned, settings, why
        self._last: Plan | None = None
        self._is_tight = False  # and that has been said
        self._restart()

    def change(self, settings: Settings) -> None:
        """Settings for the next step and those behind it."""
        if settings != self.settings:
            self.settings = settings
            self._restart()

    def _restart(self) -> None:
        refuse_unplannable(self.planned, in_regions=True)
        assert self.settings.budget_bytes is not None
        session = Session(
            self.planned,
            target_for(self.planned, self.settings.costs),
            self.settings.budget_bytes,
        )
        self._forward = RegionsForward(
            self.planned, session, self._solved,
            root=self.root, any_mode=True, state=self._state_bytes,
        )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a call that trains."""
        return self._forward(*args, **kwargs)

    @property
    def session(self) -> Session:
        """The session that the steps run in."""
        return self._forward.session

    @property
    def last(self) -> Plan | None:
        """The plan of the last step, or the one made last."""
        return self._forward.plan or self._last

    def settle(self) -> None:
        """Another call than a training one comes: a recorder that is still on has done its work."""
        self.session.watching.settle()

    # -- planning ----------------------------------------------------------------------------------

    def _state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        optimizer = self.settings.optimizer
        found = resident_in_training(self.root, None, optimizer, self.session.device)
        return found.optimizer_state_bytes

    def _resident(self, record: Record) -> Resident:
        """What the step found: of parameters and buffers it is known what they are, the rest is counted as
        inputs.
        """
        found = resident_in_training(self.root, None, self.settings.optimizer, self.session.device)
        known = found.parameters_bytes + found.buffers_bytes
        rest = max(0, record.found_bytes - known)
        gradients_bytes = min(found.gradients_bytes, self._forward.gradients_bytes, rest)
        known += gradients_bytes
        inputs_bytes = max(0, record.found_bytes - known)
        return replace(found, gradients_bytes=gradients_bytes, inputs_bytes=inputs_bytes)

    def _solved(self, record: Record) -> Solved | None:
        """Plan a recorded step; ``None`` where loops are to be followed first."""
        began, s = time.perf_counter(), self.settings
        resident = self._resident(record)

        def step_of(margin: float) -> JoinedStep:
            step = JoinedStep.of(
                record, self.root, Inputs((), {}), resident, self.session.target,
                least_limit_s=s.search.time_limit_s, session=self.session, margin=margin,
            )  # fmt: skip
            return replace(step, why=self.why.split(". ")[0])

        with modes_set_aside():
            step = step_of(1.0)
            if self.session.loops.are_left and step.share < MOST_LEFT:
                return None
            less = [step_of(share) for share in LESS_MARGIN] if step.joined.sizes.differ else []
            self.session.plans.remember(self.session.kind, step.joined.sizes)
            try:
                return self._planned(step, began)
            except InfeasibleBudgetError as error:
                for share, tight in zip(LESS_MARGIN, less, strict=False):
                    with contextlib.suppress(InfeasibleBudgetError):
                        solved = self._planned(tight, began)
                        self._tell_tight(error, share)
                        return solved
                raise

    def _tell_tight(self, error: InfeasibleBudgetError, share: float = 0.0) -> None:
        """The plan has less margin than it should for steps that hold more than those seen."""
        if not self._is_tight:
            self._is_tight = True
            log.warning(
                "steps of %s hold other sizes from one to the next (they follow the data): it is planned for "
                "the largest of those seen and %s, and one larger than that is over the budget. Of a plan "
                "that leaves room for such: %s",
                type(self.root).__name__,
                f"{share:.0%} of the room that others may need" if share else "no room for others",
                error,
            )

    def _planned(self, step: JoinedStep, began: float) -> Solved:
        assert self.settings.budget_bytes is not None
        try:
            plan = self._made_once(step)
        except InfeasibleBudgetError as error:
            raise error.saying(f"{error}. Within this budget the step runs out of memory.") from None
        level = logging.DEBUG if self._last is not None else logging.INFO
        self._last = plan
        memory, share = (sum(getattr(r, f"{of}_share") for r in plan.regions) for of in ("memory", "time"))
        log.log(
            level,
            "%s planned to %.4g GB in %d regions, which hold %.0f%% of its memory and %.0f%% of its time: "
            "peak %.4g GB (nothing recomputed: %.4g GB), overhead %.2f%% (proved >= %.2f%%), %.1f s to plan. "
            "It is not one graph: %s",
            plan.model_name, plan.budget_bytes / 1e9, len(plan.regions), 100 * memory, 100 * share,
            plan.peak_bytes / 1e9, plan.baseline_peak_bytes / 1e9, 100 * plan.overhead,
            100 * plan.overhead_bound, time.perf_counter() - began, self.why,
        )  # fmt: skip
        return step.solved(plan, functools.partial(self._over, step))

    def _made_once(self, step: JoinedStep) -> Plan:
        """The plan, from whichever rank of a distributed job asked for it first.

        What a rank holds beside its regions may differ from what another does, when a collective lets go of
        its buffer for one: so each counts what the plan takes of it, and makes its own if that is too much.
        """
        budget_bytes, search = self.settings.budget_bytes, self.settings.search
        assert budget_bytes is not None

        made = False

        def make() -> Plan:
            nonlocal made
            made = True
            with search.reporting() as reported:
                return step.plan_bytes(budget_bytes, reported)

        def adopt(received: PlanData) -> Plan:
            plan = step.as_run_here(received, budget_bytes)
            if plan is None:
                log.info("the plan of another rank takes more than the budget here: this rank makes its own")
            return make() if plan is None else plan

        key = (
            f"{step.captured.fingerprint} {self.session.kind.structure} {step.memory.margin_bytes} "
            f"{budget_bytes} {search.solver} {search.time_limit_s} {self.settings.costs}"
        )
        plan = made_once(key, make, adopt, wait_s=WAIT_S + 4 * search.time_limit_s)
        if self._forward.company is not None:
            self._forward.company.runs(plan, made, self._depends(step))
        return plan

    def _depends(self, step: JoinedStep) -> dict[str, str]:
        """What a plan depends on, by name: where ranks run different plans, one of these differs."""
        s, kind = self.settings, self.session.kind
        return {
            "budget": f"{s.budget_bytes} bytes",
            "search": f"{s.search.solver}, {s.search.time_limit_s:g} s",
            "costs": str(s.costs),
            "torch": str(torch.__version__),
            "elements of the batch": str(kind.sizes),
            "structure": hashlib.sha256(repr(kind.structure).encode()).hexdigest()[:12],
            "graph": step.captured.fingerprint[:12],
        }

    def _over(self, step: JoinedStep, taken: Sequence[int]) -> Solved | None:
        """Planned steps took so much, without the optimizer's state; what is to be run instead, if the last
        of them took too much, or one that takes as much more as they differ would.
        """
        budget_bytes = self.settings.budget_bytes
        assert budget_bytes is not None
        state_bytes = step.resident.optimizer_state_bytes
        over = taken[-1] + state_bytes - budget_bytes
        is_largest = taken[-1] > max(taken[:-1], default=0)
        is_news = is_largest or len(taken) == DIFFERENT
        need = max(taken) + state_bytes + beyond(max(taken), min(taken), len(taken)) - budget_bytes
        if over > 0 and is_largest:
            log.warning(
                "a step of %s took %s, %s over its budget: it holds more than the one that it was planned "
                "by. That is set aside from here on",
                type(self.root).__name__, bytes_text(taken[-1] + state_bytes), bytes_text(over),
            )  # fmt: skip
        if need <= 0 or not is_news or (over <= 0 and len(taken) < DIFFERENT):
            return None
        try:
            return self._planned(step.with_margin(step.memory.margin_bytes + need), time.perf_counter())
        except InfeasibleBudgetError as error:
            if over <= 0:
                self._tell_tight(error)
            else:
                log.warning("%s; it trains on over its budget", error)
            return None
