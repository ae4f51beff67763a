"""How often autograd reads a tensor, and the gradients that it adds up for it.

The engine runs formulas in reverse order of their calls, whichever part of the step they are of, and adds
each gradient of a tensor to what came before.  So where several parts of a step read one tensor, a part hands
out its gradients one by one: one sum made inside would be rounded otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import get_gradient_edge

from planner.capture import meta
from planner.errors import TraceError

__all__ = ["ReadsOf", "note_summands", "reached_from", "readers", "summands"]


class ReadsOf:
    """Counts the gradients that come for some tensors while a backward is traced.

    ``counts``  by the tensors' names.
    """

    def __init__(self) -> None:
        self.counts: Counter[str | int] = Counter()
        self._hooks: list[Any] = []

    def watch(self, tensors: Mapping[str | int, torch.Tensor], roots: Iterable[torch.Tensor]) -> None:
        """The next backward goes from ``roots`` to ``tensors``."""
        self.forget()
        self.counts.clear()
        for node, reads in readers(tensors, roots):
            self._hooks.append(node.register_hook(self._counting(reads)))

    def _counting(self, reads: Mapping[int, str | int]) -> Any:
        def count(gradients: tuple[torch.Tensor | None, ...], _: Any) -> None:
            self.counts.update(key for i, key in reads.items() if gradients[i] is not None)

        return count

    def forget(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def reached_from(
    roots: Iterable[torch.Tensor], tensors: Mapping[str | int, torch.Tensor]
) -> frozenset[str | int]:
    """Names of those ``tensors`` that autograd comes by on its way from ``roots``."""
    read = {key for _, reads in readers(tensors, roots) for key in reads.values()}
    ends = {get_gradient_edge(root) for root in roots if root.requires_grad}
    own = {key for key, t in tensors.items() if t.requires_grad and get_gradient_edge(t) in ends}
    return frozenset(read | own)


def readers(
    tensors: Mapping[str | int, torch.Tensor], roots: Iterable[torch.Tensor]
) -> Iterator[tuple[Any, dict[int, str | int]]]:
    """The nodes of autograd's graph behind ``roots`` that lead to ``tensors``, and by which input."""
    edges = {}
    for key, tensor in tensors.items():
        if tensor.requires_grad:
            edge = get_gradient_edge(tensor)
            edges[edge.node, edge.output_nr] = key
    ends = {node for node, _ in edges}
    seen = {root.grad_fn for root in roots if root.grad_fn is not None}
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        reads = {}
        for i, (following, number) in enumerate(node.next_functions):
            found = None if following is None else edges.get((following, number))
            if found is not None:
                reads[i] = found
            elif following is not None and following not in seen and following not in ends:
                seen.add(following)
                waiting.append(following)
        if reads:
            yield node, reads


def summands(gradient: fx.Node, count: int) -> list[fx.Node]:
    """The ``count`` gradients whose sum the engine made in ``gradient``, in its order.

    Raises ``TraceError`` where they cannot be told apart.
    """
    behind: list[fx.Node] = []
    node = gradient
    for k in range(count - 1):
        alone = k == 0 or len(node.users) == 1
        if not (meta.sums_gradients(node) and len(node.all_input_nodes) <= 2 and alone):
            raise TraceError(
                f"the {count} gradients that are added up for {gradient.name} cannot be told apart"
            )
        node, last = node.args[:2]  # type: ignore[assignment]
        behind.append(last)  # type: ignore[arg-type]
    return [node, *reversed(behind)]


def note_summands(gradient: fx.Node, count: int) -> None:
    """Note which calls add up the ``count`` gradients of ``gradient``; raises as :func:`summands`."""
    summands(gradient, count)
    node = gradient
    for _ in range(count - 1):
        meta.note_adds_reads(node)
        node = node.args[0]  # type: ignore[assignment]
