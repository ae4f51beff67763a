"""Sizes that are symbols."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch._subclasses.fake_tensor import (  # tensors with shapes, strides and storages, no memory; 2.0+
    FakeTensorMode,
)

from planner._compat.sized_fakes import OF_SYMBOLS


def size_hint(size: int | torch.SymInt) -> int:
    """The size as an int; of a symbolic one, what it was traced with, and no guard is made; 2.0+."""
    return size if isinstance(size, (int, float)) else int(size.node.hint)


def symbolic_mode() -> FakeTensorMode:
    """A mode in which sizes can be symbols; each symbol is one dimension of one input.

    Equal sizes get symbols of their own, and what depends on a tensor's value is refused as it is with
    fixed sizes.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # 2.0+; the three flags 2.1+

    sizes = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes)
    mode.cache_enabled = False  # 2.2+; an entry whose sizes are symbols takes longer than the op it saves
    setattr(sizes, OF_SYMBOLS, {})
    return mode


def symbolic_fake(
    mode: FakeTensorMode, tensor: torch.Tensor, dims: Collection[int], name: str
) -> torch.Tensor:
    """A fake of ``tensor`` whose ``dims`` are symbols; a size of 0 or 1 stays that number."""
    from torch._dynamo.source import ConstantSource  # names a symbol's origin; 2.0+
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # 2.3+

    kinds = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * tensor.dim())
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))


def static_fakes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fakes of ``tensors``, whose sizes are numbers, in a mode that a compiler can go on with; 2.1+."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    return [mode.from_tensor(x, static_shapes=True) for x in tensors]


def expression_of(size: Any) -> Any:
    """The sympy expression of a symbolic number, what the trace found equal replaced; others as they are."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def is_symbol(expression: Any) -> bool:
    """Whether an expression is a symbol and nothing else."""
    return getattr(expression, "is_Symbol", False)


def evaluated(expression: Any, values: Mapping[Any, int]) -> Any:
    """``expression`` with integers for its symbols, as a Python number; what is no expression as it is."""
    import sympy

    if not isinstance(expression, sympy.Basic):
        return expression
    number = expression.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if number in (sympy.true, sympy.false):
        return bool(number)
    return int(number) if number.is_integer else float(number)


def guards_of(mode: FakeTensorMode, symbols: Sequence[Any]) -> list[Any]:
    """Conditions on ``symbols`` under which the traced graph is right, ranges included."""
    import sympy

    sizes = mode.shape_env
    assert sizes is not None
    conditions = [guard.expr for guard in sizes.guards]  # 2.0+
    for symbol in symbols:
        lower, upper = sizes.var_to_range[symbol].lower, sizes.var_to_range[symbol].upper  # 2.1+
        conditions.append(sympy.Ge(symbol, lower))
        if upper < 2**62:  # beyond that it stands for no limit
            conditions.append(sympy.Le(symbol, upper))
    known = set(symbols)
    unknown = {s for c in conditions for s in c.free_symbols} - known
    if unknown or any(sizes.deferred_runtime_asserts.values()):  # 2.1+
        raise RuntimeError(f"sizes that no input determines: {', '.join(map(str, unknown)) or 'of values'}")
    return [c for c in dict.fromkeys(conditions) if c != sympy.true]


def compiled(expressions: Sequence[Any], symbols: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """A Python function of the symbols' values that returns the values of ``expressions``."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # names that printed guards use; 2.0+
    from torch.utils._sympy.printers import PythonPrinter  # 2.6+

    printer = PythonPrinter()
    body = "".join(f"{printer.doprint(e)}, " for e in expressions)
    function: Callable[..., tuple[Any, ...]] = eval(
        f"lambda {', '.join(map(str, symbols))}: ({body})", dict(SYMPY_INTERP)
    )
    return function
