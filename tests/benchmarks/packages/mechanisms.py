"""What models do besides calling layers: torch alone, a mechanism each."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gumbel_softmax, linear, mse_loss, normalize, relu

from tests.benchmarks.packages import Sample, case, classes, squares

WIDE, ROWS = 32, 64


def _rows(count: int = ROWS, wide: int = WIDE) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(count, wide),)


def _block(wide: int = WIDE, inner: int = 96) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, wide))


class _Head(nn.Module):
    """Blocks, what ``middle`` makes of them, and two classes."""

    def __init__(self, middle: nn.Module | Callable[[Tensor], Tensor], wide: int = WIDE) -> None:
        super().__init__()
        self.first, self.middle, self.second = _block(), middle, _block(wide)
        self.head = nn.Linear(wide, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(x))))


# ------------------------------------------------------------------------------- functions and hooks


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.neg() * ctx.scale, None


class _Sign(torch.autograd.Function):
    """Straight through where the input is small; the mask is an output without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        mask = x.abs() < 1
        ctx.mark_non_differentiable(mask)
        return x.sign(), mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


@case("torch", "domain_adversarial")
def domain_adversarial() -> Sample:
    """A gradient that is reversed on its way to the features; its scale grows with the step."""

    class Adversarial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.labels, self.domains = _block(), nn.Linear(WIDE, 2), _block()
            self.calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            hidden = self.features(x)
            return self.labels(hidden), self.domains(_Reversed.apply(hidden, min(1.0, 0.1 * self.calls)))

    return Sample(Adversarial(), _rows(), squares)


@case("torch", "binary_activations")
def binary_activations() -> Sample:
    class Binary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            signs, mask = _Sign.apply(x)
            return signs * mask.float().mean()

    return Sample(_Head(Binary()), _rows(), classes)


@case("torch", "gradients_clipped_by_hooks")
def gradients_clipped_by_hooks() -> Sample:
    """Hooks on tensors within the forward, on a module and on a parameter, that change gradients."""

    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
            return x

    model = _Head(Clipped())
    model.second.register_full_backward_hook(lambda _, given, made: (given[0] * 0.5,))
    model.head.weight.register_hook(lambda gradient: gradient * 2)
    return Sample(model, _rows(), classes)


@case("torch", "scripted_layer")
def scripted_layer() -> Sample:
    return Sample(_Head(torch.jit.script(_block())), _rows(), classes)


@case("torch", "saved_on_the_host")
def saved_on_the_host() -> Sample:
    """What the block saves goes through ``save_on_cpu``."""

    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = _block()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return self.block(x)

    return Sample(_Head(Offloaded()), _rows(), classes)


# --------------------------------------------------------------------------- gradients within a forward


@case("torch", "learned_to_learn")
def learned_to_learn() -> Sample:
    """MAML: two inner steps whose gradients are differentiated."""

    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            weights = dict(self.net.named_parameters())
            for _ in range(2):
                loss = mse_loss(torch.func.functional_call(self.net, weights, (x,)), y)
                found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), found, strict=True)}
            return mse_loss(torch.func.functional_call(self.net, weights, (x,)), y)

    return Sample(Learner(), lambda: (torch.randn(ROWS, 8), torch.randn(ROWS, 1)))


@case("torch", "laplacian_by_transforms")
def laplacian_by_transforms() -> Sample:
    """The trace of a Hessian by ``torch.func``, and vmap over the rows."""

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            def value(point: Tensor) -> Tensor:
                return self.net(point).squeeze(-1)

            traces = torch.func.vmap(lambda p: torch.func.hessian(value)(p).diagonal().sum())(x)
            return (traces - self.net(x).squeeze(-1)).pow(2).mean()

    return Sample(Field(), _rows(ROWS, 2))


@case("torch", "ensemble_by_vmap")
def ensemble_by_vmap() -> Sample:
    """Parameters stacked, and one call for all members."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            members = [nn.Sequential(nn.Linear(WIDE, 64), nn.GELU(), nn.Linear(64, 2)) for _ in range(4)]
            stacked, _ = torch.func.stack_module_state(members)
            self.names = list(stacked)
            self.weights = nn.ParameterList(nn.Parameter(w.detach()) for w in stacked.values())
            self.base = [copy.deepcopy(members[0]).to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
                return torch.func.functional_call(self.base[0], weights, (rows,))

            weights = dict(zip(self.names, self.weights, strict=True))
            return torch.func.vmap(one, in_dims=(0, None))(weights, x).mean(0)

    return Sample(Ensemble(), _rows(), classes)


@case("torch", "energy_and_score")
def energy_and_score() -> Sample:
    """Score matching: the gradient by the input, with ``enable_grad`` and a detached start."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(WIDE, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            noise = 0.1 * torch.randn_like(x)
            with torch.enable_grad():
                noisy = (x + noise).detach().requires_grad_()
                (score,) = torch.autograd.grad(self.net(noisy).sum(), noisy, create_graph=True)
            return (score + noise / 0.01).pow(2).sum(-1).mean() * 1e-3

    return Sample(Energy(), _rows())


