"""A graph of Dynamo's that holds for many sizes: each that it is called with is planned by itself.

Once a size has changed, ``torch.compile`` traces it as a symbol, unless it is told not to.  A plan is for
bytes, so the symbols are replaced by the numbers of a call, and what results is a graph as Dynamo would have
cut it with ``dynamic=False``.  What Dynamo asked of the symbols, it guards: the same graph holds for all of
its sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from planner import _compat

__all__ = ["BySize", "is_by_size"]

log = logging.getLogger(__name__)

Run = Callable[..., Any]

_SYMBOLIC = torch.SymInt, torch.SymFloat, torch.SymBool


def is_by_size(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph that is differentiated has symbols for sizes, all given, and none for other numbers."""
    symbols = [x for x in inputs if not isinstance(x, torch.Tensor)]
    if not symbols or not all(isinstance(x, torch.SymInt) for x in symbols) or not torch.is_grad_enabled():
        return False
    given = {_compat.expression_of(x) for x in symbols}
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    numbers = [x for x in values if isinstance(x, _SYMBOLIC)]
    sizes = (n for x in values if isinstance(x, torch.Tensor) for n in (*x.shape, *x.stride()))
    made = (_compat.expression_of(x) for x in (*numbers, *(n for n in sizes if isinstance(n, torch.SymInt))))
    return all(x.free_symbols <= given for x in made) and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )


class BySize:
    """``cut(gm, inputs)`` is told of the graph of each size, and gives what runs it.

    As many sizes are planned as Dynamo compiles a piece of code for; the others run compiled for all sizes,
    as torch compiles them, which is said once.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], cut: Callable[[fx.GraphModule, list[Any]], Run]
    ) -> None:
        self.gm, self.inputs, self.cut = gm, list(inputs), cut
        self.numbers = [i for i, x in enumerate(inputs) if not isinstance(x, torch.Tensor)]
        self.tensors = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        self._runs: dict[tuple[int, ...], Run] = {}
        self._others: Run | None = None
        self._compile_for_all = _compat.compiles_later(gm, self.inputs)

    def __call__(self, *args: Any) -> Any:
        sizes = tuple(int(args[i]) for i in self.numbers)
        run = self._runs.get(sizes)
        if run is None and len(self._runs) < _compat.recompile_limit():
            with _compat.modes_set_aside():  # what is compiled is not of the step that is seen
                run = self._runs[sizes] = self._at(args)
        if run is None:
            return self._unplanned()(*args)
        return run(*(args[i] for i in self.tensors))

    def _unplanned(self) -> Run:
        if self._others is None:
            log.warning(
                "a graph is planned at %d sizes (torch._dynamo.config.recompile_limit); at all others it is "
                "compiled as torch compiles it, outside the plan and its budget. Pad batches to few sizes, "
                "or raise the limit",
                len(self._runs),
            )
            self._others = self._compile_for_all()
        return self._others

    def _at(self, args: Sequence[Any]) -> Run:
        """What runs the graph of these sizes: of numbers that it gave, the rest gives none."""
        gm = _compat.copy_of(self.gm)
        values = {_compat.expression_of(self.inputs[i]): int(args[i]) for i in self.numbers}
        for node in list(gm.graph.nodes):
            known = node.meta.pop("example_value", None)
            if isinstance(known, _SYMBOLIC):
                number = _compat.evaluated(_compat.expression_of(known), values)
                _replace(node, number)
                gm.graph.erase_node(node)
        (end,) = gm.graph.find_nodes(op="output")
        gives = list(end.args[0])
        end.args = (tuple(x for x in gives if isinstance(x, fx.Node)),)
        gm.recompile()
        run = self.cut(gm, _compat.static_fakes([args[i] for i in self.tensors]))
        numbers = [None if isinstance(x, fx.Node) else x for x in gives]
        return run if all(x is None for x in numbers) else _with_numbers(run, numbers)


def _replace(node: fx.Node, number: float) -> None:
    def known(value: fx.Node) -> Any:
        return number if value is node else value

    for user in tuple(node.users):
        user.args = fx.map_arg(user.args, known)
        user.kwargs = fx.map_arg(user.kwargs, known)


def _with_numbers(run: Run, numbers: Sequence[float | None]) -> Run:
    def whole(*args: Any) -> tuple[Any, ...]:
        made = iter(run(*args))
        return tuple(next(made) if x is None else x for x in numbers)

    return whole
