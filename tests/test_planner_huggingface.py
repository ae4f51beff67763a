"""transformers' Trainer and models with the switch on: the bits of a run without it, within the budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import planner
from tests import tiny
from tests.hf import FAST, QUIET, Peaks, files_below, losses_of, parameters_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def rows(count: int = 7) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (count, 16), generator=random)
    return [
        {"input_ids": ids[i], "attention_mask": torch.ones(16, dtype=torch.long), "labels": i % 3}
        for i in range(count)
    ]


def train(
    folder: Path, budget_gb: float | None = None, *, told: bool = False, **arguments: Any
) -> tuple[nn.Module, Trainer, list[int]]:
    """Two epochs of two steps; ``told``: the budget comes with the training arguments only."""
    model = tiny.seeded(tiny.bert)
    loss, capture = arguments.pop("compute_loss_func", None), arguments.pop("capture", "auto")
    if budget_gb is not None:
        planner.enable(model, None if told else budget_gb, **FAST, capture=capture)
        name = arguments.pop("switch", "gradient_checkpointing")
        arguments[name] = True
        if told:
            arguments[name + "_kwargs"] = {"budget_gb": budget_gb}
    peaks, given = Peaks(arguments.pop("metered_from", 0)), arguments.pop("train_dataset", rows())
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, **QUIET, **arguments}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=given,
        eval_dataset=rows(3),
        callbacks=[peaks],
        compute_loss_func=loss,
    )
    trainer.train()
    return model, trainer, peaks.bytes


def smooth(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    """A loss outside the model."""
    return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("switch", "told", "more"),
    [
        ("gradient_checkpointing", False, {"eval_strategy": "epoch", "compute_loss_func": smooth}),
        ("activation_checkpointing", True, {"gradient_accumulation_steps": 2}),
        ("activation_checkpointing", False, {"bf16": True, "num_train_epochs": 1}),
    ],
)
def test_the_trainer(switch: str, told: bool, more: dict[str, Any], tmp_path: Path) -> None:
    twin, without, theirs = train(tmp_path / "a", **more)
    budget = 0.85 * max(theirs) / 1e9
    model, trainer, ours = train(tmp_path / "b", budget, told=told, switch=switch, **more)
    assert losses_of(trainer) == losses_of(without) and len(losses_of(trainer)) >= 2
    tiny.assert_same_bits(parameters_of(model), parameters_of(twin))
    assert max(ours) <= budget * 1e9 < max(theirs)
    plan = planner.plan_of(model)
    assert plan is not None and plan.budget_bytes == round(budget * 1e9)


def test_the_trainer_in_regions(tmp_path: Path) -> None:
    """Its first steps are looked at and recorded, which a meter would hinder."""
    more: dict[str, Any] = {"train_dataset": rows(8), "metered_from": 3}
    twin, without, theirs = train(tmp_path / "a", **more)
    budget = 0.85 * max(theirs) / 1e9
    model, trainer, ours = train(tmp_path / "b", budget, capture="regions", **more)
    assert losses_of(trainer) == losses_of(without)
    tiny.assert_same_bits(parameters_of(model), parameters_of(twin))
    assert max(ours) <= budget * 1e9 < max(theirs)
    plan = planner.plan_of(model)
    assert plan is not None and plan.budget_bytes == round(budget * 1e9)


def test_saving_and_loading(tmp_path: Path) -> None:
    model = tiny.seeded(tiny.bert)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, **FAST, now=True)
    for m in (model, twin):
        torch.manual_seed(0)
        m(**tiny.bert_batch()).loss.backward()
    model.save_pretrained(tmp_path / "a")
    twin.save_pretrained(tmp_path / "b")
    names = files_below(tmp_path / "a")
    assert names == files_below(tmp_path / "b")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    loaded = type(model).from_pretrained(tmp_path / "a")
    tiny.assert_same_bits(dict(loaded.state_dict()), dict(twin.state_dict()))
    assert planner.plan_of(loaded) is None and "forward" not in vars(loaded)


def test_generation_between_training_steps() -> None:
    """The twin trains without the cache of keys, as the switch does: with it other kernels may run."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = tiny.seeded(lambda: GPT2LMHeadModel(GPT2Config(**sizes)))  # its use_cache is True
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, **FAST, now=True)
    seen = []
    for m, how in ((model, {}), (twin, {"use_cache": False})):
        torch.manual_seed(0)
        for seed in range(2):
            m.train()
            m(**tiny.gpt2_batch(seed), **how).loss.backward()
            m.eval()
            seen.append(m.generate(tiny.gpt2_batch()["input_ids"][:, :4], max_new_tokens=6, do_sample=True))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert planner.plan_of(model) is not None and model.config.use_cache


def test_what_transformers_switch_takes_beside_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    model = planner.enable(tiny.seeded(tiny.bert))
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "budget_gb": 1.0},
        every_n_layers=2,
        offload=True,
    )
    assert [r.message.split()[0] for r in caplog.records] == ["every_n_layers", "offload"]
    assert not model.is_activation_checkpointing  # nothing below checkpoints itself
    assert "forward" in vars(model)
