"""What a plan was made for, checked before each planned step.

A captured graph is right for one structure of inputs, one set of modules with their training flags,
parameters of certain sizes and ``requires_grad``, one autocast state.  Anything else is a
``StalePlanError`` that names the first difference; nothing is guessed.  The check walks cached
references, some tenths of a microsecond per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.effects import has_hooks
from planner.errors import PlannerError, StalePlanError

__all__ = ["Expectation", "Guard", "TensorSpec", "expectation_of"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides, dtype, device and whether autograd tracks it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}] on {self.device}"


@dataclass(frozen=True)
class Expectation:
    """All that the capture depended on.

    ``leaves``       tensor specs and constants of the flattened inputs; ``in_spec`` their structure.
    ``parameters``   by name (buffers too).
    ``modules``      (path, type name, training flag) in traversal order.
    """

    in_spec: Any
    leaves: tuple[Any, ...]
    parameters: dict[str, TensorSpec]
    modules: tuple[tuple[str, str, bool], ...]
    autocast: tuple[bool, str]


def expectation_of(model: nn.Module, leaves: Sequence[Any], in_spec: Any) -> Expectation:
    """What a capture of ``model`` at these inputs depends on, as of now."""
    device = next(model.parameters()).device
    return Expectation(
        in_spec,
        tuple(TensorSpec.of(x) if isinstance(x, torch.Tensor) else x for x in leaves),
        {n: TensorSpec.of(t) for n, t in (*model.named_parameters(), *model.named_buffers())},
        tuple((n, type(m).__name__, m.training) for n, m in model.named_modules()),
        autocast_state(device),
    )


def autocast_state(device: torch.device) -> tuple[bool, str]:
    """Whether autocast is on for the device's type, and to which dtype."""
    on = torch.is_autocast_enabled(device.type)
    return on, str(torch.get_autocast_dtype(device.type)) if on else ""


class Guard:
    """An expectation bound to one model instance."""

    def __init__(self, model: nn.Module, expected: Expectation) -> None:
        self.model, self.expected = model, expected
        found = [(n, type(m).__name__) for n, m in model.named_modules()]
        wanted = [(n, t) for n, t, _ in expected.modules]
        if found != wanted:
            raise StalePlanError(
                f"this plan was made for a model with {len(wanted)} modules, "
                f"{_first_difference(wanted, found)}; plan the model you want to run"
            )
        self._modules = [
            (m, flag, len(m._modules))
            for m, (_, _, flag) in zip(model.modules(), expected.modules, strict=True)
        ]
        self._edges = [(m._modules, k, child) for m in model.modules() for k, child in m._modules.items()]
        self._tensors: list[tuple[dict[str, Any], str, str, TensorSpec]] = []
        for name, spec in expected.parameters.items():
            path, _, key = name.rpartition(".")
            owner = model.get_submodule(path)
            where: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            if key not in where:
                raise StalePlanError(f"the plan needs {name!r}, which {type(model).__name__} does not have")
            self._tensors.append((where, key, name, spec))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Current parameters and buffers by name; ``StalePlanError`` if one is not what was planned."""
        out = {}
        for where, key, name, spec in self._tensors:
            tensor = where.get(key)
            if (
                tensor is None
                or tensor.shape != spec.shape
                or tensor.dtype != spec.dtype
                or (tensor.device != spec.device or tensor.requires_grad != spec.requires_grad)
            ):
                now = (
                    "gone"
                    if tensor is None
                    else f"{TensorSpec.of(tensor)}, requires_grad={tensor.requires_grad}"
                )
                raise StalePlanError(
                    f"{name} was {spec}, requires_grad={spec.requires_grad} when the plan was made and is "
                    f"{now}; make a new plan"
                )
            out[name] = tensor
        return out

    def check_modules(self) -> None:
        """Same modules, same training flags, no hooks that the graph would skip."""
        root = self.model
        for module, flag, size in self._modules:
            if module.training is not flag:
                path = next(n for n, m in root.named_modules() if m is module)
                raise StalePlanError(
                    f"{path or 'the model'} has training={module.training}, the plan was made with "
                    f"training={flag}; make a new plan, or set the flag back"
                )
            if len(module._modules) != size:
                raise StalePlanError(
                    f"a submodule of {type(module).__name__} was added or removed; make a new plan"
                )
            if module is not root and has_hooks(module):
                path = next(n for n, m in root.named_modules() if m is module)
                raise PlannerError(
                    f"{path} has a hook; a planned step runs one graph and would skip it. Remove it, "
                    "register it on the model itself, or call plan.restore(model)"
                )
        for modules, key, child in self._edges:
            if modules.get(key) is not child:
                raise StalePlanError(f"submodule {key!r} was replaced after planning; make a new plan")

    def check_inputs(self, leaves: Sequence[Any], in_spec: Any) -> None:
        """Same structure, sizes, strides, dtypes, devices and constants."""
        expected = self.expected
        if in_spec != expected.in_spec:
            raise StalePlanError(
                f"the inputs have another structure than the plan's: {in_spec} instead of "
                f"{expected.in_spec}; pass them the same way (positional or by keyword), or make a new plan"
            )
        for i, (leaf, want) in enumerate(zip(leaves, expected.leaves, strict=True)):
            if isinstance(want, TensorSpec):
                if isinstance(leaf, torch.Tensor) and TensorSpec.of(leaf) == want:
                    continue
                got = (
                    f"{TensorSpec.of(leaf)}, strides {leaf.stride()}"
                    if isinstance(leaf, torch.Tensor)
                    else repr(leaf)
                )
                raise StalePlanError(
                    f"input {self._label(i)} is {got}; the plan was made for {want}, strides {want.stride}. "
                    "Plan once per shape, or pad the batch to the planned size"
                )
            if leaf is not want and leaf != want:
                raise StalePlanError(f"input {self._label(i)} is {leaf!r}; the plan was made for {want!r}")
        state = autocast_state(next(self.model.parameters()).device)
        if state != expected.autocast:
            raise StalePlanError(
                f"autocast is {state[1] or 'off'}, it was {expected.autocast[1] or 'off'} when the plan was "
                "made; plan under the same autocast context as you train"
            )

    def _label(self, index: int) -> str:
        args, kwargs = pytree.tree_unflatten(list(range(len(self.expected.leaves))), self.expected.in_spec)
        for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
            if leaf == index:
                return pytree.keystr(path[1:])
        return str(index)


def _first_difference(wanted: list[tuple[str, str]], found: list[tuple[str, str]]) -> str:
    for (name, kind), other in zip(wanted, found, strict=False):
        if (name, kind) != other:
            return f"where it has {kind} {name!r} this one has {other[1]} {other[0]!r}"
    return f"this one has {len(found)}"
