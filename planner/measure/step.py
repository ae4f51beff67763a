"""One training step, as every measurement runs it: what is called, what is differentiated, what is undone.

The backward starts from ``loss_fn(outputs)``, or from the model's own loss (:func:`loss_of`, the rule
capture follows), or, without one, from every differentiable output, given a gradient of ones.
:func:`undone` runs a step as if it had not been.

Known limit: of Python's and numpy's generators the global ones are put back, others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from planner._compat import post_accumulate_hooks, pytree
from planner.capture.as_eager.generators import global_states_kept
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn, loss_within, register_dataclasses
from planner.errors import PlannerError

__all__ = [
    "Batch",
    "Forward",
    "backward",
    "call",
    "cuda_devices",
    "device_of",
    "dropping",
    "forward",
    "held",
    "let_go",
    "loss_of",
    "own",
    "passed_on",
    "tangents_for",
    "tensors_in",
    "undone",
]

# Arguments by position, by keyword, the only one, as a capture has them, or none.
Batch: TypeAlias = tuple[Any, ...] | Mapping[str, Any] | Tensor | Inputs | None


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a nest of containers (tuples, dicts, registered dataclasses), in order."""
    if isinstance(tree, Inputs):
        tree = (tree.args, tree.kwargs)
    if isinstance(tree, Mapping):  # a tokenizer's BatchEncoding is one that pytree does not know
        tree = list(tree.values())
    register_dataclasses(tree)
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def loss_of(outputs: Any, loss_fn: LossFn | None = None) -> Tensor | None:
    """The scalar a step differentiates, or ``None`` when it differentiates the outputs themselves.

    ``loss_fn(outputs)``; without one, what :func:`planner.capture.outputs.loss_index` says of the outputs,
    which is the rule that a capture goes by.  Raises TypeError if ``loss_fn`` gives no one-element tensor.
    """
    if loss_fn is not None:
        loss = loss_fn(outputs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a scalar tensor, got {shape}: reduce it, e.g. with .mean()")
        return loss
    return loss_within(outputs)


def own(inputs: Batch) -> Batch:
    """The batch, cut off from a graph that made a tensor of it: a step ends at its inputs."""
    if inputs is None or all(t.is_leaf for t in tensors_in(inputs)):
        return inputs
    return Inputs.of(nn.Module(), inputs)


def call(target: Callable[..., Any], inputs: Batch) -> Any:
    """``target`` on a batch; ``TypeError`` for what is none."""
    if inputs is None:
        return target()
    if isinstance(inputs, Inputs):
        return target(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return target(**inputs)
    if isinstance(inputs, tuple):
        return target(*inputs)
    if isinstance(inputs, Tensor):
        return target(inputs)
    raise TypeError(
        f"inputs must be a tuple or a dict of arguments, or a tensor, got {type(inputs).__name__}"
    )


class Forward(NamedTuple):
    """A finished forward pass: what it returned, and the tensors the backward starts from.

    Of a root that was let go of (:func:`let_go`) there is the edge of the autograd graph instead.
    """

    outputs: Any
    loss: Tensor | None
    roots: list[Any]


def forward(model: nn.Module, inputs: Batch, loss_fn: LossFn | None) -> Forward:
    """Run the forward and find what is differentiated; ``PlannerError`` if nothing can be."""
    return passed_on(call(model, inputs), loss_fn)


def passed_on(outputs: Any, loss_fn: LossFn | None) -> Forward:
    """What of a forward's ``outputs`` is differentiated; ``PlannerError`` if nothing can be."""
    loss = loss_of(outputs, loss_fn)
    roots = [loss] if loss is not None else [t for t in tensors_in(outputs) if t.requires_grad]
    if not roots or not all(root.requires_grad for root in roots):
        raise PlannerError(
            "nothing to differentiate: the loss, or every output of the model, is free of gradients; "
            "check requires_grad of the parameters and that gradients are enabled"
        )
    return Forward(outputs, loss, roots)


def let_go(passed: Forward, hold: bool | Collection[int] = False) -> Forward:
    """``passed`` as a loop has it that holds only some of the output's tensors: all, none, or by number.

    The loss is held in any case.
    """
    tensors = tensors_in(passed.outputs)
    kept = [t for i, t in enumerate(tensors) if (hold if isinstance(hold, bool) else i in hold)]
    if len(kept) == len(tensors):
        return passed
    if passed.loss is not None:
        return passed._replace(outputs=kept)
    mine = {id(t) for t in kept}
    roots = [r if id(r) in mine or not isinstance(r, Tensor) else get_gradient_edge(r) for r in passed.roots]
    return Forward(kept, None, roots)


def backward(passed: Forward, given: list[Tensor] | None = None) -> None:
    """Run the backward as a training loop does: behind the autocast context the forward ran in, if any.

    Leaving that context also drops its cache of cast weights.
    """
    device = (given or passed.roots)[0].device.type
    if not torch.is_autocast_enabled(device):
        torch.autograd.backward(passed.roots, given)
        return
    torch.clear_autocast_cache()
    with torch.autocast(device, enabled=False):
        torch.autograd.backward(passed.roots, given)


def tangents_for(passed: Forward, tangents: Iterable[Tensor] | None) -> list[Tensor] | None:
    """Output gradients: as given, else ones; ``None`` lets the engine make the one of a loss."""
    if tangents is None:
        return [torch.ones_like(root) for root in passed.roots] if passed.loss is None else None
    given = list(tangents)
    if [t.shape for t in given] != [root.shape for root in passed.roots]:
        raise ValueError(
            f"tangents have shapes {[tuple(t.shape) for t in given]}, what the backward starts from "
            f"{[tuple(root.shape) for root in passed.roots]}"
        )
    return given


def cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The CUDA devices that tensors are on, each once, by name."""
    return sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)


def held(model: nn.Module | None, inputs: Batch) -> list[Tensor]:
    """What a step holds from beginning to end: parameters, buffers, inputs."""
    own = [] if model is None else [*model.parameters(), *model.buffers()]
    return [*own, *tensors_in(inputs)]


class _Drop:
    """The hook of :func:`dropping`."""

    def __init__(self, scratch_bytes: int) -> None:
        self.scratch_bytes = scratch_bytes

    def __call__(self, parameter: Tensor) -> None:
        if self.scratch_bytes:
            torch.empty(self.scratch_bytes, dtype=torch.uint8, device=parameter.device)
        parameter.grad = None


@contextmanager
def dropping(model: nn.Module, taken: Mapping[str, int]) -> Iterator[None]:
    """The gradients of these parameters go as soon as they are there, as if a hook had used them.

    ``taken``  by the parameter's name, the bytes that it takes for that besides.
    """
    handles = [
        p.register_post_accumulate_grad_hook(_Drop(taken[n]))
        for n, p in model.named_parameters()
        if n in taken
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooks_set_aside(model: nn.Module) -> Iterator[None]:
    """No hook runs when a gradient is there, but those of :func:`dropping`: an optimizer's would train."""
    aside: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in model.parameters():
        hooks = post_accumulate_hooks(parameter)
        if any(not isinstance(hook, _Drop) for hook in hooks.values()):
            aside.append((hooks, dict(hooks)))
            for key in [k for k, hook in hooks.items() if not isinstance(hook, _Drop)]:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in aside:
            now = dict(hooks)
            hooks.clear()
            hooks.update({**before, **now})


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has values of its own, side by side."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta


@contextmanager
def undone(model: nn.Module, inputs: Batch) -> Iterator[None]:
    """Run a step as if it had not been: gradients (required to be None), buffers, batch, random states.

    Hooks that run when a gradient is there are set aside.
    """
    of_model, given = dict(model.named_parameters()), enumerate(tensors_in(inputs))
    leaves = [*of_model.items(), *((f"input {i}", t) for i, t in given)]
    for name, leaf in leaves:
        if leaf.is_leaf and leaf.grad is not None:
            raise PlannerError(
                f"the gradient of {name!r} is not None: a step is measured from empty gradients; "
                + ("call model.zero_grad(set_to_none=True)" if name in of_model else "set its .grad to None")
                + " first"
            )
    buffers = [
        (module, name, buffer, buffer.detach().to("cpu", copy=True))  # not on the device being measured
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    batch = [(t, t.detach().to("cpu", copy=True)) for t in tensors_in(inputs) if _is_plain(t)]
    try:
        devices = cuda_devices(held(model, inputs))
        with torch.random.fork_rng(devices=devices), global_states_kept(), _hooks_set_aside(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                if not torch.equal(buffer.cpu(), saved):  # an expanded buffer cannot be written to
                    buffer.copy_(saved)
                setattr(module, name, buffer)
            for tensor, saved in batch:
                if not torch.equal(tensor.detach().cpu(), saved):
                    tensor.detach().copy_(saved)
        for _, leaf in leaves:
            if leaf.is_leaf:
                leaf.grad = None


def device_of(model: nn.Module | None, inputs: Batch, device: torch.device | str | None) -> torch.device:
    """``device`` if given, else that of the first parameter, buffer or input; the CPU without any."""
    if device is not None:
        return torch.device(device)
    return next((t.device for t in held(model, inputs)), torch.device("cpu"))
