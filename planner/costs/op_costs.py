"""What each op of a graph costs: seconds, scratch bytes, FLOPs.

Two sources: :mod:`planner.costs.profiler` runs every distinct op once it is warm,
:mod:`planner.costs.roofline` works it out from FLOPs and bytes.  Each module says where it is right and
where it errs.  Views cost nothing in both.

A profile goes on where an op cannot be measured, out of memory included: the roofline stands in for it,
and what the allocator kept from the attempt is given back.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import fx

from planner._compat import is_out_of_memory
from planner.costs.believed import Believed, believed
from planner.costs.cache import Measured, cache_for, key_of
from planner.costs.profiler import Signatures, device_for, measure, undisturbed
from planner.costs.roofline import (
    is_view,
    node_flops,
    outputs_of,
    packet_of,
    roofline_seconds,
)
from planner.costs.translation import scratch_bytes
from planner.devices.rates import Device
from planner.graph.nodes import talks
from planner.graph.training_graph import TrainingGraph

__all__ = ["Costs", "costs_of", "graph_costs"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_measured: dict[str, Measured] = {}  # by signature, for the life of the process


@dataclass(frozen=True)
class Costs:
    """Seconds, scratch bytes and FLOPs of one execution of each node, by its name.

    ``source``      where the seconds come from.
    ``device``      the device they are for.
    ``signatures``  distinct ops among the nodes, views left out.
    ``estimated``   how many of them a profile left to the roofline.

    Raises ``ValueError`` if the three name different nodes, or a cost is negative or not finite.
    """

    seconds: Mapping[str, float]
    workspace_bytes: Mapping[str, int]
    flops: Mapping[str, int]
    source: Literal["profile", "roofline"]
    device: str
    signatures: int
    estimated: int = 0

    def __post_init__(self) -> None:
        if not (self.seconds.keys() == self.workspace_bytes.keys() == self.flops.keys()):
            raise ValueError("seconds, workspace_bytes and flops must name the same nodes")
        for label in ("seconds", "workspace_bytes", "flops"):
            for name, cost in getattr(self, label).items():
                if not (math.isfinite(cost) and cost >= 0):
                    raise ValueError(f"node {name!r} has {label}={cost!r}, want a finite number >= 0")

    @property
    def total_seconds(self) -> float:
        """Seconds of every node run once."""
        return math.fsum(self.seconds.values())

    @property
    def total_flops(self) -> int:
        """FLOPs of every node run once."""
        return sum(self.flops.values())

    def __str__(self) -> str:
        left = f" ({self.estimated} by roofline)" if self.estimated else ""
        return (
            f"{self.source} on {self.device}: {len(self.seconds)} nodes, {self.signatures} distinct{left}, "
            f"{self.total_seconds * 1e3:.3f} ms, {self.total_flops / 1e9:.3f} GFLOP, "
            f"workspace up to {max(self.workspace_bytes.values(), default=0) / 1e6:.1f} MB"
        )

    def __repr__(self) -> str:
        return f"Costs({self})"


def costs_of(
    nodes: Iterable[fx.Node],
    source: Literal["auto", "profile", "roofline"] = "auto",
    device: torch.device | None = None,
    *,
    rates: Device | None = None,
    limit_s: float = 10.0,
) -> Costs:
    """What each of ``nodes`` costs on ``device``.

    ``nodes``    of one graph, with fake tensors in ``meta["val"]``, their inputs too.
    ``source``   "profile", "roofline", or "auto": profile on CUDA; on a CPU only if all was before, or three
                 calls of each distinct op are expected to take less than ``limit_s``.
    ``device``   default: the first CUDA device among the nodes' tensors, else the first device.
    ``rates``    for the roofline; default ``device_for(device)``.
    ``limit_s``  about how long a profile may take.  Ops with the largest share of the step come first;
                 for what is not reached, or fails on made-up operands, the roofline stands in, scaled by
                 measured over expected seconds of the rest.

    Raises ``ValueError`` for another ``source``.
    """
    if source not in ("auto", "profile", "roofline"):
        raise ValueError(f"costs must be 'auto', 'profile' or 'roofline', not {source!r}")
    nodes = list(nodes)
    device = device or _device_of(nodes)
    alike: dict[str, list[fx.Node]] = {}
    signatures = Signatures(device)
    for node in nodes:
        if not is_view(node):
            alike.setdefault(signatures.of(node), []).append(node)
    expected = _Expected(alike, device, rates)
    measured = {} if source == "roofline" else _recalled(alike, device)
    if source == "auto":
        at_once = device.type == "cuda" or (rates is None and measured.keys() >= {*_alone(alike)})
        quick = at_once or 3 * math.fsum(expected.seconds.values()) < limit_s
        source = "profile" if quick else "roofline"
    measured = _profile(alike, measured, expected, device, limit_s) if source == "profile" else {}

    seconds = {node.name: 0.0 for node in nodes}
    workspace_bytes, flops = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
    scale = expected.scale(measured) if alike.keys() - measured.keys() else 1.0
    for key, group in alike.items():
        cost = measured.get(key) or Measured(expected.seconds[key] * scale, _scratch_bytes(group[0], device))
        flops_each = node_flops(group[0])
        for node in group:
            seconds[node.name] = cost.seconds
            workspace_bytes[node.name] = cost.workspace_bytes
            flops[node.name] = flops_each
    return Costs(
        seconds,
        workspace_bytes,
        flops,
        source,
        _device_name(device) if source == "profile" else expected.rates.name,
        signatures=len(alike),
        estimated=len(alike) - len(measured) if source == "profile" else 0,
    )


def graph_costs(
    graph: TrainingGraph,
    source: Literal["auto", "profile", "roofline"] = "auto",
    *,
    rates: Device | None = None,
) -> Costs:
    """Costs of every op by its name; the step's and the loss's nodes come from two graphs."""
    ours = [op.node for op in graph.ops if op.node is not None and op.phase != "loss"]
    theirs = [op.node for op in graph.ops if op.node is not None and op.phase == "loss"]
    costs = costs_of(ours, source, graph.device, rates=rates)
    if not theirs:
        return costs
    loss = costs_of(theirs, costs.source, graph.device, rates=rates)
    return replace(
        costs,
        seconds={**costs.seconds, **_prefixed(loss.seconds)},
        workspace_bytes={**costs.workspace_bytes, **_prefixed(loss.workspace_bytes)},
        flops={**costs.flops, **_prefixed(loss.flops)},
        signatures=costs.signatures + loss.signatures,
        estimated=costs.estimated + loss.estimated,
    )


def _prefixed(by_node: Mapping[str, T]) -> dict[str, T]:
    return {f"loss/{name}": cost for name, cost in by_node.items()}


class _Expected:
    """What a roofline says of each signature; the device's rates are measured when it is first asked."""

    def __init__(
        self, alike: Mapping[str, list[fx.Node]], device: torch.device, rates: Device | None
    ) -> None:
        self._alike, self._device, self._rates = alike, device, rates

    @cached_property
    def rates(self) -> Device:
        return self._rates or device_for(self._device)

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        return {key: roofline_seconds(group[0], self.rates) for key, group in self._alike.items()}

    def scale(self, measured: Mapping[str, Measured]) -> float:
        """How many times as long as expected the ``measured`` ops take, all in all."""
        if not measured:
            return 1.0
        return math.fsum(m.seconds for m in measured.values()) / math.fsum(self.seconds[k] for k in measured)


