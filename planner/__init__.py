"""Plan a PyTorch training step to a memory budget, with proof of how near the plan is to best.

p = planner.plan(model, budget_gb=8, inputs=batch)
print(p.summary())
p.apply()          # or module = p.rewrite()

Importing it imports nothing else: each name is looked up when it is first asked for, since torch's tracer and
the solvers take seconds to import, and a script may not plan at all.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner import distributed, measure, sharded
    from planner.api import frontier, plan
    from planner.compiled.loop import inductor
    from planner.errors import (
        InfeasibleBudgetError,
        InvalidPlanFileError,
        PlannerError,
        StalePlanError,
        TraceError,
    )
    from planner.frontier import Frontier
    from planner.memory.in_backward import OptimizerInBackward, optimizer_in_backward
    from planner.plan import Placement, Plan, load
    from planner.runtime.verify import Report
    from planner.sizing.batches import LargestBatch
    from planner.sizing.estimates import Estimate
    from planner.sizing.estimating import estimate
    from planner.sizing.largest import largest_batch
    from planner.training.enable import disable, enable, plan_of

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "Frontier",
    "InfeasibleBudgetError",
    "InvalidPlanFileError",
    "LargestBatch",
    "OptimizerInBackward",
    "Placement",
    "Plan",
    "PlannerError",
    "Report",
    "StalePlanError",
    "TraceError",
    "disable",
    "distributed",
    "enable",
    "estimate",
    "frontier",
    "inductor",
    "largest_batch",
    "load",
    "measure",
    "optimizer_in_backward",
    "plan",
    "plan_of",
    "sharded",
]

# Where each name is from; what is not here is a module of this package.
_FROM = {
    "Estimate": "sizing.estimates",
    "Frontier": "frontier",
    "LargestBatch": "sizing.batches",
    "OptimizerInBackward": "memory.in_backward",
    "Placement": "plan",
    "Plan": "plan",
    "Report": "runtime.verify",
    "disable": "training.enable",
    "enable": "training.enable",
    "estimate": "sizing.estimating",
    "frontier": "api",
    "inductor": "compiled.loop",
    "largest_batch": "sizing.largest",
    "load": "plan",
    "optimizer_in_backward": "memory.in_backward",
    "plan": "api",
    "plan_of": "training.enable",
} | dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_FROM.get(name, name)}")
    except (AttributeError, ImportError, TypeError) as error:
        from planner.errors import of_unknown_torch

        unknown = of_unknown_torch(error)
        if unknown is None:
            raise
        raise unknown from error
    found = globals()[name] = getattr(home, name) if name in _FROM else home
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Door(ModuleType):
    """``planner.plan`` is the function, whoever imports the file of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FROM and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
