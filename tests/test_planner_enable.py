"""The switch on any module: nothing changes until it is thrown, then training fits the budget bit for bit."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

import planner
from planner import _compat
from planner.solving.priced import prepare
from tests import tiny
from tests.hf import FAST

INPUTS = tiny.batch(64, labels=True)


class Layer(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(x))))
        return out


class Classifier(hf.PreTrainedModel):
    """As transformers' own models are, and captured in half of the time that its BERT takes."""

    config_class = hf.PretrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: hf.PretrainedConfig) -> None:
        super().__init__(config)
        self.embed, self.layers = nn.Embedding(64, 16), nn.ModuleList(Layer(16) for _ in range(2))
        self.classifier = nn.Linear(16, 3)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        hidden = self.embed(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.classifier(hidden.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def classifier() -> nn.Module:
    """The same weights at every call."""
    return tiny.seeded(lambda: Classifier(hf.PretrainedConfig()))


def texts(seed: int = 0) -> dict[str, Tensor]:
    """So many rows that activations count beside the parameters of one layer."""
    return tiny.bert_batch(seed, rows=4)


def peak_gb(model: nn.Module, inputs: Any) -> float:
    """Of the step as it is."""
    return prepare(model, inputs, costs="roofline").baseline.peak_bytes / 1e9


@functools.cache
def whole_gb() -> float:
    return peak_gb(classifier(), texts())


def pair(share: float = 0.85, **options: Any) -> tuple[nn.Module, nn.Module]:
    """An enabled model, its switch not thrown, and its twin without."""
    model = classifier()
    twin = copy.deepcopy(model)
    planner.enable(model, share * whole_gb(), **FAST, **options)
    return model, twin


def train(model: nn.Module, seeds: tuple[int, ...] = (0, 1, 2), seed: int = 5) -> dict[str, Tensor]:
    """Losses, parameters and the generator's state after a step per seed."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, Tensor] = {}
    for i, batch_seed in enumerate(seeds):
        optimizer.zero_grad()
        loss = model(**texts(batch_seed)).loss
        loss.backward()
        optimizer.step()
        seen[f"loss {i}"] = loss.detach()
    seen |= {n: p.detach().clone() for n, p in model.named_parameters()}
    seen["rng"] = torch.get_rng_state()
    return seen


def plain(model: nn.Module) -> set[str]:
    return {name for name in vars(model) if "checkpointing" in name or name in ("forward", "_planner_switch")}


# -- on and off -----------------------------------------------------------------------------------


def test_nothing_changes_until_the_switch_is_thrown() -> None:
    model, twin = pair()
    assert "forward" not in vars(model)
    tiny.assert_same_bits(train(model), train(twin))
    assert planner.plan_of(model) is None


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_the_switch_plans_at_the_first_batch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, twin = pair()
    with caplog.at_level(logging.INFO, logger="planner"):
        getattr(model, name)()
        assert planner.plan_of(model) is None
        tiny.assert_same_bits(train(model), train(twin))
    plan = planner.plan_of(model)
    assert plan is not None and plan.recompute_flops > 0
    assert plan.peak_bytes <= plan.budget_bytes < plan.baseline_peak_bytes
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "Classifier planned to" in caplog.text and "input_ids 4x16," in caplog.text
    assert "\n" not in caplog.records[0].message


def test_a_class_without_the_method_gets_a_switch() -> None:
    # 'CrossEncoder' object has no attribute 'gradient_checkpointing_enable'
    model = tiny.seeded(tiny.Mlp)
    with pytest.raises(AttributeError, match="gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    twin = copy.deepcopy(model)
    planner.enable(model, 0.9 * peak_gb(model, INPUTS), **FAST)
    model.gradient_checkpointing_enable()
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))
    plan = planner.plan_of(model)
    assert plan is not None and plan.recompute_flops > 0


def test_now_and_off_again() -> None:
    model, twin = pair(now=True)
    got, want = train(model), train(twin)
    tiny.assert_same_bits(got, want)
    model.gradient_checkpointing_disable()
    assert "forward" not in vars(model)
    tiny.assert_same_bits(train(model), train(twin))
    planner.disable(model)
    assert not plain(model) and planner.plan_of(model) is None
    assert model.gradient_checkpointing_enable.__func__ is type(model).gradient_checkpointing_enable


def test_the_instance_keeps_its_class_and_signature() -> None:
    model, twin = pair(now=True)
    assert type(model) is type(twin)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_flags_below_are_lowered_and_put_back() -> None:
    model, twin = pair()
    type(model).gradient_checkpointing_enable(model)
    raised = [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
    assert raised
    model.gradient_checkpointing_enable()
    assert not model.is_gradient_checkpointing
    tiny.assert_same_bits(train(model), train(twin))
    model.gradient_checkpointing_disable()
    assert [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)] == raised


def test_the_optimizer_is_found_and_counts() -> None:
    model, _ = pair(share=0.9)
    model.gradient_checkpointing_enable({"budget_gb": 1})
    held = torch.optim.AdamW(model.parameters())
    model(**texts()).loss.backward()
    plan = planner.plan_of(model)
    assert plan is not None
    moments = 2 * sum(p.nbytes for p in model.parameters())
    counters = 4 * len(held.param_groups[0]["params"])
    assert plan.breakdown["optimizer_state"] == moments + counters


def test_batches_are_not_kept() -> None:
    model, _ = pair(now=True)
    batches = [{k: v[:n].clone() for k, v in texts().items()} for n in (2, 1)]
    kept = [weakref.ref(t) for b in batches for t in b.values()]
    for batch in batches:
        model(**batch).loss.backward()
    model.zero_grad()
    del batch, batches
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_the_plan_can_be_verified() -> None:
    model, _ = pair(now=True)
    model(**texts()).loss.backward()
    model.zero_grad()
    plan = planner.plan_of(model)
    assert plan is not None
    report = plan.verify(inputs=texts(1))
    assert report.ok and report.recompute_flops == plan.recompute_flops > 0
    assert "forward" in vars(model)
    with pytest.raises(planner.PlannerError, match=r"pass verify\(model, inputs\)"):
        plan.verify()


# -- calls the plan is not for --------------------------------------------------------------------


def test_evaluation_in_the_middle_of_training() -> None:
    model, twin = pair(share=0.95, now=True)
    for m in (model, twin):
        torch.manual_seed(0)
        m(**texts(0)).loss.backward()
        with torch.no_grad():
            m(**texts(1))  # draws dropout, in training mode
        m.eval()
        m(**texts(2)).loss.backward()
        m.train()
        m(**texts(3)).loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_frozen_model_runs_as_it_is() -> None:
    model, _ = pair(now=True)
    model.requires_grad_(False)
    assert not model(**texts()).loss.requires_grad
    assert planner.plan_of(model) is None


# -- many shapes ----------------------------------------------------------------------------------


def test_after_two_shapes_one_capture_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, **{**FAST, "solver": "recompute_all"}, now=True)
    traced, original = [], _compat.export_joint
    monkeypatch.setattr(_compat, "export_joint", lambda *a, **k: traced.append(1) or original(*a, **k))
    parts = [tiny.batch(n, seed=n, labels=True) for n in (16, 9, 12, 5, 14, 2, 1, 1)]
    for m in (model, twin):
        torch.manual_seed(0)
        for _ in range(2):
            for part in parts:
                m.zero_grad()
                m(**part).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert len(traced) == 4  # two shapes, sizes that vary, and those with a batch of one


def test_a_larger_batch_may_be_refused() -> None:
    model, _ = pair(now=True, on_larger="raise")
    whole = texts()
    small = {k: v[:1] for k, v in whole.items()}
    model(**small).loss.backward()
    with pytest.raises(planner.StalePlanError, match=r"int64\[4x16\].*int64\[1x16\].*on_larger"):
        model(**whole)
    model(**small).loss.backward()


def test_gradients_of_earlier_batches_count() -> None:
    model, twin = pair(share=1.0, now=True)
    for m in (model, twin):
        torch.manual_seed(0)
        for seed in range(3):
            m(**texts(seed)).loss.backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    plan = planner.plan_of(model)
    assert plan is not None and plan.recompute_flops > 0  # the first batch alone would have fitted as it is
    assert plan.peak_bytes <= plan.budget_bytes


# -- use it was not made for ----------------------------------------------------------------------


def test_enabling_twice_changes_the_budget_without_a_new_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from planner.training import making

    model, twin = pair(share=0.95, now=True)
    first, want = train(model), train(twin)
    tiny.assert_same_bits(first, want)
    loose = planner.plan_of(model)
    assert planner.enable(model, loose.budget_bytes / 1e9, **FAST) is model  # the same again: nothing
    monkeypatch.setattr(making, "prepare", lambda *a, **k: pytest.fail("captured again"))
    tiny.assert_same_bits(train(model), train(twin))
    assert planner.plan_of(model) is loose
    planner.enable(model, loose.budget_bytes / 1e9 * 0.85, **FAST)
    tiny.assert_same_bits(train(model), train(twin))
    tight = planner.plan_of(model)
    assert tight.peak_bytes <= tight.budget_bytes < loose.budget_bytes
    assert tight.overhead > loose.overhead


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"budget_gb": 0}, ValueError),
        ({"budget_gb": "8"}, TypeError),
        ({"on_larger": "ignore"}, ValueError),
        ({"max_plans": 0}, ValueError),
        ({"optimizer": "adam"}, TypeError),
        ({"budget_gb": float("nan")}, ValueError),
        ({"budget_gb": float("inf")}, ValueError),
        ({"budget_gb": True}, TypeError),
        ({"solver": "nope"}, ValueError),
        ({"time_limit_s": -3}, ValueError),
        ({"time_limit_s": float("nan")}, ValueError),
        ({"time_limit_s": "30"}, TypeError),
        ({"progress": "yes"}, TypeError),
        ({"calls_per_step": 0}, ValueError),
        ({"costs": "guess"}, ValueError),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception]) -> None:
    """They are refused where they are given, by the argument's name, and the model stays as it was."""
    (name, value), *_ = arguments.items()
    said = rf"(?s){name}.*{re.escape(repr(value))}"
    model = tiny.seeded(tiny.Mlp)
    with pytest.raises(error, match=said):
        planner.enable(model, **{"budget_gb": 1, **arguments})
    assert not plain(model)
    planner.enable(model, 1, **FAST)
    with pytest.raises(error, match=said):
        planner.enable(model, **{"budget_gb": 1, **arguments})
    with pytest.raises(error, match=said):
        model.gradient_checkpointing_enable(arguments)
    assert vars(model)["_planner_switch"].settings.search.solver == FAST["solver"]


def test_options_of_the_switch_that_make_no_sense() -> None:
    model = planner.enable(tiny.seeded(tiny.Mlp))
    with pytest.raises(ValueError, match="no budget"):
        model.gradient_checkpointing_enable()
    with pytest.raises(TypeError, match="'budget' is no option"):
        model.gradient_checkpointing_enable({"budget": 8})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        planner.enable("model", 1)
    model.gradient_checkpointing_enable({"budget_gb": 8, "use_reentrant": False})  # as with torch's own


def test_a_budget_too_low_says_so_and_leaves_the_model_alone() -> None:
    model, twin = pair(now=True)
    planner.enable(model, 1e-6, **FAST)
    with pytest.raises(planner.InfeasibleBudgetError, match="least budget"):
        model(**texts())
    planner.enable(model, 1, **FAST)
    tiny.assert_same_bits(train(model), train(twin))


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_enabled_too_and_trains_its_own_parameters(copied: Any) -> None:
    model, twin = pair(now=True)
    train(model), train(twin)
    other = copied(model)
    assert planner.plan_of(other) is None
    before = {n: p.clone() for n, p in model.named_parameters()}
    got, want = train(other), train(copy.deepcopy(twin))
    tiny.assert_same_bits(got, want)
    assert planner.plan_of(other) is not None
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    other.gradient_checkpointing_disable()
    assert "forward" in vars(model) and "forward" not in vars(other)