@case("torch", "fixed_point_by_hook")
def fixed_point_by_hook() -> Sample:
    """A deep equilibrium: solved without a graph; a hook solves for the gradient."""

    class Equilibrium(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(WIDE, WIDE)
            with torch.no_grad():
                self.net.weight.mul_(0.3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = torch.zeros_like(x)
                for _ in range(30):
                    new = torch.tanh(self.net(z) + x)
                    if (new - z).norm() < 1e-4:
                        break
                    z = new
            z = torch.tanh(self.net(z) + x)
            if z.requires_grad:
                start = z.clone().detach().requires_grad_()
                again = torch.tanh(self.net(start) + x)

                def solve(gradient: Tensor) -> Tensor:
                    found = gradient
                    for _ in range(8):
                        found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + gradient
                    return found

                z.register_hook(solve)
            return z

    return Sample(_Head(Equilibrium()), _rows(), classes)


# ----------------------------------------------------------------------------------- state and buffers


@case("torch", "mean_teacher")
def mean_teacher() -> Sample:
    """A teacher that the forward moves toward the student, in eval mode and without a gradient."""

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(_block(), nn.BatchNorm1d(WIDE), _block(), nn.Linear(WIDE, 2))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        @torch.no_grad()
        def follow(self) -> None:
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(0.99).add_(theirs, alpha=0.01)

        def forward(self, x: Tensor) -> Tensor:
            self.follow()
            with torch.no_grad():
                self.teacher.eval()
                aim = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)
            return -(self.student(x).log_softmax(-1) * aim).sum(-1).mean()

    return Sample(Teacher(), _rows())


@case("torch", "momentum_queue")
def momentum_queue() -> Sample:
    """A queue of keys in a buffer, written at a pointer that is read."""

    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Sequential(_block(), _block())
            self.key = copy.deepcopy(self.query).requires_grad_(False)
            self.register_buffer("queue", normalize(torch.randn(WIDE, 512), dim=0))
            self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            query = normalize(self.query(x), dim=1)
            with torch.no_grad():
                for mine, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    mine.data = mine.data * 0.999 + theirs.data * 0.001
                key = normalize(self.key(x.flip(0)), dim=1)
            near = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
            far = torch.einsum("nc,ck->nk", query, self.queue.clone().detach())
            loss = cross_entropy(torch.cat([near, far], 1) / 0.07, torch.zeros(len(x), dtype=torch.long))
            at = int(self.pointer)
            self.queue[:, at : at + len(x)] = key.T
            self.pointer[0] = (at + len(x)) % self.queue.shape[1]
            return loss

    return Sample(Queue(), _rows())


@case("torch", "state_carried_between_calls")
def state_carried_between_calls() -> Sample:
    """A recurrent net that keeps its state on itself, detached at the next call."""

    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(16, 48, 2, batch_first=True, dropout=0.1), nn.Linear(48, 2)
            self.state: tuple[Tensor, Tensor] | None = None

        def forward(self, x: Tensor) -> Tensor:
            state = None if self.state is None else tuple(part.detach() for part in self.state)
            out, self.state = self.cell(x, state)
            return self.head(out[:, -1])

    return Sample(Carried(), lambda: (torch.randn(8, 24, 16),), classes)


@case("torch", "cumulative_and_frozen_norms")
def cumulative_and_frozen_norms() -> Sample:
    """Batch norms with a cumulative average, without statistics, in eval, and instance norms with them."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU(inplace=True),
                nn.Conv2d(16, 16, 3), nn.InstanceNorm2d(16, affine=True, track_running_stats=True), nn.SiLU(),
                nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.Hardswish(),
                nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.LocalResponseNorm(3), nn.Dropout2d(0.1),
            )  # fmt: skip
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.net[10].eval()
            return self.head(self.net(x).mean((2, 3)))

    return Sample(Norms(), lambda: (torch.randn(8, 3, 24, 24),), classes)


# ---------------------------------------------------------------------------------- numbers and formats


@case("torch", "complex_layers")
def complex_layers() -> Sample:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(WIDE, WIDE, dtype=torch.complex64) for _ in range(2))
            self.phase = nn.Parameter(torch.randn(WIDE, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(torch.fft.fft(x.to(torch.complex64)))
            z = torch.view_as_complex(torch.view_as_real(z).relu()) * torch.exp(1j * self.phase.angle())
            z = self.second(torch.complex(torch.tanh(z.real), torch.tanh(z.imag)))
            return torch.fft.ifft(z * z.conj() + z).abs()

    return Sample(_Head(Complex()), _rows(), classes)


@case("torch", "double_precision")
def double_precision() -> Sample:
    model = _Head(nn.Sequential(nn.LayerNorm(WIDE), _block())).double()
    return Sample(model, lambda: (torch.randn(ROWS, WIDE, dtype=torch.float64),), classes)


@case("torch", "mixed_precision_inside")
def mixed_precision_inside() -> Sample:
    """Autocast to bfloat16 within the forward, with a part that leaves it."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = _block(), _block(), nn.LayerNorm(WIDE)
            self.head = nn.Linear(WIDE, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.first(x)
                with torch.autocast("cpu", enabled=False):
                    hidden = self.norm(hidden.float())
                hidden = self.second(hidden) + hidden
                hidden = self.second(hidden)
            return self.head(hidden.float())

    return Sample(Mixed(), _rows(), classes)


@case("torch", "channels_last")
def channels_last() -> Sample:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, groups=4),
        nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 2),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    shape = (8, 3, 24, 24)
    return Sample(model, lambda: (torch.randn(shape).to(memory_format=torch.channels_last),), classes)


