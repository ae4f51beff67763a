"""Generated code calls ops as eager does: ``torch.addmm(...)``, not ``torch.ops.aten.addmm.default(...)``.

Both run the same kernel.  The second looks its arguments up in the op's schema at each call, which takes
some two microseconds more than torch's own bindings do.  On a large batch the device hides that; on a small
one the host is what a step waits for, and a rewritten step has as many calls as eager's.

A binding chooses among an op's overloads by the kinds of its arguments.  So each is tried once per kind of
call, on tensors without data and under a mode that stops whatever arrives below autograd: it is taken if
the same op arrives with the same arguments.

Known limit: many backward formulas have no binding and stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from planner._compat import OpOverload, TorchDispatchMode, modes_set_aside, pytree, size_hint
from planner.capture import meta

__all__ = ["bind"]

# By op and kind of call; the op itself where no binding is the same.
_known: dict[Any, Callable[..., Any]] = {}


class _Arrived(BaseException):
    """Thrown from below autograd: no library's handler takes it for an error of the op."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call


class _Stop(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Arrived((func, args, kwargs or {}))


def bind(graph: fx.Graph) -> None:
    """Turn ``graph``'s aten calls into calls of torch's functions and methods where these do the same."""
    with torch.no_grad(), modes_set_aside():
        for node in graph.nodes:
            if isinstance(node.target, OpOverload) and _is_tensor(next(iter(node.args), None)):
                binding = _binding_of(node)
                if isinstance(binding, types.MethodDescriptorType):
                    node.op, node.target = "call_method", binding.__name__
                else:
                    node.target = binding


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(meta.value(argument), torch.Tensor)


def _binding_of(node: fx.Node) -> Callable[..., Any]:
    """What to call in place of the node's op; the op itself where nothing else is the same."""
    op: Any = node.target
    leaves, form = pytree.tree_flatten((node.args, node.kwargs))
    key = op, form, tuple(map(_kind, leaves))
    if key not in _known:
        args, kwargs = pytree.tree_unflatten([_stand_in(leaf) for leaf in leaves], form)
        _known[key] = next(
            (b for b in _bindings(op) if _same(_arrival(op, args, kwargs), _arrival(b, args, kwargs))), op
        )
    return _known[key]


def _bindings(op: Any) -> list[Callable[..., Any]]:
    """Functions and methods of that name, where they are torch's own and not Python around it."""
    name = op.overloadpacket.__name__
    found = [getattr(home, name, None) for home in (torch, torch.nn.functional, torch.Tensor)]
    native = types.BuiltinFunctionType, types.MethodDescriptorType
    return [f for f in found if isinstance(f, native)]


def _kind(leaf: Any) -> object:
    """All that a binding's choice of overload looks at."""
    if not isinstance(leaf, fx.Node):
        return type(leaf)
    value = meta.value(leaf)
    return ("tensor", value.dim() == 0) if isinstance(value, torch.Tensor) else int


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, fx.Node):
        return leaf
    value = meta.value(leaf)
    if not isinstance(value, torch.Tensor):
        return 1 if value is None else size_hint(value)
    sizes, strides = [*map(size_hint, value.shape)], [*map(size_hint, value.stride())]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def _arrival(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """The first op below autograd that a call comes to, with its arguments; ``None`` if to none."""
    try:
        with _Stop():
            function(*args, **kwargs)
    except _Arrived as arrived:
        return arrived.call
    except (TypeError, RuntimeError, ValueError, IndexError):  # the binding does not take such arguments
        return None
    return None


def _same(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    if a is None or b is None or a[0] is not b[0]:
        return False
    left, form = pytree.tree_flatten(a[1:])
    right, other = pytree.tree_flatten(b[1:])
    return form == other and all(map(_equal, left, right))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return type(a) is type(b) and a == b
