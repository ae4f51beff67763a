"""sentence-transformers' own trainers with the switch on: the bits of a run without it, within the budget.

Nothing is simulated: real trainers, losses, tokenizers and checkpoints; dropout on; every batch padded to
its own longest text; a smaller last batch.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

import planner
from planner import _compat
from planner.measure import step_flops, step_peak
from planner.solving import fit as search
from tests import rerankers, tiny
from tests.hf import FAST, files_below, parameters_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    ("name", "share", "epochs"),
    [("binary", 0.9, 1), ("list", 0.9, 2), ("negatives", 0.8, 1), ("sentences", 0.95, 1)],
)
def test_training_within_the_budget_bit_for_bit(name: str, share: float, epochs: int, tmp_path: Path) -> None:
    settings = {"eval_strategy": "epoch", "num_train_epochs": epochs}
    without = rerankers.train(name, tmp_path / "a", **settings)
    budget = share * max(without.peaks) / 1e9
    ours = rerankers.train(name, tmp_path / "b", budget, **settings)
    assert ours.losses == without.losses and len(ours.losses) == 3 * epochs  # two steps and an evaluation
    tiny.assert_same_bits(parameters_of(ours.model), parameters_of(without.model))
    assert max(ours.peaks) <= budget * 1e9 < max(without.peaks)
    plan = planner.plan_of(ours.model)
    assert plan is not None and plan.model_name.startswith("Bert")


def test_dynamic_padding_is_traced_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = dataclasses.replace(rerankers.TASKS["binary"], data=lambda: rerankers.pairs(45))
    monkeypatch.setattr(rerankers, "TASKS", {"many": many})
    seen: dict[str, list[Any]] = {"export_joint": [], "solve": [], "token_shapes": []}

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: seen[name].append(a[0]) or original(*a, **k))

    original = BertModel.forward

    def forward(self: BertModel, input_ids: torch.Tensor, **rest: Any) -> Any:
        seen["token_shapes"].append(tuple(input_ids.shape))
        return original(self, input_ids, **rest)

    with monkeypatch.context() as only:
        only.setattr(BertModel, "forward", forward)
        without = rerankers.train("many", tmp_path / "a", num_train_epochs=1)
    counted(_compat, "export_joint")
    counted(search, "solve")
    budget = 0.7 * max(without.peaks) / 1e9
    ours = rerankers.train("many", tmp_path / "b", budget, num_train_epochs=1)
    tiny.assert_same_bits(parameters_of(ours.model), parameters_of(without.model))
    assert max(ours.peaks) <= budget * 1e9
    shapes = set(seen["token_shapes"])
    assert len(shapes) >= 10
    assert min(shapes)[0] == 1  # the last batch
    assert len(seen["export_joint"]) <= 4  # two shapes, sizes that vary, and those with a batch of one
    assert len(seen["solve"]) <= len(shapes) // 2


def test_less_memory_and_fewer_flops_than_the_librarys_own_switch() -> None:
    model = rerankers.cross_encoder(width=64, layers=2)
    texts = [(f"w{i} w2", " ".join(f"w{j}" for j in range(i, i + 30))) for i in range(8)]
    model.train()

    def step() -> None:
        torch.manual_seed(0)
        scores = model(model.preprocess(texts))["scores"].squeeze(-1)
        torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.ones(8)).backward()
        model.zero_grad()

    plain_flops = step_flops(step)
    model.gradient_checkpointing_enable()
    stock_bytes, stock_flops = step_peak(step), step_flops(step)
    planner.enable(model, (stock_bytes - 1) / 1e9, costs="roofline", time_limit_s=1, now=True)
    step()
    assert step_peak(step) < stock_bytes
    assert plain_flops < step_flops(step) < stock_flops


def test_killed_and_resumed(tmp_path: Path) -> None:
    without = rerankers.train("even", tmp_path / "a")
    budget = 0.9 * max(without.peaks) / 1e9
    folder = tmp_path / "b"
    start = multiprocessing.get_context(tiny.START)
    child = start.Process(target=rerankers.train_and_die, args=(folder, budget))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    ours = rerankers.train("even", folder, budget, resume=True)
    assert ours.losses[2:] == without.losses[2:] and len(ours.peaks) == 2
    tiny.assert_same_bits(parameters_of(ours.model), parameters_of(without.model))
    assert max(ours.peaks) <= budget * 1e9


def test_a_release_without_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers.base.model import BaseModel

    monkeypatch.delattr(BaseModel, "gradient_checkpointing_enable")
    stock = {"gradient_checkpointing": True}
    with pytest.raises(AttributeError, match="'CrossEncoder' object has no attribute"):
        rerankers.train("binary", tmp_path / "a", **stock)
    ours = rerankers.train("binary", tmp_path / "b", 1.0, num_train_epochs=1, **stock)
    assert planner.plan_of(ours.model) is not None


def test_saving_loading_and_predicting(tmp_path: Path) -> None:
    texts = [("w1 w2", "w3 w4 w5"), ("w6", "w7 w8")]
    model, twin = rerankers.cross_encoder(), rerankers.cross_encoder()
    planner.enable(model, 1.0, **FAST, now=True)
    for m in (model, twin):
        torch.manual_seed(0)
        m.train()
        m(m.preprocess(texts))["scores"].sum().backward()
    assert planner.plan_of(model) is not None
    assert (model.predict(texts) == twin.predict(texts)).all()
    model.save_pretrained(str(tmp_path / "a"))
    twin.save_pretrained(str(tmp_path / "b"))
    names = files_below(tmp_path / "a")
    assert names == files_below(tmp_path / "b")
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes()
        for n in names
        if n.endswith((".safetensors", ".json"))
    )
    loaded, other = (rerankers.CrossEncoder(str(tmp_path / n), device="cpu") for n in ("a", "b"))
    assert (loaded.predict(texts) == other.predict(texts)).all()
    assert planner.plan_of(loaded) is None


def test_only_the_transformer_is_planned() -> None:
    model = planner.enable(rerankers.cross_encoder(), 1.0, **FAST, now=True)
    assert "forward" in vars(model[0].model) and "forward" not in vars(model)
    model.train()
    model(model.preprocess([("w1", "w2")]))["scores"].sum().backward()
    plan = planner.plan_of(model)
    assert plan is not None and plan.model_name == "BertForSequenceClassification"
    model[0].model.gradient_checkpointing_disable()  # the same switch, by another name
    assert "forward" not in vars(model[0].model)