# ----------------------------------------------------------------------------------------- randomness


@case("torch", "random_layers")
def random_layers() -> Sample:
    """Every layer that draws: RReLU, alpha dropout, fractional pools, Gumbel softmax."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.RReLU(), nn.FractionalMaxPool2d(3, output_ratio=0.7),
                nn.Conv2d(16, 16, 3), nn.AlphaDropout(0.1), nn.SELU(), nn.FeatureAlphaDropout(0.1),
                nn.Conv2d(16, 16, 3),
            )  # fmt: skip
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net(x)
            chosen = gumbel_softmax(hidden.flatten(2), tau=0.5, hard=True).view_as(hidden)
            return self.head((hidden * chosen).sum((2, 3)))

    return Sample(Draws(), lambda: (torch.randn(8, 3, 24, 24),), classes)


@case("torch", "own_generator")
def own_generator() -> Sample:
    """A generator that the model keeps, numpy's and Python's draws."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(5)
            self.block = _block()

        def forward(self, x: Tensor) -> Tensor:
            import numpy as np

            noise = torch.randn(x.shape, generator=self.generator)
            if random.random() < 0.5:
                x = x + 0.1 * noise
            x = self.block(x * float(np.random.beta(2.0, 2.0)))
            order = torch.randperm(len(x))
            return x + 0.5 * x[order]

    return Sample(_Head(Drawn()), _rows(), classes)


@case("torch", "mixed_up_rows")
def mixed_up_rows() -> Sample:
    """Mixup and cut-out at a place that is drawn, read as numbers."""

    class Mixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), nn.Linear(16, 2),
            )  # fmt: skip

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            share = torch.distributions.Beta(0.4, 0.4).sample().item()
            order = torch.randperm(len(x))
            mixed = share * x + (1 - share) * x[order]
            top, left = torch.randint(0, 16, (2,)).tolist()
            mixed[:, :, top : top + 8, left : left + 8] = 0
            out = self.net(mixed)
            return share * cross_entropy(out, y) + (1 - share) * cross_entropy(out, y[order])

    return Sample(Mixup(), lambda: (torch.randn(8, 3, 24, 24), torch.arange(8) % 2))


