"""Backward calls that may write their result over an operand.

A gradient on its way is often read once more and never again: added to another, scaled, sent through
a pointwise derivative.  Autograd's engine adds such gradients in place; a captured graph never does,
which costs it fresh memory at every such call and, where the call is the peak (the gradient of a
language model's loss), a whole gradient of bytes.  Calls of the backward run exactly once in every
plan, so here it is safe to decide once and for all: where the operand is a whole storage made by the
backward, of the result's layout, and nothing reads it later, the call is replaced by its in-place or
``out=`` form, bit for bit the same.

Known limits: softmax derivatives are written in place on the CPU only, where their kernels were read
and are tested, and over contiguous gradients only: torch writes others wrongly.  Calls of the forward are
left alone, since a plan may repeat them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from planner._compat import storage_key
from planner.capture import meta
from planner.graph.draft import Did
from planner.graph.nodes import is_mutation, tensors_of

__all__ = ["IN_PLACE", "destination", "leave_sums_to_engine", "write_apart", "write_in_place"]

aten = torch.ops.aten

MOST, MOST_SUMS = 3, 24  # gradients for one tensor, and sums in all, that are left to the engine

# Call -> its in-place form, and which operands it may overwrite.
IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {
    aten.add.Tensor: (aten.add_.Tensor, (0, 1)),
    aten.mul.Tensor: (aten.mul_.Tensor, (0, 1)),
    aten.mul.Scalar: (aten.mul_.Scalar, (0,)),
    aten.sub.Tensor: (aten.sub_.Tensor, (0,)),
    aten.div.Tensor: (aten.div_.Tensor, (0,)),
    aten.div.Scalar: (aten.div_.Scalar, (0,)),
    aten.neg.default: (aten.neg_.default, (0,)),
}

BY_COMPONENT = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.neg.default})  # complex as two real calls

# Call -> its form with a given result, and the name of that argument; they overwrite their first operand.
OUT: dict[Any, tuple[Any, str]] = {
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
}
OUT_ON_CPU: dict[Any, tuple[Any, str]] = {
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, "out"),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input"),
}


def write_in_place(
    backward: Sequence[fx.Node], kept: Collection[fx.Node], tangents: Collection[fx.Node] = ()
) -> Did:
    """Replace what can be replaced among ``backward``, calls in execution order, views included.

    ``kept``      nodes whose storages the caller holds: gradients and outputs.
    ``tangents``  gradients of outputs, which may come laid out otherwise than they were traced.

    Of a replaced node :func:`planner.capture.meta.over` is the operand whose storage its result lies on.
    """
    places = _Places(backward, kept)
    follow = _laid_out_as(tangents, backward)
    written = 0
    for node in backward:
        for operand in _overwritable(node):
            if storage_key(meta.tensor(node)) in places.held or meta.is_engines(node):
                continue
            # A result is laid out as its first operand; gradients that are summed over it are by its layout.
            if operand is not node.args[0] and not follow.isdisjoint(node.all_input_nodes):
                continue
            if places.is_last_read(operand, node) and _same_place(operand, node):
                _replace(node, operand)
                written += 1
                break
    return {"calls": written}


def _laid_out_as(tangents: Collection[fx.Node], backward: Sequence[fx.Node]) -> set[fx.Node]:
    """Those of ``tangents`` that have a layout, and what lies on them or follows it."""
    found = {n for n in tangents if isinstance(meta.value(n), torch.Tensor) and meta.tensor(n).numel() > 1}
    for node in backward:
        above = found.intersection(node.all_input_nodes)
        if not above or not isinstance(meta.value(node), torch.Tensor):
            continue
        tags, key = getattr(node.target, "tags", ()), storage_key(meta.tensor(node))
        lies_on = any(storage_key(meta.tensor(n)) == key for n in above)
        alike = any(meta.tensor(n).shape == meta.tensor(node).shape for n in above)
        if lies_on or (alike and (torch.Tag.pointwise in tags or node.target in _FOLLOW)):
            found.add(node)
    return found


_FOLLOW = frozenset({aten.clone.default, aten._to_copy.default, aten.native_dropout_backward.default})


def leave_sums_to_engine(backward: Sequence[fx.Node], kept: Sequence[fx.Node]) -> Did:
    """Leave sums of gradients to the engine, given what they add, where that takes what they take here.

    ``kept``  gradients and outputs, as often as they are.

    Of a few gradients, added up as they come.  Whatever else it is given for the same is then added in
    eager's order.  Each sum counts as a tensor of its own: whether the engine writes over the one before
    depends on who else has looked at it (a meter).  Of more, as a recurrence has them, the step makes one
    sum, so that its backward is not cut behind each (:mod:`planner.rewrite.apart` parts them where it must).
    """
    places = _Places(backward, kept)
    times = Counter(storage_key(t) for node in kept for t in tensors_of(node))
    parts: Counter[int] = Counter()
    chosen = []
    for total in dict.fromkeys(kept):
        sums, terms = _sums(total)
        if not 0 < len(sums) < MOST or times[storage_key(meta.tensor(total))] > 1:
            continue
        keys = {storage_key(meta.tensor(n)) for n in terms}
        if len(keys) == len(terms) and _adds_apart(sums, terms, places):
            chosen.append((sums, keys))
            parts.update(keys)
    left = 0
    for sums, keys in sorted(chosen, key=lambda of: len(of[0])):
        if any(parts[key] > 1 for key in keys) or left + len(sums) > MOST_SUMS:
            continue
        left += len(sums)
        for add in sums:
            meta.note_is_engines(add)
    return {"sums": left}


def _sums(total: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The sums that ``total`` is made by, the first one first, and what they add up, in that order."""
    sums: list[fx.Node] = []
    terms: list[fx.Node] = []
    node = total
    while meta.adds_reads(node) is not None:
        sums.append(node)
        node, term = node.args[:2]  # type: ignore[assignment]
        terms.append(term)  # type: ignore[arg-type]
    return sums[::-1], [node, *reversed(terms)]


