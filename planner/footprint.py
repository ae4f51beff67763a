"""What a captured step holds beside the values it makes, in the blocks of the device it is planned for."""

from __future__ import annotations

from planner._compat import storage_key
from planner.devices import library_bytes, rounded_up
from planner.training_graph import TrainingGraph

__all__ = ["constant_bytes", "cublas_bytes", "gradient_bytes", "tangent_bytes"]

# Ops that cuBLAS runs.
_PRODUCTS = frozenset(
    f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear")
)


def tangent_bytes(graph: TrainingGraph, grain: int) -> int:
    """Of output gradients that come from outside and are there throughout."""
    given = (v for v in graph.values if v.kind == "tangent" and v.producer is None)
    return sum(rounded_up(v.bytes, grain) for v in given)


def constant_bytes(graph: TrainingGraph, grain: int) -> int:
    """Of tensors the trace baked into the graph."""
    sizes = {
        storage_key(t): rounded_up(t.untyped_storage().nbytes(), grain)
        for t in graph.constants.values()
        if t.device == graph.device
    }
    return sum(sizes.values())


def gradient_bytes(graph: TrainingGraph, grain: int) -> int:
    """Of the gradients that the step leaves behind."""
    return sum(rounded_up(v.bytes, grain) for v in graph.values if v.kind == "gradient")


def cublas_bytes(graph: TrainingGraph, capability: tuple[int, int] | None) -> int:
    """That cuBLAS keeps for itself through the step; see :mod:`planner.devices`."""
    multiply = [i for i, op in enumerate(graph.ops) if op.target in _PRODUCTS]
    return library_bytes(
        capability,
        forward=any(i < graph.turn for i in multiply),
        backward=any(i >= graph.turn for i in multiply),
    )