@case("torch", "distributions")
def distributions() -> Sample:
    """Reparameterized draws of many distributions, and divergences."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(WIDE, 8 * 8), nn.Linear(8 * 8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            import torch.distributions as D

            a, b, c, d, e, f, g, h = self.first(x).chunk(8, -1)
            plus = nn.functional.softplus
            normal = D.Normal(a, plus(b) + 0.1)
            drawn = [
                normal.rsample(),
                D.Gamma(plus(c) + 0.5, plus(d) + 0.5).rsample(),
                D.Beta(plus(a) + 0.5, plus(e) + 0.5).rsample(),
                D.Dirichlet(plus(f) + 0.5).rsample(),
                D.StudentT(plus(g) + 2.0, h).rsample(),
                D.Gumbel(a, plus(b) + 0.1).rsample(),
                D.RelaxedBernoulli(torch.tensor(0.5), logits=h).rsample(),
                D.Laplace(g, plus(c) + 0.1).rsample(),
            ]
            divergence = D.kl_divergence(normal, D.Normal(0.0, 1.0)).sum(-1).mean()
            return self.head(torch.cat(drawn, -1)), divergence

    return Sample(Draws(), _rows(), squares)


# ------------------------------------------------------------------------------------ sizes and indices


@case("torch", "experts_by_index")
def experts_by_index() -> Sample:
    """Top-2 experts, each on the rows that chose it, added back in place."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDE, 4, bias=False)
            self.experts = nn.ModuleList(_block() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows, slot = torch.where(chosen == number)
                if rows.numel() == 0:
                    continue
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
            return out

    return Sample(_Head(Experts()), _rows(), classes)


@case("torch", "ragged_sentences")
def ragged_sentences() -> Sample:
    """A list of sequences, padded and cut again, with a mask for keys."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDE, 4, 64, batch_first=True, norm_first=True)
            self.net, self.head = (
                nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
                nn.Linear(WIDE, 2),
            )

        def forward(self, parts: list[Tensor]) -> Tensor:
            lengths = torch.tensor([len(part) for part in parts])
            padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            masked = torch.arange(padded.shape[1])[None] >= lengths[:, None]
            hidden = self.net(padded, src_key_padding_mask=masked)
            return self.head(
                torch.stack([h[:n].mean(0) for h, n in zip(hidden, lengths.tolist(), strict=True)])
            )

    def batch() -> tuple[Any, ...]:
        return ([torch.randn(int(n), WIDE) for n in torch.randint(6, 20, (6,))],)

    return Sample(Ragged(), batch, classes)


@case("torch", "unique_and_counted")
def unique_and_counted() -> Sample:
    """Rows gathered by their ids: unique, bincount, scatter_reduce, sort and searchsorted."""

    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(100, WIDE), _block(), nn.Linear(WIDE, 2)

        def forward(self, ids: Tensor) -> Tensor:
            kinds, back = torch.unique(ids, return_inverse=True)
            hidden = self.block(self.embed(kinds))
            counts = torch.bincount(back, minlength=len(kinds)).float()
            rows = hidden[back] / counts[back, None]
            order = rows.norm(dim=1).argsort()
            places = torch.searchsorted(torch.linspace(0, 1, 8), rows[order].mean(1).sigmoid().detach())
            pooled = torch.zeros(9, WIDE).scatter_reduce(
                0, places[:, None].expand(-1, WIDE), rows[order], "mean", include_self=False
            )
            return self.head(pooled)

    return Sample(Gathered(), lambda: (torch.randint(0, 100, (256,)),), squares)


@case("torch", "written_in_place")
def written_in_place() -> Sample:
    """Slices, masks and indices written into what has a gradient."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = _block(), _block(), nn.Linear(WIDE, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            out = torch.zeros(len(x), 2 * WIDE)
            out[:, :WIDE] = hidden
            out[:, WIDE:].copy_(hidden.tanh())
            out[::2, :4] *= 2
            out.masked_fill_(out > 3, 3.0)
            out.index_put_((torch.arange(4), torch.arange(4)), torch.ones(4), accumulate=True)
            left = out[:, :WIDE]
            left.add_(out[:, WIDE:].detach())
            return self.head(relu(self.second(out[:, WIDE:] + left), inplace=True))

    return Sample(Written(), _rows(), classes)


@case("torch", "draws_a_depth")
def draws_a_depth() -> Sample:
    """A block called a drawn number of times, left early where the state is small."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = _block(), nn.Linear(WIDE, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(random.randint(2, 5)):
                x = x + self.block(x)
                if x.norm(dim=1).mean() > 20:
                    break
            return self.head(x)

    return Sample(Deep(), _rows(), classes)


# ------------------------------------------------------------------------------------- linear algebra


@case("torch", "matrix_functions")
def matrix_functions() -> Sample:
    """Decompositions with gradients: eigh, svd, qr, cholesky, solve, slogdet, matrix_exp, pinv."""

    class Matrices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(WIDE, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.first(x).view(-1, 8, 8)
            spread = a @ a.mT + 4 * torch.eye(8)
            values, vectors = torch.linalg.eigh(spread + torch.diag(torch.arange(8.0)))
            q, r = torch.linalg.qr(a + 4 * torch.eye(8))
            lower = torch.linalg.cholesky(spread)
            solved = torch.linalg.solve(spread, a) + torch.cholesky_solve(a, lower)
            power = torch.linalg.matrix_exp(0.1 * a) + torch.linalg.pinv(spread)
            mixed = vectors * values.log().unsqueeze(-2) + q @ r.tril() + solved + power
            return self.head(mixed.flatten(1)), torch.linalg.slogdet(spread)[1].mean()

    return Sample(Matrices(), _rows(48), squares)


@case("torch", "orthogonal_parametrized")
def orthogonal_parametrized() -> Sample:
    """Parametrizations that are cached for a call, and the weight norm of old."""

    class Orthogonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from torch.nn.utils import parametrizations, spectral_norm, weight_norm

            self.cell = parametrizations.orthogonal(nn.Linear(WIDE, WIDE))
            self.inner, self.outer = weight_norm(nn.Linear(WIDE, 64)), spectral_norm(nn.Linear(64, 2))

        def forward(self, x: Tensor) -> Tensor:
            from torch.nn.utils import parametrize

            hidden = torch.zeros_like(x)
            with parametrize.cached():
                for _ in range(6):
                    hidden = torch.tanh(self.cell(hidden) + x)
            return self.outer(self.inner(hidden).relu())

    return Sample(Orthogonal(), _rows(), classes)


@case("torch", "weights_by_a_network")
def weights_by_a_network() -> Sample:
    """A hypernetwork, lazy layers, and weights that are slices of one parameter."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Parameter(torch.randn(96, WIDE) * 0.1)
            self.make, self.lazy = nn.Linear(8, WIDE * WIDE), nn.LazyLinear(2)
            self.task = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.make(self.task).view(WIDE, WIDE)
            for part in self.shared.split(WIDE):
                x = nn.functional.gelu(linear(x, part))
                x = x + linear(x, weight)
            return self.lazy(x)

    model = Hyper()
    model(torch.randn(2, WIDE))
    return Sample(model, _rows(), classes)


# -------------------------------------------------------------------------------------- torch's own


@case("torch", "convolutions_of_every_kind")
def convolutions_of_every_kind() -> Sample:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, padding="same", padding_mode="reflect")
            self.deep = nn.Conv2d(16, 16, 3, groups=16, dilation=2)
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
            self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, output_padding=0)
            self.shuffle, self.head = nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.leaky_relu(self.deep(self.first(x)), 0.1)
            small, indices = self.pool(hidden)
            hidden = self.unpool(small.tanh(), indices, output_size=hidden.shape) + hidden
            patches = nn.functional.unfold(hidden, 2, stride=2)
            hidden = nn.functional.fold(patches * patches.sigmoid(), hidden.shape[2:], 2, stride=2)
            theta = torch.eye(2, 3).expand(len(x), 2, 3) + 0.01 * hidden.mean((1, 2, 3))[:, None, None]
            grid = nn.functional.affine_grid(theta, hidden.shape, align_corners=False)
            hidden = nn.functional.grid_sample(hidden, grid, align_corners=False)
            hidden = nn.functional.interpolate(self.up(hidden), scale_factor=0.5, mode="bicubic")
            return self.head(self.shuffle(hidden)).mean((2, 3))

    return Sample(Many(), lambda: (torch.randn(4, 3, 20, 20),), classes)


