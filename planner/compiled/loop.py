"""Plans for a model that trains compiled, made as its steps come; the backend for code that compiles itself.

The first step of a kind (:mod:`planner.compiled.kinds`) is seen: its graphs run call by call, with little
kept, and not in inductor's loops, so that it may take more than it will once it is planned.  Its random
numbers are its own.  When the next step begins it is planned, and compiled as planned.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from planner import _compat
from planner.capture.inputs import Inputs
from planner.compiled.session import CompiledSession
from planner.compiled.step import CompiledStep
from planner.costs.target import CostSource, Target, target_for
from planner.errors import InfeasibleBudgetError
from planner.memory.live_optimizers import resident_in_training
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import budget_bytes_of
from planner.options import RecomputeMode, Search, check_options
from planner.plan import Plan
from planner.ranks.once import made_once
from planner.units import bytes_text

__all__ = ["Compiled", "Inductor", "inductor"]

log = logging.getLogger(__name__)

WAIT_S = 120.0  # for another rank's plan, whose code is generated too, beside what its search may take


class Compiled:
    """The training steps of ``planned``, a part of ``root`` or all of it, compiled.

    ``forward``  of ``planned`` as it is written.
    """

    def __init__(
        self,
        root: nn.Module,
        planned: nn.Module,
        forward: Callable[..., Any],
        budget_bytes: int,
        optimizer: OptimizerLike | Literal["find"] | None,
        costs: CostSource,
        search: Search,
        recompute: RecomputeMode = "fastest",
    ) -> None:
        same_bits = recompute == "same bits"
        self.root, self.budget_bytes, self.optimizer, self.search = root, budget_bytes, optimizer, search
        self.session = CompiledSession(target_for(planned, costs), root, self._planned, same_bits=same_bits)
        self.session.is_told = True
        self.last: Plan | None = None
        self._told = False
        self._call = torch.compile(_compat.own_code(forward), backend=self.session.backend, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a call that trains."""
        before = self.session.called
        self.session.called_by_us(args, kwargs)
        outputs = self._call(*args, **kwargs)
        if self.session.called == before and not self._told:
            self._told = True
            log.warning(
                "a call of %s ran as eager runs it, outside the plan and its budget: torch.compile has "
                "given up on it (its limit of recompilations, torch._dynamo.config.recompile_limit, is %d; "
                "TORCH_LOGS=recompiles tells what differed). Pad batches to few sizes, or raise the limit",
                type(self.root).__name__, _compat.recompile_limit(),
            )  # fmt: skip
        return outputs

    def _planned(self, session: CompiledSession) -> None:
        self.last = _plan_of(session, self.root, self.budget_bytes, self.optimizer, self.search)


class Inductor:
    """What :func:`inductor` returns: a backend for ``torch.compile``.  ``plan``: the last one, or None."""

    def __init__(
        self,
        budget_bytes: int,
        optimizer: OptimizerLike | Literal["find"] | None,
        costs: CostSource,
        search: Search,
        recompute: RecomputeMode = "fastest",
    ) -> None:
        self.budget_bytes, self.optimizer, self.costs, self.search = budget_bytes, optimizer, costs, search
        self.recompute = recompute
        check_options(self, finds=True)
        self.plan: Plan | None = None
        self._session: CompiledSession | None = None

    def __call__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
    ) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs.  ``TypeError`` for torch.compile's ``mode=`` and ``options=``."""
        if mode is not None or options is not None:
            given = f"mode={mode!r}" if options is None else f"options={options!r}"
            raise TypeError(
                f"planner.inductor takes no {given}: torch.compile has these for its own backends alone. Set "
                "them for inductor itself, before a call: torch._inductor.config.max_autotune = True. "
                "CUDA graphs (mode='reduce-overhead') hold memory that no plan counts; leave them off"
            )
        if self._session is None:
            device = next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
            target = Target.of(self.costs, device)
            same_bits = self.recompute == "same bits"
            self._session = CompiledSession(target, None, self._planned, same_bits=same_bits)
        return self._session.backend(gm, inputs)

    def _planned(self, session: CompiledSession) -> None:
        model = session.model
        if model is None:
            model = Graphs()
            for i, parameter in enumerate(session.parameters.values()):
                model.register_parameter(f"parameter_{i}", parameter)
        self.plan = _plan_of(session, model, self.budget_bytes, self.optimizer, self.search)


