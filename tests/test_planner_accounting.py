"""Optimizer bytes against the same optimizer run for real; resident bytes; budgets that make no sense."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from planner._compat import FakeTensorMode
from planner.errors import PlannerError
from planner.measure import step_peak
from planner.measure.meter import StorageMeter
from planner.memory.optimizer_state import OptimizerBytes, optimizer_state_bytes
from planner.memory.resident import Resident, budget_bytes_of, resident_of
from planner.options import Search
from planner.solving.priced import prepare
from tests.models import CASES

SHAPES = ((64, 32), (64,), (3, 5, 7), (128, 16), ())

# Adam's loop makes a square root and its quotient, the denominator, for one parameter at a time; the
# denominator of the parameter before is still there.  Most at (128, 16), after (3, 5, 7).
LOOP_BYTES = 2 * 4 * 128 * 16 + 4 * 3 * 5 * 7


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, 0.5, device=device)) for shape in SHAPES]


def run_for_real(make: Callable[[list[nn.Parameter]], optim.Optimizer]) -> OptimizerBytes:
    """State and temporaries of two steps on real tensors."""
    params = parameters()
    gradients = [torch.ones_like(p) for p in params]
    meter = StorageMeter()
    meter.register(*params, *gradients)
    base_bytes, most_bytes = meter.live_bytes, 0
    with meter:
        optimizer = make(params)
        for _ in range(2):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            meter.reset_peak()
            optimizer.step()
            most_bytes = max(most_bytes, meter.peak_bytes)
    state_bytes = meter.live_bytes - base_bytes
    return OptimizerBytes(state_bytes, most_bytes - meter.live_bytes)


class Quantised(optim.Optimizer):
    """State of odd kinds: codes of one byte, a scale per row, and an attribute beside ``state``."""

    def __init__(self, params: Any, lr: float, bits: int = 8) -> None:
        super().__init__(params, {"lr": lr})
        self.bits = bits
        self.table = torch.zeros(2**bits)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["codes"] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
                    state["scales"] = torch.zeros(p.shape[:1], device=p.device)
                    state["history"] = [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
                moment = state["codes"] * 0.9 + p.grad
                if moment.abs().max().item() > 0:  # a value read from a tensor
                    p.add_(moment, alpha=-group["lr"])


class FromTheStart(optim.SGD):
    """Its state is there before its first step, as Adagrad's is in torch 2.11."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Without a look whether there is state."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] += 1
                self.state[p]["sum"] += p.grad.detach().square()
                p.data -= group["lr"] * p.grad / self.state[p]["sum"].sqrt()


MAKERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": optim.SGD,
    "momentum": functools.partial(optim.SGD, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "amsgrad": functools.partial(optim.AdamW, amsgrad=True),
    "foreach": functools.partial(optim.AdamW, foreach=True),
    "fused": functools.partial(optim.AdamW, fused=True),
    "adafactor": optim.Adafactor,
    "rmsprop": functools.partial(optim.RMSprop, momentum=0.1, centered=True),
    "adagrad": optim.Adagrad,
    "adamax": optim.Adamax,
    "from the start": FromTheStart,
    "quantised": functools.partial(Quantised, lr=0.1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_fake_steps_take_what_real_steps_take(name: str) -> None:
    real = run_for_real(MAKERS[name])
    assert optimizer_state_bytes(MAKERS[name], parameters()) == real  # to the byte
    params = parameters()
    assert optimizer_state_bytes(MAKERS[name](params), params) == real


def test_state_by_hand() -> None:
    params = parameters()
    count = sum(p.numel() for p in params)
    assert optimizer_state_bytes(optim.SGD, params).state_bytes == 0
    assert optimizer_state_bytes(optim.Adam, params).state_bytes == 8 * count + 4 * len(params)
    assert optimizer_state_bytes(optim.Adam, params).step_transient_bytes == LOOP_BYTES


def test_on_cuda_foreach_makes_parameter_sized_temporaries() -> None:
    with FakeTensorMode():
        params = parameters("cuda")
    blocks = [-(-p.nbytes // 512) * 512 for p in params]  # as its allocator rounds
    total = sum(blocks)
    found = optimizer_state_bytes(optim.AdamW, params)
    assert found == OptimizerBytes(2 * total, total)  # the steps are on the CPU
    loop = optimizer_state_bytes(functools.partial(optim.AdamW, foreach=False), params)
    assert loop == OptimizerBytes(2 * total, 2 * 4 * 128 * 16 + 512)
    fused = optimizer_state_bytes(functools.partial(optim.AdamW, fused=True), params)
    assert fused == OptimizerBytes(2 * total + 512 * len(params), 0)
    assert optimizer_state_bytes(optim.AdamW, params, device="cpu").state_bytes == 4 * len(params)


def test_what_is_on_the_cpu_can_be_counted_as_on_cuda() -> None:
    with FakeTensorMode():
        there = parameters("cuda")
    for optimizer in (optim.SGD, optim.AdamW, functools.partial(optim.AdamW, fused=True), optim.Adagrad):
        found = optimizer_state_bytes(optimizer, parameters(), as_on="cuda")
        assert found == optimizer_state_bytes(optimizer, there)
    model = nn.Linear(3, 5)
    assert resident_of(model, (torch.ones(2, 3),), as_on="cuda") == Resident(2 * 512, 0, 0, 512)


def test_an_instance_keeps_its_groups_and_loses_its_state() -> None:
    params = parameters()
    optimizer = optim.SGD(
        [{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "momentum": 0.0}], lr=0.1
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[0].grad = None
    found = optimizer_state_bytes(optimizer, params)
    assert found.state_bytes == params[0].nbytes


def test_nothing_of_the_users_changes() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, lr=torch.tensor(0.1))
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    StepLR(optimizer, 1)  # wraps the instance's step
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    called.clear()
    before = [(p, p.detach().clone(), p.grad, p.grad.clone()) for p in params]
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    random, attributes = torch.get_rng_state(), set(vars(optimizer))

    found = optimizer_state_bytes(optimizer, params)

    learning_rates_bytes = 2 * 4  # the tensor lr, and the scheduler's copy of it
    plain = optimizer_state_bytes(optim.AdamW, params)
    assert found.state_bytes == plain.state_bytes + learning_rates_bytes
    assert called == []
    assert set(vars(optimizer)) == attributes and torch.equal(random, torch.get_rng_state())
    for p, value, gradient, gradient_value in before:
        assert p.grad is gradient and torch.equal(p, value) and torch.equal(gradient, gradient_value)
        assert type(p) is nn.Parameter
        for key, kept in state[p].items():
            assert torch.equal(optimizer.state[p][key], kept)
    assert optimizer.param_groups[0]["params"][0] is params[0]


def test_frozen_parameters_have_no_state() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    found = optimizer_state_bytes(optim.Adam(params), params)
    assert found.state_bytes == sum(2 * p.nbytes + 4 for p in params[1:])


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper(optim.Optimizer):
        def __init__(self, inner: optim.Optimizer) -> None:
            self.optimizer = inner

        param_groups = property(lambda self: self.optimizer.param_groups)

        def step(self, closure: Any = None) -> None:
            raise AssertionError("the wrapper's step is not what is counted")

    params = parameters()
    inner = optim.Adam(params)
    assert optimizer_state_bytes(Wrapper(inner), params) == optimizer_state_bytes(inner, params)


def test_bytes_are_taken_as_they_are() -> None:
    assert optimizer_state_bytes(12345, parameters()) == OptimizerBytes(12345, 0)
    assert optimizer_state_bytes(optim.Adam, []) == OptimizerBytes(0, 0)
    with pytest.raises(ValueError, match="state_bytes must be a count of bytes, 0 or more, got -1"):
        optimizer_state_bytes(-1, parameters())


@pytest.mark.parametrize("wrong", ["adam", True, None, 1.5])
def test_what_is_no_optimizer(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, its class"):
        optimizer_state_bytes(wrong, parameters())


def test_what_cannot_run_on_fakes_says_so() -> None:
    for made in (optim.LBFGS, optim.LBFGS(parameters()), optim.SparseAdam):
        with pytest.raises(PlannerError, match=r"(LBFGS|SparseAdam) does not run on fake.*pass the bytes"):
            optimizer_state_bytes(made, parameters())


def test_what_cannot_be_constructed_says_so() -> None:
    class Picky(optim.SGD):
        def __init__(self, params: Any, lr: float, rank: int, scale: float) -> None:
            super().__init__(params, lr=lr)

    with pytest.raises(PlannerError, match=r"Picky needs lr, rank, scale: .*partial\(Picky, lr=\.\.\., rank"):
        optimizer_state_bytes(Picky, parameters())
    ready = functools.partial(Picky, lr=0.1, rank=2, scale=1.0)
    assert optimizer_state_bytes(ready, parameters()) == OptimizerBytes(0, 0)
    with pytest.raises(PlannerError, match=r"list made a list, not a torch\.optim\.Optimizer"):
        optimizer_state_bytes(list, parameters())  # type: ignore[arg-type]


# --- resident bytes ------------------------------------------------------------------------------


def test_resident_bytes_count_storages_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("kept", torch.zeros(16))
            self.register_buffer("view", self.kept[:4])
            self.register_buffer("none", None)

    model, x = Tied(), torch.zeros(4, 8)
    found = resident_of(model, {"x": x, "again": x.view(-1), "flag": True})
    assert found == Resident(
        parameters_bytes=256, buffers_bytes=64, gradients_bytes=0, inputs_bytes=128, optimizer_state_bytes=0
    )
    assert found.total_bytes == 448
    model.first.weight.grad = torch.zeros(8, 8)
    assert resident_of(model, (x,)).gradients_bytes == 256
    assert resident_of(model, (model.kept,)).inputs_bytes == 0  # counted as a buffer already


def test_resident_bytes_of_a_real_model() -> None:
    model, batch = CASES["gpt2"].build(), CASES["gpt2"].make_inputs(0)
    found = resident_of(model, batch, optim.AdamW)
    parameters_bytes = sum(p.nbytes for p in model.parameters())  # embedding and head are tied
    assert found.parameters_bytes == parameters_bytes
    assert found.optimizer_state_bytes == 2 * parameters_bytes + 4 * len(list(model.parameters()))
    assert found.inputs_bytes == sum(t.nbytes for t in batch.values())
    assert "optimizer state" in str(found)
    assert found.optimizer_step_bytes > 0
    assert resident_of(model, batch, optim.AdamW, device="cuda").total_bytes == 0


def test_a_fake_model_has_resident_bytes() -> None:
    with FakeTensorMode():
        model = nn.Linear(1000, 1000)
    found = resident_of(model, (), optim.Adam)
    assert found.parameters_bytes == 4 * 1001 * 1000
    assert found.optimizer_state_bytes == 2 * found.parameters_bytes + 2 * 4


def test_records_refuse_what_is_no_count() -> None:
    with pytest.raises(ValueError, match="inputs_bytes must be a count"):
        Resident(0, 0, 0, -4)


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"), [(8, 8 * 10**9), (0.29, 290_000_000), (np.float32(0.5), 500_000_000), (1e-9, 1)]
)
def test_budgets_in_gb(given: Any, wanted: int) -> None:
    assert budget_bytes_of(given) == wanted


@pytest.mark.parametrize("given", ["8", "8GB", True, None, [8], 8j, torch.tensor(8.0)])
def test_budgets_of_the_wrong_type(given: Any) -> None:
    with pytest.raises(TypeError, match=r"budget_gb must be a number of gigabytes such as 8 or 0\.5, got"):
        budget_bytes_of(given)


@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf])
def test_budgets_that_are_not_finite(given: float) -> None:
    with pytest.raises(ValueError, match=f"budget_gb must be finite, got {given}"):
        budget_bytes_of(given)


@pytest.mark.parametrize(
    ("given", "message"), [(0, "positive, got 0"), (-2.5, "got -2.5"), (1e-12, "a byte")]
)
def test_budgets_without_a_byte(given: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget_bytes_of(given)


def test_a_wide_state_is_a_view_of_nothing() -> None:
    """State that aliases the parameters costs nothing."""

    class Aliasing(optim.SGD):
        def step(self, closure: Any = None) -> Tensor | None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["same"] = p.detach().view(-1)
            return None

    assert optimizer_state_bytes(Aliasing, parameters()) == OptimizerBytes(0, 0)


# --- losses --------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,  # keeps the storage of what it reduced
    "smooth_l1": F.smooth_l1_loss,  # so does this one
    "square": lambda out, wanted: (out - wanted).square().mean(),  # its backward is one formula of three ops
    "huber": F.huber_loss,
}


class Regression(nn.Module):
    """``loss(net(x), wanted)``, or the two for a loss outside."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), loss

    def forward(self, x: Tensor, wanted: Tensor) -> Any:
        out = self.net(x)
        return (out, wanted) if self.loss is None else self.loss(out, wanted)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_memory_of_a_loss_is_predicted_to_the_byte(name: str, inside: bool) -> None:
    loss = LOSSES[name]
    inputs = (torch.randn(128, 64), torch.randn(128, 64))
    model = Regression(loss if inside else None).train()
    step = prepare(
        model, inputs, costs="roofline", loss_fn=None if inside else lambda outputs: loss(*outputs)
    )
    report = step.plan_bytes(10**9, search=Search("keep_all")).verify()
    assert report.peak_bytes == report.predicted_peak_bytes


class Proxies(nn.Module):
    """A loss with targets, class weights and a trained tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = torch.randint(4, (100,))
        self.register_buffer("weights", torch.rand(4))
        self.scale = nn.Parameter(torch.rand(1000))

    def forward(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output, self.targets, self.weights) * self.scale.sum()


def losses_by_own_bytes(x: Tensor, model: nn.Sequential) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Loss functions, and the bytes that each holds beside the model and its inputs."""
    targets, classes = torch.randn(100, 4), torch.randint(4, (100,))
    weight = model[0].weight
    return {
        "closure": (lambda output: F.cross_entropy(output, classes), 800),
        "view": (lambda output: F.mse_loss(output[:50], targets[50:]), 1600),
        "input": (lambda output: F.mse_loss(output, x[:, :4]), 0),
        "parameter": (lambda output: F.mse_loss(output, targets) + weight.detach().sum(), 1600),
        "module": (Proxies(), 800 + 16 + 2 * 4000),
        "nothing": (lambda output: output.sum(), 0),
    }


@pytest.mark.parametrize("name", ["closure", "view", "input", "parameter", "module", "nothing"])
def test_what_a_loss_function_holds_is_in_the_budget(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(100, 8)
    loss_fn, own_bytes = losses_by_own_bytes(x, model)[name]
    prepared = prepare(model, (x,), loss_fn=loss_fn, costs="roofline")
    assert prepared.memory.constant_bytes == own_bytes
    plan = prepared.plan_bytes(prepared.minimum_peak_bytes)
    plan.apply(model)
    assert step_peak(model, (x,), loss_fn=loss_fn) == plan.peak_bytes == plan.budget_bytes
