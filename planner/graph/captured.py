"""The captured step: a model, its joint graph, the ops of that, and what it all depended on.

A plan names ops of one captured step.  Whoever makes a plan, and whoever runs one that comes from a
file, begins here; neither costs nor budgets are known yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from planner.capture.expectation import Expectation, expectation_of
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph
from planner.errors import StalePlanError
from planner.graph.nodes import talks
from planner.graph.step_graph import CALLERS, LAST
from planner.graph.training_graph import TrainingGraph

__all__ = ["CapturedStep", "fingerprint_of"]


@dataclass(frozen=True, eq=False)
class CapturedStep:
    """One training step of ``model``, as captured.

    ``joint``     the whole step as one fx graph.
    ``graph``     the same as ops and storages; for a device elsewhere, as it will be there.
    ``expected``  what the capture depended on.
    """

    model: nn.Module
    joint: JointGraph
    graph: TrainingGraph
    expected: Expectation

    @classmethod
    def of(cls, model: nn.Module, joint: JointGraph, graph: TrainingGraph) -> CapturedStep:
        """With what a capture depends on as of now: the autocast state and the training flags too."""
        expected = expectation_of(model, *joint.inputs.flatten(), joint.read, joint.asked)
        return cls(model, joint, graph, expected)

    @property
    def inputs(self) -> Inputs:
        """The batch that it was captured for."""
        return self.joint.inputs

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the captured step: its calls, sizes, gradients and what it depends on."""
        return fingerprint_of(self.graph, self.expected)

    def steps(self, sequence: Sequence[str]) -> list[int]:
        """Op positions of a sequence of names; those of a loss outside this graph are left out.

        Raises ``StalePlanError`` for a name that the step does not have.
        """
        position = {op.name: i for i, op in enumerate(self.graph.ops)}
        others = CALLERS | position.keys()
        missing = [n for n in sequence if n not in others and not n.startswith("loss/")]
        if missing and missing != ["ones_like_loss"]:
            raise StalePlanError(f"the plan runs {missing[0]!r}, which the captured step does not have")
        return [position[name] for name in sequence if name in position]

    def turn(self, sequence: Sequence[str]) -> int:
        """How many leading steps of ``sequence`` (:meth:`steps`) run in the forward, before the loss."""
        phase = {op.name: op.phase for op in self.graph.ops}
        names = [name for name in sequence if name in phase or name != LAST]
        return next((t for t, name in enumerate(names) if phase.get(name) != "forward"), len(names))


def fingerprint_of(graph: TrainingGraph, expected: Expectation | None = None) -> str:
    """Hash of a captured step: its calls, sizes, gradients and what it depends on, if that is given."""
    h = hashlib.sha256()
    device = graph.device  # the same step on another device of the kind is the same step
    here, anywhere = repr(device), repr(torch.device(device.type))
    for op in graph.ops:
        if op.phase != "loss" and op.node is not None:
            made = [graph.values[v].bytes for v in op.outputs]
            args = op.node.args[:-1] if talks(op.node) else op.node.args  # last is a group of this rank's
            call = f"{op.name}|{op.target}|{args}|{op.node.kwargs}|{made}\n"
            h.update(call.replace(here, anywhere).encode())
    for name, spec in ({} if expected is None else expected.parameters).items():
        spec = replace(spec, device=torch.device(spec.device.type))
        h.update(f"{name}|{spec}|{spec.requires_grad}\n".encode())
    return h.hexdigest()
