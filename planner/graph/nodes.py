"""What a node of the captured graph is: random, mutating, a view, whose work, which tensors it makes."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels

__all__ = [
    "argument",
    "changes_nothing",
    "first_tensor",
    "ignores_running_stats",
    "is_check",
    "is_mutation",
    "is_random",
    "keeps_unreduced",
    "last_of",
    "layer_of",
    "output_mask",
    "readers_of",
    "roots_of",
    "same_layout",
    "spare_bytes",
    "talks",
    "tensors_of",
    "transposed_twice",
]

aten = torch.ops.aten


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors a node makes, ``None``s and numbers left out, in order."""
    value = meta.value(node)
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        mask = output_mask(node, len(value))
        return [t for t, made in zip(value, mask, strict=True) if made and isinstance(t, torch.Tensor)]
    return []


def output_mask(node: fx.Node, length: int) -> list[bool]:
    """Which outputs the kernel makes; fake kernels make some that the real one leaves out."""
    named = hasattr(node.target, "_schema") and node.op == "call_function"
    mask = argument(node, "output_mask") if named else None
    return list(mask) if mask is not None and len(mask) == length else [True] * length


def first_tensor(node: fx.Node) -> torch.Tensor:
    """The first of :func:`tensors_of`; ``IndexError`` if the node makes none."""
    return tensors_of(node)[0]


def argument(node: fx.Node, name: str) -> Any:
    """The value of an operator's argument, given or default; ``None`` if it has no such argument."""
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, a.default_value)
    return None


def keeps_unreduced(node: fx.Node) -> fx.Node | None:
    """The argument whose size the result keeps as its storage: three kernels shrink the sizes only."""
    if node.target is aten.col2im.default:
        return node.all_input_nodes[0]
    if node.target not in (aten.mse_loss.default, aten.smooth_l1_loss.default):
        return None
    if argument(node, "reduction") == 0:
        return None
    a, b = node.all_input_nodes[0], node.all_input_nodes[-1]
    return max(a, b, key=lambda n: meta.tensor(n).numel())


def spare_bytes(node: fx.Node) -> int:
    """What a result's storage has beyond its sizes: the CPU's bags have room for one index more."""
    bag = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    if not isinstance(bag, fx.Node) or bag.target is not aten._embedding_bag.default:
        return 0
    made = meta.tensor(node)
    return made.element_size() if made.device.type == "cpu" and made.numel() else 0


_GIVEN_STATE = ("philox_seed", "philox_offset", "rng_state")


def is_random(node: fx.Node) -> bool:
    """Whether the call draws from a generator, by torch's own tag and its probability."""
    if node.target is kernels.dropout_mask:
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if any(argument(node, name) is not None for name in _GIVEN_STATE):
        return False  # a backward, which draws again what its forward drew
    certain = argument(node, "dropout_p") == 0 or argument(node, "p") == 0 or argument(node, "train") is False
    return not certain


def talks(node: fx.Node) -> bool:
    """Whether the call is a collective: all ranks make it, in one order, each as often as the others."""
    return node.target is kernels.collective or _compat.talks(node.target)


def is_check(node: fx.Node) -> bool:
    """Whether all that the call does is to raise, where a matrix was singular."""
    return node.target is aten._linalg_check_errors.default


def is_mutation(node: fx.Node) -> bool:
    """Whether the call writes to an argument; cuDNN's batch norm moves its statistics, its schema silent."""
    if node.target in (kernels.write_over, kernels.scale_gradient, kernels.sum_over):
        return True
    if node.target is aten.cudnn_batch_norm.default:
        return argument(node, "training") is True and argument(node, "running_mean") is not None
    return _compat.writes_arguments(node.target)


_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)|^(\d+)(?:\.|$)")


def layer_of(path: str) -> str:
    """The outermost numbered module of a path: ``h.3.attn.c_proj`` -> ``h.3``; else its first name."""
    match = _LAYER.match(path)
    return (match.group(1) or match.group(2)) if match else path.split(".")[0]


_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


def changes_nothing(node: fx.Node) -> bool:
    """Whether the result is the first argument: an alias, or a view of the same layout at any sizes."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _ALIASES:
        return True
    before, after = meta.value(node.args[0]), meta.value(node)
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)) or is_mutation(node):
        return False
    return _compat.storage_key(before) == _compat.storage_key(after) and _same_view(
        meta.symbolic(node.args[0]), meta.symbolic(node)
    )


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors look at one storage in the same way, at whatever sizes they have."""
    express = _compat.expression_of
    return (
        [*map(express, (*a.shape, *a.stride()))] == [*map(express, (*b.shape, *b.stride()))]
        and express(a.storage_offset()) == express(b.storage_offset())
        and a.dtype == b.dtype
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
    )


def same_layout(grad: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether a gradient has the dtype and strides that autograd gives one of ``leaf``."""
    if grad.dtype != leaf.dtype:
        return False
    if leaf.is_contiguous() and grad.shape == leaf.shape and grad.stride() == leaf.stride():
        return True  # one like the leaf is contiguous too
    pairs = zip(grad.shape, grad.stride(), torch.empty_like(leaf).stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def last_of(node: fx.Node) -> fx.Node:
    """The node, or the last ``getitem`` of its group, so that an insertion does not split the group."""
    last = node if node.target is not operator.getitem else node.args[0]
    assert isinstance(last, fx.Node)
    while last.next.op == "call_function" and last.next.target is operator.getitem:
        last = last.next
    return last


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Calls that read the node's storage, directly or through views."""
    key = _compat.storage_key(meta.tensor(node))
    out: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if any(_compat.storage_key(t) == key for t in tensors_of(user)):
            stack.extend(user.users)
        else:
            out.append(user)
    return out


def transposed_twice(node: fx.Node) -> fx.Node | None:
    """What ``t(t(x))`` is a view of, which autograd writes for each weight and its gradient."""
    t = torch.ops.aten.t.default
    inner = node.args[0] if node.target is t else None
    twice = isinstance(inner, fx.Node) and inner.target is t
    return inner.args[0] if twice else None  # type: ignore[union-attr,return-value]


def ignores_running_stats(node: fx.Node) -> bool:
    """A batch norm in training mode normalizes with the batch's statistics, in both directions."""
    name = str(getattr(node.target, "overloadpacket", ""))
    if "batch_norm" not in name:
        return False
    return (
        argument(node, "training") is True
        or argument(node, "train") is True
        or name in ("aten.cudnn_batch_norm_backward", "aten.miopen_batch_norm_backward")
    )


def roots_of(node: fx.Node) -> dict[int, fx.Node]:
    """For a call with several outputs: tensor position -> its ``getitem``."""
    value: Any = meta.value(node)
    if isinstance(value, torch.Tensor):
        return {0: node}
    made = [
        isinstance(x, torch.Tensor) and m for x, m in zip(value, output_mask(node, len(value)), strict=True)
    ]
    position = {i: sum(made[:i]) for i, m in enumerate(made) if m}
    out: dict[int, fx.Node] = {}
    for user in node.users:
        index = user.args[1] if user.target is operator.getitem else None
        if isinstance(index, int) and index in position:
            out.setdefault(position[index], user)
    return out
