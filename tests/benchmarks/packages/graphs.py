"""Networks on graphs, meshes and knowledge graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from tests.benchmarks.packages import Sample, case, classes, squares

NODES, EDGES, WIDE = 480, 1920, 24


def _edges(nodes: int = NODES, edges: int = EDGES) -> Tensor:
    return torch.randint(0, nodes, (2, edges), generator=torch.Generator().manual_seed(3))


def _graph() -> tuple[Any, ...]:
    return torch.randn(NODES, WIDE), _edges()


class _Stack(nn.Module):
    """Graph layers with dropout between them."""

    def __init__(self, *layers: nn.Module, rate: float = 0.2) -> None:
        super().__init__()
        self.layers, self.rate = nn.ModuleList(layers), rate

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = dropout(layer(x, edges).relu(), self.rate, self.training)
        return self.layers[-1](x, edges)


# ----------------------------------------------------------------------------------- torch-geometric


@case("torch-geometric")
def gcn() -> Sample:
    from torch_geometric.nn import GCNConv

    return Sample(_Stack(GCNConv(WIDE, 64), GCNConv(64, 64), GCNConv(64, 2)), _graph, classes)


@case("torch-geometric")
def gcn_cached() -> Sample:
    """The normalized edges are stored on the layer at its first call."""
    from torch_geometric.nn import GCNConv

    return Sample(_Stack(GCNConv(WIDE, 64, cached=True), GCNConv(64, 2, cached=True)), _graph, classes)


@case("torch-geometric")
def gatv2() -> Sample:
    from torch_geometric.nn import GATv2Conv

    return Sample(_Stack(GATv2Conv(WIDE, 16, heads=4, dropout=0.2), GATv2Conv(64, 2)), _graph, classes)


@case("torch-geometric")
def graph_isomorphism() -> Sample:
    """Graphs pooled by a batch vector."""
    from torch_geometric.nn import GIN, global_add_pool

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gin, self.head = GIN(WIDE, 48, 3, norm="batch_norm", dropout=0.2), nn.Linear(48, 2)

        def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
            return self.head(global_add_pool(self.gin(x, edges), batch))

    return Sample(Pooled(), lambda: (*_graph(), torch.arange(NODES) // 60), classes)


@case("torch-geometric")
def top_k_pooling() -> Sample:
    """A graph U-Net: nodes dropped by their scores."""
    from torch_geometric.nn import GraphUNet

    return Sample(GraphUNet(WIDE, 32, 2, depth=3, pool_ratios=0.5), _graph, classes)


@case("torch-geometric")
def sage_jumping() -> Sample:
    from torch_geometric.nn import GraphSAGE

    return Sample(GraphSAGE(WIDE, 48, 3, 2, dropout=0.2, jk="lstm"), _graph, classes)


@case("torch-geometric")
def point_transformer() -> Sample:
    from torch_geometric.nn import PointTransformerConv

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PointTransformerConv(WIDE, 32), PointTransformerConv(32, 2)

        def forward(self, x: Tensor, places: Tensor, edges: Tensor) -> Tensor:
            return self.second(self.first(x, places, edges).relu(), places, edges)

    return Sample(Points(), lambda: (torch.randn(NODES, WIDE), torch.randn(NODES, 3), _edges()), classes)


@case("torch-geometric")
def schnet() -> Sample:
    from torch_geometric.nn.models import SchNet

    def batch() -> tuple[Any, ...]:
        return torch.randint(1, 9, (64,)), 3 * torch.randn(64, 3), torch.arange(64) // 16

    net = SchNet(32, 32, 2, 16, cutoff=8.0, interaction_graph=_AllPairs())
    return Sample(net, batch, squares)


class _AllPairs(nn.Module):
    """Edges between all atoms of a molecule, without the extension that finds the near ones."""

    def forward(self, places: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        same = (batch[:, None] == batch[None]) & ~torch.eye(len(batch), dtype=torch.bool)
        edges = same.nonzero().t()
        return edges, (places[edges[0]] - places[edges[1]]).norm(dim=-1)


@case("torch-geometric")
def heterogeneous() -> Sample:
    """Several kinds of nodes and edges, in dictionaries."""
    from torch_geometric.nn import HeteroConv, SAGEConv

    class Hetero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kinds = {
                ("user", "buys", "item"): SAGEConv((16, 24), 32),
                ("item", "of", "user"): SAGEConv((24, 16), 32),
            }
            self.conv, self.head = HeteroConv(kinds, aggr="sum"), nn.Linear(32, 2)

        def forward(self, x: dict[str, Tensor], edges: dict[tuple[str, str, str], Tensor]) -> Tensor:
            return self.head(self.conv(x, edges)["item"].relu())

    def batch() -> tuple[Any, ...]:
        edges = {("user", "buys", "item"): _edges(200), ("item", "of", "user"): _edges(200)}
        return {"user": torch.randn(200, 16), "item": torch.randn(200, 24)}, edges

    return Sample(Hetero(), batch, classes)


@case("torch-geometric")
def variational_autoencoder() -> Sample:
    """Edges are decoded; negative ones are sampled in the loss."""
    from torch_geometric.nn import VGAE, GCNConv

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mean, self.log_std = GCNConv(WIDE, 32), GCNConv(32, 16), GCNConv(32, 16)

        def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x, edges).relu()
            return self.mean(hidden, edges), self.log_std(hidden, edges)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vgae = VGAE(Encoder())

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            z = self.vgae.encode(x, edges)
            return self.vgae.recon_loss(z, edges) + self.vgae.kl_loss() / NODES

    return Sample(Model(), _graph)


@case("torch-geometric")
def dimension_wise_transformer() -> Sample:
    from torch_geometric.nn import GINConv, GPSConv

    class Gps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(WIDE, 32)
            self.layers = nn.ModuleList(
                GPSConv(
                    32, GINConv(nn.Sequential(nn.Linear(32, 32), nn.ReLU())), heads=4, attn_type="multihead"
                )
                for _ in range(2)
            )
            self.head = nn.Linear(32, 2)

        def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x, edges, batch)
            return self.head(x)

    return Sample(Gps(), lambda: (*_graph(), torch.arange(NODES) // 60), classes)


@case("torch-geometric")
def relational() -> Sample:
    from torch_geometric.nn import RGCNConv

    class Relational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = RGCNConv(WIDE, 32, 4, num_bases=2), RGCNConv(32, 2, 4)

        def forward(self, x: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
            return self.second(self.first(x, edges, kinds).relu(), edges, kinds)

    return Sample(Relational(), lambda: (*_graph(), torch.arange(EDGES) % 4), classes)


@case("torch-geometric")
def principal_neighbourhood() -> Sample:
    from torch_geometric.nn import PNAConv

    degrees = torch.bincount(_edges()[1], minlength=NODES)
    histogram = torch.bincount(degrees)

    def layer(inside: int, out: int) -> nn.Module:
        return PNAConv(inside, out, ["mean", "min", "max", "std"], ["identity", "amplification"], histogram)

    return Sample(_Stack(layer(WIDE, 32), layer(32, 2)), _graph, classes)


@case("torch-geometric")
def light_gcn() -> Sample:
    from torch_geometric.nn.models import LightGCN

    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LightGCN(NODES, 16, 3)

        def forward(self, edges: Tensor, better: Tensor, worse: Tensor) -> Tensor:
            ranks = self.net(edges, torch.cat([better, worse], 1))
            return self.net.recommendation_loss(*ranks.chunk(2), node_id=better[0])

    return Sample(Ranked(), lambda: (_edges(), _edges()[:, :32], _edges()[:, 32:64]))


# ------------------------------------------------------------------------------------------- pykeen


def _triples() -> Any:
    import numpy as np
    from pykeen.triples import TriplesFactory

    random = np.random.RandomState(0)
    rows = np.stack(
        [
            np.array([f"e{i}" for i in random.randint(0, 30, 200)]),
            np.array([f"r{i}" for i in random.randint(0, 4, 200)]),
            np.array([f"e{i}" for i in random.randint(0, 30, 200)]),
        ],
        1,
    )
    return TriplesFactory.from_labeled_triples(rows)


class _Scored(nn.Module):
    """Scores of true and false triples, and the model's own regularizer and resets."""

    def __init__(self, net: nn.Module, *, fresh: bool = False) -> None:
        super().__init__()
        self.net, self.fresh = net, fresh

    def forward(self, true: Tensor, false: Tensor) -> Tensor:
        if self.fresh:
            self.net.post_parameter_update()
        loss = (1 + self.net.score_hrt(false) - self.net.score_hrt(true)).relu().mean()
        return loss + self.net.collect_regularization_term()


