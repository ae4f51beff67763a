"""Inputs without memory, and sizes that vary from batch to batch, as symbols.

A capture with symbols holds for every batch that meets its guards.  A plan needs numbers, so the
captured graph is *evaluated*: every symbolic tensor becomes a fake one at the sizes planned for, on
storages shared as before, and every size the program computes becomes an argument of it by the name
of its expression.  From there on nothing is symbolic; a batch of other sizes only needs the values
of those expressions, one compiled function of its own sizes.

Right where what the trace looked at is a guard, which is what torch's shape environment sees to:
sizes of 0 and 1 are never symbols, a comparison the model makes is a condition, and a condition that
does not hold means another trace.  Known weakness: a symbolic trace takes three to six times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from planner import _compat
from planner._compat import FakeTensor, FakeTensorMode, pytree
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.errors import TraceError

__all__ = ["Dims", "Dynamic", "Sizes", "evaluate", "fake_inputs", "fake_of", "varying_dims"]

Dynamic: TypeAlias = bool | Mapping[str | int, Sequence[int]]

# For each tensor among the flattened inputs, which of its dimensions vary.
Dims: TypeAlias = tuple[tuple[int, ...], ...]


def varying_dims(inputs: Inputs, dynamic: Dynamic) -> Dims:
    """Which dimensions of which tensor may vary.

    ``True``: all of integer and boolean tensors (token ids, masks, labels); of floating ones the first
    two (batch, time), or the first alone where there are more than three (images, tiles).  A mapping
    names them: keyword or position of an argument -> its dimensions; what it leaves out is fixed.
    Features of 0 or 1 elements, and dimensions that the model fixes, turn out constant in the trace.

    Raises ``ValueError`` for a name that is no argument or a dimension that does not exist.
    """
    args, kwargs = inputs.args, dict(sorted(inputs.kwargs.items()))
    known: dict[str | int, Any] = dict(enumerate(args))
    known.update(kwargs)
    if isinstance(dynamic, bool):
        return tuple(_usual_dims(t) if dynamic else () for t in inputs.tensors())
    if unknown := [k for k in dynamic if k not in known]:
        raise ValueError(
            f"dynamic names {unknown[0]!r}, which is not among the inputs ({', '.join(map(repr, known))})"
        )
    out: list[tuple[int, ...]] = []
    for name, argument in known.items():
        wanted = dynamic.get(name, ())
        for tensor in (x for x in pytree.tree_leaves(argument) if isinstance(x, torch.Tensor)):
            if bad := [d for d in wanted if not -tensor.dim() <= d < tensor.dim()]:
                raise ValueError(f"dynamic names dimension {bad[0]} of {name!r}, which has {tensor.dim()}")
            out.append(tuple(sorted({d % tensor.dim() for d in wanted})))
    return tuple(out)


def _usual_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return tuple(range(tensor.dim()))
    return tuple(range(min(tensor.dim(), 2 if tensor.dim() <= 3 else 1)))


@dataclass(frozen=True, eq=False)
class Sizes:
    """The symbols of one capture.

    ``symbols``     sympy symbols; ``places`` the (input tensor, position in its layout) each stands for.
    ``layouts``     of each input tensor its shape and strides, as expressions of the symbols.
    ``conditions``  what must hold for the graph to be right.
    """

    symbols: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    layouts: tuple[tuple[Any, ...], ...]
    conditions: tuple[Any, ...]

    @classmethod
    def of(cls, fakes: Sequence[torch.Tensor]) -> Sizes:
        """Symbols and layouts of fakes as they were made; what the trace learns comes with ``guarded``.

        A stride that does not follow from the sizes, as of a slice, is a symbol too.
        """
        layouts = tuple(tuple(map(_compat.expression_of, (*t.shape, *t.stride()))) for t in fakes)
        found: dict[Any, tuple[int, int]] = {}
        for i, layout in enumerate(layouts):
            for k, size in enumerate(layout):
                if _compat.is_symbol(size):
                    found.setdefault(size, (i, k))  # the first, if one tensor is given twice
        return cls(tuple(found), tuple(found.values()), layouts, ())

    def guarded(self, mode: FakeTensorMode) -> Sizes:
        """With the guards of the finished trace."""
        conditions = tuple(_compat.guards_of(mode, self.symbols))
        return Sizes(self.symbols, self.places, self.layouts, conditions)

    def read(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Values of the symbols in a batch."""
        layouts = [(*t.shape, *t.stride()) for t in tensors]
        return tuple(layouts[i][k] for i, k in self.places)

    def hold(self, values: Sequence[int]) -> bool:
        """Whether the captured graph is right at these values."""
        try:
            return all(self._hold(*values))
        except ZeroDivisionError:  # an empty batch, in a condition that divides by its size
            return False

    def admit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the captured graph is right for a batch."""
        return self.fit(tensors) and self.hold(self.read(tensors))

    def fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether every tensor of a batch is laid out as the capture saw it, at the batch's own sizes."""
        if any(t.dim() * 2 != len(layout) for t, layout in zip(tensors, self.layouts, strict=True)):
            return False
        found = tuple(n for t in tensors for n in (*t.shape, *t.stride()))
        expected: tuple[int, ...] = self._layout(*self.read(tensors))
        return found == expected

    def inputs_at(self, inputs: Inputs, values: Sequence[int]) -> Inputs:
        """``inputs`` as fake tensors at other sizes."""
        flat, spec = inputs.flatten()
        at = iter(self._layout(*values))
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def sized(tensor: torch.Tensor) -> torch.Tensor:
            shape, stride = ([next(at) for _ in range(tensor.dim())] for _ in range(2))
            with mode:
                fake = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
                return fake.requires_grad_(tensor.requires_grad)

        args, kwargs = pytree.tree_unflatten(
            [sized(x) if isinstance(x, torch.Tensor) else x for x in flat], spec
        )
        return Inputs(args, kwargs, inputs.of_others)

    @cached_property
    def _hold(self) -> Any:
        return _compat.compiled(self.conditions, self.symbols)

    @cached_property
    def _layout(self) -> Any:
        return _compat.compiled([n for layout in self.layouts for n in layout], self.symbols)


