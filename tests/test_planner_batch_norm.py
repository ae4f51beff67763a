"""Batch norm where eager's is cuDNN's: the same op, its reserve, copies where eager copies, the same bits.

No GPU is here: torch is made to say "cuDNN", and cuDNN's two ops are given to the CPU with torch's own
kernels inside.  The reserve is checked to be the one that the forward made for this very input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import _compat
from planner.capture.joint_graph import capture
from planner.checks.kernel_check import op_counts
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.measure import compare, run_step, step_peak
from planner.options import Search
from planner.solving.priced import prepare

aten = torch.ops.aten
RESERVE_BYTES = 4000
EMPTY = torch.empty(0, dtype=torch.uint8)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    assert any(x.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    made = aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    if not training:
        return (made[0], weight.new_empty(0), weight.new_empty(0), EMPTY.clone())
    reserve = torch.zeros(RESERVE_BYTES, dtype=torch.uint8)
    reserve[:8] = x.sum(dtype=torch.float64).view(1).view(torch.uint8)
    return (*made, reserve)


def _backward(
    x: Tensor,
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    saved_mean: Tensor,
    saved_deviation: Tensor,
    eps: float,
    reserve: Tensor,
) -> tuple[Tensor, ...]:
    assert torch.equal(reserve[:8].view(torch.float64), x.sum(dtype=torch.float64).view(1))
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    assert x.is_contiguous(memory_format=layout) and gradient.is_contiguous(memory_format=layout)
    made: tuple[Tensor, ...] = aten.native_batch_norm_backward(
        gradient, x, weight, mean, variance, saved_mean, saved_deviation, True, eps, [True] * 3
    )
    return made


def _chosen(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> bool:
    """Of torch's conditions those that the models here meet or miss."""
    return weight is not None and bias is not None and x.dim() >= 3 and x.dtype != torch.bfloat16


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_batch_norm", _forward, "CPU")
    library.impl("cudnn_batch_norm_backward", _backward, "CPU")
    monkeypatch.setattr(_compat, "batch_norm_is_cudnns", _chosen)
    monkeypatch.setattr(_compat, "batch_norm_reserve_bytes", lambda x, training: RESERVE_BYTES * training)
    yield
    library._destroy()


class Net(nn.Module):
    """Convolutions between the norms, activations that outweigh the parameters."""

    def __init__(self, norms: int = 4, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False),
                    nn.BatchNorm2d(8, **settings),
                    nn.GELU(),
                )
                for i in range(norms)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def pixels(
    layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float32
) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 12, 12, generator=random).to(dtype).contiguous(memory_format=layout)


def net(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**settings)


def graph_of(model: nn.Module, *inputs: Tensor) -> TrainingGraph:
    return training_graph(capture(model, inputs))


def norms_of(graph: TrainingGraph) -> Counter[str]:
    return Counter(op.target for op in graph.ops if "norm" in op.target)


def agrees(model: nn.Module, *inputs: Tensor) -> Any:
    """The least plan: it gives the bits of the one that recomputes nothing, and takes what it says.

    The eager step is the CPU's own, which may add up in another order where cuDNN's would copy first.
    """
    step = prepare(model, inputs, costs="roofline")
    eager, records = run_step(model, inputs), []
    plans = [
        step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all")),
        step.plan_bytes(step.minimum_peak_bytes, search=Search(time_limit_s=5)),
    ]
    for plan in plans:
        plan.apply(model)
        records.append(run_step(model, inputs))
        assert step_peak(model, inputs) == plan.peak_bytes
        plan.restore(model)
    assert compare(*records).equal
    found = compare(eager, records[0])
    assert max(found.buffers.max_relative, found.gradients.max_relative) < 1e-5
    return plans[1]


