"""Random layered DAGs, the general graphs on which rematerialization solvers are compared.

The family is that of Gagrani et al., "Neural Topological Ordering for Computation Graphs" (NeurIPS
2022, appendix A); MOCCASIN (Bartan et al., ICML 2023) takes its instances RL1 to RL4, of 100, 250, 500
and 1000 ops, from it.  Ops lie in layers.  With a width factor W drawn from 0.25 to 0.5 there are about
sqrt(n (1/W - 1)) layers, each of a random number of ops (up to 75 % above or below the mean).  Layers of
a and b ops that follow each other are joined by d a b + (1 - d) max(a, b) edges, d = 0.2, spread evenly
over the ops of the larger and local: an op reads what lies at about its own relative place.  Another 14 %
of all edges skip layers, local in the same sense with some spread.

This generator follows that description and nothing else.  What it does not fix is ours: bytes are drawn
from a mixture of four Gaussians, seconds uniformly, and what no op reads is dropped like anything else.
The order is layer by layer.  ``INSTANCES`` are seeds whose number of edges is that of MOCCASIN's
instances to within 2 %; bytes and seconds are not theirs, so results compare in kind, not row by row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import MappingProxyType

import networkx as nx

from solvers import Problem

__all__ = ["INSTANCES", "layered_dag", "layered_problem"]

WIDTH = (0.25, 0.5)
LAYER_SPREAD = 0.75
EDGE_DENSITY = 0.2
SKIP_SHARE = 0.14
SKIP_SPREAD = 0.2

# Weight, mean and deviation, in MiB.
SIZES = ((0.3, 0.5, 0.5), (0.3, 1.0, 1.0), (0.3, 3.0, 1.0), (0.1, 5.0, 1.0))
LEAST_MIB = 0.05
SECONDS = (1e-3, 10e-3)

# name -> ops, seed.
INSTANCES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "layered-100": (100, 18),
        "layered-250": (250, 5),
        "layered-500": (500, 25),
        "layered-1000": (1000, 3),
    }
)


def layered_problem(name: str) -> Problem:
    """The instance called ``name``, one of ``INSTANCES``."""
    ops, seed = INSTANCES[name]
    return Problem.from_networkx(layered_dag(ops, seed), name=name)


def layered_dag(ops: int, seed: int) -> nx.DiGraph:
    """A random layered DAG of ``ops`` nodes 0, 1, ..., in layer order; the same for the same seed.

    Node attributes: ``layer``, ``bytes`` and ``seconds``.
    """
    rng = random.Random(seed)
    graph = nx.DiGraph(order=range(ops))
    layers = _layers(ops, rng)
    for number, layer in enumerate(layers):
        for node in layer:
            graph.add_node(node, layer=number, bytes=_bytes(rng), seconds=rng.uniform(*SECONDS))
    for k in range(len(layers) - 1):
        graph.add_edges_from(_between(layers[k], layers[k + 1], rng))
    skips = round(graph.number_of_edges() * SKIP_SHARE / (1 - SKIP_SHARE))
    goal = graph.number_of_edges() + min(skips, _pairs_apart(layers))
    while graph.number_of_edges() < goal:
        graph.add_edge(*_skip(layers, rng))
    return graph


def _layers(ops: int, rng: random.Random) -> list[range]:
    width = rng.uniform(*WIDTH)
    mean = ops / math.ceil(math.sqrt(ops * (1 / width - 1)))
    least, most = math.ceil(mean * (1 - LAYER_SPREAD)), math.floor(mean * (1 + LAYER_SPREAD))
    layers: list[range] = []
    start = 0
    while start < ops:
        stop = min(ops, start + max(1, rng.randint(least, max(least, most))))
        layers.append(range(start, stop))
        start = stop
    return layers


def _between(above: range, below: range, rng: random.Random) -> list[tuple[int, int]]:
    """Edges from one layer to the next: each op of the larger gets about as many as any other."""
    large, small = (above, below) if len(above) >= len(below) else (below, above)
    count = int(EDGE_DENSITY * len(large) * len(small) + (1 - EDGE_DENSITY) * len(large))
    each, rest = divmod(count, len(large))
    favoured = set(rng.sample(range(len(large)), rest))
    edges = []
    for k, node in enumerate(large):
        degree = each + (k in favoured)
        centre = k * (len(small) - 1) / max(1, len(large) - 1)
        first = min(max(0, round(centre - (degree - 1) / 2)), len(small) - degree)
        for other in small[first : first + degree]:
            edges.append((node, other) if large is above else (other, node))
    return edges


def _pairs_apart(layers: list[range]) -> int:
    """Pairs of ops that at least one layer lies between."""
    return sum(len(a) * len(b) for k, a in enumerate(layers) for b in layers[k + 2 :])


def _skip(layers: list[range], rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(layers) - 2)
    above, below = layers[start], layers[rng.randrange(start + 2, len(layers))]
    place = rng.random()
    other = min(max(0.0, place + SKIP_SPREAD * rng.gauss(0.0, 1.0)), 1.0)
    return above[int(place * len(above))], below[min(int(other * len(below)), len(below) - 1)]


def _bytes(rng: random.Random) -> int:
    (part,) = rng.choices(SIZES, [weight for weight, _, _ in SIZES])
    _, mean, deviation = part
    return round(max(LEAST_MIB, rng.gauss(mean, deviation)) * 2**20)
