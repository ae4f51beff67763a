"""Gaussian processes, flows, Bayesian layers and probabilistic programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes


def _points(count: int = 128, wide: int = 4) -> Any:
    def batch() -> tuple[Any, ...]:
        x = torch.randn(count, wide)
        return x, x.sin().sum(-1) + 0.1 * torch.randn(count)

    return batch


# ------------------------------------------------------------------------------------------ gpytorch


@case("gpytorch")
def exact() -> Sample:
    import gpytorch

    x, y = _points(64)()

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(2.5, ard_num_dims=4))

        def forward(self, at: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(at), self.kernel(at))

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gp = Exact()
            self.likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(self.gp.likelihood, self.gp)

        def forward(self) -> Tensor:
            return -self.likelihood(self.gp(x), y)

    return Sample(Trained(), lambda: ())


@case("gpytorch")
def variational_deep_kernel() -> Sample:
    """Features from a network, inducing points, the evidence bound."""
    import gpytorch

    class Sparse(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            points = torch.randn(16, 4)
            inner = gpytorch.variational.CholeskyVariationalDistribution(16)
            super().__init__(gpytorch.variational.VariationalStrategy(self, points, inner))
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, at: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(at), self.kernel(at))

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
            self.gp, self.likelihood = Sparse(), gpytorch.likelihoods.GaussianLikelihood()
            self.bound = gpytorch.mlls.VariationalELBO(self.likelihood, self.gp, 128)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return -self.bound(self.gp(self.net(x)), y)

    return Sample(Trained(), _points())


@case("botorch")
def single_task() -> Sample:
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    x, y = _points(48)()
    x = x.double()
    y = y.double()

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gp = SingleTaskGP(x, y[:, None])
            self.likelihood = ExactMarginalLogLikelihood(self.gp.likelihood, self.gp)

        def forward(self) -> Tensor:
            return -self.likelihood(self.gp(*self.gp.train_inputs), self.gp.train_targets)

    return Sample(Trained(), lambda: ())


# --------------------------------------------------------------------------------------------- flows


class _Likelihood(nn.Module):
    """Minus the mean log likelihood of a flow."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def _rows(count: int = 256, wide: int = 6) -> Any:
    return lambda: (torch.randn(count, wide),)


@case("nflows")
def masked_autoregressive() -> Sample:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    steps: list[Any] = []
    for _ in range(2):
        steps += [ReversePermutation(6), MaskedAffineAutoregressiveTransform(6, 32, dropout_probability=0.1)]
    return Sample(_Likelihood(Flow(CompositeTransform(steps), StandardNormal([6]))), _rows())


@case("nflows")
def rational_splines() -> Sample:
    """Splines choose the points inside by a mask."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        CompositeTransform,
        LULinear,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    )

    spline = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(6, 32, tails="linear", tail_bound=3.0)
    return Sample(_Likelihood(Flow(CompositeTransform([LULinear(6), spline]), StandardNormal([6]))), _rows())


@case("normflows")
def real_nvp() -> Sample:
    import normflows as nf

    flows: list[Any] = []
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0])
    for i in range(4):
        scale, shift = nf.nets.MLP([6, 32, 6]), nf.nets.MLP([6, 32, 6])
        flows += [nf.flows.MaskedAffineFlow(mask if i % 2 else 1 - mask, shift, scale), nf.flows.ActNorm(6)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows)

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = model

        def forward(self, x: Tensor) -> Tensor:
            return self.flow.forward_kld(x)

    return Sample(Trained(), _rows())


@case("normflows")
def residual_flow() -> Sample:
    """A log determinant from a series, its length drawn by numpy, with power iterations in buffers."""
    import normflows as nf

    flows = []
    for _ in range(2):
        net = nf.nets.LipschitzMLP([6, 32, 32, 6], init_zeros=True, lipschitz_const=0.9)
        flows.append(nf.flows.Residual(net, reduce_memory=False))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows)

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = model

        def forward(self, x: Tensor) -> Tensor:
            return self.flow.forward_kld(x)

    return Sample(Trained(), _rows(64))


class _Conditional(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow().log_prob(x).mean()


@case("zuko")
def neural_spline() -> Sample:
    import zuko

    return Sample(_Conditional(zuko.flows.NSF(6, transforms=3, hidden_features=(32, 32))), _rows())


@case("zuko")
def continuous() -> Sample:
    """The log determinant along an ODE, solved with an adaptive step."""
    import zuko

    return Sample(_Conditional(zuko.flows.CNF(6, hidden_features=(32, 32))), _rows(64))


@case("zuko")
def unconstrained_monotonic() -> Sample:
    import zuko

    return Sample(_Conditional(zuko.flows.UNAF(6, transforms=1, hidden_features=(16,))), _rows(64))


# ---------------------------------------------------------------------------------------- Bayesian


@case("bayesian-torch")
def reparameterized() -> Sample:
    """Weights drawn anew at every step; a divergence beside the output."""
    from bayesian_torch.layers import Conv2dReparameterization, LinearReparameterization

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv2dReparameterization(3, 8, 3), LinearReparameterization(8, 2)

        def forward(self, image: Tensor) -> Tensor:
            x, one = self.first(image)
            x, two = self.second(x.relu().mean((2, 3)))
            return classes(x) + (one + two) / 1e4

    return Sample(Net(), lambda: (torch.randn(8, 3, 16, 16),))


@case("blitz-bayesian-pytorch")
def bayesian_lstm() -> Sample:
    from blitz.modules import BayesianLinear, BayesianLSTM

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = BayesianLSTM(8, 16), BayesianLinear(16, 2)

        def forward(self, series: Tensor) -> Tensor:
            return self.head(self.net(series)[0][:, -1])

    return Sample(Net(), lambda: (torch.randn(16, 8, 8),), classes)


@case("pyro-ppl")
def variational_autoencoder() -> Sample:
    """A program and its guide, and the bound that pyro computes by running both."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 16))
            self.decode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 24))
            self.bound = Trace_ELBO()

        def model(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 8), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            mean, log_std = self.encode(x).chunk(2, -1)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(mean, log_std.exp()).to_event(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.bound.differentiable_loss(self.model, self.guide, x) / len(x)

    return Sample(Vae(), lambda: (torch.randn(64, 24),))


@case("torch", "mixture_of_distributions")
def mixture_of_distributions() -> Sample:
    """``torch.distributions``, its arguments validated by reading them."""
    from torch import distributions as dist

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 15))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            weight, mean, std = self.net(x).chunk(3, -1)
            parts = dist.Normal(mean, std.exp())
            return -dist.MixtureSameFamily(dist.Categorical(logits=weight), parts).log_prob(y).mean()

    return Sample(Mixture(), lambda: (torch.randn(256, 8), torch.randn(256)))
