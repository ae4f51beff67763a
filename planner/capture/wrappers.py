"""What stands around a model, or inside it, where several processes train it: seen, counted, refused.

See :mod:`planner.training.distributed` for what a plan does among several processes, and why.
"""

from __future__ import annotations

import gc
import sys

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planner.errors import PlannerError

__all__ = ["bucket_bytes", "is_sharded", "refuse_sharded", "sharded_message", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that call its ``forward``; ``PlannerError`` for a compiled one."""
    if hasattr(model, "_orig_mod"):
        raise PlannerError(
            f"this {type(model._orig_mod).__name__} is compiled already: plan the model first and compile it "
            "then"
        )
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return unwrapped(model.module)
    return model


def bucket_bytes(model: nn.Module) -> int:
    """Bytes of the gradient buckets of every DistributedDataParallel that holds parameters of ``model``."""
    if not dist.is_available() or not dist.is_initialized():
        return 0
    mine = {id(p) for p in model.parameters()}
    found = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return sum(_bucket_bytes(ddp) for ddp in found if any(id(p) in mine for p in ddp.parameters()))


def _bucket_bytes(ddp: DistributedDataParallel) -> int:
    total = _gradient_bytes(ddp.module)
    if ddp.gradient_as_bucket_view:  # gradients that exist lie in the buckets
        total -= sum(p.grad.nbytes for p in ddp.parameters() if p.grad is not None)
    return max(0, total)


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


# -- sharded models -----------------------------------------------------------------------------------


def refuse_sharded(model: nn.Module) -> None:
    """``PlannerError`` for models whose step is not the graph of one process."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise PlannerError(
                f"{name or 'the model'} is a SyncBatchNorm, which talks to the other ranks inside the "
                "forward; a captured step cannot. Use BatchNorm, or plan parts of the model without it"
            )
        if name and is_sharded(module):
            raise PlannerError(sharded_message(name))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, _types("torch.distributed.tensor", "DTensor")):
            raise PlannerError(sharded_message(name) if is_sharded(model) else _SPREAD.format(name))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of ``module``."""
    return isinstance(module, _types("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"))


def sharded_message(name: str) -> str:
    """What to do about a sharded module inside a plan."""
    return (
        f"{name} is sharded (FSDP) and gathers its parameters by hooks, which a captured step would not run. "
        "Plan each block by itself before it is sharded: plan.apply(block), then fully_shard(block)"
    )


def _types(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that nobody needs to have imported yet."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names) if found is not None else ()


_SPREAD = (
    "{} is a DTensor, spread over several devices; a plan is for one device. Plan the parts that are not, or "
    "before the model is spread"
)
