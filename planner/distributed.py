"""Plans where several processes train one model; see :mod:`planner.training.distributed`."""

from planner.training.distributed import agreed, made_once, shared_plan

__all__ = ["agreed", "made_once", "shared_plan"]
