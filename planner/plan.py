"""A plan: which values the step keeps, which it computes again, what that costs and how near it is to best.

A ``Plan`` is data first (:class:`~planner.plans.plan_data.PlanData`): every field can be printed, compared
and written to JSON, and reading one back executes nothing.  Here are its verbs, a line each.  Made by
:func:`planner.plan` it also remembers the captured step, from which ``rewrite`` and ``apply`` generate code
at once; read from a file it captures the model again and checks that it is the step the plan was made for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from planner.capture.module import unwrapped
from planner.capture.outputs import LossFn
from planner.errors import PlannerError
from planner.measure.step import tensors_in
from planner.options import Search, check_count, check_function, check_model
from planner.plans import serialize
from planner.plans.frontier_data import FrontierData, Peers
from planner.plans.plan_data import Decision, Placement, PlanData
from planner.plans.within_budget import WithinBudget
from planner.regions.forward import apply_plan
from planner.regions.observe import without_memory
from planner.runtime.apply import CheckpointedModule, applied, restored
from planner.runtime.build import executable, recaptured
from planner.runtime.held_outputs import HeldOutputs
from planner.runtime.step import ExecutableStep
from planner.runtime.variants import Replanner, Variants, Varying
from planner.runtime.verify import verify
from planner.view import block, depth, diff, display, explain, plots, snapshot
from planner.view.diff import PlanDiff
from planner.view.explain import Explanation

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

__all__ = ["CheckpointedModule", "Decision", "Origin", "Placement", "Plan", "load"]


class Whole(Replanner, Protocol):
    """A step of one graph, of which a program can be generated.

    :class:`planner.solving.priced.PricedStep` is one.
    """

    @property
    def varying(self) -> Varying | None: ...


class Origin(Protocol):
    """What a made plan remembers of how it was made; a plan from a file has none.

    ``whole``  the same where the step is one graph; ``None`` for one in regions.

    :class:`planner.solving.budgeted.BudgetedStep` is one.
    """

    @property
    def model(self) -> nn.Module: ...

    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model`` train as ``plan``."""
        ...

    def verified(
        self, plan: Plan, model: nn.Module, inputs: object, loss_fn: LossFn | None, seed: int
    ) -> WithinBudget:
        """The report of a step with ``plan`` and without."""
        ...

    @property
    def whole(self) -> Whole | None: ...
    @property
    def loss_fn(self) -> LossFn | None: ...
    @property
    def minimum_peak_bytes(self) -> int: ...
    @property
    def known_minimum_bytes(self) -> int | None: ...

    def frontier(
        self, budgets_bytes: Sequence[int] | None = None, search: Search | None = None, *, points: int = 8
    ) -> FrontierData:
        """Overhead against budget."""
        ...


