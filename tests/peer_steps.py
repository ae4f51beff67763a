"""What a user would do by hand, and our plans, on the same models by the same meter.

By hand means the Hugging Face flag where the family has it, and ``torch.utils.checkpoint`` around
every block where it has not.  Bytes are peaks above parameters, buffers and inputs, by the storage
meter, the outputs held to the end of the step; FLOPs are counted while the step runs.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from planner.checks.zoo import Bottleneck
from planner.costs.op_costs import graph_costs
from planner.devices.rates import DEVICES
from planner.measure import StepRecord, compare, run_step, step_flops, step_peak
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import PricedStep, prepare
from tests.models import PEERS, Case

__all__ = ["Measured", "Peer", "applied", "by_hand", "measured", "measured_plan", "peer"]

# Blocks to wrap, by class name, where the family has no flag of its own.
BLOCKS = {"peers-resnet": Bottleneck.__name__, "peers-convnext": "ConvNextLayer"}


@dataclass(frozen=True)
class Measured:
    """One step: peak bytes above what is resident, and FLOPs beyond eager's."""

    peak_bytes: int
    extra_flops: int


@dataclass(frozen=True, eq=False)
class Peer:
    """A size of PEERS: the model, its batch, the eager step, and the step checkpointed by hand."""

    name: str
    case: Case
    model: nn.Module
    inputs: dict[str, Any]
    prepared: PricedStep
    eager_peak_bytes: int
    eager_flops: int
    eager_record: StepRecord
    by_hand: Measured

    @property
    def resident_bytes(self) -> int:
        """Parameters, buffers, inputs."""
        return self.prepared.resident.total_bytes

    def plan(self, above_bytes: int, *, time_limit_s: float) -> Plan:
        """The plan whose peak is at most ``above_bytes`` over what is resident."""
        return self.prepared.plan_bytes(
            self.resident_bytes + above_bytes, search=Search(time_limit_s=time_limit_s)
        )


def by_hand(case: Case) -> nn.Module:
    """The model as its users would checkpoint it: its own flag, or every block wrapped."""
    model = case.build()
    kind = BLOCKS.get(case.name)
    if kind is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model
    for block in [m for m in model.modules() if type(m).__name__ == kind]:
        block.forward = types.MethodType(_checkpointed(type(block).forward), block)
    return model


def _checkpointed(forward: Any) -> Any:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    return run


def measured(model: nn.Module, inputs: dict[str, Any], eager_flops: int) -> Measured:
    """One step of ``model`` as it is."""
    peak_bytes = step_peak(model, inputs, include_resident=False)
    return Measured(peak_bytes, step_flops(model, inputs) - eager_flops)


def peer(name: str, *, costs: Any = "roofline", least_s: float = 10.0) -> Peer:
    """Build and measure one of ``PEERS``.

    A roofline is a fixed one, so that what is planned does not depend on how busy the machine is.
    """
    case = PEERS[name]
    model, inputs = case.build(), dict(case.make_inputs(0))
    prepared = replace(prepare(model, inputs, costs=costs), least_limit_s=least_s)
    if costs == "roofline":
        rates = DEVICES["cpu"]
        prepared = replace(prepared, costs=graph_costs(prepared.graph, "roofline", rates=rates))
    eager_flops = step_flops(model, inputs)
    return Peer(
        name,
        case,
        model,
        inputs,
        prepared,
        step_peak(model, inputs, include_resident=False),
        eager_flops,
        run_step(model, inputs),
        measured(by_hand(case), inputs, eager_flops),
    )


@contextlib.contextmanager
def applied(case: Peer, plan: Plan) -> Iterator[None]:
    """The model as planned; ``AssertionError`` if a step leaves anything else behind than the eager one."""
    plan.apply(case.model)
    try:
        found = compare(case.eager_record, run_step(case.model, case.inputs))
        assert found.equal, f"{case.name}: {found}"
        yield
    finally:
        plan.restore(case.model)


def measured_plan(case: Peer, plan: Plan) -> Measured:
    """One planned step; raises as :func:`applied`."""
    with applied(case, plan):
        return measured(case.model, case.inputs, case.eager_flops)
