"""What a captured step must carry: every kind of parameter, input, output, buffer and random op, bit for bit.

Each case plans a small model so that all that can be recomputed is, and holds two steps of it to a
twin without a plan: outputs, their type, gradients, buffers, random state.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner._compat import FakeTensorMode, tracing
from planner.capture import meta
from planner.capture.joint_graph import capture
from planner.options import Search
from planner.solving.priced import prepare
from tests import tiny

Pair = namedtuple("Pair", ["left", "right"])


class Wrap(nn.Module):
    """A trunk of two layers, and ``body(self, h, x)`` as the rest of the forward."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.4)
        self.body = body
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        h = self.second(self.drop(torch.sigmoid(self.first(x))))
        return self.body(self, h, x, *args, **kwargs)


def wrap(body: Callable[..., Any], **members: Callable[[], Any]) -> nn.Module:
    """The same weights at every call; members are made under the same seed."""
    return tiny.seeded(lambda: Wrap(body, **{name: make() for name, make in members.items()}))


X = tiny.batch()["x"]


# -- parameters -----------------------------------------------------------------------------------


class Tied(nn.Module):
    """One matrix as embedding and as head, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.embed(ids))))
        return out


IDS = torch.arange(24).reshape(4, 6) % 12


def test_tied_weights_have_one_gradient() -> None:
    model = tiny.seeded(Tied)
    plan = tiny.assert_steps_equal(model, (IDS,))
    assert list(capture(tiny.seeded(Tied), (IDS,)).step.gradients) == [
        "embed.weight",
        "mix.weight",
        "mix.bias",
    ]
    assert plan.rewrite(model).state_dict().keys() == model.state_dict().keys()
    assert model.head.weight is model.embed.weight


def test_weights_tied_after_the_plan_are_noticed() -> None:
    from planner import StalePlanError

    model = tiny.seeded(Tied)
    plan = tiny.planned(model, (IDS,))
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(StalePlanError, match=r"head\.weight"):
        plan.apply(model)
    assert "forward" not in model.__dict__


def test_frozen_parameters_get_no_gradient() -> None:
    model = tiny.seeded(tiny.Mlp)
    model.first.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    tiny.assert_steps_equal(model, tiny.batch(labels=True))
    assert "first.weight" not in capture(copy.deepcopy(model), tiny.batch()).step.gradients


def test_unused_parameters_get_no_gradient() -> None:
    model = wrap(lambda self, h, x: h.relu(), unused=lambda: nn.Linear(3, 3))
    tiny.assert_steps_equal(model, (X,))
    tiny.call(model, (X,)).sum().backward()
    assert model.unused.weight.grad is None and model.first.weight.grad is not None


def test_one_module_called_three_times() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        for _ in range(3):
            h = h + self.shared(torch.tanh(h))
        return h

    tiny.assert_steps_equal(wrap(body, shared=lambda: nn.Linear(8, 8)), (X,))


# -- inputs ---------------------------------------------------------------------------------------


def test_an_input_that_requires_grad_gets_its_gradient() -> None:
    x = X.clone().requires_grad_()
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    tiny.planned(model, (x,)).apply(model)
    got, want = tiny.run(model, (x,)), tiny.run(twin, (x,))
    assert "input gradient 0" in want
    tiny.assert_same_bits(got, want)


def test_an_input_in_the_middle_of_a_larger_graph() -> None:
    stem, model = tiny.seeded(lambda: nn.Linear(8, 8), 3), tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    tiny.planned(model, (stem(X),)).apply(model)

    def grads(m: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        stem.zero_grad()
        m(stem(X)).square().sum().backward()
        return [p.grad.clone() for p in (*stem.parameters(), *m.parameters())]

    assert all(map(torch.equal, grads(model), grads(twin)))


def test_nested_containers_and_keywords() -> None:
    def body(self: Any, h: Tensor, x: Tensor, pair: Any, *, scale: float, extra: Any = None) -> Any:
        return h * scale + pair[0]["a"] * pair[1], extra

    inputs = ({"x": X, "pair": ({"a": X * 2}, X * 3), "scale": 0.5, "extra": [None, "kept"]},)
    tiny.assert_steps_equal(wrap(body), inputs[0])


def test_the_same_tensor_given_twice() -> None:
    tiny.assert_steps_equal(wrap(lambda self, h, x, y: h * y + x), (X, X))


def test_numbers_and_strings_among_the_inputs() -> None:
    def body(self: Any, h: Tensor, x: Tensor, power: int, mode: str) -> Tensor:
        return h**power if mode == "power" else h

    tiny.assert_steps_equal(wrap(body), (X, 3, "power"))


# -- outputs --------------------------------------------------------------------------------------

OUTPUTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "scalar": lambda self, h, x: h.square().mean(),
    "tuple": lambda self, h, x: (h.exp(), h.sin()),
    "list": lambda self, h, x: [h.exp(), h.sin()],
    "dict": lambda self, h, x: {"b": h.exp(), "a": h.sin()},
    "nested": lambda self, h, x: {"deep": [(h.exp(), {"z": h.sin()})]},
    "with None": lambda self, h, x: (h.exp(), None),
    "with numbers": lambda self, h, x: (h.exp(), 3, 0.5, True, "text"),
    "named tuple": lambda self, h, x: Pair(h.exp(), h.sin()),
    "same tensor twice": lambda self, h, x: (lambda y: (y, y))(h.exp()),
    "an input": lambda self, h, x: (h.exp(), x),
    "a view of an input": lambda self, h, x: (h.exp(), x[1:3]),
    "a parameter": lambda self, h, x: (h.exp(), self.first.weight),
    "a view of a parameter": lambda self, h, x: (h.exp(), self.first.weight.t()),
    "two views of one tensor": lambda self, h, x: (lambda y: (y[:4], y[4:].t()))(h.exp()),
    "a tensor and its view": lambda self, h, x: (lambda y: (y, y.view(-1)))(h.exp()),
    "a view that the backward needs": lambda self, h, x: (lambda y: (y.view(-1), y * 2))(h.exp()),
    "integers": lambda self, h, x: (h.exp(), h.argmax(-1), h > 0),
    "detached": lambda self, h, x: (h.exp(), h.exp().detach(), h.detach()),
    "not contiguous": lambda self, h, x: h.exp().t(),
    "a buffer-free constant": lambda self, h, x: (h.exp(), torch.arange(3)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(name: str) -> None:
    model = wrap(OUTPUTS[name])
    want = OUTPUTS[name](model, X, X)
    plan = tiny.assert_steps_equal(model, (X,))
    assert type(model(X)) is type(want)
    report = plan.verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes


def test_an_output_that_is_an_input_is_that_tensor() -> None:
    model = wrap(lambda self, h, x: (h.exp(), x, self.first.weight))
    tiny.planned(model, (X,)).apply(model)
    _, x, weight = model(X)
    assert x.data_ptr() == X.data_ptr() and weight.data_ptr() == model.first.weight.data_ptr()


def test_hugging_face_output_keeps_its_class_and_its_dict_form() -> None:
    model, inputs = tiny.seeded(tiny.bert), tiny.bert_batch()
    want = model(**inputs)
    tiny.assert_steps_equal(model, inputs)
    got = model(**inputs)
    assert type(got) is type(want) and list(got.keys()) == list(want.keys())
    assert got["loss"] is got.loss and got.hidden_states is None

    model, inputs = tiny.seeded(tiny.bert), {**tiny.bert_batch(), "return_dict": False}
    tiny.planned(model, inputs, lambda out: out[0]).apply(model)
    assert type(model(**inputs)) is tuple


def test_a_loss_outside_the_model() -> None:
    labels = tiny.batch(labels=True)["labels"]

    def loss_fn(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    plan = tiny.assert_steps_equal(tiny.seeded(tiny.Mlp), tiny.batch(), loss_fn)
    assert any(name.startswith("loss/") for name in plan.sequence)


def test_a_loss_function_that_reads_one_output_of_several() -> None:
    tiny.assert_steps_equal(wrap(OUTPUTS["dict"]), (X,), lambda out: out["a"].sum())


def test_an_output_left_out_of_the_loss_counts_as_zero() -> None:
    model = wrap(OUTPUTS["tuple"])
    twin = copy.deepcopy(model)
    tiny.planned(model, (X,)).apply(model)
    got, want = tiny.run(model, (X,), lambda o: o[1].sum()), tiny.run(twin, (X,), lambda o: o[1].sum())
    tiny.assert_same_bits(got, want)


# -- buffers --------------------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        h = self.act(self.norm(self.twice(h)))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


PIXELS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_batch_norm_is_updated_once_per_call() -> None:
    model = tiny.seeded(Norms)
    tiny.assert_steps_equal(model, (PIXELS,), steps=3)
    assert int(model.norm.num_batches_tracked) == 6  # called twice in each of three steps


def _counting(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.count.add_(1)
    return h.exp() * self.count


def _reading_first(self: Any, h: Tensor, x: Tensor) -> Tensor:
    out = h.exp() + self.count
    self.count.mul_(2)
    return out


def _average(self: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return (h - self.mean).exp()


def _rebinding(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
    return (h - self.mean).exp()


@pytest.mark.parametrize(
    ("body", "name", "start"),
    [
        (_counting, "count", torch.tensor(1.0)),
        (_reading_first, "count", torch.tensor(1.0)),
        (_average, "mean", torch.zeros(8)),
        (_rebinding, "mean", torch.zeros(8)),
    ],
    ids=["read after its update", "read before its update", "moving average", "bound to a new tensor"],
)
def test_a_custom_buffer(body: Any, name: str, start: Tensor) -> None:
    model = wrap(body, **{name: start.clone})
    plan = tiny.assert_steps_equal(model, (X,), steps=3)
    report = plan.verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes
    assert not torch.equal(getattr(model, name), start)


def test_buffers_are_neither_copied_nor_changed_by_planning() -> None:
    model = tiny.seeded(Norms)
    before = {n: (b, b.clone()) for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    tiny.planned(model, (PIXELS,)).apply(model)
    assert all(b is model.get_buffer(n) and torch.equal(b, c) for n, (b, c) in before.items())
    assert torch.equal(state, torch.get_rng_state())


# -- ops ------------------------------------------------------------------------------------------


def _random(name: str) -> Callable[[Any, Tensor, Tensor], Tensor]:
    draws: dict[str, Callable[[Tensor], Tensor]] = {
        "rand_like": lambda h: h * torch.rand_like(h),
        "randn_like": lambda h: h + torch.randn_like(h),
        "randn": lambda h: h + torch.randn(8),
        "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.3)),
        "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.3),
        "normal_": lambda h: h + torch.empty_like(h).normal_(),
        "uniform_": lambda h: h + torch.empty_like(h).uniform_(),
        "randint": lambda h: h * torch.randint(1, 3, h.shape),
        "randperm": lambda h: h[torch.randperm(h.shape[0])],
        "multinomial": lambda h: h[torch.multinomial(torch.ones(h.shape[0]), 5)],
        "feature dropout": lambda h: F.dropout1d(h, 0.5),
        "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, True),
        "rrelu": lambda h: F.rrelu(h, training=True),
        "gumbel": lambda h: F.gumbel_softmax(h),
        "dropout after dropout": lambda h: F.dropout(F.dropout(h, 0.2), 0.2),
        "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.3),
    }
    return lambda self, h, x: draws[name](h).sin()


RANDOM = (
    "rand_like",
    "randn_like",
    "randn",
    "bernoulli",
    "bernoulli_",
    "normal_",
    "uniform_",
    "randint",
    "randperm",
    "multinomial",
    "feature dropout",
    "alpha dropout",
    "rrelu",
    "gumbel",
    "dropout after dropout",
    "attention",
)


@pytest.mark.parametrize("name", RANDOM)
def test_random_op(name: str) -> None:
    report = tiny.assert_steps_equal(wrap(_random(name)), (X,)).verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes


OPS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "relu_": lambda self, h, x: h.relu_() * 2,
    "add_": lambda self, h, x: h.sin().add_(x).mul_(2).exp(),
    "masked_fill_": lambda self, h, x: (h * 2).masked_fill_(x > 0, 0.0).exp(),
    "slice assignment": lambda self, h, x: _assign(h),
    "constant in forward": lambda self, h, x: h.exp() * torch.tensor([1.0, 2.0] * 4) + torch.arange(8),
    "scalar constant": lambda self, h, x: h.exp() * torch.tensor(0.5),
    "mask of the sizes": lambda self, h, x: h.masked_fill(torch.ones(32, 8).tril() == 0, 0.0).exp(),
    "dropout of p=0": lambda self, h, x: F.dropout(h, 0.0, True).exp(),
    "dropout in evaluation": lambda self, h, x: F.dropout(h, 0.5, False).exp(),
    "dropout in place": lambda self, h, x: F.dropout(h * 2, 0.5, True, inplace=True).exp(),
    "split and cat": lambda self, h, x: torch.cat(h.exp().split(3, 1)[::-1], 1),
    "unbind and stack": lambda self, h, x: torch.stack([t * i for i, t in enumerate(h.unbind(1))]),
    "chunk in place": lambda self, h, x: [t.mul(2) for t in h.exp().chunk(2, 1)],
    "expand": lambda self, h, x: h.mean(1, keepdim=True).expand(32, 8).exp(),
    "sort": lambda self, h, x: h.sort(-1).values.exp(),
    "max": lambda self, h, x: h.max(-1).values.exp(),
    "topk": lambda self, h, x: h.topk(3, -1),
    "index": lambda self, h, x: h[torch.arange(5)].exp(),
    "gather": lambda self, h, x: h.gather(1, (x > 0).long()).exp(),
    "scatter": lambda self, h, x: torch.zeros(32, 8).scatter_add(1, (x > 0).long(), h).exp(),
    "half": lambda self, h, x: h.bfloat16().exp().float(),
    "double": lambda self, h, x: h.double().exp(),
    "complex": lambda self, h, x: torch.fft.fft(h).abs(),
    "complex conjugate": lambda self, h, x: torch.view_as_real(torch.fft.rfft(h).conj() * 2),
    "einsum": lambda self, h, x: torch.einsum("bi,bj->ij", h, h.exp()),
    "where": lambda self, h, x: torch.where(h > 0, h.exp(), h),
    "cumsum": lambda self, h, x: h.cumsum(0).tanh(),
    "no_grad part": lambda self, h, x: h * _without_grad(h),
    "inner gradient stop": lambda self, h, x: (h * 2).detach() * h.exp(),
    "gru": lambda self, h, x: self.gru(h[:4])[0],
    "group norm": lambda self, h, x: F.group_norm(h, 2).exp(),
    "huge view": lambda self, h, x: h.as_strided((4, 4), (1, 1)).exp(),
}


def _assign(h: Tensor) -> Tensor:
    out = h * 2
    out[:, 2:4] = out[:, :2] * 2
    return out.sin()


def _without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.exp()


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    members: dict[str, Callable[[], Any]] = {}
    if name == "gru":
        members["gru"] = lambda: nn.GRU(8, 8)
    report = tiny.assert_steps_equal(wrap(OPS[name], **members), (X,)).verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes


def test_a_custom_autograd_function() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return h * h

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (h,) = ctx.saved_tensors
            return 3 * g * h  # not the true derivative, so that the custom one is seen to be used

    tiny.assert_steps_equal(wrap(lambda self, h, x: Square.apply(h).exp()), (X,))


def test_a_submodule_in_evaluation_inside_a_model_in_training() -> None:
    model = tiny.seeded(Norms)
    model.norm.eval()
    tiny.assert_steps_equal(model, (PIXELS,))
    assert int(model.norm.num_batches_tracked) == 0

    mlp = tiny.seeded(tiny.Mlp)
    mlp.drop.eval()
    tiny.assert_steps_equal(mlp, tiny.batch(labels=True))


def test_autocast_is_planned_as_it_trains() -> None:
    model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        tiny.planned(model, inputs).apply(model)
        got, want = tiny.run(model, inputs), tiny.run(twin, inputs)
    tiny.assert_same_bits(got, want)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.15, 0.45])
def test_dropout_multiplies_by_eagers_factor(p: float, dtype: torch.dtype, frozen: bool) -> None:
    # 1 / (1 - p) is rounded differently by eager's CPU dropout and by native_dropout
    model = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Dropout(p), nn.GELU(), nn.Linear(32, 3)))
    model.to(dtype)[0].requires_grad_(not frozen)
    for solver in ("keep_all", "recompute_all"):
        plan = tiny.assert_steps_equal(model, (X.to(dtype),), solver=solver)
        report = plan.verify()
        assert report.equal and report.peak_bytes == report.predicted_peak_bytes
        plan.restore()


def test_parametrized_weights() -> None:
    def build() -> nn.Module:
        model = tiny.Mlp()
        nn.utils.parametrizations.weight_norm(model.second)
        return model

    tiny.assert_steps_equal(tiny.seeded(build), tiny.batch(labels=True))


# -- no memory ------------------------------------------------------------------------------------


def test_planning_takes_no_memory_for_activations() -> None:
    model = tiny.seeded(lambda: tiny.blocks(5, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(10**7, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = prepare(model, (x,), costs="roofline").plan_bytes(10**12, search=Search("keep_all"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert x.nbytes > 2e9 and plan.baseline_peak_bytes > 10 * x.nbytes
    assert after - before < 0.2 * x.nbytes


def test_a_fake_model_is_planned_and_a_real_one_rewritten() -> None:
    from planner.plan import CheckpointedModule

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = tiny.seeded(tiny.Mlp)
        inputs = {"x": torch.empty(32, 8), "labels": torch.zeros(32, dtype=torch.long)}
    plan = tiny.planned(fake, inputs)
    real, given = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    assert plan.peak_bytes == tiny.planned(real, given).peak_bytes
    module = plan.rewrite(real)
    assert isinstance(module, CheckpointedModule)
    tiny.assert_same_bits(tiny.run(module, given), tiny.run(tiny.seeded(tiny.Mlp), given))


def test_what_a_trace_remembers_of_ops_serves_the_next_one_alone() -> None:
    """torch keeps a table of what ops give on fakes, and a trace has other layouts than torch outside."""
    x = torch.randn(8, 4, 6).transpose(0, 1).requires_grad_()
    op = torch.ops.aten.mse_loss_backward.default

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wanted", torch.zeros(8, 4, 6).transpose(0, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.mse_loss(x, self.wanted)

    def of_torch() -> tuple[int, ...]:
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(model.wanted)
            made: Tensor = op(torch.ones(()), fake, fake, 1)
            return made.stride()

    tracing._remembered.cache_clear()  # that of a long run may be full just here
    model = Distance()
    outside = of_torch()
    table = dict(FakeTensorMode.cache)
    first = capture(model, (x,))
    assert FakeTensorMode.cache == table and of_torch() == outside
    misses = FakeTensorMode.cache_misses
    assert capture(model, (x,)).code == first.code
    assert FakeTensorMode.cache_misses == misses
    (gradient,) = torch.autograd.grad(model(x), x)
    assert meta.tensor(first.step.input_gradients[0]).stride() == gradient.stride() != outside


def test_one_capture_serves_many_budgets() -> None:
    model, inputs = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    prepared = prepare(model, inputs, costs="roofline")
    twin = copy.deepcopy(model)
    for solver in ("keep_all", "recompute_all", "sqrt"):
        module = prepared.plan_bytes(10**9, search=Search(solver)).rewrite()
        tiny.assert_same_bits(tiny.run(module, inputs), tiny.run(twin, inputs))


@dataclasses.dataclass
class Answer:
    """An output type that pytree does not know of."""

    scores: Tensor
    hidden: Tensor
    note: str | None = None


def test_plain_dataclass_outputs_keep_their_type() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Answer:
        return Answer(h.relu(), h, "as it was")

    model = Wrap(body)
    plan = tiny.planned(model, torch.randn(4, 8), lambda out: out.scores.square().sum() + out.hidden.sum())
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8)
    plan.apply(model)
    torch.manual_seed(1)
    ours = model(x)
    torch.manual_seed(1)
    theirs = twin(x)
    assert type(ours) is Answer
    assert ours.note == "as it was"
    for out in (ours, theirs):
        (out.scores.square().sum() + out.hidden.sum()).backward()
    assert torch.equal(ours.scores, theirs.scores)
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert p.grad is not None, name
        assert torch.equal(p.grad, q.grad), name
