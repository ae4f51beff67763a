"""What a capture is told of the recurrences that eager runs on the CPU, so that it has their bits.

LSTM.  One kernel of oneDNN's runs a layer's whole sequence.  The fake form of its backward gives both biases
one gradient between them, where the kernel makes two; it is corrected here (for the workspace see
:mod:`planner.graph.passes.lstm`).

RNN.  What torch composes it of is traced as it is.

GRU.  Eager composes it from smaller ops (``aten/src/ATen/native/RNN.cpp``), some of which write their
results over a part of a larger tensor.  A capture has no such writes.  It makes the sum
of two gates a tensor of its own instead, whose rows touch, and on that the sigmoid's vectors run on from row
to row: which elements are left to the scalar rest differs, and with it their last bits.  Here both gates that
take a sigmoid are added at once and read as halves, so that rows stay apart as in eager.

Known weaknesses: packed sequences are not taken, their lengths being values; one step is one set of ops, so a
long sequence makes a large graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gru", "lstm_gradients"]


def lstm_gradients(mode: object, op: object, *args: Any) -> tuple[Tensor, ...]:
    """Fake results of ``aten::mkldnn_rnn_layer_backward``: float32, whatever the arguments are.

    Gradients of the input, the two weights, the two biases, the state and the cell.
    """
    x, of_input, of_state, _, _, state, cell = args[:7]
    bias = of_input.shape[:1]
    shapes = (x.shape, of_input.shape, of_state.shape, bias, bias, state.shape, cell.shape)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def gru(
    x: Tensor,
    hidden: Tensor,
    parameters: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """``aten::gru.input``: the last layer's outputs and every layer's last state.

    ``x``           (steps, batch, width), or (batch, steps, width) with ``batch_first``.
    ``hidden``      (layers * directions, batch, hidden size).
    ``parameters``  weights of input and state, then biases of both, per layer and direction.
    """
    each = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    states, last = hidden.unbind(0), []
    if batch_first:
        x = x.transpose(0, 1)
    for layer in range(layers):
        outputs = []
        for way in range(layer * directions, (layer + 1) * directions):
            own = parameters[way * each : (way + 1) * each]
            output, state = _one_way(x, states[way], own, backwards=way % directions == 1)
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    return (x.transpose(0, 1) if batch_first else x), torch.stack(last, 0)


def _one_way(
    x: Tensor, state: Tensor, parameters: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """The states after each step, and the one after the last that is taken."""
    of_input, of_state, *biases = parameters
    bias, state_bias = biases or (None, None)
    steps = F.linear(x, of_input, bias).unbind(0)
    found = []
    for step in reversed(steps) if backwards else steps:
        state = _after(step, F.linear(state, of_state, state_bias), state)
        found.append(state)
    return torch.stack(found[::-1] if backwards else found, 0), state


def _after(of_input: Tensor, of_state: Tensor, state: Tensor) -> Tensor:
    """The next state; ``of_input`` and ``of_state`` are (batch, reset | update | new)."""
    width = state.shape[-1]
    gates, new = of_input.split((2 * width, width), 1)
    state_gates, state_new = of_state.split((2 * width, width), 1)
    reset, update = (gate.sigmoid() for gate in (state_gates + gates).split(width, 1))
    new = (new + state_new * reset).tanh()
    return (state - new) * update + new
