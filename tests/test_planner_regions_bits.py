"""Training in regions gives eager's bits: sums of gradients, their layouts, draws, checkpoints, functions."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from planner.capture.joint_graph import capture
from planner.errors import TraceError
from planner.measure.meter import StorageMeter
from planner.regions.cut.checkpointed import Checkpointed
from planner.regions.cut.plain import as_eager
from planner.regions.session import Session
from planner.solving.in_regions import step_in_regions

cut = torch._dynamo.graph_break


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def _trained(model: nn.Module, batch: Callable[[], Any], loss: Callable[[Any], Tensor]) -> list[list[Any]]:
    """What two steps make: loss, gradients, buffers, and the random states behind them."""
    found = []
    for k in range(2):
        torch.manual_seed(k)
        random.seed(k)
        args = batch()
        model.zero_grad()
        out = loss(model(*args))
        out.backward()
        gradients = [None if p.grad is None else p.grad.clone().to_dense() for p in model.parameters()]
        states = [torch.get_rng_state(), torch.tensor(random.random())]
        found.append([out.detach(), *gradients, *(b.clone() for b in model.buffers()), *states])
    return found


def same_bits(
    build: Callable[[], nn.Module],
    batch: Callable[[], Any] = lambda: (torch.randn(4, 8),),
    loss: Callable[[Any], Tensor] = mean_square,
) -> Session:
    """Train in eager and by the plan that holds least, compare every number; what ran in regions."""
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(11)
        models.append(build())
    wanted = _trained(models[0], batch, loss)
    step = step_in_regions(models[1], batch(), costs="roofline")
    step.applied(step.least_plan(), models[1])
    got = _trained(models[1], batch, loss)
    for number, (one, other) in enumerate(zip(wanted, got, strict=True)):
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            assert (x is None) == (y is None), (number, i)
            assert x is None or torch.equal(x, y), (number, i)
    assert step.session is not None
    return step.session


def captured(session: Session) -> int:
    return sum(v.captured is not None for region in session.regions for v in region.variants.values())


# -- sums of gradients -------------------------------------------------------------------------------


class Aliased(nn.Module):
    """Llama's norm: a cast that changes nothing, and two reads behind it, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        cut()
        h = x.to(torch.float32)
        return x + self.linear(self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)))


class Shared(nn.Module):
    """One weight, several times in each of two regions, and in the code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(torch.tanh(self.linear(x)))
        cut()
        x = self.linear(torch.tanh(self.linear(torch.tanh(self.linear(x)))))
        cut()
        return self.linear(x) + self.linear.weight.sum()


class Composite(nn.Module):
    """Functions that read their argument several times, and views of one that lie in two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        cut()
        y = (
            F.local_response_norm(h[None], 2)[0]
            + F.cosine_similarity(h, h.detach() + 1, dim=0)
            + F.normalize(h)
        )
        y = y + self.attention(h[None], h[None], h[None], need_weights=False)[0][0] + (h + h)
        u, v = h.chunk(2, -1)
        w = h.view(-1)
        cut()
        return (u * v).repeat(1, 2) + w.view(4, 8) * y + h * h


@pytest.mark.parametrize(
    "build", [lambda: nn.Sequential(nn.Linear(8, 8), Aliased(), Aliased()), Shared, Composite],
    ids=["aliased", "shared", "composite"],
)  # fmt: skip
def test_gradients_of_what_several_regions_read_are_added_up_in_eagers_order(build: Any) -> None:
    session = same_bits(build)
    assert captured(session) == len(session.regions)


def test_a_gradient_keeps_its_layout_where_other_code_adds_up_by_it() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 8, 3), nn.LSTM(8, 6, batch_first=True)
            self.gamma = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            cut()
            h = (self.gamma * h.transpose(1, -1)).transpose(1, -1)
            cut()
            return self.second(h.transpose(1, -1).reshape(-1, 11, 8))[0].sum((0, 2))

    session = same_bits(Folded, lambda: (torch.randn(4, 3, 35),))
    assert captured(session) >= 2


class Turned(nn.Module):
    """A recurrence over the last dimension, which Dynamo leaves to eager."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1)
        return (self.lstm(x)[0] + x).permute(1, 2, 0)


class Upward(nn.Module):
    """Its gradient is dense, its input may not be."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.ConvTranspose1d(16, 8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(x)[..., 2:-2]


