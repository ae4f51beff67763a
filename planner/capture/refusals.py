"""Models whose graph would not be their training step are refused: what stops it, and the way out.

See :mod:`planner.training.distributed` for what a plan does among several processes, and why.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from planner import _compat
from planner.capture.as_eager.places import line_of
from planner.errors import PlannerError, TraceError, of_unknown_torch

__all__ = [
    "checkpoints_itself",
    "explained",
    "has_hooks",
    "has_parametrizations",
    "hooks_on_submodules",
    "is_sharded",
    "refuse_unplannable",
    "sharded_message",
    "weights_cached",
]

log = logging.getLogger(__name__)


def checkpoints_itself(model_name: str, how: str) -> TraceError:
    """The error for a model that recomputes on its own."""
    return TraceError(
        f"{model_name} already checkpoints itself: {how}. Switch it off first (Hugging Face: "
        "model.gradient_checkpointing_disable()); the plan decides what to recompute"
    )


def refuse_unplannable(
    model: nn.Module, inputs: Sequence[torch.Tensor] = (), *, in_regions: bool = False
) -> None:
    """Raise for models and inputs whose graph would not be a training step.

    ``in_regions``  what stands against one graph only, a ``TraceError``, is no reason.

    ``TypeError`` for what is no module; else the first of ``_CHECKS`` that has something to say.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    for check in _CHECKS:
        error = check(model, inputs)
        if error is not None and not (in_regions and isinstance(error, TraceError)):
            raise error
    _warn_of_fused(model)


def _nothing_to_train(model: nn.Module, inputs: Sequence[torch.Tensor]) -> PlannerError | None:
    if any(t.requires_grad for t in (*model.parameters(), *inputs)):
        return None
    return PlannerError(
        f"{type(model).__name__} has no trainable parameter (requires_grad is False for all "
        f"{sum(1 for _ in model.parameters())}) and no input that requires grad; there is no backward to plan"
    )


