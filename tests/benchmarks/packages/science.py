"""Operators, differential equations, and nets with physics in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes, squares

# -------------------------------------------------------------------------------------- torchdiffeq


class _Field(nn.Module):
    """A vector field that counts its own evaluations, as the package's examples do."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(wide, 64), nn.Tanh(), nn.Linear(64, wide))
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.net(y)


class _Solved(nn.Module):
    def __init__(self, solve: Any, **how: Any) -> None:
        super().__init__()
        self.field, self.head, self.solve, self.how = _Field(), nn.Linear(8, 2), solve, how

    def forward(self, y: Tensor) -> Tensor:
        times = torch.linspace(0.0, 1.0, 4)
        return self.head(self.solve(self.field, y, times, **self.how)[-1])


def _starts() -> tuple[Any, ...]:
    return (torch.randn(64, 8),)


@case("torchdiffeq")
def dormand_prince() -> Sample:
    from torchdiffeq import odeint

    return Sample(_Solved(odeint, method="dopri5", rtol=1e-3, atol=1e-4), _starts, classes)


@case("torchdiffeq")
def runge_kutta_four() -> Sample:
    from torchdiffeq import odeint

    return Sample(_Solved(odeint, method="rk4"), _starts, classes)


@case("torchdiffeq")
def adjoint() -> Sample:
    """The backward solves another equation."""
    from torchdiffeq import odeint_adjoint

    return Sample(_Solved(odeint_adjoint, method="dopri5", rtol=1e-3, atol=1e-4), _starts, classes)


@case("torchsde")
def stochastic() -> Sample:
    import torchsde

    class Sde(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.drift, self.spread = nn.Linear(4, 4), nn.Linear(4, 4)

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return self.drift(y).tanh()

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return self.spread(y).sigmoid()

        def forward(self, y: Tensor) -> Tensor:
            paths = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=tuple(y.shape), entropy=7)
            return torchsde.sdeint(self, y, torch.linspace(0, 1, 3), bm=paths, dt=0.1, method="euler")

    return Sample(Sde(), lambda: (torch.randn(64, 4),), squares)


@case("torchcde")
def controlled() -> Sample:
    import torchcde

    class Cde(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.net, self.head = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 2)

        def field(self, t: Tensor, z: Tensor) -> Tensor:
            return self.net(z).tanh().view(*z.shape[:-1], 8, 3)

        def forward(self, coefficients: Tensor) -> Tensor:
            path = torchcde.LinearInterpolation(coefficients)
            start = self.start(path.evaluate(path.interval[0]))
            how = {"adjoint": False, "method": "rk4", "options": {"step_size": 1.0}}
            return self.head(torchcde.cdeint(path, self.field, start, path.interval, **how)[:, -1])

    return Sample(Cde(), lambda: (torchcde.linear_interpolation_coeffs(torch.randn(32, 8, 3)),), classes)


# ------------------------------------------------------------------------------------ neuraloperator


@case("neuraloperator")
def fourier() -> Sample:
    """Complex weights."""
    from neuralop.models import FNO

    model = FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=16, n_layers=2)
    return Sample(model, lambda: (torch.randn(4, 1, 24, 24),), squares)


@case("neuraloperator")
def tensorized_fourier() -> Sample:
    from neuralop.models import TFNO

    model = TFNO(
        n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=16, n_layers=2, factorization="tucker",
        rank=0.3, implementation="factorized",
    )  # fmt: skip
    return Sample(model, lambda: (torch.randn(4, 1, 24, 24),), squares)


@case("neuraloperator")
def u_shaped() -> Sample:
    from neuralop.models import UNO

    model = UNO(
        1, 1, hidden_channels=8, n_layers=3, uno_out_channels=[8, 16, 8], uno_n_modes=[[6, 6]] * 3,
        uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]], channel_mlp_skip="linear",
    )  # fmt: skip
    return Sample(model, lambda: (torch.randn(2, 1, 24, 24),), squares)


# --------------------------------------------------------------------------------------- in the loss


@case("torch", "physics_informed")
def physics_informed() -> Sample:
    """A residual with second derivatives, taken in the forward."""

    class Heat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
            )

        def forward(self, at: Tensor) -> Tensor:
            at = at.requires_grad_()
            u = self.net(at)
            first = torch.autograd.grad(u.sum(), at, create_graph=True)[0]
            second = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)[0]
            return (first[:, 1] - 0.1 * second[:, 0]).pow(2).mean() + u.pow(2).mean()

    return Sample(Heat(), lambda: (torch.rand(256, 2),))


@case("torch", "gradient_penalty")
def gradient_penalty() -> Sample:
    """A critic whose slope between real and false is drawn to one."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2), nn.LeakyReLU(0.2),
                nn.Flatten(), nn.Linear(32 * 25, 1),
            )  # fmt: skip

        def forward(self, real: Tensor, false: Tensor) -> Tensor:
            share = torch.rand(len(real), 1, 1, 1)
            between = (share * real + (1 - share) * false).requires_grad_()
            slope = torch.autograd.grad(self.net(between).sum(), between, create_graph=True)[0]
            penalty = (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()
            return self.net(false).mean() - self.net(real).mean() + 10 * penalty

    return Sample(Critic(), lambda: (torch.randn(8, 3, 24, 24), torch.randn(8, 3, 24, 24)))


@case("pykan")
def kolmogorov_arnold() -> Sample:
    """It keeps its activations on the module."""
    from kan import KAN

    model = KAN(width=[4, 8, 2], grid=3, k=3, auto_save=False, seed=0)
    for layer in model.act_fun:  # fitted by least squares, whose last bits are not the same in every run
        nn.init.normal_(layer.coef, std=0.1)
    return Sample(model, lambda: (torch.rand(128, 4),), squares)


@case("geoopt")
def hyperbolic() -> Sample:
    """A parameter on a manifold."""
    import geoopt

    ball = geoopt.PoincareBall()

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(16, 8)
            self.centers = geoopt.ManifoldParameter(0.1 * torch.randn(2, 8), manifold=ball)

        def forward(self, x: Tensor) -> Tensor:
            points = ball.expmap0(0.1 * self.net(x))
            return classes(-ball.dist(points[:, None], self.centers[None]))

    return Sample(Hyper(), lambda: (torch.randn(256, 16),))


@case("torchkbnufft")
def unrolled_mri() -> Sample:
    import torchkbnufft as tkbn

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sample, self.back = tkbn.KbNufft((16, 16)), tkbn.KbNufftAdjoint((16, 16))
            self.net = nn.Sequential(
                nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1)
            )

        def forward(self, image: Tensor, where: Tensor) -> Tensor:
            measured = self.sample(torch.complex(image[:, :1], image[:, 1:]), where)
            guess = torch.view_as_real(self.back(measured, where)[:, 0]).permute(0, 3, 1, 2) / 256
            return (guess + self.net(guess) - image).pow(2).mean()

    return Sample(Unrolled(), lambda: (torch.randn(2, 2, 16, 16), 3 * torch.rand(2, 200) - 1.5))