class Graphs(nn.Module):
    """Stands for the model, where only its graphs are known: their parameters."""


def inductor(
    budget_gb: float,
    *,
    optimizer: OptimizerLike | Literal["find"] | None = "find",
    costs: CostSource = "auto",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    recompute: RecomputeMode = "fastest",
) -> Inductor:
    """A backend for code that compiles itself: ``torch.compile(model, backend=planner.inductor(8))``.

    All graphs that are compiled with it share the budget, GB of 10**9 bytes for the whole step, what the
    loop computes outside of them (a loss) included.  The first two steps run uncompiled: with the first it
    is known where the code begins, and the second is seen from there; when the third begins that is planned,
    and compiled so.  Where other shapes come, or graphs without a plan (a branch), that step is seen and
    planned.

    Arguments as for :func:`planner.enable`, ``recompute`` as for :func:`planner.plan`.  Raises ``TypeError``
    or ``ValueError`` for those that make no sense; a step whose budget cannot be met raises
    ``InfeasibleBudgetError``.
    """
    search = Search(solver, time_limit_s)
    return Inductor(budget_bytes_of(budget_gb), optimizer, costs, search, recompute)


def _plan_of(
    session: CompiledSession,
    root: nn.Module,
    budget_bytes: int,
    optimizer: OptimizerLike | Literal["find"] | None,
    search: Search,
) -> Plan:
    """Plan the step that ``session`` has seen, and let its graphs run so."""
    began = time.perf_counter()
    with _compat.modes_set_aside(), search.reporting() as search:
        record = session.record()
        found = resident_in_training(root, None, optimizer, session.target.here)
        known = found.parameters_bytes + found.buffers_bytes
        rest = max(0, record.found_bytes - known)
        gradients_bytes = min(found.gradients_bytes, rest)
        resident = dataclasses.replace(
            found, gradients_bytes=gradients_bytes, inputs_bytes=rest - gradients_bytes
        )
        seen_bytes = session.seen_bytes + found.optimizer_state_bytes
        if seen_bytes > budget_bytes:
            log.warning(
                "the step that was seen took %s, and the budget is %s: it ran call by call, uncompiled, as "
                "the first of every kind does, with next to nothing kept. Those that follow are planned to "
                "fit; leave that much room on the device for the first",
                bytes_text(seen_bytes), bytes_text(budget_bytes),
            )  # fmt: skip
        step = CompiledStep.of_session(
            session, record, root, Inputs((), {}), resident, least_limit_s=search.time_limit_s
        )
        try:
            plan = _made_once(session, step, budget_bytes, search)
        except InfeasibleBudgetError as error:
            raise error.saying(f"{error}. Within this budget the compiled step runs out of memory.") from None
    step.follow(plan)
    log.info("%r, %d graphs, planned in %.1f s", plan, len(plan.regions), time.perf_counter() - began)
    return plan


def _made_once(session: CompiledSession, step: CompiledStep, budget_bytes: int, search: Search) -> Plan:
    """The plan of whichever rank of a distributed job asked for it first, if it fits what this one holds."""
    made = False

    def make() -> Plan:
        nonlocal made
        made = True
        return step.plan_bytes(budget_bytes, search)

    depends = {
        "budget": f"{budget_bytes} bytes",
        "search": f"{search.solver}, {search.time_limit_s:g} s",
        "costs": str(step.costs.source),
        "torch": str(torch.__version__),
        "bits": "same" if session.same_bits else "fastest",
        "graph": step.captured.fingerprint,
    }
    plan = made_once(
        f"compiled {depends}",
        make,
        lambda received: step.as_run_here(received, budget_bytes) or make(),
        wait_s=WAIT_S + 4 * search.time_limit_s,
    )
    if session.company is not None:
        session.company.runs(plan, made, {**depends, "graph": depends["graph"][:12]})
    return plan
