"""Attention masks in a capture: those eager makes, and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from planner.capture.as_eager.masks import _CONSECUTIVE, _Consecutive
from planner.measure import compare, run_step
from planner.options import Search
from planner.solving.priced import PricedStep, prepare

IDS = torch.randint(2, 64, (3, 16), generator=torch.Generator().manual_seed(0))


def _llama() -> Any:
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(config).train()


def _attention(step: PricedStep) -> list[dict[str, Any]]:
    """Keyword arguments of every attention in the forward, and its number of key heads."""
    calls = [op.node for op in step.graph.ops if op.target.endswith("attention_for_cpu") and op.node]
    return [dict(n.kwargs) | {"heads": n.args[1].meta["val"].shape[1], "rest": n.args[3:]} for n in calls]


def _same_as_eager(model: Any, inputs: dict[str, Tensor]) -> PricedStep:
    eager = run_step(model, inputs)
    step = prepare(model, inputs, costs="roofline")
    plan = step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all"))
    plan.apply(model)
    found = compare(eager, run_step(model, inputs))
    plan.restore(model)
    assert found.outputs.max_relative < 1e-5 and found.gradients.max_relative < 1e-4, str(found)
    return step


def test_without_padding_the_plan_runs_causal_attention_on_grouped_keys() -> None:
    model, inputs = _llama(), {"input_ids": IDS, "labels": IDS.clone()}
    calls = _attention(_same_as_eager(model, inputs))
    assert len(calls) == 2
    for call in calls:
        assert call["rest"] == (0.0, True) and "attn_mask" not in call and call["heads"] == 2
    eager = run_step(model, inputs)
    plan = replace(prepare(model, inputs, costs="roofline"), least_limit_s=0.5).least_plan()
    plan.apply(model)
    assert compare(eager, run_step(model, inputs)).equal


def test_sequences_packed_in_one_row_stay_apart() -> None:
    positions = torch.cat([torch.arange(10), torch.arange(6)]).expand(3, -1)
    inputs = {"input_ids": IDS, "labels": IDS.clone(), "position_ids": positions}
    packed = _attention(_same_as_eager(_llama(), inputs))
    assert all("attn_mask" in call for call in packed)


def test_a_padding_mask_is_captured_whatever_it_holds() -> None:
    mask = torch.ones_like(IDS)
    inputs = {"input_ids": IDS, "labels": IDS.clone(), "attention_mask": mask}
    model = _llama()
    step = _same_as_eager(model, inputs)
    assert all("attn_mask" in call for call in _attention(step))
    padded = {**inputs, "attention_mask": mask.clone().index_fill(1, torch.tensor([14, 15]), 0)}
    eager = run_step(model, padded)
    replace(step, least_limit_s=0.5).least_plan().apply(model)
    assert compare(eager, run_step(model, padded)).gradients.max_relative < 1e-4


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_transformers_is_as_it_was(trained: torch.dtype) -> None:
    from transformers import masking_utils

    before = dict(vars(masking_utils))
    prepare(_llama().to(trained), {"input_ids": IDS, "labels": IDS.clone()}, costs="roofline")
    assert dict(vars(masking_utils)) == before
    assert not torch.compiler.is_compiling()


def test_what_counts_up() -> None:
    with _Consecutive():
        plain = torch.arange(6)
        counting = [
            plain,
            plain + 3,
            3 + plain,
            plain.unsqueeze(0),
            plain[None],
            plain[None, :].expand(4, -1),
            torch.arange(2, 9).to(torch.int32),
        ]
        written = torch.arange(6)
        written[2:] = 0
        added = torch.arange(6)
        added += torch.ones(6, dtype=torch.long)
        others = [
            torch.arange(0, 6, 2),
            torch.arange(6, 0, step=-1),
            plain[:, None],
            plain * 2,
            plain + plain,
            plain.unsqueeze(-1),
            plain.float(),
            plain[1:],
            torch.zeros(6, dtype=torch.long),
            written,
            added,
        ]
    assert [getattr(t, _CONSECUTIVE, False) for t in counting] == [True] * len(counting)
    assert [getattr(t, _CONSECUTIVE, False) for t in others] == [False] * len(others)
    for t in counting:  # and they do
        assert (t.diff(dim=-1) == 1).all()
