"""Random numbers drawn twice: which calls draw, whose generator is asked, and what a CUDA graph may hold.

There is no GPU here: its generators are played by a dictionary, its stream by a function.  That replayed
numbers are the same bits is tested on the CPU's generator, in ``test_planner_capture`` and below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from planner.errors import PlannerError
from planner.graph import kernels
from planner.graph.nodes import is_random
from planner.measure import compare, run_step
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import PricedStep, prepare

aten = torch.ops.aten


def _node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


Q = K = V = None  # operands do not matter here


@pytest.mark.parametrize(
    ("certain", "drawn"),
    [
        (_node(aten._scaled_dot_product_flash_attention.default, Q, K, V, 0.0, True),
         _node(aten._scaled_dot_product_flash_attention.default, Q, K, V, 0.1, True)),
        (_node(aten._scaled_dot_product_flash_attention.default, Q, K, V),
         _node(aten._scaled_dot_product_flash_attention.default, Q, K, V, dropout_p=0.1)),
        (_node(aten._scaled_dot_product_efficient_attention.default, Q, K, V, None, True),
         _node(aten._scaled_dot_product_efficient_attention.default, Q, K, V, None, True, 0.1)),
        (_node(aten._scaled_dot_product_cudnn_attention.default, Q, K, V, None, True, 0.0),
         _node(aten._scaled_dot_product_cudnn_attention.default, Q, K, V, None, True, 0.1)),
        (_node(aten.native_dropout.default, Q, 0.1, False), _node(aten.native_dropout.default, Q, 0.1, True)),
        (_node(aten._scaled_dot_product_flash_attention_backward.default, Q, Q, K, V),
         _node(aten.bernoulli.p, Q, 0.5)),
    ],
)  # fmt: skip
def test_what_draws_on_cuda(certain: fx.Node, drawn: fx.Node) -> None:
    assert not is_random(certain)
    assert is_random(drawn)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Generator states by device, as torch.cuda would give and take them."""
    held = {"cuda:0": torch.zeros(16, dtype=torch.uint8), "cuda:1": torch.ones(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: held[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: held.update({device: state}))
    return held


def test_a_replay_goes_back_and_forth_on_its_own_device(states: dict[str, Tensor]) -> None:
    noted = kernels.rng_state("cuda:1")
    assert noted.nbytes == kernels.rng_state_bytes("cuda:1")
    states["cuda:1"] = torch.full((16,), 7, dtype=torch.uint8)  # others drew since
    host = torch.get_rng_state()
    seen = kernels.replay(noted, "cuda:1", lambda: states["cuda:1"].clone())
    assert torch.equal(seen, noted)
    assert torch.equal(states["cuda:1"], torch.full((16,), 7, dtype=torch.uint8))
    assert torch.equal(states["cuda:0"], torch.zeros(16, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), host)


def test_a_replay_that_fails_puts_the_generator_back(states: dict[str, Tensor]) -> None:
    def fails() -> None:
        raise RuntimeError("no memory")

    before = states["cuda:0"].clone()
    with pytest.raises(RuntimeError, match="no memory"):
        kernels.replay(torch.full((16,), 9, dtype=torch.uint8), "cuda:0", fails)
    assert torch.equal(states["cuda:0"], before)


# -------------------------------------------------------------------------------------- CUDA graphs


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.dropout(layer(x).relu(), 0.2, self.training)
        return x.square().mean()


X = torch.randn(2048, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def step() -> PricedStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Dropping().train()
    return prepare(model, (X,), costs="roofline", search=Search(time_limit_s=1.0))


def _plans(step: PricedStep) -> tuple[Plan, Plan]:
    """One that draws masks again, one that draws nothing twice."""
    replaying = step.least_plan()
    return replaying, step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all"))


def test_both_kinds_of_plan_draw_eagers_numbers(step: PricedStep) -> None:
    eager = run_step(step.model, (X,))
    for plan, replays in zip(_plans(step), (True, False), strict=True):
        plan.apply(step.model)
        assert plan.executable(step.model).program.replays is replays
        assert compare(eager, run_step(step.model, (X,))).equal
        plan.restore(step.model)


def test_a_graph_capture_of_replayed_numbers_is_refused(
    step: PricedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, keeping = _plans(step)
    model = step.model
    capturing = False
    monkeypatch.setattr(kernels, "is_capturing", lambda device: capturing)
    replaying.apply(model)
    loss = model(X)
    capturing = True
    with pytest.raises(PlannerError, match="CUDA graph is being captured"):
        loss.backward()  # forward outside the graph, backward in it
    with pytest.raises(PlannerError, match=r"plan\.restore"):
        model(X)
    capturing = False
    loss.backward()  # nothing was released
    assert model.layers[0].weight.grad is not None
    model.zero_grad()
    keeping.apply(model)
    capturing = True
    model(X).backward()
    model.zero_grad()
    keeping.restore(model)


def test_who_is_asked_whether_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: not asked.append(True))
    assert not kernels.is_capturing(torch.device("cpu")) and not asked
    assert kernels.is_capturing(torch.device("cuda", 1)) and asked


@pytest.mark.parametrize("p", [0.05, 0.1, 0.15, 0.3, 0.5])
def test_cudas_dropout_scale_is_its_kernels(p: float) -> None:
    """In float32, from a probability that was rounded before: at 0.15 it is not the nearest to 1 / 0.85."""
    expected = np.float32(1.0 / float(np.float32(1.0 - p)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kernels.dropout_scale(p, dtype, "cuda:0") == float(expected)
    assert (expected == np.float32(1.0 / (1.0 - p))) == (p != 0.15)
    assert kernels.dropout_scale(p, torch.float64, "cuda") == 1.0 / (1.0 - p)