def _recalled(alike: Mapping[str, list[fx.Node]], device: torch.device) -> dict[str, Measured]:
    """What this process measured before, or another one that is believed, by signature."""
    unknown = [key for key in alike if key not in _measured]
    cache = cache_for(device) if unknown else None
    if cache is not None:
        read = cache.read()
        found = Believed({key: read[key_of(key)] for key in unknown if key_of(key) in read}, {})
        if cache.is_shared:
            with undisturbed(device):
                found = believed(found.kept, lambda key: _attempt(alike[key][0], device))
        _measured.update({**found.kept, **found.again})
        cache.add(found.again)
    return {key: _measured[key] for key in alike if key in _measured}


def _profile(
    alike: Mapping[str, list[fx.Node]],
    recalled: Mapping[str, Measured],
    expected: _Expected,
    device: torch.device,
    limit_s: float,
) -> dict[str, Measured]:
    """Measured costs by signature, the largest shares of the step first; what is left out has none."""
    missing = [key for key in _alone(alike) if key not in recalled]
    if not missing:
        return dict(recalled)
    missing.sort(key=lambda key: -expected.seconds[key] * len(alike[key]))
    found: dict[str, Measured] = {}
    began = time.perf_counter()
    with undisturbed(device):
        for key in missing:
            if time.perf_counter() - began > limit_s:
                log.debug("the profile stopped after %.1f s", limit_s)
                break
            cost = _attempt(alike[key][0], device)
            if cost is not None:
                found[key] = cost
    _measured.update(found)
    cache = cache_for(device)
    if cache is not None:
        cache.add(found)
    return {**recalled, **found}


def _alone(alike: Mapping[str, list[fx.Node]]) -> list[str]:
    """The signatures that one process can measure: what all ranks have to run is none of them."""
    return [key for key, group in alike.items() if not talks(group[0])]


def _scratch_bytes(node: fx.Node, device: torch.device) -> int:
    """An estimate where nothing was measured."""
    return scratch_bytes(str(packet_of(node)), node) if device.type == "cuda" else 0


def _attempt(node: fx.Node, device: torch.device) -> Measured | None:
    """What ``node`` costs, ``None`` where it cannot be measured."""
    try:
        return measure(node, device)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        short = isinstance(error, RuntimeError) and is_out_of_memory(error)
        told = logging.WARNING if short else logging.DEBUG
        log.log(told, "%s (%s) cannot be measured: %s", node.name, node.target, str(error).split("\n")[0])
    if short and device.type == "cuda":  # here nothing holds the operands any more
        torch.cuda.empty_cache()
    return None


def _device_of(nodes: Iterable[fx.Node]) -> torch.device:
    devices = [t.device for node in nodes for t in outputs_of(node)]
    return next((d for d in devices if d.type == "cuda"), devices[0] if devices else torch.device("cpu"))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
