"""What a captured step holds beside the values it makes, in the blocks of the device it is planned for."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from planner._compat import storage_key
from planner.devices import library_bytes, rounded_up
from planner.training_graph import TrainingGraph

__all__ = ["constant_bytes", "cublas_bytes", "gradient_bytes", "tangent_bytes"]

# Ops that cuBLAS runs.
_PRODUCTS = frozenset(
    f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear")
)

# Those of them that it runs through cuBLASLt.
_BIASED = frozenset(f"aten.{name}" for name in ("addmm", "linear", "_addmm_activation"))


def tangent_bytes(graph: TrainingGraph, grain: int) -> int:
    """Of output gradients that come from outside and are there throughout."""
    given = (v for v in graph.values if v.kind == "tangent" and v.producer is None)
    return sum(rounded_up(v.bytes, grain) for v in given)


def constant_bytes(graph: TrainingGraph, grain: int, held: Iterable[torch.Tensor] = ()) -> int:
    """Of tensors the trace baked into the graph and those that ``loss_fn`` holds itself.

    ``held`` are counted elsewhere: a loss may read an input or a parameter.  What ``loss_fn`` trains is
    counted with its gradient, which is there from the start of the backward.
    """
    sizes: dict[int, int] = {}
    for tensor in (*graph.constants.values(), *graph.loss_tensors):
        if tensor.device == graph.device:
            storage_bytes = rounded_up(tensor.untyped_storage().nbytes(), grain)
            trained = tensor.requires_grad and tensor.is_leaf
            sizes[storage_key(tensor)] = storage_bytes * (2 if trained else 1)
    for tensor in held:
        sizes.pop(storage_key(tensor), None)
    return sum(sizes.values())


def gradient_bytes(graph: TrainingGraph, grain: int) -> int:
    """Of the gradients that the step leaves behind."""
    return sum(rounded_up(v.bytes, grain) for v in graph.values if v.kind == "gradient")


def cublas_bytes(graph: TrainingGraph, capability: tuple[int, int] | None) -> int:
    """That cuBLAS keeps for itself through the step; see :mod:`planner.devices`."""
    targets = {op.target for op in graph.ops}
    return library_bytes(
        capability, products=bool(targets & (_PRODUCTS | _BIASED)), biased=bool(targets & _BIASED)
    )
