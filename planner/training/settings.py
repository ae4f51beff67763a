"""What a model was enabled with: the options of :func:`planner.enable`, checked where they are given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from planner.capture.outputs import LossFn
from planner.costs.target import CostSource
from planner.memory.optimizer_state import OptimizerLike
from planner.memory.resident import budget_bytes_of
from planner.options import (
    BackendMode,
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OnLarger,
    OutputsMode,
    RecomputeMode,
    Search,
    check_count,
    check_options,
)

__all__ = ["OPTIONS", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What :func:`planner.enable` was told; see there.

    Raises ``TypeError`` or ``ValueError``, which name the argument, what it is and what it may be.
    """

    budget_bytes: int | None
    loss_fn: LossFn | None = None
    optimizer: OptimizerLike | Literal["find"] | None = "find"
    costs: CostSource = "auto"
    on_larger: OnLarger = "replan"
    max_plans: int = 64
    calls_per_step: int | None = None
    search: Search = field(default_factory=Search)
    outputs: OutputsMode = "auto"
    gradients: GradientsMode = "auto"
    capture: CaptureMode = "auto"
    backend: BackendMode = "eager"
    recompute: RecomputeMode = "fastest"
    chunk_loss: ChunkLoss = "auto"

    def __post_init__(self) -> None:
        check_options(self, finds=True)
        check_count("max_plans", self.max_plans)
        if self.calls_per_step is not None:
            check_count("calls_per_step", self.calls_per_step)
        if self.costs not in ("auto", "profile", "roofline"):
            raise ValueError(
                f"costs must be 'auto', 'profile' or 'roofline' for a model that trains, not {self.costs!r}"
            )

    def changed(self, options: dict[str, Any]) -> Settings:
        """The same but for ``options``, named as the arguments of :func:`planner.enable` are.

        Raises as they do, and ``TypeError`` for a name that is none of them.
        """
        unknown = options.keys() - OPTIONS
        if unknown:
            raise TypeError(
                f"{sorted(unknown)[0]!r} is no option of the planner; there are budget_gb, "
                f"{', '.join(sorted(OPTIONS - {'budget_gb'}))}"
            )
        own = dict(options)
        asked = {name: own.pop(name) for name in _SEARCH & own.keys()}
        if "budget_gb" in own:
            own["budget_bytes"] = budget_bytes_of(own.pop("budget_gb"))
        return replace(self, **own, search=replace(self.search, **asked))


_SEARCH = frozenset(f.name for f in fields(Search))
# As :func:`planner.enable` names them.
OPTIONS = (frozenset(f.name for f in fields(Settings)) - {"budget_bytes", "search"}) | _SEARCH | {"budget_gb"}
