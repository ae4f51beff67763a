"""Half precision as people train in it: autocast, loss scaling, models held in half, channels last.

Every loop runs twice, with the plan and without, and the two must agree in every bit: losses, gradients
(their layout too), parameters and the scaler's state.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner import StalePlanError
from planner.options import Search
from planner.solving.priced import prepare
from tests import models, tiny

Context = Callable[[], contextlib.AbstractContextManager[Any]]

HALVES = [torch.bfloat16, torch.float16]
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Convolutions(nn.Module):
    """Two convolutions with batch norm, pooled into four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Shared(nn.Module):
    """One layer run three times: autocast casts its weight once and adds its gradients in half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(16, 16), nn.Embedding(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        for _ in range(3):
            h = h + F.dropout(F.gelu(self.layer(h)), 0.2)
        return F.linear(h, self.table.weight)  # tied: one gradient comes in float32, one is cast


def loss_of(outputs: Any) -> Tensor:
    loss = getattr(outputs, "loss", outputs)
    return loss if loss.dim() == 0 else loss.float().square().mean()


def autocast(dtype: torch.dtype) -> Context:
    return lambda: torch.autocast("cpu", dtype)


def train(model: nn.Module, inputs: Any, context: Context, steps: int = 2) -> list[Tensor]:
    """Losses and gradients of a loop that runs the forward under ``context``, the backward behind it."""
    torch.manual_seed(0)
    model.zero_grad()
    losses = []
    for _ in range(steps):
        with context():
            loss = loss_of(tiny.call(model, inputs))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_trains_equally(model: nn.Module, inputs: Any, context: Context = contextlib.nullcontext) -> None:
    twin = copy.deepcopy(model)
    with context():
        tiny.planned(model, inputs).apply(model)
    got, want = train(model, inputs, context), train(twin, inputs, context)
    assert len(got) == len(want) > 3
    assert all(a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(got, want, strict=True))
    assert [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)] == []


# -- autocast -------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (tiny.Mlp, tiny.batch(labels=True)),
    "bert": (functools.partial(tiny.bert, layers=1), tiny.bert_batch()),
    "gpt2": (functools.partial(tiny.gpt2, layers=1), tiny.gpt2_batch()),
    "convolutions": (Convolutions, (PIXELS,)),
    "shared": (Shared, (torch.arange(32).view(2, 16),)),
}


# Every kind of layer in one type, those that are no model of transformers in both.
AROUND = [*((name, torch.bfloat16) for name in CASES), *((n, torch.float16) for n in ("mlp", "convolutions"))]


@pytest.mark.parametrize(("name", "dtype"), AROUND, ids=str)
def test_autocast_around_the_forward(name: str, dtype: torch.dtype) -> None:
    build, inputs = CASES[name]
    assert_trains_equally(tiny.seeded(build), inputs, autocast(dtype))


def test_autocast_with_a_vision_language_model() -> None:
    case = models.CASES["internvl"]
    assert_trains_equally(case.build(), case.make_inputs(0), autocast(torch.bfloat16))


def test_a_weight_that_several_layers_share_is_cast_once() -> None:
    model, inputs = tiny.seeded(Shared), CASES["shared"][1]
    with torch.autocast("cpu", torch.bfloat16):
        plan = tiny.planned(model, inputs, solver="keep_all")
    forward = plan.rewrite().program.forward.graph
    casts = [n for n in forward.nodes if "_to_copy" in str(n.target) and n.args[0].op == "placeholder"]
    assert len(casts) == len({n.args[0] for n in casts}) == 3  # weight, bias, table; each once


class Inside(nn.Module):
    """A layer read twice in each of two contexts of autocast within the forward, and outside of any."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.layer, self.cut = nn.Linear(16, 16), cut

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                x = torch.tanh(self.layer(self.layer(x))).float()
        if self.cut:
            torch._dynamo.graph_break()
        return self.layer(x).pow(2).mean()


