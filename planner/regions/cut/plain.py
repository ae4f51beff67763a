"""A graph of Dynamo's that runs as eager runs the code it was made from.

What Dynamo puts for ``torch.utils.checkpoint`` keeps everything where no compiler takes it up, and draws
other random numbers where it makes something again; what it puts for an ``autograd.Function`` holds what it
saves until Python collects it.  Here the first checkpoints, as its author wrote, and the second saves on
``ctx``.  A product's gradient is made by the formula that eager takes, where a mode watches too, and a batch
of matrices is multiplied by one matrix in eager's way, which torch folds into another where a mode watches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from planner import _compat

__all__ = ["as_eager"]

_MATMULS = (torch.matmul, operator.matmul, "matmul", "__matmul__")


def as_eager(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph``, or a copy of it where something in it is to run otherwise."""
    replaced: dict[fx.Node, Any] = {}
    inner: dict[str, fx.GraphModule] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(part := getattr(graph, node.target, None), fx.GraphModule):
            plain = as_eager(part)
            if plain is not part:
                inner[node.target] = plain
        elif _compat.is_checkpoint(node.target):
            replaced[node] = _checkpointed
        elif _compat.is_autograd_function(node.target) and "saved_for_backward_idx" in node.kwargs:
            replaced[node] = _applied
        elif node.op == "call_function" and node.target in (torch.prod, torch.cumprod):
            replaced[node] = _product if node.target is torch.prod else _cumulated
        elif node.op == "call_method" and node.target in ("prod", "cumprod"):
            replaced[node] = _product if node.target == "prod" else _cumulated
        elif node.target in _MATMULS and _may_fold(node):
            replaced[node] = _multiplied
    if not replaced and not inner:
        return graph
    new: dict[fx.Node, fx.Node] = {}
    twin = fx.Graph()
    for node in graph.graph.nodes:
        new[node] = twin.node_copy(node, new.__getitem__)
        if node in replaced:
            new[node].op, new[node].target = "call_function", replaced[node]
    module = fx.GraphModule(graph, twin)
    for name, plain in inner.items():
        setattr(module, name, plain)
    module.meta = graph.meta
    return module


def _checkpointed(inner: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    contexts = inner.meta.get("_checkpoint_context_fn")
    if contexts is not None:
        kwargs["context_fn"] = contexts
    trained = [isinstance(x, torch.Tensor) and x.requires_grad for x in args]

    def run(*given: Any) -> Any:  # a buffer may be written to before this runs again
        rest = iter(given)
        return inner(*(next(rest) if is_given else x for is_given, x in zip(trained, args, strict=True)))

    given = [x for is_given, x in zip(trained, args, strict=True) if is_given]
    return checkpoint(run, *given, **{**kwargs, "use_reentrant": False})  # as Dynamo takes either kind


def _may_fold(matmul: fx.Node) -> bool:
    """Whether one of two batches of matrices may be of one matrix only."""
    values = [n.meta.get("example_value") for n in matmul.args if isinstance(n, fx.Node)]
    batches = [x.shape[0] for x in values if isinstance(x, torch.Tensor) and x.dim() == 3]
    return len(batches) == 2 and any(not isinstance(n, int) or n == 1 for n in batches)


def _multiplied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``: one matrix is repeated, unless it is trained, as torch does where no mode watches."""
    if len(a) == 1 and not a.requires_grad:
        a = a.expand(len(b), -1, -1)
    elif len(b) == 1 and not b.requires_grad:
        b = b.expand(len(a), -1, -1)
    return torch.matmul(a, b)


def _product(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _watched(torch.prod, x, *args, **kwargs)


def _cumulated(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _watched(torch.cumprod, x, *args, **kwargs)


def _watched(call: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``call``, whose gradient autograd makes by another formula where a mode watches: here it does not."""
    if not (_compat.watching_modes() and x.requires_grad and torch.is_grad_enabled()):
        made: torch.Tensor = call(x, *args, **kwargs)
        return made
    unwatched: torch.Tensor = _Unwatched.apply(lambda t: call(t, *args, **kwargs), x)
    return unwatched


def _applied(fwd: fx.GraphModule, bwd: fx.GraphModule, *args: Any, **given: Any) -> Any:
    return _Applied.apply(fwd, bwd, given, *args)


class _Applied(torch.autograd.Function):
    """A user's ``autograd.Function``, of whose methods Dynamo made graphs."""

    @staticmethod
    def forward(ctx: Any, fwd: fx.GraphModule, bwd: fx.GraphModule, given: dict[str, Any], *args: Any) -> Any:
        output, saved = fwd(*args)
        made = output if isinstance(output, (tuple, list)) else (output,)
        if dirty := given.get("dirty_idx"):
            ctx.mark_dirty(*_chosen(made, dirty))
        if apart := given.get("non_differentiable_idx"):
            ctx.mark_non_differentiable(*_chosen(made, apart))
        checked = set(given["saved_for_backward_idx"])
        ctx.save_for_backward(*_chosen(saved, checked))
        ctx.bwd, ctx.count, ctx.checked = bwd, len(saved), checked
        ctx.others = {i: value for i, value in enumerate(saved) if i not in checked}
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        checked = iter(ctx.saved_tensors)
        saved = [next(checked) if i in ctx.checked else ctx.others[i] for i in range(ctx.count)]
        made = ctx.bwd(*gradients, *saved)
        return None, None, None, *(made if isinstance(made, (tuple, list)) else (made,))


class _Unwatched(torch.autograd.Function):
    """A function of a tensor, differentiated as if no mode watched."""

    @staticmethod
    def forward(ctx: Any, call: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        made: torch.Tensor = call(x)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with _compat.modes_set_aside(), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return None, torch.autograd.grad(ctx.call(leaf), leaf, gradient)[0]


def _chosen(values: Sequence[Any], which: Any) -> list[Any]:
    return [value for i, value in enumerate(values) if i in which]
