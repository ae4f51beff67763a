"""What a step in regions holds is all of it: backwards within forwards, what the step before handed on, and
nothing of what planning makes."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import planner
from planner.measure import StorageMeter
from planner.regions.forward import TRIES_OF_NEW
from tests import tiny
from tests.hf import FAST

WIDE = 32


def _layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()) for _ in range(count)))


def _rows(count: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, WIDE), torch.arange(count) % 2


def _enabled_beside(model: nn.Module) -> nn.Module:
    """Enable ``model`` in regions; a twin that is not."""
    plain = copy.deepcopy(model)
    planner.enable(model, 0.01, capture="regions", **FAST, now=True)
    return plain


def _assert_same_gradients(*models: nn.Module) -> None:
    tiny.assert_same_bits(*({n: p.grad for n, p in of.named_parameters()} for of in models))


class Cut(nn.Module):
    """Two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = _layers(3), _layers(3), nn.Linear(WIDE, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        out = self.head(self.second(x))
        assert isinstance(out, Tensor)
        return out


def test_a_meter_that_counts_steps_counts_nothing_of_planning() -> None:
    """The step at whose beginning a plan is made, and those after it, which it may be made again for."""
    torch.manual_seed(0)
    model = Cut()
    optimizer = torch.optim.AdamW(model.parameters())
    budget_gb = 0.000_15
    planner.enable(model, budget_gb, optimizer=optimizer, capture="regions", **FAST, now=True)
    for number in range(6):
        x, y = _rows()
        meter = StorageMeter("cpu")
        meter.register(
            *model.parameters(), x, y, *(s for of in optimizer.state.values() for s in of.values())
        )
        if number < 2:  # looked at, and recorded, for which no other mode may be on
            cross_entropy(model(x), y).backward()
        else:
            with meter:
                cross_entropy(model(x), y).backward()
            plan = planner.plan_of(model)
            assert plan is not None and meter.peak_bytes == plan.peak_bytes <= budget_gb * 1e9, number
        optimizer.step()
        optimizer.zero_grad()


class Cached(nn.Module):
    """Embeds without gradients, differentiates the loss within its forward, and embeds once more, with them,
    in the backward, where it takes most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net, self.heads = _layers(8), nn.ModuleList(nn.Linear(WIDE, 2) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            kept = self.net(x)
        kept.requires_grad_()
        hidden = self.heads[0](kept)
        torch._dynamo.graph_break()
        loss = cross_entropy(hidden + self.heads[1](kept), y)
        loss.backward()
        again = loss.detach().requires_grad_()
        again.register_hook(functools.partial(self._embed, x, kept.grad))
        return again

    @torch._dynamo.disable
    def _embed(self, x: Tensor, gradient: Tensor, scale: Tensor) -> None:
        with torch.enable_grad():
            (self.net(x) * gradient * scale).sum().backward()


def test_a_backward_within_a_forward_is_not_the_end_of_the_step() -> None:
    torch.manual_seed(0)
    model = Cached()
    plain = _enabled_beside(model)
    for _ in range(4):
        x, y = _rows()
        for one in (model, plain):
            one.zero_grad()
            one(x, y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    plan = planner.plan_of(model)
    assert plan is not None
    model.zero_grad()
    meter = StorageMeter("cpu")
    meter.register(*model.parameters(), x, y)
    with meter:
        model(x, y).backward()
    assert meter.peak_bytes == plan.peak_bytes


class Carried(nn.Module):
    """A state that the caller hands on, and that the forward takes no gradient of."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDE, WIDE), nn.Linear(WIDE, 2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state.detach())
        return self.head(state.tanh()), state


@pytest.mark.parametrize("capture", ["one graph", "regions"])
def test_no_backward_runs_into_a_step_before(capture: Any) -> None:
    """Whose graph is freed, as eager leaves it."""
    torch.manual_seed(0)
    model = Carried()
    plain = copy.deepcopy(model)
    planner.enable(model, 0.01, loss_fn=lambda out: out[0].sum(), capture=capture, **FAST, now=True)
    state = torch.zeros(64, WIDE, requires_grad=True)
    for _ in range(4):
        x, y = _rows()
        for one in (model, plain):
            out, after = one(x, state)
            cross_entropy(out, y).backward()
        state = after
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        tiny.assert_same_bits({"gradient": p.grad}, {"gradient": q.grad})
    assert planner.plan_of(model) is not None


class Begun(nn.Module):
    """A norm that its first batch sets, weights and flag, each by another tensor."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 2)
        self.scale, self.shift = nn.Parameter(torch.zeros(WIDE)), nn.Parameter(torch.zeros(WIDE))
        self.register_buffer("done", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.done:
            self.scale.data = x.std(0).log().data
            self.shift.data = x.mean(0).data
            self.done = torch.tensor(1.0)
        out = self.head((x - self.shift) * torch.exp(-self.scale))
        assert isinstance(out, Tensor)
        return out


def test_a_first_step_that_is_made_again_begins_where_the_first_one_did() -> None:
    torch.manual_seed(0)
    model = Begun()
    plain = _enabled_beside(model)
    for _ in range(4):
        x, y = _rows()
        for one in (model, plain):
            one.zero_grad()
            cross_entropy(one(3 + x), y).backward()
        _assert_same_gradients(model, plain)
        tiny.assert_same_bits(*(dict(of.state_dict()) for of in (model, plain)))
    assert planner.plan_of(model) is not None


class Ragged(nn.Module):
    """It asks which size of a list is the largest: a piece of its own for each order."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = _layers(2), nn.Linear(WIDE, 2)

    def forward(self, parts: list[Tensor]) -> Tensor:
        longest = parts[0]
        for part in parts:
            if len(part) > len(longest):
                longest = part
        padded = self.net(nn.utils.rnn.pad_sequence(parts, batch_first=True) + longest.mean(0))
        torch._dynamo.graph_break()
        out = self.head(padded.mean(1))
        assert isinstance(out, Tensor)
        return out


def test_steps_that_always_run_new_code_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the sizes of what comes in."""
    torch.manual_seed(0)
    model = Ragged()
    planner.enable(model, 0.01, capture="regions", **FAST, now=True)
    with caplog.at_level(logging.WARNING, "planner"):
        for number in range(TRIES_OF_NEW + 3):
            sizes = [5, 6, 7, 8, 9, 10]
            sizes[number % 6], sizes[number // 6] = 30 + number, 20 + number
            model([torch.randn(n, WIDE) for n in sizes]).sum().backward()
    assert "code that was not seen before" in caplog.text and "TORCH_LOGS=recompiles" in caplog.text


class Shown(nn.Module):
    """Attention whose weights come out too, and are laid out otherwise than their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(WIDE, 4 * 8)

    def forward(self, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights(x).view(2, -1, 4, 8).softmax(-1).view(2, -1, 4, 2, 4)
        return (values * weights.transpose(1, 2)).sum((-1, -2, -4)), weights


class Unread(nn.Module):
    """Whose weights nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.head = nn.Linear(WIDE, WIDE), Shown(), nn.Linear(16, 2)
        self.values = nn.Linear(WIDE, 4 * 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        mixed, _ = self.attention(x, self.values(x).view(2, -1, 4, 2, 4).transpose(1, 2))
        torch._dynamo.graph_break()
        out = self.head(mixed)
        assert isinstance(out, Tensor)
        return out


def test_what_a_region_reads_of_its_own_outputs_is_no_gradient_from_outside() -> None:
    torch.manual_seed(0)
    model = Unread()
    plain = _enabled_beside(model)
    for _ in range(5):
        x = torch.randn(2, 16, WIDE)
        for one in (model, plain):
            one.zero_grad()
            one(x).square().sum().backward()
        _assert_same_gradients(model, plain)
    plan = planner.plan_of(model)
    assert plan is not None and len(plan.regions) == 3


def test_a_sum_without_one_gradient_is_laid_out_as_the_other() -> None:
    """What reads it then runs other calls, so that the step is captured for the gradients that came."""
    torch.manual_seed(0)
    model = Shown()
    plain = copy.deepcopy(model)
    planner.enable(model, 0.01, loss_fn=lambda out: out[0].sum() + out[1].sum(), **FAST, now=True)
    for both in (True, True, False, False):
        x, values = torch.randn(2, 16, WIDE), torch.randn(2, 4, 16, 2, 4)
        for one in (model, plain):
            one.zero_grad()
            mixed, weights = one(x, values)
            (mixed.square().sum() + (weights.square().sum() if both else 0)).backward()
        _assert_same_gradients(model, plain)


def test_what_dynamo_was_told_or_left_alone_elsewhere_changes_nothing() -> None:
    """``torch.compiler.reset()`` forgets what it was to leave alone, and other models run the same code."""
    from torch._dynamo import convert_frame, eval_frame

    from planner import _compat

    test_a_backward_within_a_forward_is_not_the_end_of_the_step()
    convert_frame.input_codes.add(_compat.dynamo._ENTRIES[0].__code__)  # Dynamo has looked at it, once
    torch.compiler.reset()
    test_a_backward_within_a_forward_is_not_the_end_of_the_step()
    forward = nn.Sequential.forward.__code__
    eval_frame.skip_code(forward)
    try:
        model = _layers(3)
        plain = _enabled_beside(model)
        for _ in range(3):
            x, _ = _rows()
            for one in (model, plain):
                one.zero_grad()
                one(x).square().sum().backward()
            _assert_same_gradients(model, plain)
        assert planner.plan_of(model) is not None
    finally:
        torch._C._dynamo.eval_frame.reset_code(forward)