@case("torch", "losses_of_every_kind")
def losses_of_every_kind() -> Sample:
    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(_block(), _block())
            self.losses = nn.ModuleList([nn.HuberLoss(), nn.SmoothL1Loss(), nn.PoissonNLLLoss(), nn.L1Loss()])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out, twin = self.net(x), self.net(x.flip(0))
            target = torch.randn_like(out)
            total = torch.stack([loss(out, target.abs()) for loss in self.losses]).sum()
            total = total + nn.functional.gaussian_nll_loss(out, target, twin.exp())
            total = total + nn.functional.triplet_margin_loss(out, twin, out.roll(1, 0))
            total = total + nn.functional.cosine_embedding_loss(out, twin, 2.0 * y - 1)
            total = (
                total
                + nn.functional.multi_margin_loss(out, y)
                + nn.functional.kl_div(out.log_softmax(-1), twin.softmax(-1).detach(), reduction="batchmean")
            )
            total = total + cross_entropy(out, y, label_smoothing=0.1, weight=torch.ones(WIDE))
            return (
                total
                + torch.cdist(out, twin).mean()
                + nn.functional.multilabel_soft_margin_loss(out, (target > 0).float())
            )

    return Sample(Losses(), lambda: (torch.randn(ROWS, WIDE), torch.arange(ROWS) % 2))
