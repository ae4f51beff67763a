"""Static memory: bytes that are there throughout a step, whatever its schedule.

Beside what a step finds and leaves (:class:`~planner.memory.resident.Resident`) these are the gradients that
a caller hands in, tensors that the trace baked in, what cuBLAS keeps for itself, what an allocator rounds
up, and what is set aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.devices.allocator import HeldBlocks, is_default
from planner.graph.training_graph import TrainingGraph
from planner.measure.step import held
from planner.memory import footprint
from planner.memory.resident import Resident

__all__ = ["StaticMemory"]


class _Captured(Protocol):
    @property
    def model(self) -> nn.Module: ...
    @property
    def graph(self) -> TrainingGraph: ...
    @property
    def inputs(self) -> Inputs: ...


@dataclass(frozen=True, eq=False)
class StaticMemory:
    """What ``captured`` holds throughout on the device planned for.

    ``resident``      what the step finds there and leaves there.
    ``device``        planned for; ``grain``: bytes to which storages are rounded up there.
    ``capability``    CUDA's compute capability there; ``None`` for what is not a CUDA device.
    ``margin_bytes``  set aside for what a measured step took beyond its prediction.
    """

    captured: _Captured
    resident: Resident
    device: torch.device
    grain: int = 1
    capability: tuple[int, int] | None = None
    margin_bytes: int = 0

    @cached_property
    def tangent_bytes(self) -> int:
        """Bytes of output gradients that come from outside and are there throughout."""
        return footprint.tangent_bytes(self.captured.graph, self.grain)

    @cached_property
    def constant_bytes(self) -> int:
        """Bytes of tensors the trace baked into the graph or that ``loss_fn`` holds itself."""
        inputs = self.captured.inputs
        counted = held(self.captured.model, (inputs.args, inputs.kwargs))
        return footprint.constant_bytes(self.captured.graph, self.grain, counted)

    @cached_property
    def library_blocks(self) -> tuple[int, ...]:
        """Bytes of each block that cuBLAS keeps for itself."""
        return footprint.cublas_blocks(self.captured.graph, self.capability)

    @property
    def library_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.library_blocks)

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that the step leaves behind."""
        return footprint.gradient_bytes(self.captured.graph, self.grain)

    @cached_property
    def blocks(self) -> HeldBlocks | None:
        """What a CUDA allocator has handed out when the step begins; ``None`` where there is no such one."""
        if self.device.type != "cuda":
            return None
        further = [self.tangent_bytes, self.constant_bytes, *self.library_blocks]
        step = self.captured
        return footprint.blocks_of(step.model, step.inputs, self.resident, further, step.graph.device)

    @cached_property
    def slack_bytes(self) -> int:
        """What the allocator has handed out for ``blocks`` beyond what was asked for."""
        if self.blocks is None or not is_default():
            return 0
        asked_bytes = (
            self.resident.total_bytes + self.constant_bytes + self.tangent_bytes + self.library_bytes
        )
        return self.blocks.handed_out_bytes - asked_bytes

    @cached_property
    def by_kind(self) -> Mapping[str, int]:
        """Bytes there throughout, by kind (:data:`planner.memory.lifetimes.MEMORY_KINDS`)."""
        r = self.resident
        slack = {} if self.blocks is None else {"allocator_slack": self.slack_bytes}
        return {
            "parameters": r.parameters_bytes,
            "buffers": r.buffers_bytes + self.constant_bytes,
            "optimizer_state": r.optimizer_state_bytes,
            "inputs": r.inputs_bytes,
            "gradients": r.gradients_bytes,
            "output_gradients": self.tangent_bytes,
            "library_workspace": self.library_bytes,
            **slack,
            "margin": self.margin_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """All that is there throughout."""
        return sum(self.by_kind.values())

    @property
    def seen_bytes(self) -> int:
        """Bytes of it that a measured step without an optimizer finds; what cuBLAS takes comes later."""
        r = self.resident
        without_state = r.total_bytes - r.optimizer_state_bytes
        return without_state + self.tangent_bytes + self.constant_bytes + self.slack_bytes

    @cached_property
    def optimizer_step_bytes(self) -> int:
        """Bytes during the optimizer's step, when the activations are gone; 0 without an optimizer."""
        r = self.resident
        if not r.optimizer_state_bytes and not r.optimizer_step_bytes:
            return 0
        slack = self.slack_bytes
        return r.total_bytes + self.library_bytes + slack + self.gradient_bytes + r.optimizer_step_bytes

    def optimizer_breakdown(self) -> dict[str, int]:
        """``optimizer_step_bytes`` by kind."""
        r = self.resident
        slack = {} if self.blocks is None else {"allocator_slack": self.slack_bytes}
        return {
            "parameters": r.parameters_bytes,
            "buffers": r.buffers_bytes,
            "optimizer_state": r.optimizer_state_bytes,
            "inputs": r.inputs_bytes,
            "library_workspace": self.library_bytes,
            **slack,
            "gradients": self.gradient_bytes + r.gradients_bytes,
            "workspace": r.optimizer_step_bytes,
        }
