"""What a captured step holds beside the values it makes, in the blocks of the device it is planned for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from planner._compat import FakeTensor, storage_key
from planner.capture.inputs import Inputs
from planner.devices.allocator import HeldBlocks
from planner.devices.cublas import library_blocks
from planner.devices.state import GRAIN, segments_of
from planner.graph.training_graph import TrainingGraph
from planner.measure.step import tensors_in
from planner.memory.resident import Resident
from planner.units import rounded_up

__all__ = ["blocks_of", "constant_bytes", "cublas_blocks", "gradient_bytes", "tangent_bytes"]

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
    return sum(rounded_up(v.bytes, grain) for v in graph.values if v.kind == "gradient" and v.final)


def cublas_blocks(graph: TrainingGraph, capability: tuple[int, int] | None) -> tuple[int, ...]:
    """That cuBLAS keeps for itself through the step; see :mod:`planner.devices.cublas`."""
    targets = {op.target for op in graph.ops}
    return library_blocks(
        capability, products=bool(targets & (_PRODUCTS | _BIASED)), biased=bool(targets & _BIASED)
    )


def blocks_of(
    model: nn.Module, inputs: Inputs, resident: Resident, further: Sequence[int], device: torch.device
) -> HeldBlocks:
    """Bytes of each block that a CUDA allocator has handed out when the step begins.

    ``device``  where the model is.  If that is a CUDA device, the blocks of its tensors are looked up;
    elsewhere they are what is asked for.  Optimizer state is laid out as so many copies of the parameters;
    of other kinds whose tensors are not known there is one block each.
    """
    home = {address: segment for segment in segments_of(device) for address in segment.blocks}
    held: dict[int, set[int]] = {}  # addresses of blocks by that of their segment

    def made(tensors: Iterable[torch.Tensor], asked_bytes: int) -> list[int]:
        storages = {storage_key(t): t for t in tensors if t.device == device}
        asked = {k: rounded_up(int(t.untyped_storage().nbytes()), GRAIN) for k, t in storages.items()}
        if sum(asked.values()) != asked_bytes:  # sizes of another batch, or storages that serve two purposes
            return [asked_bytes]
        for key, tensor in storages.items() if home else ():
            address = None if isinstance(tensor, FakeTensor) else tensor.untyped_storage().data_ptr()
            if address in home:
                held.setdefault(home[address].address, set()).add(address)
                del asked[key]
        return list(asked.values())

    tensors = (model.parameters(), model.buffers(), tensors_in((inputs.args, inputs.kwargs)))
    asked = (resident.parameters_bytes, resident.buffers_bytes, resident.inputs_bytes)
    first = [count for of, total in zip(tensors, asked, strict=True) for count in made(of, total)]
    parameters = [rounded_up(p.untyped_storage().nbytes(), GRAIN) for p in model.parameters()]
    copies, rest = divmod(resident.optimizer_state_bytes, max(1, sum(parameters)))
    later = [*further, *copies * parameters, rest, resident.gradients_bytes]
    there = {segment.address: segment for segment in home.values()}
    laid = [there[a]._replace(blocks={b: there[a].blocks[b] for b in blocks}) for a, blocks in held.items()]
    return HeldBlocks(tuple(sorted(laid)), (*first, *later))
