"""Runs one of Dynamo's graphs as eager runs it, with its own autograd graph, and holds next to nothing.

The step that is looked at runs so: which gradients come, and whether one is differentiated itself, shows in
it, and whatever comes has eager's bits.  The graph is run in parts, cut where little is alive, each of which
torch runs again when its backward comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from planner import _compat
from planner.regions.cut.writes import base_of, positions, written_by

__all__ = ["Checkpointed"]

_SMALL = 16  # calls that are not worth cutting
SMALL_BYTES = 1 << 20  # of a tensor that is copied rather than relied upon, at most
SMALL_SHARE = 1 / 512  # likewise of the budget


class Checkpointed:
    """``plain`` in parts."""

    def __init__(self, plain: fx.GraphModule) -> None:
        self.plain, self.written = plain, positions(plain.graph)
        self._read: list[tuple[torch.Tensor, int]] = []  # by parts of the last call, and versions
        self._relied: list[tuple[fx.Node, torch.Tensor, int]] = []  # likewise what has no gradient
        self._copied: set[fx.Node] = set()  # that code behind them was seen to write to
        self._cut(_cuts)

    def _cut(self, where: Callable[[Sequence[fx.Node], Mapping[fx.Node, int]], list[int]]) -> None:
        plain = self.plain
        nodes = [n for n in plain.graph.nodes if n.op not in ("placeholder", "output")]
        at = {n: i for i, n in enumerate(nodes)}
        cuts = where(nodes, at)
        self._parts = [_part(plain, nodes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(nodes)], strict=True)]
        # a gradient that is taken within, by torch.func: it says no to a checkpoint around it
        # and what may talk to other ranks, which is done once
        held = [_compat.forbids_hooks(n) or _is_spread(n) for n in nodes]
        self._held = [any(held[a:b]) for a, b in pairwise([0, *cuts, len(nodes)])]
        (output,) = plain.graph.find_nodes(op="output")
        self._results = output.args[0]
        self._given = plain.graph.find_nodes(op="placeholder")
        last = {n: max((at[u] for u in n.users if u in at), default=-1) for n in nodes}
        kept = set(output.all_input_nodes)
        ends = [*cuts, len(nodes)]
        self._gone = [[n for n in nodes if n not in kept and last[n] < end] for end in ends]

    def mend_if_spoilt(self) -> bool:
        """Whether what a part of the last call had read was written over since.

        By another part (through a view that does not show as one): it is one part from here on.  Something
        without a gradient, by whatever code: it is copied from here on.
        """
        spoilt = any(alias._version != version for alias, version in self._read)
        written = {node for node, x, version in self._relied if _compat.version_of(x) != version}
        self._read, self._relied = [], []
        self._copied |= written
        if spoilt:
            self._cut(lambda _, __: [])
        return spoilt or bool(written)

    def __call__(
        self,
        args: Sequence[Any],
        *,
        note: bool = False,
        spoilt: Collection[int] = frozenset(),
        budget_bytes: int = 0,
    ) -> Any:
        """Its outputs.  Where it writes over an argument that has a gradient all is held.

        ``note``    what is read, for :meth:`mend_if_spoilt`, which is to come before the backward; so less is
                    copied, of a known budget.
        ``spoilt``  positions of arguments that others write over before the backward: they are copied.
        """
        if any(args[i].requires_grad for i in self.written):
            return self.plain.forward(*args)
        self._read, self._relied = [], []
        small = min(SMALL_BYTES, budget_bytes * SMALL_SHARE) if note and budget_bytes else SMALL_BYTES
        writes = {self._given[i] for i in self.written.union(spoilt)}
        values: dict[fx.Node, Any] = dict(zip(self._given, args, strict=True))
        for (run, takes, makes), gone, is_held in zip(self._parts, self._gone, self._held, strict=True):
            given = [values[n] for n in takes]
            tracked = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
            if note:
                self._read += ((x.detach(), x._version) for x in tracked if not x.is_leaf)
            copied = [n in self._copied or _is_small(x, small) for n, x in zip(takes, given, strict=True)]
            if note:
                pairs = [
                    (n, x) for n, x, is_copied in zip(takes, given, copied, strict=True) if not is_copied
                ]
                plain = ((n, x) for n, x in pairs if isinstance(x, torch.Tensor) and not x.requires_grad)
                self._relied += ((n, x.detach(), _compat.version_of(x)) for n, x in plain if n not in writes)
            again = _again(run, given, [n in writes for n in takes], copied)
            # to its end: what stops it early is an exception, which libraries that write code wrap in theirs
            with set_checkpoint_early_stop(False):
                made = run(*given) if is_held else checkpoint(again, *tracked, use_reentrant=False)
            values.update(zip(makes, made, strict=True))
            del made
            for node in gone:
                values.pop(node, None)
        return fx.map_arg(self._results, values.__getitem__)


def _is_small(x: Any, most_bytes: float) -> bool:
    return isinstance(x, torch.Tensor) and x.nbytes <= most_bytes and not isinstance(x, nn.Parameter)


def _again(
    run: Callable[..., Any], given: Sequence[Any], writes: Sequence[bool], copied: Sequence[bool]
) -> Callable[..., Any]:
    """``run`` on ``given``, as a function of those that have gradients, whose second call is as the first.

    What it writes, and what is to be ``copied``, is copied for that; the rest must not change in between.
    """
    copies: list[Any] = [None] * len(given)
    versions = [0] * len(given)
    first = True

    def forward(*tracked: Any) -> Any:
        nonlocal first
        rest = iter(tracked)
        now: list[Any] = []
        for i, (x, is_written) in enumerate(zip(given, writes, strict=True)):
            if not isinstance(x, torch.Tensor):
                now.append(x)
            elif x.requires_grad:
                now.append(next(rest))
            elif first:
                if is_written or copied[i]:
                    copies[i] = x.detach().clone()
                now.append(x)
            elif copies[i] is not None:
                now.append(copies[i].clone() if is_written else copies[i])
            elif _compat.version_of(x) != versions[i]:
                raise RuntimeError(
                    f"a tensor {tuple(x.shape)} that the forward read was modified by an inplace operation "
                    "before its backward, which reads it again: in the first step of training in regions the "
                    "forward runs once more in the backward"
                )
            else:
                now.append(x)
        outputs = run(*now)
        if first:
            versions[:] = [_compat.version_of(x) if isinstance(x, torch.Tensor) else 0 for x in given]
        first = False
        return outputs

    return forward


def _cuts(nodes: Sequence[fx.Node], at: Mapping[fx.Node, int]) -> list[int]:
    """Where to cut, so that about the root of the calls is in each part and little is alive in between."""
    count = len(nodes)
    if count < _SMALL:
        return []
    # what is written is written in the part that makes it: another would run again on what is written by then
    joined = [(at[base_of(x)], at[n]) for n in nodes for x in written_by(n) if base_of(x) in at]
    within = {k for made, wrote in joined for k in range(made + 1, wrote + 1)}
    # what is inside a transform of torch.func is nothing outside of it
    depths = itertools.accumulate(map(_compat.nests, nodes))
    within.update(k for k, depth in enumerate(depths, 1) if depth)
    alive = [0] * (count + 1)
    for node in nodes:
        last = max((at[u] for u in node.users if u in at), default=-1)
        size = _bytes_of(node.meta.get("example_value"))
        for k in range(at[node] + 1, last + 1):
            alive[k] += size
    parts = math.isqrt(count)
    spread = [_is_spread(n) for n in nodes]
    turns = {k for k in range(1, count) if spread[k - 1] != spread[k]} - within
    found: list[int] = []
    for k in range(1, parts):
        middle, reach = count * k // parts, count // (2 * parts)
        low = max(middle - reach, (found[-1] if found else 0) + 1)
        window = [i for i in range(low, min(middle + reach + 1, count)) if i not in within]
        if window:
            found.append(min(window, key=lambda i: (alive[i], abs(i - middle))))
    return sorted(turns.union(found))


def _is_spread(node: fx.Node) -> bool:
    """Whether a call reads or makes a tensor that is spread over ranks."""
    made = (n.meta.get("example_value") for n in (node, *node.all_input_nodes))
    return any(_compat.is_spread(type(x)) for of in made for x in _compat.pytree.tree_leaves(of))


def _bytes_of(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes_of, value))
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(_compat.size_hint(n) for n in value.shape) * value.element_size()


def _part(
    plain: fx.GraphModule, nodes: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """A stretch of the graph: what runs it, what it takes and what it makes for others."""
    own = set(nodes)
    takes = list(
        dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in own and x.op != "get_attr")
    )
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in takes:
        new[n] = graph.placeholder(n.name)
    for n in nodes:
        for x in n.all_input_nodes:
            if x.op == "get_attr" and x not in new:
                new[x] = graph.node_copy(x)
        if n not in new:
            new[n] = graph.node_copy(n, new.__getitem__)
    makes = [n for n in nodes if n.op != "get_attr" and any(u not in own for u in n.users)]
    graph.output(tuple(new[n] for n in makes))
    return fx.GraphModule(plain, graph), takes, makes
