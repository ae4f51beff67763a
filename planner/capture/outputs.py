"""The model's output object with its tensors taken out, and which of them the step differentiates.

The rule of which tensor is the loss stands here alone (:func:`loss_index`): a capture and a measurement of
the same model differentiate the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from planner._compat import pytree
from planner.errors import PlannerError, TraceError

__all__ = [
    "Leaf",
    "LossFn",
    "OutputTemplate",
    "Unread",
    "UnreadOutputError",
    "loss_index",
    "loss_within",
    "register_dataclasses",
    "template_of",
]

# What a model returned -> the scalar that is differentiated.
LossFn: TypeAlias = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Leaf:
    """One tensor of the model's output: whether autograd tracks it, whether the step differentiates it."""

    name: str
    requires_grad: bool
    differentiated: bool


class UnreadOutputError(PlannerError, AttributeError):
    """An output was read that the step was planned not to make."""


class Unread:
    """Stands where an output was that nobody was to read; whatever asks anything of it is told so."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        name = object.__getattribute__(self, "_name")
        raise UnreadOutputError(
            f"{name} was not made: this step was planned for a loop that reads only the loss, so that "
            f"{name} need not exist whole. Where the loop reads it, plan with outputs='released' or 'held', "
            "and a cache, which no graph can carry, with chunk_loss=False, in regions"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies, prints and compares objects asks of any
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, Unread)]
        return given[0]._refuse()

    __getitem__ = __len__ = __iter__ = __array__ = __bool__ = __float__ = __add__ = __mul__ = _refuse
    __radd__ = __rmul__ = __sub__ = __truediv__ = __neg__ = __matmul__ = _refuse

    def __repr__(self) -> str:
        return f"Unread({object.__getattribute__(self, '_name')})"


@dataclass(frozen=True)
class OutputTemplate:
    """The model's output type with its tensors taken out.

    ``constants[k]`` is the k-th leaf where it is not a tensor, ``None`` where ``is_tensor[k]``.
    ``reached``  names of parameters and positions of inputs to which autograd leads from any output;
                 ``None``: unknown.
    ``dropped``  places of what no graph can carry, such as a cache of keys and values, and which is not
                 handed out.
    """

    spec: Any
    is_tensor: tuple[bool, ...]
    constants: tuple[Any, ...]
    leaves: tuple[Leaf, ...]
    reached: frozenset[str | int] | None = None
    dropped: tuple[str, ...] = ()

    def reading(self, outputs: Collection[int]) -> OutputTemplate:
        """The same where of its tensors only these are handed out."""
        place = [k for k, is_tensor in enumerate(self.is_tensor) if is_tensor]
        is_tensor, constants = list(self.is_tensor), list(self.constants)
        for i, (k, leaf) in enumerate(zip(place, self.leaves, strict=True)):
            if i not in outputs:
                is_tensor[k], constants[k] = False, Unread(leaf.name)
        leaves = tuple(leaf for i, leaf in enumerate(self.leaves) if i in outputs)
        return dataclasses.replace(
            self, is_tensor=tuple(is_tensor), constants=tuple(constants), leaves=leaves
        )

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


# The output's own field or key; any that is called so, however deep; any whose name ends so.
_LOSSES = (
    re.compile(r"output(\.loss|\['loss'\])"),
    re.compile(r".*(\.loss|\['loss'\])"),
    re.compile(r".*loss('\])?"),
)


def loss_index(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> int | None:
    """Which tensor of a model's output is its loss; ``None``: all that require grad are differentiated.

    Only a tensor of one element that requires grad can be.  Of those it is, in this order,

    1. the output's own ``loss``, a field or a key;
    2. the only one called ``loss`` at any depth, as in ``{"decoder": {"loss": ...}}``;
    3. the only one whose name ends in ``loss``, as ``mask_loss``;
    4. the only one there is, whatever its name.

    Where several fit and none of the above decides (``(loss, loss * 2)``), none is *the* loss.  A loss that
    was not reduced, or that was detached, is none either.

    ``names``  place of each tensor as one would write it: ``output['loss']``, ``output.loss``, ``output[0]``.
    """
    able = [i for i, t in enumerate(tensors) if t.requires_grad and t.numel() == 1]
    for pattern in _LOSSES:
        named = [i for i in able if pattern.fullmatch(names[i])]
        if len(named) == 1:
            return named[0]
    return able[0] if len(able) == 1 else None


def loss_within(output: Any) -> torch.Tensor | None:
    """The tensor of ``output`` that is its loss, by :func:`loss_index`.

    Also of what a graph cannot carry: mappings that pytree does not know are read by key, of any other object
    ``loss`` is all that is seen.
    """
    if isinstance(output, Mapping):
        output = dict(output)
    register_dataclasses(output)
    flat = pytree.tree_leaves(output)
    if len(flat) == 1 and flat[0] is output and not isinstance(output, torch.Tensor):
        return loss_within({"loss": getattr(output, "loss", None)})
    found = [(n, t) for n, t in zip(_places(output), flat, strict=True) if isinstance(t, torch.Tensor)]
    index = loss_index([n for n, _ in found], [t for _, t in found])
    return None if index is None else found[index][1]


def _places(output: Any) -> list[str]:
    return ["output" + name for name in _names(output)]


def template_of(
    model_name: str, output: Any, used: frozenset[int] | None, *, drops: bool = False
) -> tuple[OutputTemplate, list[torch.Tensor]]:
    """The template of ``output``, and its tensors.

    ``used``: indices of the tensors that are differentiated; ``None``: the loss if there is one
    (:func:`loss_index`), else all that require grad.  ``drops``: whoever reads an object that no graph can
    carry is told that it was not made (:class:`Unread`).

    Raises ``TraceError`` for such an object otherwise.
    """
    register_dataclasses(output)
    flat, spec = pytree.tree_flatten(output)
    names = _places(output)
    dropped = []
    for i, (name, leaf) in enumerate(zip(names, flat, strict=True)):
        if isinstance(leaf, (torch.Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)):
            continue
        if drops:
            flat[i] = Unread(name)
            dropped.append(name)
        else:
            raise TraceError(
                f"{model_name} returns a {type(leaf).__name__} at {name}, which a graph cannot carry; "
                "return tensors in tuples, lists, dicts or dataclasses "
                "(for Hugging Face models pass use_cache=False)"
            )
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in flat]
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    labels = [name for name, t in zip(names, is_tensor, strict=True) if t]
    tracked = [t.requires_grad for t in tensors]
    loss = loss_index(labels, tensors) if used is None else None
    if used is not None:
        chosen = [i in used for i in range(len(tensors))]
    elif loss is not None:
        chosen = [i == loss for i in range(len(tensors))]
    else:
        chosen = tracked
    leaves = tuple(Leaf(n, g, c and g) for n, g, c in zip(labels, tracked, chosen, strict=True))
    constants = tuple(None if t else leaf for t, leaf in zip(is_tensor, flat, strict=True))
    return OutputTemplate(spec, tuple(is_tensor), constants, leaves, dropped=tuple(dropped)), tensors
