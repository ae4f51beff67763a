"""Writes into a part of a storage, as eager makes them: in place where nothing reads what was there.

A trace has no writes: ``x[:, a:b] = y`` is ``slice_scatter(x, copy(x[:, a:b], y), 1, a, b)``, two kernels
that clone the whole storage under ``x``, and ``x[0, 1] += y`` one more for each view on the way.  Here such
a group becomes one call, :func:`planner.graph.kernels.written`, which has two forms: on a copy of the
storage, and over it (:func:`over_form`).  Which it is, is decided where a schedule is known: over it, if
that copy of ``x`` is not read again (``GraphOp.reuses``).  So a write can be repeated like any other call.
Ops that copy their first operand to change some of it (``index_put``, ``masked_fill``) have two forms too.

Known limit: what an in-place op on a part made is kept beside the whole where the backward reads it and it
is laid out otherwise than the part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft

__all__ = ["in_place_form", "over_form", "write_parts"]

aten = torch.ops.aten

# Scatter -> the view that it writes to; further arguments are the same.
_VIEWS: dict[Any, Any] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
    aten.as_strided_scatter.default: aten.as_strided.default,
}

# Ops that copy their first operand and then change some of it: the same with and without the copy.
_CHANGES: dict[Any, Any] = {
    aten.index_put.default: aten.index_put_.default,
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar,
    aten.index_fill.int_Tensor: aten.index_fill_.int_Tensor,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor: aten.masked_fill_.Tensor,
    aten.masked_scatter.default: aten.masked_scatter_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
}

# Pointwise ops, which give the same numbers in place.
_POINTWISE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
    aten.neg.default: aten.neg_.default,
    aten.lerp.Scalar: aten.lerp_.Scalar,
    aten.lerp.Tensor: aten.lerp_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addcdiv.default: aten.addcdiv_.default,
    aten.clamp.default: aten.clamp_.default,
    aten.remainder.Scalar: aten.remainder_.Scalar,
    aten.relu.default: aten.relu_.default,
    aten.exp.default: aten.exp_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}


_OF_OURS: dict[Any, Any] = {
    kernels.gradient_scaled: kernels.scale_gradient,
    kernels.sum_with: kernels.sum_over,
}


def in_place_form(node: fx.Node) -> Any:
    """The op that leaves in its first operand what ``node`` makes, bit for bit; ``None`` if there is none."""
    form = {**_CHANGES, **_POINTWISE, aten.copy.default: aten.copy_.default}.get(node.target)
    operand = node.args[0] if node.args else None
    if form is None or not isinstance(operand, fx.Node):
        return None
    before, after = meta.value(operand), meta.tensor(node)
    if not isinstance(before, torch.Tensor):
        return None
    alike = before.shape == after.shape and before.dtype == after.dtype and before.device == after.device
    return form if alike else None


def over_form(node: fx.Node) -> Any:
    """What to call in place of ``node`` to have its result on the storage of its first operand."""
    if node.target is kernels.written:
        return kernels.write_over
    if node.target in _OF_OURS:
        form: Any = _OF_OURS[node.target]
    elif node.target is aten.addmm.default:  # of a sum of products, one more
        total = meta.tensor(node.all_input_nodes[0])
        form = aten.addmm_.default if total.shape == meta.tensor(node).shape else None
    else:
        form = in_place_form(node) if node.target in _CHANGES else None
    if form is None:
        return None
    operand, made = meta.tensor(node.all_input_nodes[0]), meta.tensor(node)
    whole = operand.untyped_storage().nbytes() == operand.numel() * operand.element_size()
    same = whole and operand.stride() == made.stride() and operand.storage_offset() == 0
    return form if same and node.args[0] is node.all_input_nodes[0] else None


def write_parts(draft: Draft) -> Did:
    """Turn each group of ``copy``, op and scatters into one call."""
    draft.storage_bytes = dict(draft.storage_bytes)
    groups = 0
    for node in list(draft.graph.nodes):
        if node.op != "call_function" or node.kwargs.keys() - {"non_blocking"}:
            continue
        if node.target in _VIEWS and not node.kwargs:
            groups += _scattered(draft, node)
        elif node.target is aten.copy.default and not _is_scattered(node):
            groups += _replaced(draft, node, node.args[0], "copy_.default", node.args[1:2], ())
    draft.sweep()
    return {"writes": groups}


def _is_scattered(copy: fx.Node) -> bool:
    """Whether a copy goes into a scatter, which is met later and takes it in."""
    return any(user.target in _VIEWS and user.args[1] is copy for user in copy.users)


def _scattered(draft: Draft, node: fx.Node) -> bool:
    """A scatter, what it writes, and how that was made of the part it is written to."""
    base, source, *where = node.args
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    view = (_VIEWS[node.target], *where)
    call, args = "copy_.default", (source,)
    steps: tuple[Any, ...] = ((_name(view[0]), *where),)
    if _onto(draft, source, base, view):
        made: tuple[Any, ...] = source.args
        if source.target is kernels.written:
            call, args, steps = made[1], made[2], steps + made[3]
        elif source.target is aten.copy.default:
            args = made[1:2]
        elif in_place_form(source) is not None and _may_move(source):
            call, args = _name(in_place_form(source)), made[1:]
    return _replaced(draft, node, base, call, args, steps)


def _onto(draft: Draft, source: fx.Node, base: fx.Node, view: tuple[Any, ...]) -> bool:
    """Whether ``source`` is made of that part of ``base`` to which it is written."""
    part = source.args[0] if source.args else None
    if source.kwargs or not isinstance(part, fx.Node) or not isinstance(meta.value(part), torch.Tensor):
        return False
    if part.target is view[0] and part.args == (base, *view[1:]):
        return True
    if draft.sizes or any(isinstance(a, fx.Node) for a in view):
        return False  # equal at these sizes says nothing of others
    whole, seen = meta.tensor(base), meta.tensor(part)
    if _compat.storage_key(whole) != _compat.storage_key(seen):
        return False
    with _compat.fake_mode_of(whole):
        return _form_of(view[0](whole, *view[1:])) == _form_of(seen)


def _may_move(source: fx.Node) -> bool:
    """Whether nobody else reads what is written, or may as well read it where it is written."""
    part, made = meta.tensor(source.all_input_nodes[0]), meta.tensor(source)
    return len(source.users) == 1 or part.stride() == made.stride()


def _replaced(draft: Draft, node: fx.Node, base: Any, call: str, args: Any, steps: tuple[Any, ...]) -> bool:
    """``written(base, call, args, steps)`` in place of ``node``; ``False`` where the layout forbids it."""
    before = meta.tensor(base)
    if _overlaps(before) or before.untyped_storage().nbytes() % before.element_size():
        return False
    # Where eager writes: what was written may be read before the trace comes to the whole.
    inputs = {n for a in (base, args, steps) for n in _nodes_in(a)}
    source = node.args[1] if node.target in _VIEWS else None
    taken = source if isinstance(source, fx.Node) and source not in inputs else None
    with draft.graph.inserting_before(node) if taken is None else draft.graph.inserting_after(taken):
        new = draft.graph.call_function(kernels.written, (base, call, tuple(args), steps), name=node.name)
    with _compat.fake_mode_of(before):
        count = before.untyped_storage().nbytes() // before.element_size()
        whole = torch.empty((count,), dtype=before.dtype, device=before.device)
        meta.describe(new, whole.as_strided(before.size(), before.stride(), before.storage_offset()), node)
    symbolic = draft.storage_bytes.get(_compat.storage_key(before))
    if symbolic is not None:
        draft.storage_bytes[_compat.storage_key(whole)] = symbolic
    draft.replace(node, new)
    draft.graph.erase_node(node)
    if taken is not None:
        _read_from(draft, taken, new, steps)
    return True


def _read_from(draft: Draft, taken: fx.Node, new: fx.Node, steps: tuple[Any, ...]) -> None:
    """Whoever reads what was written, and is not written now, reads it where it was written."""
    held = taken in draft.outputs or taken in {*draft.gradients.values(), *draft.mutations.values()}
    if not taken.users and not held:
        draft.graph.erase_node(taken)
        return
    depth = 1 if taken.target is kernels.written else len(steps)
    part = new
    for name, *where in steps[:depth]:
        with draft.graph.inserting_after(part):
            view = draft.graph.call_function(kernels.aten_op(name), (part, *where))
        with _compat.fake_mode_of(meta.tensor(new)):
            values = fx.map_arg(tuple(where), meta.value)
            meta.describe(view, kernels.aten_op(name)(meta.tensor(part), *values), taken)
        part = view
    draft.replace(taken, part)
    draft.graph.erase_node(taken)


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def _name(op: Any) -> str:
    return str(op).removeprefix("aten.")


def _form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether some elements may be one; a clone of such a tensor has another layout."""
    return any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
