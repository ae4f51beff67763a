"""A plan as data: every field can be printed, compared and written to JSON.

What solves, runs and draws reads a :class:`PlanData`; :class:`planner.Plan` adds the verbs to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from planner.graph.step_graph import scratch_of
from planner.plans.outline import Outline
from planner.units import bytes_text

if TYPE_CHECKING:
    from planner.capture.inputs import Inputs
    from planner.capture.sizes import Dims
    from planner.graph.chunks.chunked import Chunked
    from planner.options import OrderMode

__all__ = [
    "Backend",
    "Calibration",
    "Decision",
    "InputRecord",
    "OutputState",
    "Placement",
    "PlanData",
    "RegionSummary",
    "Round",
]

# Inputs by structure and sizes, as JSON holds them: what a plan from a file knows of its batch.
InputRecord: TypeAlias = Mapping[str, Any]

Backend = Literal["eager", "inductor"]
Decision = Literal["save", "recompute", "free"]

# Until when the caller holds an output: to the end of the step, until the backward begins, or, as a name that
# is only assigned again does, until the next call has returned; or that it is not made.
OutputState = Literal["held", "released", "kept", "unread"]


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


@dataclass(frozen=True)
class Round:
    """One planned step.  Bytes are of the whole step, the optimizer's state included.

    ``margin_bytes``     set aside when it was planned; ``predicted_bytes`` its peak without them.
    ``allocated_bytes``  measured, ``reserved_bytes`` too, or ``None``.
    """

    margin_bytes: int
    predicted_bytes: int
    allocated_bytes: int
    reserved_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            count = getattr(self, field.name)
            optional = field.name == "reserved_bytes" and count is None
            if not optional and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ValueError(f"{field.name} must be a count of bytes, 0 or more, got {count!r}")

    @property
    def taken_bytes(self) -> int:
        """What has to fit the budget."""
        return max(self.allocated_bytes, self.reserved_bytes or 0)

    def __str__(self) -> str:
        reserved = "" if self.reserved_bytes is None else f", reserved {bytes_text(self.reserved_bytes)}"
        margin = f", {bytes_text(self.margin_bytes)} set aside" if self.margin_bytes else ""
        return (
            f"predicted {bytes_text(self.predicted_bytes)}{margin}; "
            f"allocated {bytes_text(self.allocated_bytes)}{reserved}"
        )


@dataclass(frozen=True)
class Calibration:
    """The rounds a plan went through; the last one is the plan's own."""

    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise ValueError("a calibration has at least one round")

    @property
    def last(self) -> Round:
        """What the plan's own step was measured to take."""
        return self.rounds[-1]

    def __str__(self) -> str:
        return "\n".join(f"round {k}: {r}" for k, r in enumerate(self.rounds, 1))


@dataclass(frozen=True)
class RegionSummary:
    """What a plan does with one call of a region.

    ``name``              of the call, with which the names of its ops and values begin: "r0".
    ``path``              of the module that it was cut from; "" for the model itself.
    ``ops``               it runs when nothing is recomputed, in ``seconds``; a share ``time_share`` of the
                          step's.
    ``peak_bytes``        of its values at the peak of the step when nothing is recomputed; a share
                          ``memory_share`` of what the step then takes beside what is there throughout.
    ``saved_bytes``       that it keeps for the backward.
    ``recomputed_bytes``  that it drops and makes again, in ``recompute_s``.
    """

    name: str
    path: str
    ops: int
    seconds: float
    time_share: float
    peak_bytes: int
    memory_share: float
    saved_bytes: int
    recomputed_bytes: int
    recompute_s: float

    def __post_init__(self) -> None:
        for name in ("ops", "peak_bytes", "saved_bytes", "recomputed_bytes"):
            if (count := getattr(self, name)) < 0:
                raise ValueError(f"{name} of region {self.name!r} is {count}, want 0 or more")
        for name in ("time_share", "memory_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} of region {self.name!r} is {share}, want 0 to 1")

    def __str__(self) -> str:
        where = f" ({self.path})" if self.path else ""
        return (
            f"{self.name}{where}: {self.ops} ops, {self.time_share:.1%} of the step's time, "
            f"{self.memory_share:.1%} of its memory; {bytes_text(self.saved_bytes)} kept, "
            f"{bytes_text(self.recomputed_bytes)} recomputed"
        )


