"""Frozen weights in few bits under adapters that train, as in QLoRA: planned, or refused by that name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.capture.state.effects import Before
from planner.errors import TraceError
from planner.measure import StepRecord, StorageMeter, compare
from tests import tiny
from tests.hf import FAST


class _Dequantized(torch.autograd.Function):
    """x times a weight that is made from bytes and scales in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.packed, ctx.scales = packed, scales
        return x @ _weight(packed, scales).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ _weight(ctx.packed, ctx.scales), None, None


def _weight(packed: Tensor, scales: Tensor) -> Tensor:
    """Of a byte, two values of four bits; or of a byte, one of eight."""
    if packed.dtype is torch.int8:
        return packed.float() * scales
    both = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
    return (both.float() - 8) * scales


class Frozen(nn.Module):
    """A layer whose weight is bytes, in a parameter that is not trained, as bitsandbytes keeps it."""

    def __init__(self, given: int, made: int, bits: int) -> None:
        super().__init__()
        kind, most = (torch.uint8, 256) if bits == 4 else (torch.int8, 128)
        bytes_ = torch.randint(0, most, (made, given * bits // 8)).to(kind)
        self.weight = nn.Parameter(bytes_, requires_grad=False)
        self.scales = torch.rand(made, 1) / 64  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantized.apply(x, self.weight, self.scales)
        return out


class Adapted(nn.Module):
    """Frozen layers with adapters of low rank; ``looks``: a value is read between them."""

    def __init__(self, bits: int, looks: bool) -> None:
        super().__init__()
        self.up, self.down, self.looks = Frozen(16, 64, bits), Frozen(64, 16, bits), looks
        self.a, self.b, self.drop = nn.Linear(16, 4), nn.Linear(4, 64), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            h = torch.tanh(self.up(x) + self.b(self.a(self.drop(x))))
            x = torch.tanh(self.down(h)) + x
        if self.looks and x.isnan().any():
            x = x * 0
        return x.square().mean()


def _trained(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for k in range(5):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        if k < 4:
            model(x).backward()
        else:
            with StorageMeter() as meter:
                meter.register(
                    *model.parameters(), x, *(m.scales for m in model.modules() if hasattr(m, "scales"))
                )
                model(x).backward()
        optimizer.step()
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return state | {"random": torch.get_rng_state()}, meter.peak_bytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("capture", ["one graph", "regions"])
def test_adapters_of_frozen_bytes_train_as_in_eager(bits: int, capture: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Adapted(bits, capture == "regions")
        want, eager = _trained(copy.deepcopy(model))
        budget = 0.85 * eager
        planner.enable(model, budget / 1e9, **FAST, capture=capture, now=True)
        got, ours = _trained(model)
    tiny.assert_same_bits(got, want)
    assert ours <= budget < eager
    assert planner.plan_of(model) is not None


class _Wraps(torch.Tensor):
    """A weight that is bytes and scales inside, and is dequantized by whatever op reads it."""

    packed: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scales: Tensor) -> _Wraps:
        private: Any = torch.Tensor
        made: _Wraps = private._make_wrapper_subclass(cls, packed.shape, dtype=scales.dtype)
        made.packed, made.scales = packed, scales
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> _Wraps:
        return _Wraps(inner["packed"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scales)
        plain = [_weight(x.packed, x.scales) if isinstance(x, cls) else x for x in args]
        return func(*plain, **(kwargs or {}))


def test_gradients_that_hold_others_are_compared_and_counted_by_what_they_hold() -> None:
    packed, scales = torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1)
    indices, values = torch.tensor([[0, 3]]), torch.ones(2, 4)

    def step(*gradients: Tensor) -> StepRecord:
        named = {str(i): g for i, g in enumerate(gradients)}
        return StepRecord({}, named, {}, {}, None, "Tensor")

    def sparse(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(indices, values, (4, 4), check_invariants=False)

    one = step(_Wraps(packed, scales), sparse(values))
    assert compare(one, step(_Wraps(packed.clone(), scales.clone()), sparse(values.clone()))).equal
    other = compare(one, step(_Wraps(packed, 3 * scales), sparse(2 * values))).gradients
    assert other.differing == ("0", "1") and other.max_absolute == 2.0 and other.max_relative == 2.0
    with StorageMeter() as meter:
        meter.register(*one.gradients.values())
    assert meter.live_bytes == sum(t.nbytes for t in (packed, scales, indices, values))


class Wrapped(nn.Module):
    """A layer with such a weight, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        packed = torch.randint(-128, 128, (16, 16)).to(torch.int8)
        self.frozen = nn.Parameter(_Wraps(packed, torch.rand(16, 1) / 64), requires_grad=False)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).matmul(self.frozen).square().mean()


def test_weights_that_wrap_others_are_refused_as_quantized_ones_and_keep_eagers_bits() -> None:
    with pytest.raises(TraceError, match=r"frozen is a _Wraps.*quantized weights.*dequantizes them in its"):
        planner.plan(Wrapped(), 1.0, (torch.randn(8, 16),), **FAST, capture="one graph")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wrapped()
        torch.manual_seed(0)
        twin = Wrapped()
        planner.enable(model, 1.0, **FAST, now=True)
        for k in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(k))
            for one in (model, twin):
                one.zero_grad()
                one(x).backward()
            assert torch.equal(model.layer.weight.grad, twin.layer.weight.grad)


def test_what_a_layer_takes_from_its_weight_is_there_again_where_a_forward_runs_twice() -> None:
    layer: Any = nn.Linear(4, 4)
    layer.weight.scales = scales = torch.rand(4, 1)
    before = Before(layer)
    layer.scales, layer.weight.scales, layer.weight.packed = layer.weight.scales, None, scales
    before.put_back()
    assert layer.weight.scales is scales and not hasattr(layer, "scales")
    assert not hasattr(layer.weight, "packed")