@pytest.mark.usefixtures("cudnn")
def test_training_calls_cudnn_with_its_reserve() -> None:
    model = net()
    graph = graph_of(model, pixels())
    assert norms_of(graph) == {"aten.cudnn_batch_norm": 4, "aten.cudnn_batch_norm_backward": 4}
    made = [
        graph.values[v].bytes for op in graph.ops if op.target == "aten.cudnn_batch_norm" for v in op.outputs
    ]
    assert made == [4 * 8 * 144 * 4, 32, 32, RESERVE_BYTES] * 4
    for op in graph.ops:
        if op.target == "aten.cudnn_batch_norm_backward":
            assert [graph.values[v].bytes for v in op.outputs] == [4 * 8 * 144 * 4, 32, 32]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_recomputed_it_gives_the_same_bits_and_moves_its_statistics_once(layout: torch.memory_format) -> None:
    model = net().to(memory_format=layout)  # type: ignore[call-overload]
    plan = agrees(model, pixels(layout))
    again = [p for p in plan.placements if p.op == "aten.cudnn_batch_norm" and p.times_recomputed]
    assert again
    code = plan.rewrite(model).code
    assert "cudnn_batch_norm_backward" in code and "aten.native_batch_norm" not in code


@pytest.mark.usefixtures("cudnn")
def test_statistics_that_stand_still_have_torchs_own_backward() -> None:
    """As eager has it: cuDNN's inference in the forward, nothing saved by it."""
    model = net(norms=2).eval()
    assert norms_of(graph_of(model, pixels())) == {
        "aten.cudnn_batch_norm": 2,
        "aten.native_batch_norm_backward": 2,
    }
    agrees(model, pixels())


@pytest.mark.usefixtures("cudnn")
def test_without_running_statistics() -> None:
    model = net(track_running_stats=False)
    assert norms_of(graph_of(model, pixels()))["aten.cudnn_batch_norm"] == 4
    agrees(model, pixels())


@pytest.mark.usefixtures("cudnn")
def test_called_twice_it_works_on_copies_of_its_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x).tanh()).square().mean() + self.norm(x).exp().mean()

    model = Twice()
    assert norms_of(graph_of(model, pixels()))["cudnn_batch_norm_functional"] == 3
    agrees(model, pixels())


@pytest.mark.usefixtures("cudnn")
def test_it_copies_where_eager_copies() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(0, 2).exp().sum()

    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    graph = graph_of(Sliced(), x)
    assert norms_of(graph) == {"aten.cudnn_batch_norm": 1, "aten.cudnn_batch_norm_backward": 1}
    copies = [op for op in graph.ops if op.target == "aten.clone"]
    # The input; the gradient is dense already, since on a CPU the norm's result is laid out anew.
    assert [graph.values[op.outputs[0]].bytes for op in copies] == [4 * x.numel()]
    agrees(Sliced(), x)


@pytest.mark.usefixtures("cudnn")
def test_other_batch_norms_are_torchs_own() -> None:
    assert not any("cudnn" in name for name in norms_of(graph_of(net(affine=False), pixels())))
    half = net().to(torch.bfloat16)
    assert not any("cudnn" in name for name in norms_of(graph_of(half, pixels(dtype=torch.bfloat16))))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    assert not any("cudnn" in name for name in norms_of(graph_of(model, torch.randn(5, 4))))


def test_on_a_cpu_torch_says_its_own() -> None:
    model = net()
    assert not any("cudnn" in name for name in norms_of(graph_of(model, pixels())))
    norm = model.layers[0][1]  # type: ignore[index]
    given = (pixels(), norm.weight, norm.bias, norm.running_mean, norm.running_var)
    assert not _compat.batch_norm_is_cudnns(*given, True, 1e-5)
    assert _compat.batch_norm_reserve_bytes(pixels(), training=False) == 0


@pytest.mark.usefixtures("cudnn")
def test_the_kernels_of_a_plan_are_counted_as_cudnns() -> None:
    model = net(norms=2)
    step = prepare(model, (pixels(),), costs="roofline")
    step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all")).apply(model)
    with op_counts() as counts:
        model(pixels()).backward()
    assert counts["aten.cudnn_batch_norm"] == counts["aten.cudnn_batch_norm_backward"] == 2