@dataclass(frozen=True, eq=False)
class PlanData:
    """All that a plan says.  Bytes are of the whole step on ``device``; GB are 10**9 bytes.

    ``peak_bytes``           predicted peak; ``baseline_peak_bytes`` the peak when nothing is recomputed.
    ``overhead``             recompute seconds / seconds of the step when nothing is recomputed.
    ``overhead_bound``       proved: no plan within the budget (this order of ops) has less overhead.
    ``status``               "optimal" (the two are equal) or "feasible".
    ``breakdown``            bytes by kind at the peak; they add up to ``peak_bytes``.
    ``timeline``             live bytes at each step, shape (T,); ``timeline_by_kind`` splits it.
    ``sequence``             op names in execution order; a repeated name is a recomputation.
    ``recompute_flops``      extra FLOPs; ``step_flops`` those of the step when nothing is recomputed.
    ``solve_s``              seconds of search; ``searched_on`` its day (UTC, "2026-05-30"), where what it
                             found was taken from the cache.
    ``step_s``               predicted seconds of the step when nothing is recomputed.
    ``floor_bytes``          proved: no plan has a lower peak.
    ``peak_op``              name of the op at the peak, and ``peak_module`` the path of its module.
    ``optimizer_step_bytes`` bytes during the optimizer's own step, 0 without ``optimizer``.
    ``varying_dims``         for each input tensor its dimensions that may vary; ``None`` if none may.
    ``planned_for``          name of the device planned for, where it is not the model's own; bytes and
                             seconds are then of that device, and the plan is not to be applied.
    ``reserved_bytes``       predicted: what CUDA's caching allocator takes from the driver for the step, of
                             which ``peak_bytes`` are allocated; ``None`` where there is no such allocator.
    ``outputs``              whether the caller holds each of the model's outputs (by place, as
                             ``output.logits``) to the end of the step, has let go of it when the backward
                             begins, or has it kept until the next call returned; one not named is held.
    ``calibration``          what its step was measured to take, and the rounds before; ``None`` without.
    ``regions``              of a step in regions their calls, in order; empty where the step is one graph.
    ``cuts``                 where the forward was cut into them and why, a line each.

    ``backend``              what runs it: "eager", or "inductor", which compiles it.

    ``chunked``              losses that are computed in chunks of tokens; ``whole_step_s``,
                             ``whole_step_flops`` and ``whole_peak_bytes`` are then ``step_s``, ``step_flops``
                             and ``baseline_peak_bytes`` without.

    ``order``                of the backward: "given" by the trace, or "free", with gradients of weights as
                             soon as less is held for it.  Bound and floor are for this order.
    ``answers``              of the batch to what the forward asks of it, by which the step was captured.
    ``channels_last``        ops of a compiled step whose operands its code lays out so: they take less time
                             then, and more memory.
    ``known_minimum_bytes``  the least peak for which a plan was found, if it was looked for.
    ``inputs``               the batch planned for; of a plan from a file its structure and sizes.
    ``outline``              the step in outline, by which the plan is played through and explained; ``None``
                             for a plan from a file that was written without it.

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
    inputs: Inputs | InputRecord
    known_minimum_bytes: int | None = None
    searched_on: str = ""
    varying_dims: Dims | None = None
    calibration: Calibration | None = None
    planned_for: str = ""
    reserved_bytes: int | None = None
    outputs: Mapping[str, OutputState] = dataclasses.field(default_factory=dict)
    outline: Outline | None = dataclasses.field(default=None, repr=False)
    regions: tuple[RegionSummary, ...] = ()
    cuts: tuple[str, ...] = ()
    backend: Backend = "eager"
    chunked: tuple[Chunked, ...] = ()
    whole_step_s: float = 0.0
    whole_step_flops: int = 0
    whole_peak_bytes: int = 0
    order: OrderMode = "given"
    answers: tuple[bool, ...] = ()
    channels_last: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.timeline) != len(self.sequence):
            raise ValueError(
                f"'timeline' has {len(self.timeline)} entries for {len(self.sequence)} steps of 'sequence'"
            )
        if self.status not in ("optimal", "feasible"):
            raise ValueError(f"'status' is {self.status!r}")
        if self.order not in ("given", "free"):
            raise ValueError(f"'order' is {self.order!r}")
        for name, state in self.outputs.items():
            if state not in ("held", "released", "kept", "unread"):
                raise ValueError(f"'outputs' says {state!r} of {name!r}")
        for p in self.placements:
            if any(not 0 <= first <= last < len(self.sequence) for first, last in p.spans):
                raise ValueError(
                    f"placement of {p.name!r} has spans {p.spans}, which are not within the "
                    f"{len(self.sequence)} positions of the sequence"
                )

    @property
    def steps_in_backward(self) -> dict[str, int]:
        """Parameters that step in the backward, with the bytes that each step takes besides."""
        if self.outline is None:
            return {}
        return scratch_of(self.outline.ops, [op.workspace_bytes for op in self.outline.problem.ops])

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
    def released(self) -> tuple[str, ...]:
        """The outputs that the caller has let go of when the backward begins, if it does as planned for."""
        return tuple(name for name, state in self.outputs.items() if state == "released")

    @property
    def kept(self) -> tuple[str, ...]:
        """The outputs of the last call that the caller still holds while the next one runs."""
        return tuple(name for name, state in self.outputs.items() if state == "kept")

    @property
    def adding_peak_bytes(self) -> int | None:
        """The least that the step takes where its gradients are there from the start, to be added to.

        ``None`` where the plan counts some as there already, or as gone before the backward ends.
        """
        made = self.timeline_by_kind.get("gradients")
        if made is None or not len(made) or made[0] or self.steps_in_backward:
            return None
        return int((self.timeline + (made[-1] - made)).max())

    @property
    def unread(self) -> tuple[str, ...]:
        """The outputs that are not made, since the caller reads only the loss."""
        return tuple(name for name, state in self.outputs.items() if state == "unread")

    @property
    def recompute_s(self) -> float:
        """Predicted seconds spent on recomputation."""
        return self.overhead * self.step_s

    @property
    def minimum_if_known(self) -> int | None:
        """The least peak in bytes for which a plan was found, if it was looked for; never solves."""
        return self.known_minimum_bytes

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.model_name}: budget {self.budget_bytes / 1e9:.4g} GB, "
            f"peak {self.peak_bytes / 1e9:.4g} GB "
            f"(nothing recomputed: {self.baseline_peak_bytes / 1e9:.4g} GB), overhead {self.overhead:.2%}, "
            f"proved >= {self.overhead_bound:.2%}, {self.status})"
        )

    __str__ = __repr__
