"""Spiking networks: states kept on modules, surrogate gradients, loops over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes

STEPS = 8


def _series() -> tuple[Tensor, ...]:
    return (torch.rand(STEPS, 64, 24),)


# ------------------------------------------------------------------------------------------ snntorch


@case("snntorch")
def leaky() -> Sample:
    import snntorch as snn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 2)
            self.spike, self.out = snn.Leaky(beta=0.9, learn_beta=True), snn.Leaky(beta=0.9)

        def forward(self, series: Tensor) -> Tensor:
            one, two = self.spike.init_leaky(), self.out.init_leaky()
            levels = []
            for now in series:
                spikes, one = self.spike(self.first(now), one)
                _, two = self.out(self.second(spikes), two)
                levels.append(two)
            return torch.stack(levels).mean(0)

    return Sample(Net(), _series, classes)


@case("snntorch")
def synaptic_hidden() -> Sample:
    """The states are kept by the modules (``init_hidden``) and reset through ``utils.reset``."""
    import snntorch as snn
    from snntorch import surrogate, utils

    for kind in (snn.Synaptic, snn.Leaky):
        kind.instances.clear()  # of every model that this process ever made, which reset() goes through
    net = nn.Sequential(
        nn.Linear(24, 48),
        snn.Synaptic(alpha=0.9, beta=0.8, init_hidden=True, spike_grad=surrogate.atan()),
        nn.Linear(48, 2),
        snn.Leaky(beta=0.9, init_hidden=True, output=True, spike_grad=surrogate.fast_sigmoid()),
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, series: Tensor) -> Tensor:
            utils.reset(self.net)
            return torch.stack([self.net(now)[1] for now in series]).mean(0)

    return Sample(Net(), _series, classes)


@case("snntorch")
def spiking_lstm() -> Sample:
    import snntorch as snn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = snn.SLSTM(24, 32, threshold=0.1), nn.Linear(32, 2)

        def forward(self, series: Tensor) -> Tensor:
            synapse, level = self.cell.init_slstm()
            for now in series:
                _, synapse, level = self.cell(now, synapse, level)
            return self.head(level)

    return Sample(Net(), _series, classes)


# -------------------------------------------------------------------------------------- spikingjelly


@case("spikingjelly")
def lif_convolutions() -> Sample:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8),
        neuron.LIFNode(surrogate_function=surrogate.ATan()), layer.MaxPool2d(2, 2), layer.Flatten(),
        layer.Dropout(0.5), layer.Linear(8 * 49, 2), neuron.IFNode(surrogate_function=surrogate.ATan()),
    )  # fmt: skip

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            functional.reset_net(self.net)
            return torch.stack([self.net(images) for _ in range(4)]).mean(0)

    return Sample(Net(), lambda: (torch.rand(4, 1, 14, 14),), classes)


@case("spikingjelly")
def parametric_lif_multi_step() -> Sample:
    from spikingjelly.activation_based import functional, layer, neuron

    net = nn.Sequential(
        layer.Linear(24, 64), neuron.ParametricLIFNode(), layer.Linear(64, 2), neuron.ParametricLIFNode()
    )
    functional.set_step_mode(net, "m")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, series: Tensor) -> Tensor:
            functional.reset_net(self.net)
            return self.net(series).mean(0)

    return Sample(Net(), _series, classes)


# --------------------------------------------------------------------------------------------- norse


@case("norse")
def lif_cells() -> Sample:
    import norse.torch as norse

    net = norse.SequentialState(nn.Linear(24, 48), norse.LIFCell(), nn.Linear(48, 2), norse.LICell())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, series: Tensor) -> Tensor:
            state, out = None, series.new_zeros(())
            for now in series:
                out, state = self.net(now, state)
            return out

    return Sample(Net(), _series, classes)


@case("norse")
def recurrent_long_short_term() -> Sample:
    import norse.torch as norse

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = norse.LSNNRecurrent(24, 32), nn.Linear(32, 2)

        def forward(self, series: Tensor) -> Tensor:
            spikes, _ = self.cell(series)
            return self.head(spikes.mean(0))

    return Sample(Net(), _series, classes)


# -------------------------------------------------------------------------------------------- sinabs


@case("sinabs")
def integrate_and_fire() -> Sample:
    """States in buffers whose shape is that of the last batch."""
    import sinabs.layers as sl

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 2)
            self.spike, self.leak = sl.LIF(tau_mem=20.0), sl.ExpLeak(tau_mem=10.0)

        def forward(self, series: Tensor) -> Tensor:
            self.spike.reset_states()
            self.leak.reset_states()
            x = self.spike(self.first(series.transpose(0, 1)))
            return self.leak(self.second(x)).mean(1)

    return Sample(Net(), _series, classes)