class Around(nn.Module):
    """No ``nn.Sequential``, whose code Dynamo leaves alone once it was called under a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turned, self.upward = nn.Conv1d(1, 16, 3), Turned(), Upward()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        x = self.turned(x)
        torch._dynamo.graph_break()
        return self.upward(F.elu(x))


def test_a_gradient_that_goes_on_is_laid_out_as_eagers_not_as_its_input() -> None:
    session = same_bits(Around, lambda: (torch.randn(2, 1, 102),))
    assert captured(session) >= 2


def test_complex_products_keep_the_order_of_their_factors() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.linear = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            cut()
            f = torch.einsum("bi,oi->bi", torch.fft.rfft(h), self.weight)
            return torch.fft.irfft(f) + h

    assert captured(same_bits(Fourier)) == 2


# -- draws ---------------------------------------------------------------------------------------------


def test_draws_in_regions_are_those_of_eager() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + F.dropout(torch.tanh(layer(x)), 0.3)
            x = x[torch.randperm(4)] * torch.rand(4, 1) + torch.rand(8, generator=self.generator)
            return self.layers[0](x) * random.random()

    session = same_bits(Draws)
    assert captured(session) >= 1


# -- what authors checkpoint ---------------------------------------------------------------------------


class Checkpoints(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.third = nn.Linear(width, width)

    def inner(self, layer: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(layer(x))
        return F.dropout(x, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + checkpoint(self.inner, self.second, h, use_reentrant=False)
        cut()
        return h + checkpoint(self.inner, self.third, h, use_reentrant=True)


def test_a_checkpoint_of_the_author_is_planned_through() -> None:
    session = same_bits(Checkpoints)
    assert captured(session) == len(session.regions)
    ops = [op for r in session.regions for v in r.variants.values() for op in v.captured.graph.ops]  # type: ignore[union-attr]
    assert any(op.target == "aten.tanh" and op.recomputable for op in ops)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        made = x.exp()
        ctx.save_for_backward(made, w)
        ctx.factor = 2.0
        return made * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        made, w = ctx.saved_tensors
        return gradient * w * made * ctx.factor, (gradient * made).sum((0, 1))


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h = Doubled.apply(h[None], self.weight)[0] + h
        cut()
        return Doubled.apply(h[None], self.weight)[0]


def test_a_function_of_the_author_is_planned_through() -> None:
    session = same_bits(Functions)
    assert captured(session) == len(session.regions)


def _held(model: nn.Module, batch: tuple[Tensor]) -> tuple[int, list[Any]]:
    """Bytes alive between forward and backward, and the step's numbers."""
    torch.manual_seed(5)
    meter = StorageMeter(torch.device("cpu"))
    meter.register(*model.parameters(), *batch)
    model.zero_grad()
    with meter:
        out = model(*batch)
        held_bytes = meter.live_bytes
        mean_square(out).backward()
    return held_bytes, [out.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("build", [Checkpoints, Functions])
def test_a_graph_left_to_eager_holds_what_eager_holds(build: Any) -> None:
    """And draws what eager draws where it makes something again."""
    torch._dynamo.reset()
    batch = (torch.randn(64, 8),)
    model = build()
    held_bytes, wanted = _held(model, batch)
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(as_eager(graph))
        return graphs[-1].forward

    model.__dict__["forward"] = torch.compile(model.forward, backend=kept)
    model(*batch)  # compiles
    bytes_now, got = _held(model, batch)
    assert len(graphs) == 2
    assert all(map(torch.equal, got, wanted))
    assert bytes_now <= held_bytes


def test_a_graph_that_needs_nothing_else_is_left_as_it_is() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    assert as_eager(graph) is graph


# -- what no plan carries ------------------------------------------------------------------------------


class Normed(nn.Module):
    """Its author checkpoints a batch norm, whose statistics move again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + checkpoint(lambda t: torch.tanh(self.norm(self.second(t))), h, use_reentrant=False)
        return torch.tanh(h) * h


class Prototypes(nn.Module):
    """Weights that the forward normalizes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            self.heads.weight.copy_(F.normalize(self.heads.weight.data.clone(), dim=1))
        return self.heads(torch.tanh(h)) * h


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        return torch.tanh(self.linear(h)) * h


class Centered(nn.Module):
    """DINO's center: a buffer whose storage is another after each step."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.net(x) - self.center)
        with torch.no_grad():
            self.center.data = self.center * 0.9 + y.mean(0) * 0.1
        return y


class Product(nn.Module):
    """Eager divides by values that are not zero; a trace, which sees none, cannot."""

    def __init__(self, of_batch: bool = False) -> None:
        super().__init__()
        self.linear, self.of_batch = nn.Linear(8, 8), of_batch

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        y = x.prod(0) * h.detach().prod(0) if self.of_batch else h.prod(0)
        return torch.tanh(h * y) * y


def test_a_product_whose_gradient_depends_on_values_is_refused_in_one_graph() -> None:
    batch = (torch.rand(4, 8),)
    with pytest.raises(TraceError, match="gradient of a product"):
        capture(Product(), batch)
    assert capture(Product(of_batch=True), batch).step.gradients


@pytest.mark.parametrize("build", [Normed, Prototypes, Renormed, Product, Centered])
def test_a_graph_is_torn_around_what_no_plan_carries(build: Any) -> None:
    of_words = build is Renormed
    session = same_bits(build, lambda: (torch.randint(0, 10, (4,)),) if of_words else (torch.randn(4, 8),))
    (kept,) = [region for region in session.regions if region.why]
    assert session.left_to_eager == (f"region {kept.number}: as eager runs it, for {kept.why}",)
    assert captured(session) == len(session.regions) - 1


def test_a_norm_outside_checkpoints_and_writes_without_gradients_are_planned_whole() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(lambda t: torch.tanh(self.linear(t)), self.norm(x), use_reentrant=False)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0))
            return h.mul(2).add_(1.0) * self.mean

    session = same_bits(Plain)
    assert [region.why for region in session.regions] == [""]
    assert captured(session) == 1


def test_running_statistics_move_once_in_a_step_that_is_looked_at() -> None:
    """Which runs in parts, each made again in its backward, until all is there again."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return lambda *args: Checkpointed(graph)(args)

    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8)
    mean_square(torch.compile(model, backend=kept)(x)).backward()
    mean_square(twin(x)).backward()
    assert len(graphs) == 1
    pairs = zip((*model.buffers(), *model.parameters()), (*twin.buffers(), *twin.parameters()), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_products_gradient_is_eagers_where_a_mode_watches() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.prod(x, 0) + x.prod(0) + x.cumprod(0).sum(0)

    x = torch.rand(5, 7)

    def gradient(run: Callable[[Tensor], Tensor], *, watched: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        with StorageMeter(torch.device("cpu")) if watched else contextlib.nullcontext():
            run(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    plain = as_eager(torch.fx.symbolic_trace(Products()))
    wanted = gradient(Products(), watched=False)
    assert torch.equal(gradient(plain, watched=True), wanted)
    assert torch.equal(gradient(plain, watched=False), wanted)


class Rows(nn.Module):
    """Embeddings with sparse gradients, and code behind them that has dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum", sparse=True)
        self.row, self.out = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        return torch.tanh(self.out(torch.tanh(self.bag(words) * 0.5) + self.row(words[:, 0])))


def test_sparse_gradients_stay_sparse_and_the_rest_is_planned() -> None:
    session = same_bits(Rows, lambda: (torch.randint(0, 20, (4, 6)),))
    assert any("sparse" in why for why in session.left_to_eager)
    assert captured(session)


class Written(nn.Module):
    """Writes over what earlier code made: asked to by a flag, by an assignment, by an uncommon view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        late = torch.tanh(x) @ self.layers[0].weight  # type: ignore[operator]
        for layer in self.layers:
            h = layer(x)
            h += x
            h[:, 1:].mul_(0.5)
            F.leaky_relu(h, 0.1, True)
            x = torch.tanh(h)
        late.unfold(1, 2, 2).mul_(0.5)
        return x + late


def test_what_is_written_in_place_is_made_again_in_the_part_that_made_it() -> None:
    session = same_bits(lambda: nn.Sequential(Written(), nn.BatchNorm1d(8), nn.ReLU(inplace=True)))
    assert [region.why for region in session.regions] == [""]
    assert captured(session)


def test_parts_that_write_over_each_others_arguments_become_one() -> None:
    graphs: list[Checkpointed] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(Checkpointed(graph))
        return lambda *args: graphs[0](args, note=True)

    torch._dynamo.reset()
    model = Written()
    run = torch.compile(model, backend=kept)
    x = torch.randn(4, 8)
    run(x)
    assert graphs[0].mend_if_spoilt()  # by the view that is not known as one
    mean_square(run(x)).backward()
    assert not graphs[0].mend_if_spoilt()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    mean_square(twin(x)).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_a_batch_of_matrices_times_one_is_eagers_where_a_mode_watches() -> None:
    class Placed(nn.Module):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return x @ at + torch.matmul(at, x) + x.matmul(at)

    def made(run: Callable[..., Any], *args: Tensor, watched: bool) -> Tensor:
        with StorageMeter(torch.device("cpu")) if watched else contextlib.nullcontext():
            out = run(*args)
        return out[0] if isinstance(out, tuple) else out

    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x, at = torch.randn(5, 48, 48), torch.randn(1, 48, 48)
    many, trained = torch.randn(5, 48, 48), at.clone().requires_grad_()
    for args in ((x, at), (at, x), (x, many), (x, trained)):
        torch._dynamo.reset()
        torch.compile(Placed(), backend=kept, dynamic=False)(*args)
        plain = as_eager(graphs[-1])
        assert (plain is graphs[-1]) == (args[1] is many)
        wanted = made(Placed(), *args, watched=False)
        assert torch.equal(made(plain, *args, watched=True), wanted)
        assert torch.equal(made(plain, *args, watched=False), wanted)
