"""Equivariant networks and potentials, with energies and the forces that are their derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, squares

ATOMS = 24


def _molecule() -> tuple[Any, ...]:
    return torch.randint(1, 9, (ATOMS,)), 2 * torch.randn(ATOMS, 3)


def _pairs(atoms: int = ATOMS) -> Tensor:
    return (~torch.eye(atoms, dtype=torch.bool)).nonzero().t()


# --------------------------------------------------------------------------------------------- e3nn


@case("e3nn")
def tensor_products() -> Sample:
    """Edges in spherical harmonics, a tensor product with learned weights for each."""
    from e3nn import o3
    from e3nn.math import soft_one_hot_linspace
    from e3nn.nn import FullyConnectedNet, Gate

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.harmonics = o3.Irreps.spherical_harmonics(2)
            self.gate = Gate("8x0e", [torch.relu], "4x0e", [torch.sigmoid], "4x1o")
            self.embed = nn.Embedding(9, 8)
            self.product = o3.FullyConnectedTensorProduct(
                "8x0e", self.harmonics, self.gate.irreps_in, shared_weights=False
            )
            self.weights = FullyConnectedNet([8, 32, self.product.weight_numel], torch.relu)
            self.head = o3.Linear(self.gate.irreps_out, "1x0e")

        def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
            source, target = _pairs()
            edge = places[target] - places[source]
            angle = o3.spherical_harmonics(self.harmonics, edge, True, normalization="component")
            length = soft_one_hot_linspace(edge.norm(dim=1), 0.0, 8.0, 8, basis="smooth_finite", cutoff=True)
            sent = self.product(self.embed(kinds)[source], angle, self.weights(length))
            x = sent.new_zeros(ATOMS, sent.shape[1]).index_add(0, target, sent) / ATOMS**0.5
            return self.head(self.gate(x))

    return Sample(Convolution(), _molecule, squares)


@case("e3nn")
def batch_norm_activation() -> Sample:
    from e3nn import o3
    from e3nn.nn import BatchNorm, NormActivation

    irreps = "16x0e + 16x1o + 8x2e"
    model = nn.Sequential(
        o3.Linear("8x0e + 8x1o", irreps), BatchNorm(irreps), NormActivation(irreps, torch.sigmoid),
        o3.Linear(irreps, irreps), BatchNorm(irreps), NormActivation(irreps, torch.sigmoid),
        o3.Linear(irreps, "2x0e + 1x1o"),
    )  # fmt: skip
    return Sample(model, lambda: (torch.randn(512, 32),), squares)


# ------------------------------------------------------------------------------------------ lucidrains


@case("egnn-pytorch")
def egnn_network() -> Sample:
    from egnn_pytorch import EGNN_Network

    net = EGNN_Network(
        num_tokens=9, num_positions=ATOMS, dim=24, depth=2, num_nearest_neighbors=4, dropout=0.1
    )
    return Sample(net, lambda: (torch.randint(0, 9, (2, ATOMS)), torch.randn(2, ATOMS, 3)), squares)


@case("en-transformer")
def en_transformer() -> Sample:
    from en_transformer import EnTransformer

    net = EnTransformer(dim=24, depth=2, dim_head=32, heads=2, neighbors=4)
    return Sample(net, lambda: (torch.randn(2, ATOMS, 24), torch.randn(2, ATOMS, 3)), squares)


@case("se3-transformer-pytorch")
def se3_transformer() -> Sample:
    from se3_transformer_pytorch import SE3Transformer

    net = SE3Transformer(
        dim=12, heads=2, depth=1, dim_head=6, num_degrees=2, valid_radius=10, num_neighbors=4,
        attend_self=True,
    )  # fmt: skip
    return Sample(
        net,
        lambda: (torch.randn(1, ATOMS, 12), torch.randn(1, ATOMS, 3), torch.ones(1, ATOMS).bool()),
        squares,
    )


@case("equiformer-pytorch")
def equiformer() -> Sample:
    from equiformer_pytorch import Equiformer

    net = Equiformer(
        num_tokens=9, dim=(12, 6), dim_head=(6, 6), heads=(2, 2), num_linear_attn_heads=0, num_degrees=2,
        depth=1, attend_self=True, reduce_dim_out=False, num_neighbors=4,
    )  # fmt: skip
    return Sample(
        net, lambda: (torch.randint(0, 9, (1, ATOMS)), torch.randn(1, ATOMS, 3), torch.ones(1, ATOMS).bool()),
        lambda out: out.type0.pow(2).mean() + out.type1.pow(2).mean(),
    )  # fmt: skip


@case("torch-geometric")
def schnet_forces() -> Sample:
    """A potential whose loss has the forces."""
    from torch_geometric.nn.models.schnet import SchNet

    from tests.benchmarks.packages.graphs import _AllPairs

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SchNet(32, 32, 2, 16, cutoff=8.0, interaction_graph=_AllPairs())

        def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
            places = places.requires_grad_()
            energy = self.net(kinds, places).sum()
            forces = -torch.autograd.grad(energy, places, create_graph=True)[0]
            return energy.pow(2) + forces.pow(2).mean()

    return Sample(Forces(), _molecule)


@case("torch-geometric")
def crystal_graph() -> Sample:
    from torch_geometric.nn import CGConv

    class Crystal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 32)
            self.convs = nn.ModuleList(CGConv(32, 1, batch_norm=True) for _ in range(3))

        def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
            edges = _pairs()
            lengths = (places[edges[0]] - places[edges[1]]).norm(dim=-1, keepdim=True)
            x = self.embed(kinds)
            for conv in self.convs:
                x = conv(x, edges, lengths)
            return x.mean(0)

    return Sample(Crystal(), _molecule, squares)
