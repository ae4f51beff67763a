"""A plan: which values the step keeps, which it computes again, what that costs and how near it is to best.

A ``Plan`` is data first: every field can be printed, compared and written to JSON, and reading one
back executes nothing.  Made by :func:`planner.plan` it also remembers the captured step, from which
``rewrite`` and ``apply`` generate code at once; read from a file it captures the model again and
checks that it is the step the plan was made for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import fx, nn

from planner.capture.sizes import Dims
from planner.capture.wrappers import unwrapped
from planner.errors import PlannerError
from planner.rewrite.emit import Program, emit
from planner.runtime.forward import PlannedForward, Step, planned_forward_of
from planner.runtime.variants import Variants

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

    from planner.capture.joint_graph import LossFn
    from planner.frontier import Peers
    from planner.plans.outline import Outline
    from planner.runtime.verify import Report
    from planner.solving.calibrate import Calibration
    from planner.solving.prepared import Prepared
    from planner.view.diff import PlanDiff
    from planner.view.explain import Explanation

__all__ = ["CheckpointedModule", "Decision", "Placement", "Plan"]

Decision = Literal["save", "recompute", "free"]


@dataclass(frozen=True)
class Placement:
    """What happens to one value of the forward.

    ``name``              of the value, as in the generated code.
    ``module``            path of the module that makes it; ``op`` the kernel.
    ``bytes``             of its storage.
    ``decision``          "save": kept for the backward; "recompute": dropped and computed again;
                          "free": the backward never needs it.
    ``seconds``           of its op, once.
    ``times_recomputed``  how often its op runs beyond the first time.
    ``call``              the op's name in ``Plan.sequence``; outputs of one call share it.
    ``spans``             first and last step, both included, at which each copy of the value is in memory:
                          the one the forward makes, then one per recomputation.
    """

    name: str
    module: str
    op: str
    bytes: int
    decision: Decision
    seconds: float
    times_recomputed: int
    call: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer of :func:`planner.plan`.  Bytes are of the whole step on ``device``; GB are 10**9 bytes.

    ``peak_bytes``           predicted peak; ``baseline_peak_bytes`` the peak when nothing is recomputed.
    ``overhead``             recompute seconds / seconds of the step when nothing is recomputed.
    ``overhead_bound``       proved: no plan within the budget (this order of ops) has less overhead.
    ``status``               "optimal" (the two are equal) or "feasible".
    ``breakdown``            bytes by kind at the peak; they add up to ``peak_bytes``.
    ``timeline``             live bytes at each step, shape (T,); ``timeline_by_kind`` splits it.
    ``sequence``             op names in execution order; a repeated name is a recomputation.
    ``recompute_flops``      extra FLOPs; ``step_flops`` those of the step when nothing is recomputed.
    ``step_s``               predicted seconds of the step when nothing is recomputed.
    ``floor_bytes``          proved: no plan has a lower peak.
    ``peak_op``              name of the op at the peak, and ``peak_module`` the path of its module.
    ``optimizer_step_bytes`` bytes during the optimizer's own step, 0 without ``optimizer``.
    ``varying_dims``         for each input tensor its dimensions that may vary; ``None`` if none may.
    ``planned_for``          name of the device planned for, where it is not the model's own; bytes and
                             seconds are then of that device, and the plan is not to be applied.
    ``reserved_bytes``       predicted: what CUDA's caching allocator takes from the driver for the step, of
                             which ``peak_bytes`` are allocated; ``None`` where there is no such allocator.
    ``calibration``          what its step was measured to take, and the rounds before; ``None`` without.

    Where sizes vary, all figures are for the sizes planned for.
    """

    model_name: str
    budget_bytes: int
    peak_bytes: int
    baseline_peak_bytes: int
    overhead: float
    overhead_bound: float
    status: Literal["optimal", "feasible"]
    placements: tuple[Placement, ...]
    breakdown: Mapping[str, int]
    timeline: np.ndarray
    timeline_by_kind: Mapping[str, np.ndarray]
    baseline_timeline: np.ndarray
    sequence: tuple[str, ...]
    op_count: int
    step_s: float
    step_flops: int
    recompute_flops: int
    floor_bytes: int
    optimizer_step_bytes: int
    solver: str
    solve_s: float
    cost_source: str
    cost_device: str
    device: str
    torch_version: str
    fingerprint: str
    peak_op: str
    peak_module: str
    differentiated: tuple[int, ...]
    input_spec: Any
    known_minimum_bytes: int | None = None
    varying_dims: Dims | None = None
    calibration: Calibration | None = None
    planned_for: str = ""
    reserved_bytes: int | None = None
    _prepared: Prepared | None = field(default=None, repr=False)
    _outline: Outline | None = field(default=None, repr=False)

    # -- numbers derived from the fields -----------------------------------------------------------

    @property
    def gap(self) -> float:
        """``overhead - overhead_bound``: how much of the step's time could at most still be won."""
        return max(0.0, self.overhead - self.overhead_bound)

    @cached_property
    def held_bytes(self) -> int:
        """Bytes held between the forward and the backward: saved values, outputs and inputs."""
        kinds = self.timeline_by_kind
        turn = int(kinds["saved"].argmax())  # saved values pile up in the forward and go in the backward
        return int(kinds["saved"][turn] + kinds["outputs"].max() + kinds["inputs"].max())

    @property
    def recompute_s(self) -> float:
        """Predicted seconds spent on recomputation."""
        return self.overhead * self.step_s

    @property
    def minimum_peak_bytes(self) -> int:
        """The least peak for which a plan was found; solved for when first asked."""
        known = self.minimum_if_known
        if known is not None:
            return known
        if self._prepared is None:
            raise PlannerError(
                "this plan was read from a file that does not say its minimum; plan the model again"
            )
        return self._prepared.minimum_peak_bytes

    @property
    def minimum_if_known(self) -> int | None:
        """``minimum_peak_bytes`` if it was solved for before, else ``None``; never solves."""
        if self.known_minimum_bytes is not None or self._prepared is None:
            return self.known_minimum_bytes
        return self._prepared.__dict__.get("minimum_peak_bytes")

    @property
    def outline_if_known(self) -> Outline | None:
        """The step in outline; ``None`` for a plan from a file that was written without it."""
        if self._outline is not None or self._prepared is None or self._prepared.costs is None:
            return self._outline
        return self._prepared.outline

    # -- looking -----------------------------------------------------------------------------------

    def summary(self) -> str:
        """A page of text: budget, peak, overhead, what fills the peak, what is recomputed where."""
        from planner.view.display import summary

        return summary(self)

    def __repr__(self) -> str:
        return (
            f"Plan({self.model_name}: budget {self.budget_bytes / 1e9:.4g} GB, "
            f"peak {self.peak_bytes / 1e9:.4g} GB "
            f"(nothing recomputed: {self.baseline_peak_bytes / 1e9:.4g} GB), overhead {self.overhead:.2%}, "
            f"proved >= {self.overhead_bound:.2%}, {self.status})"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from planner.view.display import html

        return html(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook stores: the page, and the summary for viewers that show no HTML."""
        return {"text/html": self._repr_html_(), "text/plain": self.summary()}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per value of the forward, in order of execution (needs pandas)."""
        from planner.view.display import dataframe

        return dataframe(self)

    def explain(self, name: str) -> Explanation:
        """Why a value, or what a module makes, is kept, recomputed or freed, in a few sentences.

        ``name`` is a value, a module path, or both: ``"encoder.layer.3.output.dense"``, ``"mm_5"``; of a
        path the end will do where it means one thing: ``"layer.3"``.  Every number comes from the plan's
        schedule with that choice turned round, as simulated (:mod:`planner.view.explain`).  Raises
        ``ValueError`` for an unknown name, with those that are near, or one that means several, with these.
        """
        from planner.view.explain import explain

        return explain(self, name)

    def diff(self, other: Plan) -> PlanDiff:
        """What ``other``, a plan of the same model, decides otherwise, with bytes and seconds by layer.

        Raises ``PlannerError`` for a plan of another model.
        """
        from planner.view.diff import diff

        return diff(self, other)

    def plot_memory(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Live bytes over the step, by kind, against the budget and the step without recomputation."""
        from planner.view.plots import plot_memory

        return plot_memory(self, ax)

    def plot_placements(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Model depth against time: when each layer's values are kept, dropped and recomputed."""
        from planner.view.depth import plot_placements

        return plot_placements(self, ax)

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
        from planner.view.plots import plot_frontier

        if self._prepared is None:
            raise PlannerError(
                "a plan read from a file has no graph to solve again; call planner.frontier on the model"
            )
        curve = self._prepared.frontier(points=points, time_limit_s=time_limit_s)
        return plot_frontier(curve, ax, plan=self, peers=peers)

    def plot_graph(self, module: str, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """The ops of one module as a graph: what is kept, what is dropped, and what is computed again.

        Raises ``PlannerError`` if there is no such module, if it has more ops than can be read, or if the
        plan is of a file that does not have its ops.
        """
        from planner.view.block import plot_graph

        return plot_graph(self, module, ax)

    @property
    def code(self) -> str:
        """The rewritten step as Python; recomputed calls are named ``..._recomputed``."""
        return self.step(None).program.code

    @property
    def variants(self) -> Variants | None:
        """The programs at hand for batches of other sizes; ``None`` where sizes are fixed."""
        return self.step(None).variants

    def to_memory_snapshot(self, path: str | Path) -> None:
        """Write the planned step as a memory snapshot, to lie beside one recorded on a GPU.

        https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` read it
        (:mod:`planner.view.snapshot`); it is a pickle of plain data, since they read nothing else.
        """
        from planner.view.snapshot import save

        save(self, path)

    # -- using -------------------------------------------------------------------------------------

    def rewrite(self, model: nn.Module | None = None) -> CheckpointedModule:
        """A GraphModule that trains as planned: the model's own Parameters, state_dict keys and output type.

        ``model`` defaults to the one planned.  Raises ``StalePlanError`` for a model of another
        structure, ``PlannerError`` if the plan came from a file and no model is given, or is for another
        device than the model's.
        """
        self._refuse_elsewhere()
        model = self._model(model)
        return CheckpointedModule(model, self.step(model))

    def apply(self, model: nn.Module | None = None) -> nn.Module:
        """Make ``model`` itself train as planned, in place; twice is a no-op.  Returns the model.

        Raises as :meth:`rewrite`.
        """
        self._refuse_elsewhere()
        model = self._model(model)
        step = self.step(model)
        applied = planned_forward_of(model)
        if applied is not None:
            if applied.step is step:
                return model
            self.restore(model)
        before = model.__dict__.get("forward")
        stand_in = PlannedForward(model, step)  # raises before anything is changed
        stand_in.before = before
        model.__dict__["forward"] = stand_in
        return model

    def restore(self, model: nn.Module | None = None) -> nn.Module:
        """Undo ``apply``, whichever plan was applied; a no-op if none was.  Returns the model."""
        model = self._model(model)
        applied = planned_forward_of(model)
        if applied is not None:
            if applied.before is None:
                del model.__dict__["forward"]
            else:
                model.__dict__["forward"] = applied.before
        return model

    def verify(
        self,
        model: nn.Module | None = None,
        inputs: object = None,
        *,
        loss_fn: LossFn | None = None,
        seed: int = 0,
    ) -> Report:
        """Run the step with and without the plan and compare: outputs, gradients, buffers, peak, FLOPs."""
        from planner.runtime.verify import verify

        self._refuse_elsewhere()
        return verify(self, self._model(model), inputs, loss_fn=loss_fn, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; :func:`planner.load` reads it."""
        from planner.plans.serialize import save

        save(self, path)

    # -- inside ------------------------------------------------------------------------------------

    def _refuse_elsewhere(self) -> None:
        if self.planned_for:
            raise PlannerError(
                f"this plan is for the {self.planned_for}, captured on {self.device}: its kernels, bytes and "
                f"seconds are those of the {self.planned_for}, so there is nothing here to run or to compare "
                f"with. It is for looking; where the {self.planned_for} is, plan the model again"
            )

    def _model(self, model: nn.Module | None) -> nn.Module:
        if model is not None:
            model = unwrapped(model)
            return model.original if isinstance(model, CheckpointedModule) else model
        if self._prepared is None:
            raise PlannerError("this plan was read from a file and knows no model; pass the model it is for")
        return self._prepared.model

    def step(self, model: nn.Module | None = None) -> Step:
        """The generated program; made on first use and shared by every model it is applied to."""
        if "_made_step" not in self.__dict__:
            prepared = self._prepared
            if prepared is None:
                from planner.solving.prepared import prepare_for

                if model is None:
                    raise PlannerError("this plan was read from a file; pass the model it is for")
                prepared = prepare_for(self, model)
            if prepared.varying is not None:
                variants = Variants(self, prepared, prepared.varying)
                step = replace(variants.all[0].step, variants=variants)
            else:
                program = emit(
                    prepared.graph,
                    prepared.steps(self.sequence),
                    boundary=prepared.forward_steps(self.sequence),
                )
                step = Step(
                    program,
                    prepared.joint.template,
                    prepared.expected,
                    prepared.graph.device,
                    self.budget_bytes,
                )
            object.__setattr__(self, "_made_step", step)
        made: Step = self.__dict__["_made_step"]
        return made


class CheckpointedModule(fx.GraphModule):
    """The rewritten model.  ``graph`` is its forward; ``code`` the whole step, backward included.

    It shares the original's submodules and Parameters, so training either trains both.
    """

    original: nn.Module

    def __init__(self, original: nn.Module, step: Step) -> None:
        super().__init__({}, step.program.forward.graph, type(original).__name__ + "Checkpointed")
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        self.__dict__["original"] = original
        self.__dict__["forward"] = PlannedForward(original, step, original=_unplanned(original))
        self.training = original.training

    @property
    def program(self) -> Program:
        """The generated graphs."""
        planned: PlannedForward = self.__dict__["forward"]
        return planned.step.program

    @property
    def code(self) -> str:
        """The whole step as Python; recomputed calls are named ``..._recomputed``."""
        return self.program.code

    def train(self, mode: bool = True) -> CheckpointedModule:
        """Also sets the original's own flag, which decides whether the plan applies."""
        self.original.training = mode
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedModule:
        original = copy.deepcopy(self.original, memo)
        return CheckpointedModule(original, self.__dict__["forward"].step)

    def __reduce__(self) -> Any:
        return self.__dict__["forward"].__reduce__()


def _unplanned(model: nn.Module) -> Any:
    applied = planned_forward_of(model)
    return model.forward if applied is None else applied.original
