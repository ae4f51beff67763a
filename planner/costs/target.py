"""Which device a step is planned for: the model's own, or one that is named and may be elsewhere.

``costs="H100"`` means the rates of an H100.  Where the model is on one, that is all it means.  Where it is
not, the step is captured with the kernels an H100 would choose
(:mod:`planner.capture.as_eager.cuda_attention`), restated in its bytes (:mod:`planner.costs.translation`),
and the plan is for looking: what a budget costs there, which batch fits.  It has ops that cannot run here,
so it cannot be applied; making it again on the H100 takes seconds.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from planner.capture.as_eager.cuda_attention import CudaAttention
from planner.costs.op_costs import Costs, graph_costs
from planner.costs.profiler import device_for
from planner.costs.translation import Translation, translated
from planner.devices.rates import Device, device_named
from planner.devices.state import (
    DeviceMemory,
    allocation_grain,
    capability_of,
    memory_of,
    memory_on_paper,
    reachable,
)
from planner.graph.training_graph import TrainingGraph
from planner.measure.step import device_of
from planner.options import check_costs

__all__ = ["CostSource", "Target", "target_for"]

# "auto", "profile", "roofline", or a device's name.
CostSource: TypeAlias = str
_Source = Literal["auto", "profile", "roofline"]


@dataclass(frozen=True)
class Target:
    """What prices a step, and the device it is planned for.

    ``here``   where the model is.
    ``named``  the device asked for by name, ``None`` for the model's own.
    """

    source: _Source
    here: torch.device
    named: Device | None = None

    @classmethod
    def of(cls, costs: CostSource, here: torch.device) -> Target:
        """What a ``costs`` argument means for a model on ``here``; ``ValueError`` if nothing."""
        check_costs(costs)
        for source in get_args(_Source):
            if costs == source:
                return cls(source, here)
        named = device_named(costs)
        return cls("roofline", here, named)

    @property
    def elsewhere(self) -> bool:
        """Whether it is another device than the model's."""
        if self.named is None:
            return False
        return self.here.type != "cuda" or device_for(self.here, may_measure=False) != self.named

    @property
    def name(self) -> str:
        """Of the device, if it is elsewhere; else empty."""
        return self.named.name if self.named is not None and self.elsewhere else ""

    @property
    def device(self) -> torch.device:
        """The kind of device planned for."""
        return torch.device("cuda") if self.elsewhere else self.here

    @property
    def grain(self) -> int:
        """Bytes to which storages are rounded up."""
        return allocation_grain(self.device)

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability; ``None`` for what is not a CUDA device."""
        if self.named is not None and self.elsewhere:
            return self.named.capability
        return capability_of(self.here)

    @property
    def memory(self) -> DeviceMemory | None:
        """Of the device: as it is now, or on paper where it is elsewhere; ``None`` for a CPU."""
        if self.named is not None and self.elsewhere:
            return memory_on_paper(self.named)
        return memory_of(self.here)

    def capturing(self) -> AbstractContextManager[object]:
        """The context in which steps are captured."""
        if self.elsewhere and self.here.type != "cuda" and self.capability is not None:
            return CudaAttention(self.capability)
        return nullcontext()

    def price(self, graph: TrainingGraph) -> tuple[TrainingGraph, Costs, Translation | None]:
        """The step as the device would run it, what its ops cost there, and what was changed for that."""
        if not self.elsewhere or self.named is None:
            return graph, graph_costs(graph, self.source, rates=self.named), None
        translation = translated(graph, self.named)
        costs = graph_costs(graph, "roofline", rates=self.named)
        scratch = {**costs.workspace_bytes, **translation.workspace_bytes}
        return translation.graph, dataclasses.replace(costs, workspace_bytes=scratch), translation


def target_for(model: object, costs: CostSource) -> Target:
    """What a ``costs`` argument means for ``model``.

    Raises ``ValueError`` as :meth:`Target.of`, ``PlannerError`` for a model on a GPU that is not there.
    """
    here = device_of(model if isinstance(model, nn.Module) else None, None, None)
    return Target.of(costs, reachable(here))
