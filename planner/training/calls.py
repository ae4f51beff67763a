"""One call of a module's forward, and what a plan for it depends on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensor, pytree
from planner.capture.expectation import TensorSpec, autocast_state
from planner.capture.inputs import Inputs
from planner.capture.module import home_of

__all__ = ["Call", "Signature"]


@dataclass(frozen=True)
class Signature:
    """What tells calls apart that need plans of their own.  Compared and hashed once per step.

    ``leaves``         tensor specs and constants of the arguments; ``in_spec`` their structure.
    ``autocast``       whether autocast is on, and to which dtype.
    ``has_gradients``  gradients of earlier batches are held: the step adds to them.
    ``place``          which call of its step it is, where there are several.
    ``trains``         whether the model is in training mode, then ``requires_grad`` of each parameter.
    """

    in_spec: Any
    leaves: tuple[Hashable, ...]
    autocast: tuple[bool, str]
    has_gradients: bool
    place: int = 1
    trains: tuple[bool, ...] = ()

    def __str__(self) -> str:
        shapes = [str(leaf) for leaf in self.leaves if isinstance(leaf, TensorSpec)]
        return ", ".join(shapes) or "no tensors"

    @cached_property
    def kind(self) -> Signature:
        """The same for calls that differ in sizes only."""
        return replace(self, leaves=tuple(map(_without_sizes, self.leaves)))

    @cached_property
    def of_step(self) -> Signature:
        """That of the captured step, which depends neither on gradients held nor on the place in the step."""
        return replace(self, has_gradients=False, place=1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        shapes = [leaf.shape for leaf in self.leaves if isinstance(leaf, TensorSpec)]
        return tuple(int(torch.Size(shape).numel()) for shape in shapes)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, flattened."""

    inputs: Inputs
    leaves: list[Any]
    in_spec: Any
    signature: Signature

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        module: nn.Module,
        has_gradients: bool = False,
        place: int = 1,
        trains: tuple[bool, ...] = (),
    ) -> Call:
        """Of ``module(*args, **kwargs)``."""
        inputs = Inputs(args, kwargs)
        leaves, in_spec = inputs.flatten()
        specs = tuple(TensorSpec.of(x) if isinstance(x, torch.Tensor) else _constant(x) for x in leaves)
        signature = Signature(
            in_spec, specs, autocast_state(home_of(module, leaves)), has_gradients, place, trains
        )
        return cls(inputs, leaves, in_spec, signature)

    def __str__(self) -> str:
        """Names and shapes of the tensors, and what else is special about it."""
        parts = []
        for path, leaf in pytree.tree_flatten_with_path((self.inputs.args, self.inputs.kwargs))[0]:
            if isinstance(leaf, torch.Tensor):
                name = pytree.keystr(path[1:]).strip("[]'")
                parts.append(f"{name} {'x'.join(map(str, leaf.shape)) or 'scalar'}")
        signature = self.signature
        parts += [f"autocast to {signature.autocast[1].removeprefix('torch.')}"] * signature.autocast[0]
        parts += ["gradients accumulated"] * signature.has_gradients
        return ", ".join(parts)

    def but(self, **changes: Any) -> Call:
        """The same with these fields of its signature changed."""
        return replace(self, signature=replace(self.signature, **changes))

    @property
    def fake(self) -> bool:
        """Whether somebody is tracing or counting, so that nothing is to be planned."""
        return any(isinstance(x, FakeTensor) for x in self.leaves)


def _without_sizes(leaf: Hashable) -> Hashable:
    if not isinstance(leaf, TensorSpec):
        return leaf
    return len(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad


def _constant(leaf: Any) -> Hashable:
    """``1``, ``1.0`` and ``True`` are equal but not the same constant; what has no hash is itself only."""
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), id(leaf)
    return type(leaf), leaf
