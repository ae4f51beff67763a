"""The InternVL2 script: the bits of a run without the switch, within the budget, below the library's peak.

What runs is the script of :mod:`planner.examples.internvl2` with smaller towers: its data, whose batches
differ in tiles and words, its labels, its Trainer and its hand-written loop.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

import planner
from planner.examples import internvl2
from planner.examples.internvl2 import IGNORED, IMAGE, SHAPES, Arguments, Shape, Tiles, Training, batch_of
from planner.measure import StorageMeter, step_flops, step_peak
from tests import tiny
from tests.benchmarks import bench_internvl2
from tests.benchmarks.graphs import without_memory
from tests.hf import FAST, QUIET, Peaks

SMALL = Shape(
    image=64,
    patch=8,
    vision={
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.1,
    },
    text={
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
    },
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller towers."""
    monkeypatch.setitem(SHAPES, "tiny", SMALL)


def run(folder: Path, rows: int, **arguments: Any) -> tuple[Any, list[float], int]:
    """One epoch: the model as trained, its losses, and its peak.

    Under the Trainer, whose data loader is a batch ahead, the peak of a step; else that of the whole run,
    from the building of the model on.
    """
    settings = {**QUIET, "num_train_epochs": 1, "per_device_train_batch_size": 3}
    asked, training = Arguments(rows=rows, max_tiles=3, **arguments), Training(str(folder), **settings)
    if asked.loop == "trainer":
        peaks = Peaks()
        return *internvl2.train(asked, training, callbacks=[peaks], **FAST), max(peaks.bytes)
    with StorageMeter("cpu") as meter:
        model, losses = internvl2.train(asked, training, **FAST)
    return model, losses, meter.peak_bytes


@pytest.mark.parametrize(
    ("how", "rows", "share"),
    [
        ({"loop": "plain"}, 5, 0.75),
        ({"loop": "trainer", "freeze_backbone": True, "use_llm_lora": 4}, 5, 0.9),
    ],
    ids=["plain", "trainer-frozen-lora"],
)
def test_training_within_the_budget_bit_for_bit(
    how: dict[str, Any], rows: int, share: float, tmp_path: Path
) -> None:
    twin, without, theirs = run(tmp_path / "a", rows, **how)
    budget_gb = share * theirs / 1e9
    model, losses, ours = run(tmp_path / "b", rows, grad_checkpoint=True, budget_gb=budget_gb, **how)
    assert losses == without and len(losses) == -(-rows // 3)
    tiny.assert_same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert ours <= budget_gb * 1e9 < theirs
    plan = planner.plan_of(model)
    assert plan is not None and plan.budget_bytes == round(budget_gb * 1e9)


def test_below_the_librarys_own_peak_at_no_more_flops() -> None:
    """And no batch outlives its step: plans keep the sizes of those they were made for, not their memory."""
    set_seed(0)
    model = internvl2.prepared_model(Arguments())
    batch = batch_of([Tiles(SMALL, 8, 4)[i] for i in range(8)])

    def step() -> None:
        torch.manual_seed(0)
        model(**batch).loss.backward()
        model.zero_grad()

    plain_bytes, plain_flops = step_peak(step), step_flops(step)
    model.activation_checkpointing_enable()
    stock_bytes, stock_flops = step_peak(step), step_flops(step)
    assert stock_bytes < plain_bytes
    planner.enable(model, (stock_bytes - 1) / 1e9, costs="roofline", time_limit_s=1, now=True)
    step()
    assert step_peak(step) < stock_bytes
    assert plain_flops <= step_flops(step) <= stock_flops
    assert planner.plan_of(model) is not None
    storages = [weakref.ref(x.untyped_storage()) for x in batch.values()]
    batch.clear()
    gc.collect()
    assert [r() for r in storages] == [None] * 4


# -- the data --------------------------------------------------------------------------------------


def test_rows_differ_and_only_the_answer_is_learnt() -> None:
    data = Tiles(SMALL, 12, 4)
    rows = [data[i] for i in range(12)]
    assert {len(row["pixel_values"]) for row in rows} == {1, 2, 3, 4}
    for i, row in enumerate(rows):
        ids, labels, tiles = row["input_ids"], row["labels"], len(row["pixel_values"])
        assert int((ids == IMAGE).sum()) == tiles * SMALL.tokens_per_tile == tiles * 16
        answer = labels != IGNORED
        assert int(answer.sum()) == tiles + 1 and torch.equal(labels[answer], ids[answer])
        assert answer.tolist() == sorted(answer.tolist())  # at the end, so neither images nor the prompt
        bright = row["pixel_values"].mean((1, 2, 3)) > 0
        assert torch.equal(ids[answer][:-1] == internvl2.BRIGHT, bright)
        tiny.assert_same_bits(row, data[i])


def test_a_batch_holds_the_tiles_of_all_rows() -> None:
    rows = [Tiles(SMALL, 3, 4)[i] for i in range(3)]
    batch = batch_of(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 1
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert len(batch["pixel_values"]) == sum(len(row["pixel_values"]) for row in rows)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


# -- the command -----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = f"--grad_checkpoint --budget_gb 0.05 --loop plain --rows 4 --use_cpu --output_dir {tmp_path}"
    with caplog.at_level(logging.INFO):
        assert internvl2.main([*command.split(), "--num_train_epochs", "1"]) == 0
    assert "planned to 0.05 GB" in caplog.text and "losses of 1 steps" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"budget_gb": 1.0}, {"rows": 0}, {"max_tiles": 0}, {"use_llm_lora": -1}], ids=str
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Arguments(**wrong)


# -- the published size ----------------------------------------------------------------------------


def test_the_model_of_the_record_is_the_published_one() -> None:
    model, batch = without_memory(bench_internvl2.step_1b)
    assert len(model.model.vision_tower.encoder.layer) == len(model.model.language_model.layers) == 24
    record = json.loads(bench_internvl2.RESULTS.read_text())
    assert sum(p.numel() for p in model.parameters()) == record["parameters"] == 938_158_976
    assert batch["pixel_values"].shape[2:] == (448, 448)
    assert batch["input_ids"].shape[1] == 6 * 256 + 256


def test_the_record_is_within_its_budgets_and_is_what_the_page_shows() -> None:
    record = json.loads(bench_internvl2.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "planner/README.md").read_text(encoding="utf-8")
    assert len(record["plans"]) == 3 and "\n".join(bench_internvl2.table(record)) in page
    assert f"{record['capture_seconds']:.0f} s on one core" in page
    for row in record["plans"]:
        assert row["peak_bytes"] <= row["budget_bytes"] < record["keep_all_peak_bytes"]
        assert 0 < row["overhead_bound"] <= row["overhead"]
        assert record["imported_peak_rss_bytes"] < row["peak_rss_bytes"] < record["at_rest_bytes"]
