"""``planner.estimate``: its numbers are those of ``planner.plan``, a budget's verdict what is known of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.sizing.estimates import Fit
from tests import tiny

AdamW = torch.optim.AdamW


class Conv(nn.Module):
    """A convolution net with batch norm and a wide loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GELU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def of_conv() -> tuple[nn.Module, Any, dict[str, Any]]:
    return Conv().train(), (torch.randn(2, 3, 8, 8),), {"loss_fn": lambda out: out.square().mean()}


def of_bert() -> tuple[nn.Module, Any, dict[str, Any]]:
    return tiny.seeded(tiny.bert), tiny.bert_batch(), {"optimizer": AdamW}


def of_gpt2() -> tuple[nn.Module, Any, dict[str, Any]]:
    return tiny.seeded(functools.partial(tiny.gpt2, 1)), tiny.gpt2_batch(), {"outputs": "released"}


@pytest.mark.parametrize("case", [of_bert, of_conv, of_gpt2])
def test_the_numbers_are_those_of_a_plan(case: Callable[[], tuple[nn.Module, Any, dict[str, Any]]]) -> None:
    model, inputs, how = case()
    how = {**how, "costs": "roofline"}
    found = planner.estimate(model, inputs, **how)
    as_it_is = planner.plan(model, 1, inputs, time_limit_s=0.5, **how)
    assert found.unplanned_peak_bytes == as_it_is.peak_bytes == as_it_is.baseline_peak_bytes
    assert found.breakdown == as_it_is.breakdown
    assert (found.peak_op, found.peak_module) == (as_it_is.peak_op, as_it_is.peak_module)
    least = planner.plan(model, found.least_known_bytes / 1e9, inputs, time_limit_s=0.5, **how)
    assert found.floor_bytes <= least.peak_bytes <= found.least_known_bytes <= found.unplanned_peak_bytes
    assert found.fits(found.unplanned_peak_bytes / 1e9).verdict == "as it is"
    if found.floor_bytes > 1:
        with pytest.raises(planner.InfeasibleBudgetError):
            planner.plan(model, (found.floor_bytes - 1) / 1e9, inputs, time_limit_s=0.1, **how)


def test_every_verdict_is_told_in_words_and_as_a_value() -> None:
    model = tiny.blocks(6, 16).train()
    found = planner.estimate(model, (torch.randn(64, 16),), costs="roofline")
    floor, least, full = found.floor_bytes, found.least_known_bytes, found.unplanned_peak_bytes
    assert floor < least < full
    verdicts = {size: found.fits(size / 1e9) for size in (full, full - 1, least, least - 1, floor, floor - 1)}
    assert [fit.verdict for fit in verdicts.values()] == [
        "as it is", "with a plan", "with a plan", "perhaps", "perhaps", "no",
    ]  # fmt: skip
    assert [bool(fit) for fit in verdicts.values()] == [True, True, True, False, False, False]
    no = verdicts[floor - 1]
    assert no.lacks_bytes == 1 and "1 B below the proved floor" in str(no) and found.floor_op in str(no)
    assert "proved floor" in str(found) and "At the peak, as it is:" in str(found)
    searched = planner.estimate(model, (torch.randn(64, 16),), costs="roofline", time_limit_s=0.5)
    assert floor <= searched.floor_bytes <= searched.least_known_bytes <= least
    with pytest.raises(TypeError, match="budget_gb"):
        found.fits("8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verdict"):
        Fit(1, "no", 0, "")


def test_a_model_without_memory_is_estimated_as_one_with() -> None:
    from torch._subclasses import FakeTensorMode

    whole = tiny.bert_batch()
    bare = {name: t for name, t in whole.items() if name != "attention_mask"}  # whose values choose a path
    with torch.device("meta"):
        meta = tiny.bert(1).train()
    with FakeTensorMode():
        fake = tiny.bert(1).train()
    on_meta = {k: v.to("meta") for k, v in bare.items()}
    for model, inputs, optimizer, same in (
        (meta, whole, AdamW, whole),
        (meta, on_meta, AdamW(meta.parameters()), bare),
        (fake, whole, AdamW, whole),
    ):
        real = planner.estimate(tiny.bert(1).train(), same, optimizer=AdamW, costs="roofline")
        assert planner.estimate(model, inputs, optimizer=optimizer, costs="roofline") == real
    assert all(p.device.type == "meta" for p in meta.parameters())


def test_below_the_optimizers_own_need_a_smaller_batch_is_not_advised() -> None:
    inputs = (torch.randn(2, 16),)
    found = planner.estimate(tiny.blocks(2, 16).train(), inputs, optimizer=AdamW, costs="roofline")
    assert found.floor_op == "optimizer.step"
    assert "nor a smaller batch helps" in str(found.fits(found.floor_bytes / 2e9))


def test_a_gpu_that_is_elsewhere_reserves_what_a_plan_for_it_would() -> None:
    model, inputs = tiny.blocks(3, 16).train(), (torch.randn(64, 16),)
    found = planner.estimate(model, inputs, costs="H100")
    plan = planner.plan(model, 1, inputs, costs="H100", time_limit_s=0.1)
    assert (found.planned_for, found.reserved_bytes) == ("H100", plan.reserved_bytes)
    assert found.unplanned_peak_bytes == plan.baseline_peak_bytes
    assert "reserved" in str(found) and "the device has" in str(found)
