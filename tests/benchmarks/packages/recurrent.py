"""State spaces, liquid networks, temporal convolutions and gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes, squares


def _series(count: int = 8, length: int = 24, wide: int = 16) -> Any:
    return lambda: (torch.randn(count, length, wide),)


@case("mambapy")
def mamba() -> Sample:
    """A parallel scan with a backward of its own."""
    from mambapy.mamba import Mamba, MambaConfig

    return Sample(Mamba(MambaConfig(d_model=16, n_layers=2, d_state=8)), _series(), squares)


@case("mambapy")
def mamba_sequential() -> Sample:
    from mambapy.mamba import Mamba, MambaConfig

    return Sample(Mamba(MambaConfig(d_model=16, n_layers=1, d_state=8, pscan=False)), _series(), squares)


@case("s5-pytorch")
def simplified_state_space() -> Sample:
    """Complex parameters and an associative scan."""
    from s5 import S5Block

    return Sample(S5Block(16, 16, bidir=False, ff_dropout=0.1, attn_dropout=0.1), _series(), squares)


@case("ncps")
def liquid() -> Sample:
    from ncps.torch import CfC

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = CfC(16, 32, proj_size=8), nn.Linear(8, 2)

        def forward(self, series: Tensor) -> Tensor:
            return self.head(self.net(series)[0][:, -1])

    return Sample(Net(), _series(8, 12), classes)


@case("ncps")
def wired_time_constants() -> Sample:
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LTC(8, AutoNCP(12, 2, seed=7))

        def forward(self, series: Tensor) -> Tensor:
            return self.net(series)[0][:, -1]

    return Sample(Net(), _series(8, 4, 8), classes)


@case("pytorch-tcn")
def temporal_convolutions() -> Sample:
    """Weight norm, and buffers for streams."""
    from pytorch_tcn import TCN

    return Sample(
        TCN(16, [24, 24, 24], kernel_size=3, dropout=0.1), lambda: (torch.randn(8, 16, 40),), squares
    )


@case("gateloop-transformer")
def gate_loop() -> Sample:
    """An associative scan over complex gates."""
    from gateloop_transformer import Transformer

    net = Transformer(num_tokens=64, dim=32, depth=2, use_gate_looped_attn=True)
    return Sample(net, lambda: (torch.randint(0, 64, (4, 24)),), squares)


@case("torch", "loop_until_small")
def loop_until_small() -> Sample:
    """A loop that ends when a tensor says so (a fixed point)."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.into, self.head = nn.Linear(32, 32), nn.Linear(16, 32), nn.Linear(32, 2)
            nn.init.normal_(self.inner.weight, std=0.05)

        def forward(self, x: Tensor) -> Tensor:
            given = self.into(x)
            z = torch.zeros_like(given)
            for _ in range(20):
                after = torch.tanh(self.inner(z) + given)
                if (after - z).norm() < 1e-2:
                    break
                z = after
            return self.head(after)

    return Sample(Fixed(), lambda: (torch.randn(256, 16),), classes)


@case("torch", "halting_per_row")
def halting_per_row() -> Sample:
    """Rows leave a loop as they become sure: indices from a mask, sizes that vary with the step."""

    class Halting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.sure, self.head = nn.GRUCell(16, 32), nn.Linear(32, 1), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            state, left = torch.zeros(len(x), 32), torch.arange(len(x))
            for _ in range(4):
                new = self.cell(x[left], state[left])
                state = state.index_copy(0, left, new)
                left = left[self.sure(new).squeeze(-1) < 0.1]
                if not len(left):
                    break
            return self.head(state)

    return Sample(Halting(), lambda: (torch.randn(128, 16),), classes)
