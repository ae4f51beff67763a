"""What eager returns as it is costs a planned step nothing; what eager copies stays a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.options import Search
from planner.solving.priced import prepare
from tests import tiny

Call = Callable[[Tensor], Tensor]
X = torch.linspace(-1, 1, 512).view(32, 16)

NO_OPS: dict[str, Call] = {
    "dropout p=0": lambda h: F.dropout(h, 0.0, True),
    "dropout p=0 in place": lambda h: F.dropout(h, 0.0, True, True),
    "dropout that is not training": lambda h: torch.dropout(h, 0.5, False),
    "alpha dropout p=0": lambda h: F.alpha_dropout(h, 0.0, True),
    "dropout of channels p=0": lambda h: F.dropout1d(h, 0.0, True),
    "feature dropout that is not training": lambda h: torch.feature_dropout(h, 0.5, False),
    "the dtype it has": lambda h: h.to(torch.float32).float().type_as(h),
    "contiguous": lambda h: h.contiguous(),
    "the shape it has": lambda h: h.expand_as(h).reshape(h.shape).view(32, 16),
    "turned and turned back": lambda h: h.t().t().contiguous(),
}

COPIES: dict[str, Call] = {
    "clone": lambda h: h.clone(),
    "a copy asked for": lambda h: h.to(torch.float32, copy=True),
    "padding by nothing": lambda h: F.pad(h, (0, 0)),
    "one part in a row": lambda h: torch.cat([h]),
}


class Layers(nn.Module):
    """A softmax keeps its result, the next layer its input: one storage, or two where ``call`` copies."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(torch.softmax(layer(x), -1))
        return x.pow(2).mean()


def peak_bytes(call: Call) -> int:
    """Of the step when nothing is recomputed."""
    return prepare(tiny.seeded(lambda: Layers(call)), (X,), costs="roofline").baseline_peak_bytes


@pytest.fixture(scope="module")
def plain_bytes() -> int:
    return peak_bytes(lambda h: h)


@pytest.mark.parametrize("name", NO_OPS)
def test_a_no_op_keeps_no_copy(name: str, plain_bytes: int) -> None:
    assert peak_bytes(NO_OPS[name]) == plain_bytes


@pytest.mark.parametrize("name", COPIES)
def test_what_eager_copies_is_a_copy(name: str, plain_bytes: int) -> None:
    assert peak_bytes(COPIES[name]) == plain_bytes + 2 * X.nbytes


def test_a_planned_step_without_dropout_takes_no_more_than_eager() -> None:
    model = tiny.seeded(lambda: Layers(nn.Dropout(0.0)))
    step = prepare(model, (X,), costs="roofline")
    report = step.plan_bytes(step.baseline_peak_bytes, Search("keep_all")).verify()
    assert report.equal and report.predicted_peak_bytes == report.peak_bytes <= report.eager_peak_bytes


class Aliases(nn.Module):
    """Writes over what dropout returned, which is what went in, and returns both."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(16, 16), nn.Dropout(p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        dropped = self.drop(h)
        dropped.add_(1)
        return h * 2, dropped


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_what_is_written_afterwards_is_seen_as_in_eager(p: float) -> None:
    tiny.assert_steps_equal(tiny.seeded(lambda: Aliases(p)), (X,))


def test_an_output_that_dropout_returned_as_it_was_lies_where_its_twin_does() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.linear(x)
            return h, F.dropout(h, 0.0, True)

    model = tiny.seeded(Both)
    tiny.assert_steps_equal(model, (X,))
    first, second = model(X)
    assert first.data_ptr() == second.data_ptr()


def test_nothing_of_torch_is_left_changed() -> None:
    forms = torch.ops.aten.dropout.default.py_kernels
    before = dict(forms)
    peak_bytes(nn.Dropout(0.0))
    assert torch.ops.aten.dropout.default.py_kernels == before
