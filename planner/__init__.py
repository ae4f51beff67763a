"""Plan a PyTorch training step to a memory budget, with proof of how near the plan is to best.

p = planner.plan(model, budget_gb=8, inputs=batch)
print(p.summary())
p.apply()          # or module = p.rewrite()
"""

from planner import distributed, measure
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
from planner.plan import Placement, Plan, load
from planner.runtime.verify import Report
from planner.training.enable import disable, enable, plan_of

__version__ = "0.1.0"

__all__ = [
    "Frontier",
    "InfeasibleBudgetError",
    "InvalidPlanFileError",
    "Placement",
    "Plan",
    "PlannerError",
    "Report",
    "StalePlanError",
    "TraceError",
    "disable",
    "distributed",
    "enable",
    "frontier",
    "inductor",
    "load",
    "measure",
    "plan",
    "plan_of",
]