class _Programs:
    """The program of one plan, generated when it is first asked for."""

    made: ExecutableStep | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Plan(PlanData):
    """The answer of :func:`planner.plan`: the fields of ``PlanData``, and what can be done with them.

    Bytes are of the whole step on ``device``; GB are 10**9 bytes.
    """

    _origin: Origin | None = field(default=None, repr=False)
    _programs: _Programs = field(default_factory=_Programs, init=False, repr=False)

    @classmethod
    def of(cls, data: PlanData, origin: Origin | None = None) -> Plan:
        """The plan that ``data`` tells of, with its verbs; ``origin``: the step captured here, if one was."""
        fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(PlanData)}
        return cls(**fields, _origin=origin)

    # -- numbers that may have to be solved for ----------------------------------------------------

    @property
    def minimum_peak_bytes(self) -> int:
        """The least peak for which a plan was found; solved for when first asked."""
        known = self.minimum_if_known
        if known is not None:
            return known
        if self._origin is None:
            raise PlannerError(
                "this plan was read from a file that does not say its minimum; plan the model again"
            )
        return self._origin.minimum_peak_bytes

    @property
    def minimum_if_known(self) -> int | None:
        """``minimum_peak_bytes`` if it was solved for before, else ``None``; never solves."""
        if self.known_minimum_bytes is not None or self._origin is None:
            return self.known_minimum_bytes
        return self._origin.known_minimum_bytes

    # -- looking -----------------------------------------------------------------------------------

    def summary(self) -> str:
        """A page of text: budget, peak, overhead, what fills the peak, what is recomputed where."""
        return display.summary(self)

    def _repr_html_(self) -> str:
        return display.html(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook stores: the page, and the summary for viewers that show no HTML."""
        return {"text/html": self._repr_html_(), "text/plain": self.summary()}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per value of the forward, in order of execution (needs pandas)."""
        return display.dataframe(self)

    def explain(self, name: str) -> Explanation:
        """Why a value, or what a module makes, is kept, recomputed or freed, in a few sentences.

        ``name`` is a value, a module path, or both: ``"encoder.layer.3.output.dense"``, ``"mm_5"``; of a
        path the end will do where it means one thing: ``"layer.3"``.  Every number comes from the plan's
        schedule with that choice turned round, as simulated (:mod:`planner.view.explain`).  Raises
        ``ValueError`` for an unknown name, with those that are near, or one that means several, with these.
        """
        return explain.explain(self, name)

    def diff(self, other: PlanData) -> PlanDiff:
        """What ``other``, a plan of the same model, decides otherwise, with bytes and seconds by layer.

        Raises ``PlannerError`` for a plan of another model.
        """
        return diff.diff(self, other)

    def plot_memory(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Live bytes over the step, by kind, against the budget and the step without recomputation."""
        return plots.plot_memory(self, ax)

    def plot_placements(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Model depth against time: when each layer's values are kept, dropped and recomputed."""
        return depth.plot_placements(self, ax)

    def plot_frontier(
        self,
        ax: matplotlib.axes.Axes | None = None,
        *,
        points: int = 8,
        time_limit_s: float = 10.0,
        peers: Peers | None = None,
    ) -> matplotlib.axes.Axes:
        """Overhead against budget, with the proved bound, and this plan on it; solves ``points`` budgets.

        ``time_limit_s``: seconds of search for each of them.
        ``peers``: other ways to train the same step, name -> (peak in bytes, overhead as a share of step
        time).
        """
        check_count("points", points)
        if self._origin is None:
            raise PlannerError(
                "a plan read from a file has no graph to solve again; call planner.frontier on the model"
            )
        curve = self._origin.frontier(search=Search(time_limit_s=time_limit_s), points=points)
        return plots.plot_frontier(curve, ax, plan=self, peers=peers)

    def plot_graph(self, module: str, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """The ops of one module as a graph: what is kept, what is dropped, and what is computed again.

        Raises ``PlannerError`` if there is no such module, if it has more ops than can be read, or if the
        plan is of a file that does not have its ops.
        """
        return block.plot_graph(self, module, ax)

    @property
    def code(self) -> str:
        """The rewritten step as Python; recomputed calls are named ``..._recomputed``."""
        return self.executable().program.code

    @property
    def variants(self) -> Variants | None:
        """The programs at hand for batches of other sizes; ``None`` where sizes are fixed."""
        variants = self.executable().variants
        return variants if isinstance(variants, Variants) else None

    def to_memory_snapshot(self, path: str | Path) -> None:
        """Write the planned step as a memory snapshot, to lie beside one recorded on a GPU.

        https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` read it
        (:mod:`planner.view.snapshot`); it is a pickle of plain data, since they read nothing else.
        """
        snapshot.save(self, path)

    # -- using -------------------------------------------------------------------------------------

    def rewrite(self, model: nn.Module | None = None) -> CheckpointedModule:
        """A GraphModule that trains as planned: the model's own Parameters, state_dict keys and output type.

        ``model`` defaults to the one planned.  Raises ``StalePlanError`` for a model of another
        structure, ``PlannerError`` if the plan came from a file and no model is given, or is for another
        device than the model's.
        """
        self._refuse_elsewhere()
        model = self._model(model, "rewrite")
        return CheckpointedModule(model, self.executable(model), self.watch())

    def apply(self, model: nn.Module | None = None) -> nn.Module:
        """Make ``model`` itself train as planned, in place; twice is a no-op.  Returns the model.

        A plan made with ``outputs="auto"`` looks at what the first steps hold, and is then planned again
        where that makes a difference.  Raises as :meth:`rewrite`.
        """
        self._refuse_elsewhere()
        model, origin = self._model(model, "apply"), self._origin
        self._refuse_compiled_from_file()
        if origin is not None:
            return origin.applied(self, model)
        if self.regions:
            return apply_plan(self, model)
        return applied(model, self.executable(model), self.watch())

    def restore(self, model: nn.Module | None = None) -> nn.Module:
        """Undo ``apply``, whichever plan was applied; a no-op if none was.  Returns the model."""
        return restored(self._model(model, "restore"))

    def verify(
        self,
        model: nn.Module | None = None,
        inputs: object = None,
        *,
        loss_fn: LossFn | None = None,
        seed: int = 0,
    ) -> Any:
        """Run the step with and without the plan and compare: outputs, gradients, buffers, peak, FLOPs.

        ``inputs`` and ``loss_fn`` default to those of the plan; a plan from a file knows neither, and one of
        :func:`planner.enable` knows no inputs.  Raises ``PlannerError`` if no inputs are given then, if model
        or inputs have no memory, or if gradients are not None.
        """
        self._refuse_elsewhere()
        model, origin = self._model(model, "verify"), self._origin
        check_function("loss_fn", loss_fn)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        hollow = without_memory(model, tensors_in(inputs))
        if hollow:
            raise PlannerError(
                f"verify runs a step of {type(model).__name__}, for which {hollow}: pass a model and inputs "
                "that are real, verify(model, inputs)"
            )
        self._refuse_compiled_from_file()
        if origin is not None:
            loss_fn = origin.loss_fn if loss_fn is None else loss_fn
            return origin.verified(self, model, inputs, loss_fn, seed)
        step = partial(self.apply, model) if self.regions else self.executable(model)
        return verify(self, step, model, inputs, loss_fn=loss_fn, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; :func:`planner.load` reads it."""
        serialize.save(self, path)

    # -- inside ------------------------------------------------------------------------------------

    def _refuse_compiled_from_file(self) -> None:
        if self.backend == "inductor" and self._origin is None:
            raise PlannerError(
                "this plan is of graphs that torch.compile cut and inductor compiles, and a file has none of "
                "them: it is for looking; planner.plan(model, ..., backend='inductor') makes it again"
            )

    def _refuse_elsewhere(self) -> None:
        if self.planned_for:
            raise PlannerError(
                f"this plan is for the {self.planned_for}, captured on {self.device}: its kernels, bytes and "
                f"seconds are those of the {self.planned_for}, so there is nothing here to run or to compare "
                f"with. It is for looking; where the {self.planned_for} is, plan the model again"
            )

    def watch(self) -> HeldOutputs | None:
        """Sees that the outputs that are planned for so are let go of."""
        return HeldOutputs("released") if self.released else None

    def _model(self, model: nn.Module | None, verb: str) -> nn.Module:
        if model is not None:
            check_model(model)
            model = unwrapped(model)
            return model.original if isinstance(model, CheckpointedModule) else model
        if self._origin is None:
            raise PlannerError(
                "this plan was read from a file and knows no model: pass the model it is for, "
                f"plan.{verb}(model)"
            )
        return self._origin.model

    def executable(self, model: nn.Module | None = None) -> ExecutableStep:
        """The generated program; made on first use and shared by every model it is applied to.

        ``model`` is needed once for a plan from a file: ``PlannerError`` without, ``StalePlanError`` for
        another than the plan's.
        """
        programs, origin = self._programs, self._origin
        if self.regions:
            raise PlannerError(
                f"this plan is of a step in {len(self.regions)} regions with the model's own code between "
                "them, which is no one program: plan.apply(model) makes the model train so"
            )
        if programs.made is None:
            whole = None if origin is None else origin.whole
            if whole is not None:
                programs.made = executable(self, whole.captured, whole.varying, whole)
            elif model is not None:
                programs.made = executable(self, *recaptured(self, model))
            else:
                raise PlannerError(
                    "this plan was read from a file, without its graph: plan.executable(model) captures the "
                    "model that it is for, and plan.code is there from then on"
                )
        return programs.made


def load(path: str | Path) -> Plan:
    """Read a plan.  Raises ``InvalidPlanFileError`` if the file is not one; ``OSError`` if it is not there.

    The plan can be looked at at once; ``rewrite(model)`` and ``apply(model)`` capture the model again.
    """
    return Plan.of(serialize.load(path))
