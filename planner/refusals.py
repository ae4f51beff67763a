"""Models whose graph would not be their training step are refused; a warning says where it nearly is."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.parameter import is_lazy

from planner.effects import hooks_on_submodules
from planner.errors import PlannerError, TraceError
from planner.wrappers import refuse_sharded

__all__ = ["checkpoints_itself", "refuse_unplannable"]

log = logging.getLogger(__name__)


def checkpoints_itself(model_name: str, how: str) -> TraceError:
    """The error for a model that recomputes on its own."""
    return TraceError(
        f"{model_name} already checkpoints itself: {how}. Switch it off first (Hugging Face: "
        "model.gradient_checkpointing_disable()); the plan decides what to recompute"
    )


def refuse_unplannable(model: nn.Module) -> None:
    """Raise for models whose graph would not be their training step."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise PlannerError(
            f"{type(model).__name__} has no trainable parameter (requires_grad is False for all "
            f"{sum(1 for _ in model.parameters())}); there is no backward to plan"
        )
    unmade = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if unmade:
        raise PlannerError(
            f"{type(model).__name__} has lazy parameters without a size yet ({unmade[0]}): call it once on a "
            "batch, then plan"
        )
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.sparse
            and module.weight.requires_grad
        ):
            raise PlannerError(
                f"{name or 'the model'} makes sparse gradients (sparse=True), whose size is known only when "
                "they are made; build it with sparse=False"
            )
        if getattr(module, "gradient_checkpointing", False) is True:
            raise checkpoints_itself(
                type(model).__name__, f"{name or 'model'}.gradient_checkpointing is True"
            )
    refuse_sharded(model)
    hooked = hooks_on_submodules(model)
    if hooked:
        raise PlannerError(
            f"{type(model).__name__} has hooks on submodules ({', '.join(hooked[:3])}"
            f"{', ...' if len(hooked) > 3 else ''}); a planned step runs one graph and would skip them. "
            "Remove them, or register them on the model itself (torch.nn.utils.spectral_norm and weight_norm "
            "are hooks too; those in torch.nn.utils.parametrizations are not)"
        )
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        raise TraceError(
            f"{type(model).__name__} lives on the meta device, which drops the backward; build it under "
            "torch's FakeTensorMode or on a real device"
        )
    if len(devices) > 1:
        raise TraceError(
            f"{type(model).__name__} is spread over {sorted(map(str, devices))}; a plan is for one device"
        )
    _warn_of_fused(model)


def _warn_of_fused(model: nn.Module) -> None:
    """Say which modules the graph restates step by step where eager runs one kernel for the sequence."""
    fused = {n: m for n, m in model.named_modules() if isinstance(m, nn.RNNBase) and _is_cudnns(m)}
    if fused:
        name, module = next(iter(fused.items()))
        log.warning(
            "%s (%s%s) runs as one kernel of cuDNN's in eager, in the graph step by step. Expect other last "
            "bits, other random numbers for dropout between its layers, and a slower step; Plan.verify() "
            "shows it",
            name or type(model).__name__,
            type(module).__name__,
            f", as {len(fused) - 1} more" if len(fused) > 1 else "",
        )


def _is_cudnns(module: nn.RNNBase) -> bool:
    return any(p.device.type != "cpu" for p in module.parameters())
