"""The model's output object with its tensors taken out, and which of them the step differentiates."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planner._compat import pytree
from planner.errors import TraceError

__all__ = ["Leaf", "OutputTemplate", "template_of"]


@dataclass(frozen=True)
class Leaf:
    """One tensor of the model's output: whether autograd tracks it, whether the step differentiates it."""

    name: str
    requires_grad: bool
    differentiated: bool


@dataclass(frozen=True)
class OutputTemplate:
    """The model's output type with its tensors taken out.

    ``constants[k]`` is the k-th leaf where it is not a tensor, ``None`` where ``is_tensor[k]``.
    """

    spec: Any
    is_tensor: tuple[bool, ...]
    constants: tuple[Any, ...]
    leaves: tuple[Leaf, ...]

    def rebuild(self, tensors: list[torch.Tensor]) -> Any:
        """The output object around ``tensors``."""
        it = iter(tensors)
        flat = [next(it) if t else c for t, c in zip(self.is_tensor, self.constants, strict=True)]
        return pytree.tree_unflatten(flat, self.spec)


def register_dataclasses(tree: Any) -> None:
    """Make plain dataclasses in ``tree`` containers that pytree looks into, as ``torch.export`` does."""
    while kinds := {
        type(x) for x in pytree.tree_leaves(tree) if dataclasses.is_dataclass(x) and not isinstance(x, type)
    }:
        for kind in kinds:
            torch.export.register_dataclass(kind)


def _names(tree: Any) -> list[str]:
    """The place of each leaf, as one would write it.

    A library may register its containers without saying how they are indexed (diffusers does): mappings
    are then read by key, anything else is numbered.
    """
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:
        pass
    numbered = [f"[{i}]" for i in range(len(pytree.tree_leaves(tree)))]
    if not isinstance(tree, Mapping | list | tuple):
        return numbered
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    named = [f"[{key!r}]{name}" for key, value in items for name in _names(value)]
    return named if len(named) == len(numbered) else numbered


def template_of(
    model_name: str, output: Any, used: frozenset[int] | None
) -> tuple[OutputTemplate, list[torch.Tensor]]:
    """The template of ``output``, and its tensors.

    ``used``: indices of the tensors that are differentiated; ``None``: the loss if there is one, else
    all that require grad.  Raises ``TraceError`` for an object that no graph can carry.
    """
    register_dataclasses(output)
    flat, spec = pytree.tree_flatten(output)
    names = ["output" + name for name in _names(output)]
    for name, leaf in zip(names, flat, strict=True):
        if not isinstance(leaf, (torch.Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)):
            raise TraceError(
                f"{model_name} returns a {type(leaf).__name__} at {name}, which a graph cannot carry; "
                "return tensors in tuples, lists, dicts or dataclasses "
                "(for Hugging Face models pass use_cache=False)"
            )
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in flat]
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    labels = [name for name, t in zip(names, is_tensor, strict=True) if t]
    tracked = [t.requires_grad for t in tensors]
    if used is not None:
        chosen = [i in used for i in range(len(tensors))]
    else:
        scalar = [g and t.numel() == 1 for g, t in zip(tracked, tensors, strict=True)]
        named = [s and label.strip("[]'.").endswith("loss") for s, label in zip(scalar, labels, strict=True)]
        if sum(named) > 1:
            named = [
                n and re.search(r"\W'?loss'?\W*$", label) is not None
                for n, label in zip(named, labels, strict=True)
            ]
        is_loss = named if any(named) else scalar if sum(scalar) == 1 else [False] * len(tensors)
        chosen = is_loss if any(is_loss) else tracked
    leaves = tuple(Leaf(n, g, c and g) for n, g, c in zip(labels, tracked, chosen, strict=True))
    constants = tuple(None if t else leaf for t, leaf in zip(is_tensor, flat, strict=True))
    return OutputTemplate(spec, tuple(is_tensor), constants, leaves), tensors