def _true_and_false(factory: Any) -> Any:
    def batch() -> tuple[Any, ...]:
        true = factory.mapped_triples[torch.randint(0, len(factory.mapped_triples), (256,))]
        false = true.clone()
        false[:, 2] = torch.randint(0, factory.num_entities, (256,))
        return true, false

    return batch


@case("pykeen")
def trans_e() -> Sample:
    from pykeen.models import TransE

    factory = _triples()
    return Sample(
        _Scored(TransE(triples_factory=factory, embedding_dim=32, random_seed=0)), _true_and_false(factory)
    )


@case("pykeen")
def conv_e() -> Sample:
    from pykeen.models import ConvE

    factory = _triples()
    model = ConvE(
        triples_factory=factory, embedding_dim=32, embedding_height=4, embedding_width=8, random_seed=0
    )
    return Sample(_Scored(model), _true_and_false(factory))


@case("pykeen")
def relational_gcn() -> Sample:
    """Node states computed once a batch and kept on the module."""
    from pykeen.models import RGCN

    factory = _triples()
    return Sample(
        _Scored(RGCN(triples_factory=factory, embedding_dim=16, num_layers=2, random_seed=0), fresh=True),
        _true_and_false(factory),
    )


@case("pykeen")
def rotate() -> Sample:
    from pykeen.models import RotatE

    factory = _triples()
    return Sample(
        _Scored(RotatE(triples_factory=factory, embedding_dim=64, random_seed=0)), _true_and_false(factory)
    )
