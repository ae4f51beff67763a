"""The step in float64 that two others are laid beside: the same draws, and nothing else of theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner.measure.bits import StepRecord, run_step
from planner.measure.wide import against_float64, recorded_draws, step_in_float64

Step = tuple[StepRecord, StepRecord]


def steps(model: nn.Module, x: torch.Tensor) -> Step:
    """The step as it is, and that in float64."""
    with recorded_draws() as draws:
        narrow = run_step(model, (x,), seed=3)
    return narrow, step_in_float64(model, (x,), draws, seed=3)


class Attends(nn.Module):
    """Attention, whose op is said to be random even where its rate is 0."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.rate = nn.Linear(8, 24), rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, 8) to a number."""
        parts = self.inner(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-2, -3)
        return F.scaled_dot_product_attention(*parts, dropout_p=self.rate).square().mean()


def test_attention_that_draws_nothing_is_computed_in_float64() -> None:
    model, x = Attends(0.0), torch.randn(2, 5, 8)
    narrow, wide = steps(model, x)
    twin = Attends(0.0).double()
    alone = run_step(twin, (x.double(),), seed=3)
    assert narrow.loss is not None and wide.loss is not None and alone.loss is not None
    assert torch.equal(wide.loss, alone.loss)
    assert float(wide.loss) != float(narrow.loss)  # which is rounded
    for name, gradient in alone.gradients.items():
        assert torch.equal(wide.gradients[name], gradient), name


class Drops(nn.Module):
    """Dropout by the op whose result holds what is kept of its operand, and the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 6) to a number."""
        kept, _ = torch.native_dropout(self.inner(x), 0.3, True)
        return (kept + F.dropout(kept, 0.5)).square().sum()


def test_dropout_keeps_what_it_kept_of_numbers_in_float64() -> None:
    model, x = Drops(), torch.randn(7, 6)
    torch.manual_seed(3)
    kept, mask = torch.native_dropout(model.inner(x), 0.3, True)
    twice = F.dropout(kept, 0.5) != 0
    inner = Drops().double().inner(x.double())
    first = inner * mask / 0.7
    wanted = (first + first * twice / 0.5).square().sum()
    _, wide = steps(model, x)
    assert wide.loss is not None
    torch.testing.assert_close(wide.loss, wanted.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_step_is_as_far_from_float64_as_itself(rate: float) -> None:
    model, x = Attends(rate), torch.randn(2, 5, 8)
    with recorded_draws() as draws:
        narrow = run_step(model, (x,), seed=3)
    errors, why = against_float64(model, (x,), (narrow, narrow), draws, 1, seed=3)
    assert errors is not None, why
    assert errors.share == 1 and errors.rounding_alone and errors.loss_ulps == 0
    assert 0 < errors.eager < 1e-5  # rounding: with other draws it would be of their own size
