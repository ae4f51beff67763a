"""What trains without the usual call: frozen networks, eval mode, parts of a model called by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner import _compat
from tests import tiny
from tests.hf import FAST


def frozen(n: int = 4) -> nn.Module:
    return tiny.seeded(lambda: tiny.blocks(n)).requires_grad_(False)


def given(*, wants: bool = True) -> Tensor:
    return torch.linspace(-1, 1, 64 * 32).reshape(64, 32).requires_grad_(wants)


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.autograd.grad(model(x).square().mean(), x)[0]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per capture of a step."""
    made, original = [], _compat.export_joint
    monkeypatch.setattr(_compat, "export_joint", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


# -- frozen networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_network_is_planned_for_the_gradient_of_its_input(trained: bool) -> None:
    """A discriminator, a perceptual loss, a reward model: in training mode or not, whoever made the input."""
    model, x = frozen().train(trained), given()
    made = x * 1  # by another network
    loose = planner.plan(model, 1, (made,), **FAST)
    plan = planner.plan(model, 0.85 * loose.peak_bytes / 1e9, (made,), **FAST)
    report = plan.verify()
    assert report.ok and report.comparison.gradients.count == 1 and report.recompute_flops > 0
    assert report.peak_bytes == report.predicted_peak_bytes
    twin = copy.deepcopy(model)
    plan.apply(model)
    assert planner.measure.step_peak(model, (made,)) == plan.peak_bytes <= plan.budget_bytes
    assert torch.equal(input_gradient(model, x), input_gradient(twin, x))


def test_a_layer_without_parameters_is_planned_too() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Softmax(-1), nn.GELU())
    assert planner.plan(model, 1, (given(),), **FAST).verify().ok
    planner.enable(model, 1, now=True, **FAST)
    assert torch.equal(input_gradient(model, given()), input_gradient(nn.Sequential(*model), given()))
    assert planner.plan_of(model) is not None


def test_nothing_at_all_to_differentiate_is_refused() -> None:
    with pytest.raises(planner.PlannerError, match=r"no trainable parameter .* no input that requires grad"):
        planner.plan(frozen(), 1, (given(wants=False),), **FAST)


def test_a_discriminator_frozen_at_every_other_step_is_captured_once_each_way(captures: list[Any]) -> None:
    maker, judge = tiny.seeded(lambda: tiny.blocks(1)), tiny.seeded(tiny.blocks)
    twins = copy.deepcopy((maker, judge))
    planner.enable(judge, 1, now=True, **FAST)
    seen = []
    for make, ask in ((maker, judge), twins):
        torch.manual_seed(0)
        for _ in range(3):
            ask.requires_grad_(True)
            ask(make(given(wants=False)).detach()).mean().backward()
            ask.requires_grad_(False)
            ask(make(given(wants=False))).mean().backward()
        seen.append([p.grad for p in (*make.parameters(), *ask.parameters())])
    assert all(torch.equal(p, q) for p, q in zip(*seen, strict=True))
    assert len(captures) == 2
    judge(given(wants=False)).mean()  # frozen, and nothing asks for a gradient: as it always ran
    assert len(captures) == 2


# -- eval mode ------------------------------------------------------------------------------------


def test_a_model_in_eval_mode_that_trains_is_planned(
    captures: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The first call shows that a backward comes; training mode keeps a plan of its own."""
    model = tiny.seeded(lambda: tiny.blocks(2)).eval()
    twin, x = copy.deepcopy(model), given(wants=False)
    planner.enable(model, 1, now=True, **FAST)
    for trained in (False, False, True, False, True):
        for m in (model, twin):
            torch.manual_seed(0)
            m.train(trained)(x).square().mean().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert len(captures) == 2
    (told,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert "eval mode with gradients (test_planner_unplanned_calls.py:" in told and "held " in told
    model.zero_grad()
    plan = planner.plan_of(model)
    assert plan is not None and plan.verify(inputs=(x,)).ok


def test_evaluation_with_gradients_enabled_costs_no_plan(
    captures: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = planner.enable(tiny.seeded(tiny.blocks), 1, now=True, **FAST).eval()
    for _ in range(3):
        model(given(wants=False)).square().mean().item()
        model[0](given(wants=False))
    assert not captures and not caplog.records


def test_a_second_derivative_in_eval_mode_stays_eagers(caplog: pytest.LogCaptureFixture) -> None:
    model = planner.enable(nn.Sequential(nn.Linear(32, 8), nn.Tanh()), 1, now=True, **FAST).eval()
    for _ in range(2):
        x = given()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert len(caplog.records) == 1 and "no plan can be differentiated twice" in caplog.text


def test_what_cannot_be_planned_in_eval_mode_goes_on_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.sum().item()

    model = planner.enable(Odd(nn.Linear(32, 8)), 1, now=True, capture="one graph", **FAST).eval()
    for _ in range(3):
        model(given(wants=False)).sum().backward()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "goes on without a plan: Odd cannot be captured" in caplog.text
    with pytest.raises(planner.TraceError):
        model.train()(given(wants=False))


# -- parts called by name -------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 32)
        self.layers = nn.ModuleList(tiny.blocks(2))
        self.head = nn.Linear(32, 4)

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.words(x) if x.dim() == 1 else x))


def test_a_method_called_instead_of_the_model_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = planner.enable(tiny.seeded(Encoder), 1, now=True, **FAST)
    for _ in range(2):
        model.encode(given(wants=False)).mean().backward()
    told = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [t.split(" (")[0] for t in told] == ["layers.1", "layers.0"]
    assert "in encode): the call ran without a plan and held " in told[0]
    model.words(torch.arange(4)).mean().backward()  # embeddings are looked up by many a loop
    with torch.no_grad():
        model.head(given(wants=False))
    assert planner.plan_of(model) is None and len(caplog.records) == 2


def test_a_planned_step_meets_no_hook_and_disabling_takes_them_off(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = planner.enable(tiny.seeded(Encoder), 1, now=True, **FAST)
    for _ in range(2):
        model(torch.arange(4)).mean().backward()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    twin = copy.deepcopy(model)
    planner.disable(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    twin.head(given(wants=False)).mean().backward()
    assert "head (Linear) of this Encoder" in caplog.text
    planner.disable(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


def test_the_librarys_own_checkpointing_serves_what_no_plan_does(caplog: pytest.LogCaptureFixture) -> None:
    def peak(model: Any) -> int:
        return planner.measure.step_peak(
            lambda: model.bert(**ids).last_hidden_state.mean().backward(), include_resident=False
        )

    ids = {k: v for k, v in tiny.bert_batch().items() if k != "labels"}
    stock = tiny.seeded(tiny.bert)
    stock.activation_checkpointing_enable()
    model = tiny.seeded(tiny.bert)
    planner.enable(model, 1, **FAST)
    model.activation_checkpointing_enable()
    assert not model.is_activation_checkpointing
    assert peak(model) == peak(stock) < peak(tiny.seeded(tiny.bert))
    assert "bert (BertModel) of this BertForSequenceClassification" in caplog.text
    assert not model.is_activation_checkpointing
    model(**tiny.bert_batch()).loss.backward()
    assert planner.plan_of(model) is not None
