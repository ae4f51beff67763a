"""LSTM, GRU and RNN: on the CPU captured as eager runs them, the same bits and the same bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import _compat
from planner._compat import FakeTensorMode, tracing
from planner.capture.as_eager import recurrences
from planner.capture.refusals import refuse_unplannable
from planner.errors import TraceError
from planner.graph import kernels
from planner.graph.passes import lstm
from planner.options import Search
from planner.solving.priced import PricedStep, prepare

# Five rows of thirteen: neither fills a vector, so a kernel that runs on from row to row has other bits.
STEPS, BATCH, WIDTH, HIDDEN = 2, 5, 8, 13
WORDS = torch.randn(STEPS, BATCH, WIDTH)

Call = Callable[[Any, Tensor], Tensor]


def outputs(rnn: Any, h: Tensor) -> Tensor:
    return rnn(h)[0]


def states(rnn: Any, h: Tensor) -> Tensor:
    """From a given state to the last one, outputs left alone."""
    ways = rnn.num_layers * (2 if rnn.bidirectional else 1)
    start = h[0, 0, 0] * torch.ones(ways, BATCH, HIDDEN)
    if isinstance(rnn, nn.LSTM):
        return torch.cat(rnn(h, (start, start * 2))[1])
    return rnn(h, start)[1]


def twice(rnn: Any, h: Tensor) -> Tensor:
    return rnn(h)[0] + rnn(h * 2)[0]


def one(rnn: Any, h: Tensor) -> Tensor:
    return rnn(h[:, 0])[0]


def packed(rnn: Any, h: Tensor) -> Tensor:
    lengths = torch.tensor([2, 2, 2, 1, 1])
    return rnn(nn.utils.rnn.pack_padded_sequence(h, lengths))[0].data


class Around(nn.Module):
    def __init__(self, rnn: nn.Module, call: Call) -> None:
        super().__init__()
        self.first, self.rnn, self.call = nn.Linear(WIDTH, WIDTH), rnn, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.rnn, self.first(x))


def step_of(
    kind: type[nn.Module], call: Call, dtype: torch.dtype = torch.float32, **options: Any
) -> PricedStep:
    torch.manual_seed(0)
    model = Around(kind(WIDTH, HIDDEN, **options), call).to(dtype)
    return prepare(
        model,
        (WORDS.to(dtype),),
        loss_fn=lambda y: y.pow(2).mean(),
        costs="roofline",
        search=Search(time_limit_s=0.1),
    )


CASES: dict[str, tuple[Call, dict[str, Any]]] = {
    "plain": (outputs, {}),
    "deep": (outputs, {"num_layers": 2, "batch_first": True, "dropout": 0.3}),
    "states": (states, {"bidirectional": True, "bias": False}),
    "deep, both ways": (outputs, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    "twice": (twice, {}),
    "one row": (one, {}),
    "bfloat16": (outputs, {"dtype": torch.bfloat16}),
}
SHORT = ("deep", "states")  # of what is many ops; a smaller choice
ALL = [(nn.LSTM, name) for name in CASES] + [(kind, name) for kind in (nn.GRU, nn.RNN) for name in SHORT]


def assert_as_eager(step: PricedStep) -> None:
    plans = [step.least_plan()]
    if len(step.graph.ops) < 100:
        plans.append(step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all")))
    for plan in plans:
        report = plan.verify()
        assert report.equal, str(report)
        assert report.peak_bytes == report.predicted_peak_bytes <= plan.budget_bytes, str(report)
        assert report.recompute_flops == report.predicted_recompute_flops, str(report)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_recurrence_is_as_in_eager(
    kind: type[nn.Module], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    call, options = CASES[name]
    with caplog.at_level(logging.WARNING, "planner"):
        step = step_of(kind, call, **options)
    assert not caplog.records
    assert_as_eager(step)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_are_as_in_eager() -> None:
    assert_as_eager(step_of(nn.LSTM, outputs, proj_size=5))


def test_relu_is_as_in_eager() -> None:
    assert_as_eager(step_of(nn.RNN, outputs, nonlinearity="relu"))


def test_a_layer_of_an_lstm_is_one_call() -> None:
    step = step_of(nn.LSTM, outputs, num_layers=2)
    targets = [op.target for op in step.graph.ops]
    assert sum("lstm_layer" in t for t in targets) == 2
    assert targets.count("aten.mkldnn_rnn_layer_backward") == 2
    saves = step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all")).verify()
    assert saves.peak_bytes == saves.eager_peak_bytes


def test_fake_gradients_of_an_lstm_have_the_sizes_of_the_kernels() -> None:
    for has_biases in (True, False):
        biases = [
            torch.zeros(4 * HIDDEN) if has_biases else torch.zeros(4 * HIDDEN, n) for n in (WIDTH, HIDDEN)
        ]
        weights = [torch.randn(4 * HIDDEN, n) for n in (WIDTH, HIDDEN)]
        state = torch.zeros(BATCH, HIDDEN)
        how = 2, HIDDEN, 1, has_biases
        given = (WORDS, *weights, *biases, state, state.clone())
        *made, workspace = kernels.lstm_layer(*given, False, [], *how, False, False, True)
        args: tuple[Any, ...] = (
            *given,
            *made,
            made[0],
            None,
            None,
            False,
            *how,
            True,
            False,
            [],
            False,
            workspace,
        )
        real = torch.ops.aten.mkldnn_rnn_layer_backward.default(*args)
        fake = recurrences.lstm_gradients(None, None, *args)
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [
            (t.shape, t.stride(), t.dtype) for t in real
        ]
        assert len({t.data_ptr() for t in real}) == len({t.data_ptr() for t in fake}) == 7


def test_the_workspace_of_each_size_is_asked_for_once() -> None:
    lstm._workspace_bytes.cache_clear()
    step_of(nn.LSTM, twice, bidirectional=True)
    found = lstm._workspace_bytes.cache_info()
    assert (found.misses, found.hits) == (2, 2)  # backwards and not, each of them twice


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="needs the value of a tensor"):
        step_of(kind, packed)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_on_a_gpu_it_is_warned_of(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = Around(kind(WIDTH, HIDDEN), outputs)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
    with caplog.at_level(logging.WARNING, "planner"):
        refuse_unplannable(model)
    assert f"rnn ({kind.__name__}) runs as one kernel of cuDNN's" in caplog.text


def test_on_a_gpu_the_tracer_keeps_its_forms() -> None:
    aten = torch.ops.aten
    ours = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
    assert ours <= {op for op, _ in tracing._python_forms(on_cpu=True)}
    assert not ours & {op for op, _ in tracing._python_forms(on_cpu=False)}
    before = dict(aten.gru.input.py_kernels)
    with _compat.kernels_as_eager(recurrences.gru, recurrences.lstm_gradients, on_cpu=False):
        assert dict(aten.gru.input.py_kernels) == before
    with _compat.kernels_as_eager(recurrences.gru, recurrences.lstm_gradients, on_cpu=True):
        now = aten.gru.input.py_kernels
        assert {now[key] for key in tracing._FORM_KEYS} == {recurrences.gru}
    assert dict(aten.gru.input.py_kernels) == before
