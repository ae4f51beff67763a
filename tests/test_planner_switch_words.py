"""What the switch is told beside a budget, and what it says where it cannot do, in words trainers know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import planner
from planner.capture.refusals import _INSIDE
from tests import tiny
from tests.hf import FAST, QUIET, losses_of

ONE: dict[str, Any] = {"capture": "one graph"}

# -- an infeasible budget is out of memory to a trainer -------------------------------------------


class Net(tiny.Mlp):
    """Returns its loss as trainers want it."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x, labels)}


def test_a_trainer_that_finds_its_batch_size_takes_a_smaller_one(tmp_path: Path) -> None:
    whole = tiny.batch(64, labels=True)
    with pytest.raises(planner.InfeasibleBudgetError) as least:
        planner.plan(tiny.seeded(Net), 1e-6, whole, **FAST)
    budget_gb = 0.99 * least.value.floor_bytes / 1e9  # proved: no search of another length finds a plan
    model = tiny.seeded(Net)
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["labels"])), with_kwargs=True
    )
    planner.enable(model, budget_gb, **FAST, now=True)
    settings = {
        **QUIET,
        "max_steps": 1,
        "per_device_train_batch_size": 64,
        "auto_find_batch_size": True,
        "optim": "sgd",
    }
    rows = [{"x": x, "labels": label} for x, label in zip(whole["x"], whole["labels"], strict=True)]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows)
    trainer.train()
    # by how much is a matter of what a short search finds
    assert sizes[0] == 64 and sizes[-1] < 64 and len(losses_of(trainer)) == 1


def test_other_refusals_do_not() -> None:
    tried = []

    @find_executable_batch_size(starting_batch_size=8)
    def run(batch_size: int) -> None:
        tried.append(batch_size)
        planner.enable(Odd(lambda layer, x: layer(x) * x.sum().item()), 1, **FAST, **ONE, now=True)(X)

    with pytest.raises(planner.TraceError):
        run()
    assert tried == [8]


# -- what other switches take ---------------------------------------------------------------------

SAID = {
    "every_n_layers": 2,
    "offload": True,
    "selective": True,
    "context_fn": lambda: (None, None),
    "preserve_rng_state": False,
}
SILENT = {
    "every_n_layers": 1,
    "offload": False,
    "selective": False,
    "context_fn": None,
    "preserve_rng_state": True,
    "use_reentrant": True,
    "determinism_check": "none",
    "debug": True,
    "early_stop": False,
}
WAYS: tuple[Callable[[Any, dict[str, Any]], None], ...] = (
    lambda m, k: m.gradient_checkpointing_enable(**k),
    lambda m, k: m.gradient_checkpointing_enable(k),
    lambda m, k: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=k),
    lambda m, k: m.gradient_checkpointing_enable(activation_checkpointing_kwargs=k),
    lambda m, k: m.activation_checkpointing_enable(activation_checkpointing_kwargs=k),
    lambda m, k: m.activation_checkpointing_enable(gradient_checkpointing_kwargs=k),
    lambda m, k: m.activation_checkpointing_enable(**k),
)


@pytest.mark.parametrize("way", WAYS)
def test_they_are_read_alike_whichever_way_they_come(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = planner.enable(tiny.seeded(tiny.Mlp), 1)
    with caplog.at_level(logging.INFO, logger="planner"):
        way(model, SILENT)
        assert not caplog.records
        way(model, SAID)
    assert [r.message.split(" is left aside: ")[0] for r in caplog.records] == list(SAID)
    with pytest.raises(TypeError, match="'every_layer' is no option"):
        way(model, {"every_layer": 1})


def test_they_may_come_by_position(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = planner.enable(tiny.seeded(tiny.Mlp))
    model.gradient_checkpointing_enable({"budget_gb": 2}, 1, False)
    assert vars(model)["_planner_switch"].settings.budget_bytes == 2 * 10**9 and not caplog.records
    model.gradient_checkpointing_enable(None, 2)
    assert [r.message.split()[0] for r in caplog.records] == ["every_n_layers"]
    for wrong in ((True,), ({}, 1, False, 3)):
        with pytest.raises(TypeError, match=r"must be a dict of options|positional arguments at most"):
            model.gradient_checkpointing_enable(*wrong)


# -- refusals in the user's terms -----------------------------------------------------------------

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Odd(nn.Module):
    def __init__(self, odd: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(4, 4), odd

    def forward(self, x: Tensor) -> Any:
        return self.odd(self.layer, x)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            lambda layer, x: layer(x) * torch.from_numpy(x.numpy().copy()),
            "reads a tensor's memory .*custom_op",
        ),
        (lambda layer, x: layer(x) * torch.tensor(np.asarray(x)), "reads a tensor's memory"),
        (lambda layer, x: layer(x) * len(f"{x.sum():.3f}"), "needs the value of a tensor .* as text"),
        (lambda layer, x: torch.nested.nested_tensor([layer(x)]).to_padded_tensor(0.0), "runs an operation"),
    ],
)
def test_they_quote_nothing_of_the_tracers_insides(odd: Any, said: str) -> None:
    with pytest.raises(planner.TraceError, match=f"Odd could not be captured: .*{said}") as caught:
        planner.plan(Odd(odd), 1, (X,), capture="one graph", **FAST)
    assert not _INSIDE.search(str(caught.value).split("(", 1)[-1].rpartition(") ")[-1])
    assert caught.value.__cause__ is not None  # what the tracer said is still there


def test_errors_of_the_model_itself_are_quoted() -> None:
    for odd, said in (
        (lambda layer, x: layer(x).view(3, -1), "raised RuntimeError: shape '[3, -1]' is invalid"),
        (lambda layer, x: {}["proxied"], "raised KeyError: 'proxied'"),
    ):
        with pytest.raises(planner.TraceError, match=re.escape(said)):
            planner.plan(Odd(odd), 1, (X,), **FAST)


def test_a_tensor_that_wraps_others_is_named_as_such() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Odd(lambda layer, x: layer(x))
    model.layer.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(planner.TraceError, match="a tensor that wraps others"):
        planner.plan(model, 1, (X,), capture="one graph", **FAST)


# -- a switch that nobody threw --------------------------------------------------------------------


def _reminders(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "switch was not thrown" in r.getMessage()]


def test_a_step_that_trains_before_the_switch_is_thrown_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = tiny.seeded(Net), tiny.batch(4, labels=True)
    planner.enable(model, 0.5, **FAST)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    assert not _reminders(caplog)
    for _ in range(2):
        model.train()(**batch)["loss"].backward()
    (said,) = _reminders(caplog)
    assert said.startswith("Net trains without a plan: it is enabled for 500 MB") and "now=True" in said
    assert planner.plan_of(model) is None


def _thrown(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()  # type: ignore[operator]


def _planned_by_hand(model: nn.Module) -> None:
    planner.plan(model, 0.5, tiny.batch(4, labels=True), **FAST).apply(model)


def _disabled(model: nn.Module) -> None:
    planner.disable(model)


@pytest.mark.parametrize("way", [_thrown, _planned_by_hand, _disabled])
def test_it_is_not_where_it_is_thrown_or_is_not_to_be(
    way: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = planner.enable(tiny.seeded(Net), 0.5, **FAST)
    way(model)
    model(**tiny.batch(4, labels=True))["loss"].backward()
    assert not _reminders(caplog)