def _adds_apart(sums: Sequence[fx.Node], terms: Sequence[fx.Node], places: _Places) -> bool:
    """Whether the engine, given ``terms``, would make these sums, each as a tensor of its own."""
    keys = [storage_key(meta.tensor(node)) for node in terms]
    if not places.held.isdisjoint(keys) or not places.inside.issuperset(keys[1:]):
        return False
    # else the gradient of an output, which is the caller's
    made = places.made(terms[0]) if keys[0] in places.inside else places.position.get(terms[0], -1)
    for add, term in zip(sums, terms[1:], strict=True):
        if add.target is not aten.add.Tensor or add.kwargs or places.made(term) < made:
            return False
        made = places.position[add]
    return True


class _Places:
    """Where the calls of a backward are, and the storages that they lie on.

    ``held``  storages that the caller holds.
    """

    def __init__(self, backward: Sequence[fx.Node], kept: Collection[fx.Node]) -> None:
        self.position = {node: t for t, node in enumerate(backward)}
        self.on: dict[int, list[fx.Node]] = defaultdict(list)
        for node in backward:
            for tensor in tensors_of(node):
                self.on[storage_key(tensor)].append(node)
        self.inside = {k for k, of in self.on.items() if not any(_foreign(n, k, self.position) for n in of)}
        self.held = {storage_key(t) for node in kept for t in tensors_of(node)}

    def made(self, node: fx.Node) -> int:
        """Where the storage of ``node`` is made."""
        return self.position[self.on[storage_key(meta.tensor(node))][0]]

    def is_last_read(self, operand: fx.Node, node: fx.Node) -> bool:
        """Whether nothing reads the storage of ``operand``, which is the backward's, behind ``node``, nor
        ``node`` itself by another name.
        """
        key = storage_key(meta.tensor(operand))
        if key not in self.inside or key in self.held:
            return False
        others = [n for n in node.all_input_nodes if n is not operand]
        if any(storage_key(x) == key for n in others for x in tensors_of(n)):
            return False
        behind = len(self.position)
        last = max(self.position.get(user, behind) for n in self.on[key] for user in n.users)
        return last == self.position[node]


