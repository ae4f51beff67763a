"""Loops of accelerate and Lightning, with their own accumulation, clipping and precision.

Losses and final parameters must be those of the same loop without a plan, bit for bit.  Neither library
needs code of ours: both call the model's ``forward``, and that is where a plan stands.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import planner
from planner import StalePlanError
from planner.runtime.forward import planned_forward_of
from tests import tiny

QUICK = {"costs": "roofline", "solver": "recompute_all"}
FULL = [tiny.batch(16, seed=seed, labels=True) for seed in range(5)]
UNEVEN = [*FULL, tiny.batch(7, seed=9, labels=True)]
ORDERS = ("before", "after")


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


def planned(model: nn.Module) -> None:
    planner.plan(model, 1.0, FULL[0], **QUICK).apply()


def enabled(model: nn.Module) -> None:
    planner.enable(model, 1.0, now=True, **QUICK)


# -- accelerate -----------------------------------------------------------------------------------


def accelerated(
    batches: list[dict[str, Tensor]],
    precision: str,
    before: Callable[[nn.Module], None] | None = None,
    after: Callable[[nn.Module], None] | None = None,
) -> tuple[list[Tensor], nn.Module]:
    """Losses and parameters of a loop with accumulation over two batches; ``before``: ``prepare``."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = tiny.seeded(tiny.Mlp)
    if before is not None:
        with accelerator.autocast():
            before(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    if after is not None:
        after(model)
    torch.manual_seed(0)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())], model


@pytest.mark.parametrize(("precision", "first", "second"), [("no", *ORDERS), ("bf16", *reversed(ORDERS))])
def test_an_accelerate_loop(precision: str, first: str, second: str) -> None:
    """A plan is made ``first``, before or after accelerate prepares the model, a switch set ``second``."""
    want, _ = accelerated(FULL, precision)
    got, _ = accelerated(FULL, precision, **{first: planned})
    assert same(got, want)
    want, _ = accelerated(UNEVEN, precision)
    got, model = accelerated(UNEVEN, precision, **{second: enabled})
    assert same(got, want) and planner.plan_of(model) is not None


def test_a_plan_made_outside_accelerates_autocast_says_so() -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny.seeded(tiny.Mlp)
    planned(model)
    model = accelerator.prepare(model)
    with pytest.raises(
        StalePlanError, match=r"autocast is torch\.bfloat16, it was off when the plan was made"
    ):
        model(**FULL[0])


# -- Lightning ------------------------------------------------------------------------------------


@functools.cache
def lit() -> type[Any]:
    """The class, made where it is asked for: to import Lightning takes seconds, in every worker."""
    import lightning

    class Lit(lightning.LightningModule):
        """``through_forward``: the training step calls the module itself, else the network inside."""

        def __init__(self, through_forward: bool) -> None:
            super().__init__()
            self.net, self.through_forward = tiny.seeded(tiny.Mlp), through_forward
            self.losses: list[Tensor] = []

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            out: Tensor = self.net(x, labels)
            return out

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self(**batch) if self.through_forward else self.net(**batch)
            self.losses.append(loss.detach().clone())
            return loss

        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            assert self(batch["x"]).shape == (len(batch["x"]), 4)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

        @property
        def target(self) -> nn.Module:
            """What to plan: the module whose forward the training step calls."""
            return self if self.through_forward else self.net

    return Lit


def fitted(model: Any, batches: list[dict[str, Tensor]], precision: str, where: Any) -> list[Tensor]:
    """Losses and parameters after two epochs of Lightning's own trainer."""
    import lightning
    from lightning.pytorch.utilities import disable_possible_user_warnings

    disable_possible_user_warnings()
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=where,
    )
    loader = functools.partial(DataLoader, batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers
        trainer.fit(model, loader(batches), loader(batches[:2]))
    return [*model.losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize(("precision", "through_forward"), [("no", False), ("bf16", True)])
def test_a_lightning_module(precision: str, through_forward: bool, tmp_path: Any) -> None:
    want = fitted(lit()(through_forward), FULL, precision, tmp_path)
    model = lit()(through_forward)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        planned(model.target)
    assert same(fitted(model, FULL, precision, tmp_path), want)
    assert planned_forward_of(model.target) is not None
    want = fitted(lit()(through_forward), UNEVEN, precision, tmp_path)
    model = lit()(through_forward)
    enabled(model.target)
    assert same(fitted(model, UNEVEN, precision, tmp_path), want)
    assert planner.plan_of(model.target) is not None
