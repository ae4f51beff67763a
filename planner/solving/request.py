"""What is asked for: which training step, and which plan for it; checked where it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Self

from torch import nn

from planner.capture.outputs import LossFn
from planner.capture.sizes import Dims, Dynamic
from planner.costs.target import CostSource, target_for
from planner.measure.step import tensors_in
from planner.memory.optimizer_state import OptimizerLike
from planner.options import (
    BackendMode,
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OnLarger,
    OrderMode,
    OutputsMode,
    RecomputeMode,
    Search,
    check_model,
    check_options,
)
from planner.solving.calibrate import refuse_unreal
from planner.solving.chunked import refuse_chunks
from planner.solving.in_backward import stepping_in_backward
from planner.solving.in_regions import JoinedStep, captured_as, step_in_regions
from planner.solving.priced import PricedStep, prepare

__all__ = ["PlanRequest", "StepRequest"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StepRequest:
    """Which training step is to be captured and priced, and how; named as the arguments of
    :func:`planner.plan`.

    ``dynamic``  also by tensor: which dimensions of each vary.
    ``search``   for plans that the step itself asks for, such as its least one; tells of the capture.

    Raises ``TypeError`` or ``ValueError`` for an option that is none, ``PlannerError`` for a loss that is to
    be computed in chunks where no step of that kind can.
    """

    model: nn.Module
    inputs: object = None
    search: Search = field(default_factory=Search)
    loss_fn: LossFn | None = None
    optimizer: OptimizerLike | None = None
    costs: CostSource = "auto"
    dynamic: Dynamic | Dims = False
    on_larger: OnLarger = "replan"
    outputs: OutputsMode = "auto"
    gradients: GradientsMode = "auto"
    capture: CaptureMode = "auto"
    chunk_loss: ChunkLoss = False

    def __post_init__(self) -> None:
        check_model(self.model)
        check_options(self)
        self._refuse_together()

    def _refuse_together(self) -> None:
        """Options that make no sense together."""
        refuse_chunks(self.chunk_loss, self.loss_fn, self.dynamic, self.capture == "regions")

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "inputs")}
        told = [
            f"{f.name}={given[f.name]!r}" for f in fields(self) if given.get(f.name, f.default) != f.default
        ]
        return f"{type(self).__name__}({', '.join([type(self.model).__name__, *told])})"

    @contextmanager
    def reporting(self) -> Iterator[Self]:
        """The same with the reporter of its search open: :meth:`planner.options.Search.reporting`."""
        with self.search.reporting() as search:
            yield replace(self, search=search)

    @property
    def drops(self) -> bool:
        """Whether what no graph can carry is not handed out, so that the loss can be computed in chunks."""
        return self.chunk_loss not in ("auto", False)

    def step(self) -> PricedStep | JoinedStep:
        """The step with its costs, in one graph or in regions.

        Raises ``TraceError`` where it cannot be had as ``capture`` asks, ``PlannerError`` for what cannot be
        planned.
        """
        step = captured_as(self.capture, lambda: self._whole(self.drops), self._in_regions)
        return stepping_in_backward(step, self.gradients, self.optimizer)

    def as_one_graph(self) -> PricedStep:
        """The step in one graph, whatever ``capture`` says, and without what no graph can carry.

        Raises ``TraceError`` where it is none even so, ``PlannerError`` for what cannot be planned.
        """
        return stepping_in_backward(self._whole(True), self.gradients, self.optimizer)

    def _whole(self, drops: bool) -> PricedStep:
        return prepare(
            self.model, self.inputs, loss_fn=self.loss_fn, optimizer=self.optimizer, costs=self.costs,
            dynamic=self.dynamic, on_larger=self.on_larger, search=self.search, outputs=self.outputs,
            drops=drops,
        )  # fmt: skip

    def _in_regions(self) -> JoinedStep:
        return step_in_regions(
            self.model, self.inputs, loss_fn=self.loss_fn, optimizer=self.optimizer, costs=self.costs,
            search=self.search,
        )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PlanRequest(StepRequest):
    """Which plan is to be made of a step; named as the arguments of :func:`planner.plan`.

    ``budget_bytes``  for the whole step on the model's device.

    Raises as :class:`StepRequest`, ``ValueError`` for options that make no sense together, and
    ``PlannerError`` for a step that is to be measured and is not here.
    """

    budget_bytes: int
    calibrate: bool = False
    backend: BackendMode = "eager"
    recompute: RecomputeMode = "fastest"
    order: OrderMode = "given"

    def _refuse_together(self) -> None:
        if self.backend == "inductor":
            self._refuse_with_inductor()
        else:
            super()._refuse_together()
        if self.calibrate:
            refuse_unreal(self.model, tensors_in(self.inputs), target_for(self.model, self.costs))

    def _refuse_with_inductor(self) -> None:
        given = {
            "dynamic": bool(self.dynamic),
            "calibrate": self.calibrate,
            "capture": self.capture != "auto",
            "gradients": self.gradients == "consumed",
            "chunk_loss": self.chunk_loss not in ("auto", False),
            "order": self.order != "given",
        }
        if given.pop("chunk_loss"):
            raise ValueError(
                "chunk_loss is not for backend='inductor': its chunks would be read as one graph, whose "
                "loops inductor joins, and a model that returns its logits gets a gradient of them, as "
                "large, in every backward. Plan with backend='eager', or without chunk_loss; a module that "
                "returns only its loss is cut by torch itself, without a budget, under "
                "torch._inductor.config.auto_chunker.enable"
            )
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{name} is not for backend='inductor': Dynamo cuts the step, each size is compiled by "
                    "itself, and what the generated code takes is played beforehand"
                )

    def in_seconds(self, time_limit_s: float) -> Self:
        """The same with so many seconds of search."""
        return replace(self, search=replace(self.search, time_limit_s=time_limit_s))