def _foreign(node: fx.Node, key: int, position: dict[fx.Node, int]) -> bool:
    """Whether ``node``, which has a tensor on storage ``key``, has it from outside the backward."""
    return any(
        n not in position and any(storage_key(t) == key for t in tensors_of(n)) for n in node.all_input_nodes
    )


def _overwritable(node: fx.Node) -> list[fx.Node]:
    """Operands that an in-place form of the call would write to."""
    if node.op != "call_function" or not isinstance(meta.value(node), torch.Tensor) or is_mutation(node):
        return []
    # Parts of complex products are sums of two real ones, and kernels differ in which they fuse: by the order
    # of the factors, and between a result of its own and one over a factor that is laid out otherwise.
    if meta.tensor(node).is_complex() and node.target not in BY_COMPONENT:
        return []
    places: tuple[int, ...] = ()
    if node.target in IN_PLACE and not node.kwargs:
        places = IN_PLACE[node.target][1]
    elif node.target in OUT or (node.target in OUT_ON_CPU and meta.tensor(node).device.type == "cpu"):
        places = (0,)
    dense = (
        node.target in OUT_ON_CPU
    )  # which write rows one after the other, however their result is laid out
    operands = [n for p in places if isinstance(n := node.args[p], fx.Node)]
    operands = [n for n in operands if isinstance(meta.value(n), torch.Tensor)]
    return [n for n in operands if not dense or _is_dense(n)]


def _is_dense(node: fx.Node) -> bool:
    """Whether the result is contiguous for certain.

    A fake of a pointwise call may be where the kernel's own result follows an operand that is not.
    """
    tensor = meta.tensor(node)
    alike = [meta.tensor(n) for n in node.all_input_nodes if isinstance(meta.value(n), torch.Tensor)]
    return tensor.is_contiguous() and all(t.is_contiguous() for t in alike if t.shape == tensor.shape)


def _same_place(operand: fx.Node, node: fx.Node) -> bool:
    """Whether the operand is a whole storage laid out as the result."""
    a, b = meta.tensor(operand), meta.tensor(node)
    return (
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.storage_offset() == 0
        and a.untyped_storage().nbytes() == a.numel() * a.element_size()
    )


def _replace(node: fx.Node, operand: fx.Node) -> None:
    if node.target in IN_PLACE:
        node.target = IN_PLACE[node.target][0]
        if node.args[0] is not operand:  # sums and products are the same both ways round
            node.args = (operand, node.args[0])
            first = meta.adds_reads(node)
            if first is not None:
                meta.note_adds_reads(node, 1 - first)
    else:
        form, name = {**OUT, **OUT_ON_CPU}[node.target]
        node.target, node.kwargs = form, {**node.kwargs, name: operand}
    meta.note_over(node, operand)


def destination(node: fx.Node) -> fx.Node | None:
    """The operand over which a replaced call writes its result; ``None`` for any other call."""
    apart = meta.instead_of(node)
    if apart is not None and node.target is not apart:
        operand = node.args[0]
    elif meta.over(node) is None:
        return None
    elif node.target in _APART:
        operand = node.args[0]
    elif node.target in _APART_OF_OUT:
        operand = node.kwargs[_APART_OF_OUT[node.target][1]]
    else:
        return None
    assert isinstance(operand, fx.Node)
    return operand


def write_apart(node: fx.Node) -> None:
    """Let a call that has a :func:`destination` make its result apart from it."""
    apart = meta.instead_of(node)
    if apart is not None:
        node.target = apart
    elif node.target in _APART:
        node.target = _APART[node.target]
    else:
        node.target, name = _APART_OF_OUT[node.target]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}


# In-place form -> the call itself.
_APART = {form: call for call, (form, _) in IN_PLACE.items()}
_APART_OF_OUT = {form: (call, name) for call, (form, name) in {**OUT, **OUT_ON_CPU}.items()}
