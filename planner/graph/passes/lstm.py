"""LSTM as eager runs it on the CPU: oneDNN's kernel, one call for a layer's whole sequence.

The kernel hands its backward a *workspace*, and makes one only where gradients are being recorded
(``aten/src/ATen/native/mkldnn/RNN.cpp`` asks the thread).  A planned step records none, so it says otherwise
around the call (:func:`planner.graph.kernels.lstm_layer`).  How large the workspace is, oneDNN decides, by
the sizes and the machine: the kernel is run once on zeros of those sizes, and the answer remembered.

Where eager does not call oneDNN (projections, float64) nothing is changed: the capture has eager's own ops.

Known weaknesses: that one run takes the memory and time of the layer's forward; under ``torch.no_grad``
inside a forward, eager has no workspace and the planned step has one for the length of the call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx.node import map_arg

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft

__all__ = ["as_eager"]

aten = torch.ops.aten


def as_eager(draft: Draft) -> Did:
    """Turn oneDNN's LSTM into calls that leave their workspace, and give that its size."""
    layers = draft.graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer.default)
    for node in layers:
        *made, workspace = meta.value(node)
        count = _workspace_bytes(map_arg(node.args, lambda a: _Zeros.like(meta.tensor(a))))
        with _compat.fake_mode_of(workspace):
            workspace = torch.empty(count, dtype=torch.uint8)
        node.target = kernels.lstm_layer
        meta.describe(node, (*made, workspace), node)
        for part in node.users:
            if part.args[1] == len(made):
                meta.set_value(part, workspace)
    return {"LSTM layers": len(layers)}


class _Zeros(tuple[tuple[int, ...], torch.dtype]):
    """What a tensor's workspace depends on."""

    @classmethod
    def like(cls, tensor: torch.Tensor) -> _Zeros:
        return cls((tuple(tensor.shape), tensor.dtype))


@functools.cache
def _workspace_bytes(args: tuple[Any, ...]) -> int:
    with _compat.modes_set_aside():
        given = [torch.zeros(a[0], dtype=a[1]) if isinstance(a, _Zeros) else a for a in args]
        return kernels.lstm_layer(*given)[-1].numel()