def _mode_of(model: nn.Module, flat: list[Any]) -> FakeTensorMode:
    for tensor in (*model.parameters(), *model.buffers(), *flat):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(
    model: nn.Module, flat: list[Any], dims: Dims | None
) -> tuple[FakeTensorMode, list[Any], Sizes | None]:
    """The inputs as fake tensors, of symbolic sizes where ``dims`` says so, their mode and the symbols.

    Raises ``TraceError`` where sizes are to vary and the model is made of fake tensors whose mode has none
    that do.
    """
    if dims is None or not any(dims):
        mode = _mode_of(model, flat)
        return mode, [fake_of(mode, x) if isinstance(x, torch.Tensor) else x for x in flat], None
    mode = _compat.symbolic_mode()
    if any(isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers())):
        mode = _mode_of(model, flat)
        if mode.shape_env is None:
            raise TraceError(f"sizes cannot vary where {type(model).__name__} is made of fake tensors")
    named = iter([(d, f"input{i}") for i, d in enumerate(dims)])
    fake = [
        _compat.symbolic_fake(mode, _plain(x), *next(named)) if isinstance(x, torch.Tensor) else x
        for x in flat
    ]
    return mode, fake, Sizes.of([x for x in fake if isinstance(x, torch.Tensor)])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor by itself: no fake, which another mode does not take (inputs are small), and no view, whose
    base would bring symbols of its own."""
    if isinstance(tensor, FakeTensor):
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    elif tensor._is_view():
        made = tensor.data
    else:
        return tensor
    return made.requires_grad_(tensor.requires_grad)


def fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without memory, at its own sizes; a fake one is left in the mode it is of."""
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)


def evaluate(
    module: fx.GraphModule, values: Mapping[Any, int]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node], dict[int, Any]]:
    """A copy of a symbolic graph at the given sizes, its nodes by those of ``module``, and storage bytes.

    A tensor's :func:`~planner.capture.meta.value` has numbers for sizes and ``symbolic`` what it had before;
    a size has its number in ``value`` and its expression in ``size``.  The last result gives, by
    storage, the expression of its bytes where that is not a number.
    """
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, nodes) or ())
    evaluation = _Evaluation(values)
    for old, new in nodes.items():
        value = meta.value(old)
        meta.set_value(new, pytree.tree_map(evaluation, value))
        if isinstance(value, (torch.Tensor, tuple, list)):
            meta.note_symbolic(new, value)
        elif isinstance(value, torch.SymInt):
            meta.note_size(new, _compat.expression_of(value))
    return fx.GraphModule(module, graph), nodes, evaluation.storage_bytes


class _Evaluation:
    """Symbolic values to those at given sizes; equal storages to equal ones."""

    def __init__(self, values: Mapping[Any, int]) -> None:
        self.values = values
        self.known: dict[Any, Any] = {}
        self.storages: dict[int, torch.Tensor] = {}
        self.storage_bytes: dict[int, Any] = {}
        self._keep: list[torch.Tensor] = []  # storage identities are addresses: keep them unique

    def __call__(self, value: Any) -> Any:
        return self.tensor(value) if isinstance(value, FakeTensor) else self.number(value)

    def number(self, value: Any) -> Any:
        expression = _compat.expression_of(value)
        if expression is value:
            return value
        if expression not in self.known:
            self.known[expression] = _compat.evaluated(expression, self.values)
        return self.known[expression]

    def tensor(self, fake: FakeTensor) -> torch.Tensor:
        shape, stride = [*map(self.number, fake.shape)], [*map(self.number, fake.stride())]
        offset, held = self.number(fake.storage_offset()), fake.untyped_storage().nbytes()
        symbolic = isinstance(held, torch.SymInt)
        numbers = (*fake.shape, *fake.stride(), fake.storage_offset())
        if not symbolic and not any(isinstance(n, torch.SymInt) for n in numbers):
            return fake
        base = self._base(fake, held) if symbolic else fake
        return _compat.fake_on(base.untyped_storage(), fake, shape, stride, offset)

    def _base(self, fake: FakeTensor, held: Any) -> torch.Tensor:
        key = _compat.storage_key(fake)
        if key not in self.storages:
            count = self.number(held)
            base = _compat.fake_on(count, fake, [0], [1], 0)
            self.storages[key] = base
            self._keep.append(fake)
            self.storage_bytes[_compat.storage_key(base)] = _compat.expression_of(held)
        return self.storages[key]