class ByHand(nn.Module):
    """Casts of its own, a gradient each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x.bfloat16() @ self.weight.bfloat16()).float() + self.bias
        return x.pow(2).mean()


@pytest.mark.parametrize("build", [Inside, ByHand])
def test_autocast_within_the_forward_casts_a_weight_once(build: type[nn.Module]) -> None:
    assert_trains_equally(tiny.seeded(build), (torch.randn(64, 16),))


@pytest.mark.parametrize("around", [False, True], ids=["within", "around too"])
def test_regions_cast_a_weight_once(around: bool) -> None:
    """Where one context is around several regions, those that share a weight run as eager runs them."""

    def trained(planned: bool) -> list[Tensor]:
        model = tiny.seeded(lambda: Inside(cut=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if planned:
            planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0, capture="regions")
        seen = []
        torch.manual_seed(1)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                loss = model(torch.randn(64, 16))
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        assert not planned or around or planner.plan_of(model) is not None
        return seen

    assert all(map(torch.equal, trained(False), trained(True)))


def test_the_budget_holds_under_autocast() -> None:
    case = models.CASES["bert"]
    model, inputs = case.build(), case.make_inputs(0)
    with torch.autocast("cpu", torch.bfloat16):
        step = prepare(model, inputs, costs="roofline")
        low, high = step.floor_bytes, step.baseline.peak_bytes
        plan = step.plan_bytes(round(0.7 * low + 0.3 * high), search=Search(time_limit_s=1.0))
        report = plan.verify()
    assert report.equal, str(report)
    assert report.peak_bytes == report.predicted_peak_bytes <= plan.budget_bytes < report.eager_peak_bytes


def test_another_autocast_asks_for_another_plan_and_a_new_plan_serves() -> None:
    model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    twin = copy.deepcopy(model)
    tiny.planned(model, inputs).apply(model)
    for dtype, was in ((torch.bfloat16, "off"), (torch.float16, "torch.bfloat16")):
        with torch.autocast("cpu", dtype):
            with pytest.raises(StalePlanError, match=rf"autocast is {dtype}, it was {was} when the plan"):
                model(**inputs)
            tiny.planned(model, inputs).apply(model)
        got, want = (train(m, inputs, autocast(dtype)) for m in (model, twin))
        assert all(map(torch.equal, got, want))
    with pytest.raises(StalePlanError, match=r"autocast is off, it was torch\.float16"):
        model(**inputs)
    model.eval()
    assert torch.isfinite(model(inputs["x"])).all()  # evaluation is nobody's plan


def test_under_the_switch_another_autocast_is_planned_for_when_it_comes() -> None:
    model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, now=True, costs="roofline", solver="recompute_all")
    plans = []
    for context in (contextlib.nullcontext, autocast(torch.bfloat16), contextlib.nullcontext):
        assert all(map(torch.equal, train(model, inputs, context), train(twin, inputs, context)))
        plans.append(planner.plan_of(model))
    assert plans[0] is not None and plans[0] is plans[2] and plans[0] is not plans[1]


def test_a_plan_file_is_applied_under_the_autocast_it_was_made_for(tmp_path: Any) -> None:
    model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        tiny.planned(model, inputs).save(tmp_path / "plan.json")
    loaded = planner.load(tmp_path / "plan.json")
    with pytest.raises(StalePlanError, match="autocast"):
        loaded.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        loaded.apply(model)
    context = autocast(torch.bfloat16)
    assert all(map(torch.equal, train(model, inputs, context), train(twin, inputs, context)))


# -- loss scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_loss_scaling_with_an_overflow(inside: bool) -> None:
    """Scale, unscale, clip, skip: ``inside`` the model computes its loss, else the loop does."""
    results = []
    for planned in (True, False):
        model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
        given = inputs if inside else (inputs["x"],)
        if planned:
            with torch.autocast("cpu", torch.float16):
                tiny.planned(model, given).apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        torch.manual_seed(0)
        seen = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = tiny.call(model, given)
                loss = out if inside else F.cross_entropy(out.float(), inputs["labels"])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            seen += [loss.detach(), norm, torch.tensor(scaler.get_scale())]
        results.append([*seen, *model.parameters()])
    got, want = results
    assert [str(a) for a in got] == [str(b) for b in want]
    assert all(
        torch.equal(a, b) or (a.isnan().all() and b.isnan().all()) for a, b in zip(got, want, strict=True)
    )
    scales = [float(s) for s in want[2:15:3]]
    assert scales[0] < 2.0**20 and len(set(scales)) > 1  # the first step overflowed and was skipped


# -- models held in half, and layouts -------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_models_held_in_half(dtype: torch.dtype) -> None:
    for build, inputs in (
        (tiny.Mlp, {**tiny.batch(labels=True), "x": tiny.batch()["x"].to(dtype)}),
        (functools.partial(tiny.gpt2, layers=1), tiny.gpt2_batch()),
    ):
        assert_trains_equally(tiny.seeded(build).to(dtype), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last(dtype: torch.dtype) -> None:
    model = tiny.seeded(Convolutions).to(dtype).to(memory_format=torch.channels_last)
    pixels = PIXELS.to(dtype).to(memory_format=torch.channels_last)
    assert_trains_equally(model, (pixels,))
    weight = model.net[3].weight
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_under_autocast_and_from_the_other_layout() -> None:
    model = tiny.seeded(Convolutions).to(memory_format=torch.channels_last)
    assert_trains_equally(model, (PIXELS,), autocast(torch.bfloat16))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StalePlanError, match=r"input \[0\].*strides \(768, 1, 48, 3\).*once per shape"),
    ):
        model(PIXELS.to(memory_format=torch.channels_last))
