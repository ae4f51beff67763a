"""``einsum`` of two matrices, which is a product of batches of one, restated as the product of matrices.

``einsum("nc,mc->nm", a, b)`` is ``bmm`` of ``(1, n, c)`` and ``(1, c, m)`` between permutations that move
dims of one, in the backward too.  Such a permutation is a view, and such a product one of matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph.chunks.rows import shape_of
from planner.graph.draft import Draft

__all__ = ["of_matrices"]

aten = torch.ops.aten

_MOVES = frozenset({aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim})


def of_matrices(draft: Draft) -> None:
    """Restate products of batches of one of ``draft``, and what leads to them and from them."""
    products = [n for n in draft.graph.nodes if n.target is aten.bmm.default and shape_of(n)[0] == 1]
    for node in products:
        a, b = (_matrix(draft, n, node) for n in node.args)
        product = _call(draft, node, aten.mm.default, a, b)
        draft.replace(node, _call(draft, node, aten.view.default, product, list(shape_of(node))))
    if products:
        for node in list(draft.graph.nodes):
            _as_view(draft, node)
        draft.sweep()


def _matrix(draft: Draft, node: Any, here: fx.Node) -> fx.Node:
    """A batch of one matrix as that."""
    sizes = list(shape_of(node)[1:])
    if node.target is aten.transpose.int and {d % 3 for d in node.args[1:]} == {1, 2}:
        return _call(draft, here, aten.t.default, _matrix(draft, node.args[0], here))
    if node.target is aten.view.default and list(shape_of(node.args[0])) == sizes:
        return node.args[0]
    return _call(draft, here, aten.reshape.default, node, sizes)


def _as_view(draft: Draft, node: fx.Node) -> None:
    """A permutation in which only dims of one change places is a view, and a view of a view one view."""
    base = node.args[0] if node.args else None
    if (node.target is not aten.view.default and node.target not in _MOVES) or not isinstance(base, fx.Node):
        return
    # dims of one size and one step, as an expansion has, are the same whichever comes first
    dims = (
        [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1]
        for t in map(meta.tensor, (base, node))
    )
    if node.target in _MOVES and next(dims) != next(dims):
        return
    while base.target is aten.view.default and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    if shape_of(base) == shape_of(node):
        draft.replace(node, base)
    elif base is not node.args[0] or node.target in _MOVES:
        draft.replace(node, _call(draft, node, aten.view.default, base, list(shape_of(node))))


def _call(draft: Draft, here: fx.Node, target: Any, *args: Any) -> fx.Node:
    name = f"{target.__name__.split('.')[0]}_of_matrices"
    with draft.graph.inserting_before(here):
        node = draft.graph.create_node("call_function", target, args, name=name)
    values = fx.map_arg(args, meta.value)
    with _compat.fake_mode_of(meta.tensor(here)), torch.no_grad():
        meta.describe(node, target(*values), here)
    return node
