"""Models whose graph would not be their training step are refused: what stops it, and the way out."""

from __future__ import annotations

import contextlib
import linecache
import logging
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from planner import _compat
from planner.capture.effects import hooks_on_submodules
from planner.capture.wrappers import refuse_sharded
from planner.errors import PlannerError, TraceError

__all__ = ["checkpoints_itself", "explained", "refuse_unplannable"]

log = logging.getLogger(__name__)


def checkpoints_itself(model_name: str, how: str) -> TraceError:
    """The error for a model that recomputes on its own."""
    return TraceError(
        f"{model_name} already checkpoints itself: {how}. Switch it off first (Hugging Face: "
        "model.gradient_checkpointing_disable()); the plan decides what to recompute"
    )


def refuse_unplannable(model: nn.Module, inputs: Sequence[torch.Tensor] = ()) -> None:
    """Raise for models and inputs whose graph would not be a training step."""
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
    named = [
        *model.named_parameters(),
        *model.named_buffers(),
        *((f"input {i}", t) for i, t in enumerate(inputs)),
    ]
    sparse = [(n, t.layout) for n, t in named if t.layout != torch.strided]
    if sparse:
        raise PlannerError(
            f"{sparse[0][0]} is {str(sparse[0][1]).removeprefix('torch.')}; a plan is for dense tensors. "
            "Keep it outside what is planned, or make it dense (a sparse adjacency: index_add)"
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


@contextlib.contextmanager
def explained(model: nn.Module, checkpointed: list[None]) -> Iterator[None]:
    """Turn whatever the tracer raises into a ``TraceError`` that names the model's own source line."""
    try:
        yield
    except PlannerError:
        raise
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        NotImplementedError,
        KeyError,
        AttributeError,
        IndexError,
    ) as e:
        name = type(model).__name__
        if checkpointed:
            why = "its forward calls torch.utils.checkpoint"
            raise checkpoints_itself(name, why) from e
        place, function = _place_in_source(e)
        if _compat.is_data_dependent(e):
            way_out = _WAYS_OUT.get(
                function,
                "Compute it outside forward and pass it in, or write it with torch.where; where it is the "
                "model's own loss that does it, leave the labels out and pass loss_fn",
            )
            raise TraceError(
                f"{name} cannot be captured as one graph: {place} needs the value of a tensor while the "
                f"step is being traced (an if, a loop bound, .item(), a mask used as an index). {way_out}"
            ) from e
        raise TraceError(f"{name} could not be captured: {place} raised {type(e).__name__}: {e}") from e


_TOLD = ("torch.nn.modules.", "torch.nn.functional", "torch.nn.utils.rnn", "torch.distributions.")

# What of torch's own reads values, and how to do without.
_WAYS_OUT = {
    "_detect_is_causal_mask": "It asks whether the mask is a causal one: say so where the module is called, "
    "is_causal=True or False (nn.Transformer: src_is_causal, tgt_is_causal, memory_is_causal)",
    "ctc_loss": "Leave this loss out of what is planned: return its arguments from forward and compute it "
    "on them in the training loop; the budget then does not count what it holds",
    "pack_padded_sequence": "Give the recurrent layer the padded batch, and read its outputs at the lengths",
}


def _place_in_source(error: BaseException) -> tuple[str, str]:
    """The innermost frame that is neither torch's nor ours, as ``file:line (code)``.

    Then that of the module, function or distribution of torch's own which it calls, where such a one stops
    the trace, and its name.
    """
    ours = __name__.split(".")[0]
    inner, within, function = "its forward", "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in ("torch", ours, "contextlib"):
            inner, within, function = _line_of(frame, line), "", ""
        elif name.startswith(_TOLD) and not name.endswith((".module", ".container")):
            within, function = _line_of(frame, line), frame.f_code.co_name
    return (f"{inner}, in torch's own {within}," if within else inner), function


def _line_of(frame: FrameType, line: int) -> str:
    path = frame.f_code.co_filename
    source = linecache.getline(path, line).strip()
    return f"{path}:{line} ({source})" if source else f"{path}:{line}"
