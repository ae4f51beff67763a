"""Attention masks in a plan: those eager makes, and no others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import planner
from planner.errors import StalePlanError
from planner.measure import StepRecord, compare, run_step
from planner.options import Search
from planner.runtime.forward import planned_forward_of
from planner.solving import priced
from planner.training import making

IDS = torch.randint(2, 64, (3, 16), generator=torch.Generator().manual_seed(0))
SHORT = IDS[:2, :12].contiguous()
ROOM_GB = 1.0


def _grouped(name: str) -> Any:
    """A small model of two layers, whose four heads of queries share two of keys."""
    of = {"Llama": {}, "Qwen2": {}, "Gemma": {"head_dim": 8}, "Gemma3": {"head_dim": 8, "sliding_window": 8}}
    configuration: Any = getattr(hf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = configuration(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        **of[name],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(hf, f"{name}ForCausalLM")(config).train()


def _batch(padding: str, ids: Tensor = IDS, **others: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    if padding == "padded":
        mask[:, -2:] = 0
    return (
        {"input_ids": ids, "labels": ids.clone()}
        | ({} if padding == "no mask" else {"attention_mask": mask})
        | others
    )


class _Attention(TorchDispatchMode):
    """What each call of attention in a forward is given: heads of keys, settings, tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = str(func), kwargs or {}
        if "scaled_dot_product" in name and "backward" not in name:
            masked = sorted(key for key, value in given.items() if isinstance(value, Tensor))
            self.calls.append((name, args[1].shape[1], args[3:], masked))
        return func(*args, **given)


def _run(model: Any, inputs: dict[str, Tensor]) -> tuple[StepRecord, list[tuple[Any, ...]]]:
    with _Attention() as seen:
        record = run_step(model, inputs)
    return record, seen.calls[:2]  # the forward's: a plan may make one again


def _agree(model: Any, wanted: Any, batches: Iterable[str], ids: Tensor = IDS) -> None:
    for padding in batches:
        eager, calls = wanted[padding]
        record, made = _run(model, _batch(padding, ids))
        assert compare(eager, record).equal, padding
        assert made == calls, padding


def _eager(model: Any, ids: Tensor = IDS) -> dict[str, Any]:
    return {padding: _run(model, _batch(padding, ids)) for padding in ("no mask", "whole", "padded")}


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma", "Gemma3"])
def test_every_padding_runs_as_in_eager(name: str) -> None:
    model = _grouped(name)
    wanted = _eager(model)
    if name != "Gemma3":  # whose window needs its mask in any case
        for padding in ("no mask", "whole"):  # eager makes no mask and repeats no keys
            assert [call[1:] for call in wanted[padding][1]] == [(2, (0.0, True), [])] * 2
        assert [call[1::2] for call in wanted["padded"][1]] == [(4, ["attn_mask"])] * 2
    for padding in wanted:
        step = priced.prepare(model, _batch(padding), costs="roofline")
        least_bytes, most_bytes = step.problem.resident_bytes, step.baseline.peak_bytes
        plan = step.plan_bytes((least_bytes + 2 * most_bytes) // 3, Search("greedy"))
        assert len(set(plan.sequence)) < len(plan.sequence)
        plan.apply(model)
        _agree(model, wanted, [padding])
        plan.restore(model)


def test_a_batch_with_padding_after_one_without_and_back() -> None:
    model = _grouped("Llama")
    wanted = _eager(model)
    plan = planner.plan(model, ROOM_GB, _batch("whole"), costs="roofline")
    plan.apply()
    _agree(model, wanted, ["whole", "padded", "whole", "padded", "padded", "whole"])
    applied = planned_forward_of(model)
    assert applied is not None and len(applied.turns) == 1  # one step for each answer
    plan.restore()


def test_other_answers_are_planned_with_what_the_plan_was_made_with() -> None:
    model = _grouped("Llama")
    model.config.use_cache = True
    plan = planner.plan(model, ROOM_GB, _batch("whole"), costs="roofline", chunk_loss=2)
    report = plan.verify(inputs=_batch("padded"))  # the cache is left out there too, the loss in chunks
    assert report.ok and report.is_other_batch and "the batch of the plan, which is another" in str(report)
    plan.apply()
    for padding in ("whole", "padded"):
        model(**_batch(padding)).loss.backward()
    plan.restore()
    model.zero_grad()
    assert not plan.verify().is_other_batch


@pytest.mark.parametrize("capture", ["auto", "regions"])
def test_enabled_each_is_planned_once(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _grouped("Qwen2")
    wanted = _eager(model)
    captured = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        captured.append(args)
        return priced.prepare(*args, **kwargs)

    monkeypatch.setattr(making, "prepare", counted)
    planner.enable(model, ROOM_GB, costs="roofline", capture=capture, now=True)
    _agree(model, wanted, ["whole", "padded", "whole", "padded", "padded", "whole"])
    assert len(captured) == (2 if capture == "auto" else 0)


def test_one_plan_for_batches_of_many_shapes_has_a_graph_for_each_answer() -> None:
    model = _grouped("Llama")
    wanted, shorter = _eager(model), _eager(model, SHORT)
    plan = planner.plan(model, ROOM_GB, _batch("whole"), costs="roofline", dynamic=True)
    plan.apply()
    for _ in range(2):
        _agree(model, wanted, ["whole", "padded"])
        _agree(model, shorter, ["padded", "whole"], SHORT)
    plan.restore()
    variants: Any = plan.executable().variants
    assert (variants.traces, len(variants.all)) == (2, 2)


def test_a_plan_from_a_file_is_for_one_answer_and_says_so(tmp_path: Path) -> None:
    model = _grouped("Llama")
    wanted = _eager(model)
    for planned, other in itertools.permutations(["whole", "padded"]):
        planner.plan(model, ROOM_GB, _batch(planned), costs="roofline").save(tmp_path / "plan.json")
        plan = planner.load(tmp_path / "plan.json")
        assert plan.answers[0] is (planned == "whole")
        plan.apply(model)
        _agree(model, wanted, [planned])
        with pytest.raises(StalePlanError, match=r"asks its batch at .*masking_utils\.py:\d+ .*fast_all"):
            run_step(model, _batch(other))
        plan.restore(model)


def test_sequences_packed_in_one_row_stay_apart() -> None:
    model, positions = _grouped("Llama"), torch.arange(16).expand(3, -1)
    packed = torch.cat([torch.arange(10), torch.arange(6)]).expand(3, -1)
    batches = [_batch("no mask", position_ids=p) for p in (positions, packed)]
    wanted = [_run(model, batch) for batch in batches]
    assert [[call[3] for call in calls] for _, calls in wanted] == [[[]] * 2, [["attn_mask"]] * 2]
    for first in (0, 1):
        plan = planner.plan(model, ROOM_GB, batches[first], costs="roofline")
        plan.apply()
        for k in (first, 1 - first, first):
            record, calls = _run(model, batches[k])
            assert compare(wanted[k][0], record).equal and calls == wanted[k][1]
        plan.restore()


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_transformers_is_as_it_was(trained: torch.dtype) -> None:
    from transformers import masking_utils

    before = dict(vars(masking_utils))
    priced.prepare(_grouped("Llama").to(trained), _batch("whole"), costs="roofline")
    assert dict(vars(masking_utils)) == before
    assert not torch.compiler.is_compiling()
    assert "__bool__" not in vars(torch._subclasses.FakeTensor)
