"""Batch norm as eager runs it on CUDA: by cuDNN, where torch's own conditions say so.

The tracer takes ``cudnn_batch_norm`` apart before autograd sees it, because the op moves running statistics
and its schema does not say so (``torch/_decomp/decompositions.py``).  What is captured is torch's own kernel
on every device.  Eager asks first, ``_select_batch_norm_backend`` in
``aten/src/ATen/native/Normalization.cpp``: cuDNN normalizes fp32, fp64, and fp16 with fp32 weights, in three
dimensions or more; torch's own kernel takes bf16, two dimensions and missing weights.  A plan must not change
which kernels run, nor their bits: torch is asked the same here, and the captured calls become those that
eager makes.

cuDNN hands its backward a *reserve*, an output of its own that is saved with the statistics.  Its size is
cuDNN's to say, and it is asked.  Its backward always makes all three gradients.

A further execution normalizes by the batch's statistics without moving the running ones; cuDNN documents
null pointers for these.

Known weaknesses: a batch norm that one forward calls twice works on copies of its statistics, as the capture
does; a step captured on a CPU for a GPU elsewhere keeps torch's own op, which differs in the reserve alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft
from planner.graph.nodes import last_of

__all__ = ["as_eager"]

aten = torch.ops.aten

_legit = aten._native_batch_norm_legit
_functional = aten._native_batch_norm_legit_functional.default

# (x, weight, bias, running mean, running variance, training, momentum, eps) of what a capture has.
_ARGUMENTS: Mapping[Any, Callable[..., tuple[Any, ...]]] = MappingProxyType(
    {
        _legit.default: lambda *args: args,
        _functional: lambda *args: args,
        _legit.no_stats: lambda x, w, b, training, *rest: (x, w, b, None, None, training, *rest),
        aten._native_batch_norm_legit_no_training.default: lambda *args: (*args[:5], False, *args[5:]),
    }
)


def as_eager(draft: Draft) -> Did:
    """Call cuDNN's batch norm, forward and backward, wherever eager would."""
    graph = draft.graph
    reserves: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in _ARGUMENTS:
            args: tuple[Any, ...] = _ARGUMENTS[node.target](*node.args)
            x, weight, bias, mean, variance = (_value(a) for a in args[:5])
            if _compat.batch_norm_is_cudnns(x, weight, bias, mean, variance, args[5], args[7]):
                reserves[node] = _forward(graph, node, args)
        elif node.target is aten.native_batch_norm_backward.default and node.args[7] is True:
            saved: Any = node.args[5]
            if saved.args[0] in reserves:
                _backward(graph, node, saved.args[0], reserves[saved.args[0]])
    return {"batch norms": len(reserves)}


def _value(source: Any) -> torch.Tensor | None:
    return meta.tensor(source) if isinstance(source, fx.Node) else None


def _forward(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    """Make ``node`` cuDNN's; the node of its reserve."""
    x, training = args[0], args[5]
    with graph.inserting_before(node):
        args = (_dense(graph, x, None), *args[1:])
    fake: torch.Tensor = meta.tensor(x)
    made = meta.value(node)
    count = _compat.batch_norm_reserve_bytes(fake, training)
    with _compat.fake_mode_of(fake):
        reserve = torch.empty(count, dtype=torch.uint8, device=fake.device)
        if not training:
            made = (made[0], *(torch.empty(0, dtype=t.dtype, device=t.device) for t in made[1:]))
    if node.target is _functional:
        node.target = kernels.cudnn_batch_norm_functional
    else:
        node.target = aten.cudnn_batch_norm.default
        if training:
            meta.note_again(node, node.target, (*args[:3], None, None, *args[5:]))
    node.args = args
    meta.describe(node, (*made, reserve), node)
    for part in node.users:
        meta.set_value(part, meta.value(node)[part.args[1]])
    with graph.inserting_after(last_of(node)):
        found = graph.call_function(operator.getitem, (node, len(made)))
    meta.describe(found, reserve, node)
    return found


def _backward(graph: fx.Graph, node: fx.Node, forward: fx.Node, reserve: fx.Node) -> None:
    args: tuple[Any, ...] = node.args
    gradient, _, weight, mean, variance, saved_mean, saved_deviation, _, eps, _ = args
    x: Any = forward.args[0]
    with graph.inserting_before(node):
        gradient = _dense(graph, gradient, x)
    made = meta.value(node)
    likes = (x, weight, weight)
    with _compat.fake_mode_of(meta.tensor(x)):
        made = tuple(
            t if isinstance(t, torch.Tensor) else torch.empty_like(meta.tensor(like))
            for t, like in zip(made, likes, strict=True)
        )
    node.target = aten.cudnn_batch_norm_backward.default
    node.args = (x, gradient, weight, mean, variance, saved_mean, saved_deviation, eps, reserve)
    meta.describe(node, made, node)


def _dense(graph: fx.Graph, source: fx.Node, like: fx.Node | None) -> fx.Node:
    """``source`` without gaps, in the layout of ``like`` or its own: a copy where eager makes one."""
    fake: torch.Tensor = meta.tensor(source)
    with _compat.fake_mode_of(fake):
        layout = _layout(torch.empty_like(fake if like is None else meta.tensor(like)))
        if fake.is_contiguous(memory_format=layout):
            return source
        copy = graph.call_function(aten.clone.default, (source,), {"memory_format": layout})
        meta.describe(copy, fake.clone(memory_format=layout), source)
    return copy


def _layout(dense: torch.Tensor) -> torch.memory_format:
    for layout in (torch.channels_last, torch.channels_last_3d):
        if dense.is_contiguous(memory_format=layout) and not dense.is_contiguous():
            return layout
    return torch.contiguous_format