def _lazy(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    unmade = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if not unmade:
        return None
    return PlannerError(
        f"{type(model).__name__} has lazy parameters without a size yet ({unmade[0]}): call it once on a "
        "batch, then plan"
    )


def _swapped(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name, t in model.named_parameters():
        if not isinstance(t, nn.Parameter):
            return PlannerError(
                f"{name} of {type(model).__name__} is no parameter during this call "
                "(torch.func.functional_call), and a plan is made of the model as it is. Call the model "
                "itself on a batch of this size first: its plan serves such calls too. Or call "
                "planner.disable(model)"
            )
    return None


def _weights_cached(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    if _compat.parametrized_weights_are_cached() and has_parametrizations(model):
        return weights_cached(type(model).__name__)
    return None


def has_parametrizations(model: nn.Module) -> bool:
    """Whether weights of ``model`` are computed from others (``torch.nn.utils.parametrize``)."""
    return any(isinstance(m, ParametrizationList) for m in model.modules())


def weights_cached(model_name: str) -> PlannerError:
    """The error for a call under ``parametrize.cached()``: its calls share weights that others computed."""
    return PlannerError(
        f"{model_name} is called under torch.nn.utils.parametrize.cached(), where calls share the weights "
        "that the first one computes; a planned step computes its own. Call it outside of cached(), or call "
        "plan.restore(model), or planner.disable(model), before this step"
    )


def _sparse_gradients(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name, module in model.named_modules():
        bag = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if bag and module.sparse and module.weight.requires_grad:
            return TraceError(
                f"{name or 'the model'} makes sparse gradients (sparse=True), whose size is known only when "
                "they are made; build it with sparse=False"
            )
    return None


def _checkpoints(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            how = f"{name or 'model'}.gradient_checkpointing is True"
            return checkpoints_itself(type(model).__name__, how)
    around = _compat.checkpointed_around(model)
    if around:
        return PlannerError(
            f"{around} is checkpointed by PyTorch around its sharding, or by hooks: what is made again there "
            "gathers parameters again, which no plan may do. Leave the checkpoint out, the plan decides what "
            "to recompute; or wrap the module before it is sharded, fully_shard(checkpoint_wrapper(block)), "
            "and the plan takes its place"
        )
    return None


def _sparse_tensors(model: nn.Module, inputs: Sequence[torch.Tensor]) -> PlannerError | None:
    given = ((f"input {i}", t) for i, t in enumerate(inputs))
    for name, t in (*model.named_parameters(), *model.named_buffers(), *given):
        if t.layout != torch.strided or t.is_nested:
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            return TraceError(
                f"{name} is {kind}; a plan is for dense tensors. "
                "Keep it outside what is planned, or make it dense (a sparse adjacency: index_add)"
            )
    return None


def _talks_to_ranks(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            return PlannerError(
                f"{name or 'the model'} is a SyncBatchNorm, which talks to the other ranks inside the "
                "forward; a captured step cannot. Use BatchNorm, or plan parts of the model without it"
            )
        if name and is_sharded(module):
            return _sharded(module, name)
    return None


def _spread_parameters(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name in _compat.spread_parameters(model):
        return TraceError(_SPREAD.format(name))
    if is_sharded(model):
        return _sharded(model, "the model")
    return None


def _sharded(module: nn.Module, name: str) -> PlannerError:
    if not _compat.is_fully_sharded(module):
        return PlannerError(sharded_message(name))
    compiled = _compat.compiled_part(module)
    if compiled is not None:
        path = ".".join(filter(None, (name, compiled)))
        return PlannerError(
            f"{path} is compiled by itself and sharded (FSDP2): what it saves and makes again is decided in "
            "its compiled code, which no plan of an eager step reaches. Leave the compile out (its blocks "
            "then run as eager runs them), or let the plan compile: planner.enable(..., backend='inductor') "
            "without a compile of yours, or block.compile(backend=planner.inductor(budget_gb)) for each block"
        )
    return TraceError(
        f"{name} is sharded (FSDP2) and gathers its parameters by hooks, which one graph would not run. The "
        'step can be planned in regions, between them: capture="auto" or "regions"'
    )


def _wrapped(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if _compat.wraps_others(t):
            return TraceError(
                f"{name} is a {type(t).__name__}, a tensor that wraps others, as quantized weights may; a "
                "plan is for plain tensors. Keep them in a layer that has plain bytes and dequantizes them "
                "in its forward (as bitsandbytes' do), or plan the parts without them"
            )
    return None


def _hooks(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    hooked = hooks_on_submodules(model)
    if not hooked:
        return None
    return TraceError(
        f"{type(model).__name__} has hooks on submodules ({', '.join(hooked[:3])}"
        f"{', ...' if len(hooked) > 3 else ''}); a planned step runs one graph and would skip them. "
        "Remove them, or register them on the model itself (torch.nn.utils.prune, spectral_norm "
        "and weight_norm are hooks too; those in torch.nn.utils.parametrizations are not)"
    )


def _devices(model: nn.Module, _: Sequence[torch.Tensor]) -> PlannerError | None:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        return TraceError(
            f"{type(model).__name__} lives on the meta device, which drops the backward; build it under "
            "torch's FakeTensorMode or on a real device"
        )
    if len(devices) > 1:
        return TraceError(
            f"{type(model).__name__} is spread over {sorted(map(str, devices))}; a plan is for one device"
        )
    return None


# What stops a capture, in the order in which it is asked; each check gives the error, or ``None``.
_CHECKS: tuple[Callable[[nn.Module, Sequence[torch.Tensor]], PlannerError | None], ...] = (
    _swapped,
    _nothing_to_train,
    _lazy,
    _weights_cached,
    _sparse_gradients,
    _checkpoints,
    _sparse_tensors,
    _talks_to_ranks,
    _spread_parameters,
    _wrapped,
    _hooks,
    _devices,
)


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
def explained(model: nn.Module, calls: _compat.CheckpointCalls | None = None) -> Iterator[None]:
    """Turn whatever the tracer raises into a ``TraceError`` that names the model's own source line.

    ``calls``  of ``torch.utils.checkpoint`` so far: where there are any, they are the reason.
    """
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
        ImportError,
        IndexError,
    ) as e:
        unknown = of_unknown_torch(e)
        if unknown is not None:
            raise unknown from e
        if isinstance(e, ImportError):
            raise
        name = type(model).__name__
        if calls is not None and calls.count:
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
        raise TraceError(f"{name} could not be captured: {place} {_said(e)}") from e


# Words of a tracer's insides, which say nothing to whoever wrote the model.
_INSIDE = re.compile(
    r"Functional\w*Tensor|Fake\w*Tensor\w*|fake tensor|fake mode|Sym(?:Int|Float|Bool|Node)\w*"
    r"|\w*AOT(?:In|Out)put|proxy|aot_autograd|functorch|__torch_(?:dispatch|function)__"
    r"|INTERNAL ASSERT|functionalize|non-functional|(?:Dispatch|Function)Mode|torch\.fx|\"meta\""
    r"|tensor subclass|python storage|two (?:different )?devices"
    r"|^\W*(?:OpOverload.*)?aten\W[\w.]*\W*$",
    re.IGNORECASE,
)

# What such words mean, and how to do without; the first that fits.
_MEANT = (
    (
        r"two (?:different )?devices,? (\w[\w:]*)(?:,| and) (\w[\w:]*)",
        r"computes with tensors of two devices, \1 and \2. Move the inputs, and what forward makes, to the "
        "device of the model's parameters",
    ),
    (
        r"mutating a non-functional tensor",
        "writes into a tensor that is neither an input nor a buffer of the model, but a plain attribute, a "
        "global or in a list, say. Register it (register_buffer, persistent=False keeps it out of the state "
        "dict), or write outside forward",
    ),
    (
        r"numpy\(\)|data pointer|python storage",
        "reads a tensor's memory (numpy, a pointer, pickle, a kernel of another library), and while the step "
        "is being traced a tensor has sizes only. Do it outside forward and pass the result in, or make it "
        "an op of its own (torch.library.custom_op, with register_fake)",
    ),
    (
        r"format|float\(|int\(|convert",
        "needs the value of a tensor while the step is being traced (as text, a number, an array). Compute "
        "it outside forward and pass it in, or leave it to the training loop",
    ),
    (
        r"storage",
        "handles the storage of a tensor itself (set_, untyped_storage, resize_), which a graph of ops does "
        "not have. Write it with views and copies",
    ),
    (
        r"fake mode|fake tensor",
        "uses a tensor that is neither an input nor a parameter nor a buffer of the model. Register it as a "
        "buffer, or pass it in",
    ),
    (
        r"Sym",
        "uses a size that varies from batch to batch where only a fixed number will do. Plan it for fixed "
        "sizes (dynamic=False, or pad the batches)",
    ),
    (
        r"aten",
        "runs an operation whose sizes cannot be told without values, or that no trace knows. Leave it out "
        "of what is planned: do it outside forward, or plan the parts of the model around it",
    ),
)


def _said(error: BaseException) -> str:
    """What ``error`` says, or what that means where it is of the tracer's insides."""
    kind, text = type(error).__name__, str(error)
    if not _INSIDE.search(text):
        return f"raised {kind}: {text}"
    for pattern, meant in _MEANT:
        found = re.search(pattern, text, re.IGNORECASE)
        if found:
            return found.expand(meant)
    return (
        "does something with a tensor that a trace cannot follow. Do it outside forward and pass the result "
        "in, or plan the parts of the model around it"
    )


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
            inner, within, function = line_of(frame, line), "", ""
        elif name.startswith(_TOLD) and not name.endswith((".module", ".container")):
            within, function = line_of(frame, line), frame.f_code.co_name
    return (f"{inner}, in torch's own {within}," if within else inner), function


# -- sharded models -----------------------------------------------------------------------------------


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of ``module``."""
    return isinstance(module, _types("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"))


def sharded_message(name: str) -> str:
    """What to do about a sharded module inside a plan of one graph."""
    return (
        f"{name} is sharded (FSDP) and gathers its parameters by hooks, which a captured step would not run. "
        "Under FSDP2 plan the model when it is sharded (planner.enable and planner.plan cut it into regions "
        "between these hooks), or each block by itself before it is: plan.apply(block), then "
        "fully_shard(block)"
    )


def _types(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that nobody needs to have imported yet."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names) if found is not None else ()


_SPREAD = (
    "{} is a DTensor, spread over several devices by tensor parallelism; one graph is for the ops of one "
    'device. The step can be planned in regions: capture="auto" or "regions"'
)


# -- hooks --------------------------------------------------------------------------------------------


def hooks_on_submodules(model: nn.Module) -> list[str]:
    """Names of submodules that carry hooks a graph would skip; the model itself may carry any."""
    return [name for name, module in model.named_modules() if name and has_hooks(module)]


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` carries forward or backward hooks that a captured graph would leave out.

    Two kinds that transformers sets are no such hooks, since what they do is in the graph: its recorders
    of hidden states and attentions, and what makes embeddings require grad for checkpointing (it stays
    when checkpointing is switched off).
    """
    forward, before = module._forward_hooks, module._forward_pre_hooks
    backward, before_backward = module._backward_hooks, module._backward_pre_hooks
    if not (forward or before or backward or before_backward):  # asked of each module at each step
        return False
    kinds = forward, before, backward, before_backward
    return any(_acts_on_the_side(hook) for kind in kinds for hook in kind.values())


def _acts_on_the_side(hook: Callable[..., Any]) -> bool:
    if getattr(hook, "only_watches", False):  # those of a switched model (planner.training.unplanned)
        return False
    module, name = getattr(hook, "__module__", None), getattr(hook, "__name__", None)
    return module != "transformers.utils.output_capturing" and (module, name) != (
        "transformers.modeling_utils",
        "make_inputs_require_grads",
    )
