"""What people write in a forward beside layers: gradients, distributions, bags; and what is refused, how."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from planner.errors import PlannerError
from planner.options import Search
from planner.solving.priced import prepare
from tests.tiny import seeded


class Written(nn.Module):
    """A forward given as a function of the module's parts."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.written = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.written(self, *args)


def _heat_equation(net: Any, x: Tensor) -> Tensor:
    """The residual of u_t = u_xx + u: two derivatives inside the forward."""
    x = x.detach().requires_grad_()
    u = net.body(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return (ddu[:, 0] + du[:, 1] - u[:, 0]).square().mean()


def _gradient_penalty(net: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    score = net.body(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score.mean() + (slope.norm(dim=1) - 1).square().mean()


def _variational(net: Any, x: Tensor) -> Tensor:
    posterior = D.Normal(net.mean(x), F.softplus(net.scale(x)) + 1e-3)
    z = posterior.rsample()
    prior = D.Normal(torch.zeros_like(z), torch.ones_like(z))
    return F.mse_loss(net.decode(z), x) + 0.1 * D.kl_divergence(posterior, prior).mean()


def _policy(net: Any, x: Tensor) -> Tensor:
    chosen = D.Categorical(logits=net.body(x))
    return -chosen.log_prob(net.actions).mean() - 0.01 * chosen.entropy().mean()


def _solve(net: Any, x: Tensor) -> Tensor:
    h = net.left(x)
    gram = h @ h.mT + torch.eye(h.shape[-2])
    return torch.linalg.solve(gram, net.right(x)).sum() + torch.linalg.cholesky(gram).logdet().sum()


def _bag(net: Any, indices: Tensor) -> Tensor:
    return net.head(net.bag(indices)).square().mean()


def _tanh_net(*widths: int) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _bags(mode: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Written(_bag, bag=nn.EmbeddingBag(50, 16, mode=mode), head=nn.Linear(16, 4))
    return model, (torch.randint(50, (8, 5)),)


PLANNED: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "heat equation": lambda: (Written(_heat_equation, body=_tanh_net(2, 32, 32, 1)), (torch.randn(32, 2),)),
    "gradient penalty": lambda: (Written(_gradient_penalty, body=_tanh_net(8, 16, 1)), (torch.randn(12, 8),)),
    "variational": lambda: (
        Written(_variational, mean=nn.Linear(8, 16), scale=nn.Linear(8, 16), decode=nn.Linear(16, 8)),
        (torch.randn(12, 8),),
    ),
    "policy": lambda: (
        Written(_policy, body=_tanh_net(8, 32, 5), actions=torch.randint(5, (10,))),
        (torch.randn(10, 8),),
    ),
    "solve": lambda: (
        Written(_solve, left=nn.Linear(8, 8), right=nn.Linear(8, 4)),
        (torch.randn(2, 6, 8),),
    ),
    "bags, mean": lambda: _bags("mean"),
    "bags, max": lambda: _bags("max"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_bit_for_bit_and_to_the_byte(name: str) -> None:
    parts: list[tuple[Tensor, ...]] = []

    def build() -> nn.Module:
        model, inputs = PLANNED[name]()
        parts.append(inputs)
        return model

    model = seeded(build)
    step = prepare(model, parts[0], costs="roofline", search=Search(time_limit_s=2))
    least, most = step.minimum_peak_bytes, step.baseline.peak_bytes
    plans = [
        step.plan_bytes((least + most) // 2, search=Search(time_limit_s=2)),
        step.plan_bytes(10**12, search=Search("recompute_all")),
    ]
    for plan in plans:
        report = plan.verify()
        assert report.ok, str(report)
        assert report.peak_bytes == report.predicted_peak_bytes


def test_a_singular_matrix_raises_as_it_does_in_eager() -> None:
    model = Written(lambda net, x: torch.linalg.inv(x @ net.weight).sum(), weight=nn.Parameter(torch.eye(4)))
    good, singular = torch.randn(2, 4, 4), torch.zeros(2, 4, 4)
    with pytest.raises(RuntimeError, match="singular") as eager:
        model(singular)
    plan = prepare(model, (good,), costs="roofline").plan_bytes(10**9, search=Search("recompute_all"))
    plan.apply(model)
    with pytest.raises(RuntimeError, match="singular") as planned:
        model(singular)
    assert (type(planned.value), str(planned.value)) == (type(eager.value), str(eager.value))
    model(good).backward()
    assert model.weight.grad is not None


def _ctc(net: Any, x: Tensor) -> Tensor:
    lengths = torch.tensor([10, 10]), torch.tensor([3, 4])
    return F.ctc_loss(
        net.body(x).log_softmax(-1).transpose(0, 1), torch.ones(2, 5, dtype=torch.long), *lengths
    )


def _encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    masked = Written(lambda net, x: net.body(x, mask=net.mask), body=encoder, mask=mask)
    return masked, (torch.randn(2, 6, 16),)


def _sparse() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Written(lambda net, i: net.table(i).square().mean(), table=nn.Embedding(50, 16, sparse=True))
    return model, (torch.randint(50, (8, 5)),)


def _packed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def forward(net: Any, x: Tensor) -> Any:
        return net.body(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True))[1]

    return Written(forward, body=nn.GRU(8, 16, batch_first=True)), (torch.randn(2, 5, 8),)


def _teacher() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            net.teacher.weight.lerp_(net.student.weight, 0.1)
        return F.mse_loss(net.student(x), net.teacher(x).detach())

    model = Written(forward, student=nn.Linear(8, 4), teacher=nn.Linear(8, 4).requires_grad_(False))
    return model, (torch.randn(6, 8),)


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], str]] = {
    "a buffer that may be a causal mask": (_encoder, r"make_causal.*is_causal=True or False"),
    "CTC": (lambda: (Written(_ctc, body=nn.Linear(8, 8)), (torch.randn(2, 10, 8),)), "Leave this loss out"),
    "a batch norm without momentum": (
        lambda: (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None)), (torch.randn(6, 8),)),
        r"batchnorm.py:\d+ \(exponential_average_factor",
    ),
    "a sparse input": (
        lambda: (Written(lambda net, x: net.a(x), a=nn.Linear(4, 4)), (torch.eye(4).to_sparse(),)),
        "input 0 is sparse_coo; a plan is for dense tensors",
    ),
    "a nested input": (
        lambda: (
            Written(lambda net, x: net.a(x).to_padded_tensor(0.0), a=nn.Linear(4, 4)),
            (torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]),),
        ),
        "input 0 is nested; a plan is for dense tensors",
    ),
    "a packed sequence": (_packed, "Give the recurrent layer the padded batch"),
    "a teacher": (_teacher, "writes into the parameter teacher.weight.*after the optimizer's step"),
    "sparse gradients": (_sparse, r"table makes sparse gradients \(sparse=True\).*sparse=False"),
    "lazy parameters": (
        lambda: (nn.Sequential(nn.LazyLinear(4)), (torch.randn(6, 8),)),
        r"lazy parameters without a size yet \(0.weight\): call it once",
    ),
    "hooks of the old spectral norm": (
        lambda: (nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 4))), (torch.randn(6, 8),)),
        "torch.nn.utils.parametrizations",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_line_and_the_way_out(name: str) -> None:
    build, said = REFUSED[name]
    model, inputs = build()
    checks = D.Distribution._validate_args
    with pytest.raises(PlannerError, match=said):
        prepare(model.train(), inputs, costs="roofline")
    assert D.Distribution._validate_args is checks


def _three(net: Any, x: Tensor) -> tuple[Tensor, ...]:
    h = net.first(x).tanh()
    return h.sigmoid(), h.cos(), h.exp()


@pytest.mark.parametrize("solver", ["keep_all", "recompute_all"])
def test_gradients_of_several_outputs_are_held_together(solver: str) -> None:
    """The engine hands them to the plan's node at once, and holds all while it runs."""
    model = seeded(lambda: Written(_three, first=nn.Linear(16, 16)))
    step = prepare(
        model, (torch.randn(16, 16),), loss_fn=lambda o: sum(t.mean() for t in o), costs="roofline"
    )
    report = step.plan_bytes(10**9, search=Search(solver)).verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
