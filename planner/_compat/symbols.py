"""Arithmetic on symbolic sizes from tables: what it gave once in a trace it gives again.

Every op on tensors of symbolic sizes asks for products, sums and comparisons of the same few sizes, for
shapes, strides, bytes and checks, dozens of times an op.  Each of them is worked out by torch once for each
pair of expressions; from then on the result is a node of its own, as torch makes one, with what the first
one holds.  A comparison that was decided is decided alike, and its guard is there already.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch._ops

from planner._compat.sized_fakes import OF_SYMBOLS

_kind = type  # a capture replaces the builtin, for code outside torch (as_eager.questions)

_MISSING: Any = object()
_get_mode: Any = torch._C._get_dispatch_mode  # 2.0+
_PROXY = torch._C._TorchDispatchModeKey.PROXY


@contextlib.contextmanager
def sizes_remembered(env: Any) -> Iterator[None]:
    """Arithmetic on the symbols of ``env``, a shape environment, is looked up; for the whole process; 2.9+.

    ``None``, one that validates its guards, and arithmetic that a tracer writes down: as torch does it.
    """
    if env is None or env._translation_validation_enabled:
        yield
        return
    nodes: Any = importlib.import_module("torch.fx.experimental.sym_node")
    cls = nodes.SymNode
    tables = _Tables(env, cls)
    kinds: dict[str, Any] = {"wrap_int": _Tables.constant, "maybe_as_int": _Tables.as_int}
    kinds |= dict.fromkeys(("guard_bool", "guard_or_false", "guard_or_true", "expect_true"), _Tables.decided)
    kinds |= {
        name: _KINDS[method.__name__]
        for name, method in vars(cls).items()
        if getattr(method, "__name__", "") in _KINDS
    }
    before = {name: vars(cls)[name] for name in kinds}
    for name, of in kinds.items():
        how = {} if of is not _Tables.binary else {"op": nodes.METHOD_TO_OPERATOR.get(name.strip("_"))}
        setattr(cls, name, of(tables, before[name], **how))
    env.evaluate_sym_node = tables.evaluated(env.evaluate_sym_node)
    try:
        yield
    finally:
        del env.evaluate_sym_node
        vars(env).pop(OF_SYMBOLS, None)  # for this trace alone
        for name, method in before.items():
            setattr(cls, name, method)


class _Tables:
    """What the arithmetic of one shape environment gave."""

    def __init__(self, env: Any, cls: Any) -> None:
        self.env, self.cls = env, cls
        self._proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
        nodes: Any = importlib.import_module("torch.fx.experimental.sym_node")
        self._wrapped: Any = nodes.wrap_node  # 2.11+, and so is _compute_proxy
        self._before_dispatch: Any = torch._ops.mode_stack_state_for_pre_dispatch()  # 2.2+

    def tracing(self) -> bool:
        """Whether a tracer writes down what is done to sizes, before dispatch or behind it."""
        return _get_mode(_PROXY) is not None or self._before_dispatch.get(0) is not None

    def expression(self, node: Any) -> Any:
        """Of a node, what was found equal replaced."""
        if node.constant is not None:
            return node._expr
        version = getattr(self.env, "_replacements_version_counter", None)  # 2.13+, and what hangs on it
        if version is None:
            return node.expr
        if version == 0:
            return node._expr
        return node._expr_cache if node._expr_ver == version else node.expr

    def again(self, held: dict[str, Any]) -> Any:
        """A node of its own that holds what another one does."""
        node = object.__new__(self.cls)
        vars(node).update(held)
        return node

    def binary(self, torchs: Any, op: Any) -> Any:
        """``a + b`` and its like; ``op`` is the function of Python that says so in a graph."""
        known: dict[Any, dict[str, Any]] = {}
        env, cls, tracing, expression = self.env, self.cls, self.tracing, self.expression

        def instead(a: Any, b: Any) -> Any:
            if a.shape_env is not env or _kind(b) is not cls or b.shape_env is not env:
                return torchs(a, b)
            sums = a._optimized_summation, b._optimized_summation  # 2.6+
            key = expression(a), expression(b), a.pytype, b.pytype, sums
            held = known.get(key)
            if tracing():  # what it runs once nobody writes comes here again
                return torchs(a, b) if held is None else self.written(torchs, op, a, b, held)
            if held is not None:
                return self.again(held)
            result = torchs(a, b)
            if _kind(result) is cls and result is not a and result is not b and result._hint is not None:
                known[key] = dict(vars(result))
            return result

        return instead

    def written(self, torchs: Any, op: Any, a: Any, b: Any, held: dict[str, Any]) -> Any:
        """``a + b`` and its like, known already, for a tracer that notes it until somebody needs it."""
        mode = _get_mode(_PROXY)
        plain = mode is not None and mode.tracer.enable_thunkify and op is not None
        ones = op is operator.mul and 1 in (a.constant, b.constant)  # which is no call
        if not plain or ones or a.constant is not None or held["constant"] is not None:
            return torchs(a, b)
        result = self.again(held)
        tracer, made = mode.tracer, self._wrapped(result)
        given = self._wrapped(a), self._wrapped(b)
        compute = functools.partial(self._proxies._compute_proxy, tracer, func=op, args=given, out=made)
        self._proxies.set_proxy_slot(made, tracer, self._proxies.Thunk(compute))
        return result

    def unary(self, torchs: Any) -> Any:
        """``-a`` and its like."""
        known: dict[Any, dict[str, Any]] = {}

        def instead(a: Any) -> Any:
            if a.shape_env is not self.env or self.tracing():
                return torchs(a)
            key = self.expression(a), a.pytype
            held = known.get(key)
            if held is not None:
                return self.again(held)
            result = torchs(a)
            if _kind(result) is self.cls and result is not a and result._hint is not None:
                known[key] = dict(vars(result))
            return result

        return instead

    def layout(self, torchs: Any) -> Any:
        """What is asked of sizes and strides together: whether they are contiguous, and its like."""
        known: dict[Any, dict[str, Any]] = {}

        def instead(a: Any, sizes: Any, strides: Any) -> Any:
            own = all(_kind(n) is self.cls and n.shape_env is self.env for n in (a, *sizes, *strides))
            if not own or self.tracing():
                return torchs(a, sizes, strides)
            key = tuple(map(self.expression, sizes)), tuple(map(self.expression, strides))
            held = known.get(key)
            if held is not None:
                return self.again(held)
            result = torchs(a, sizes, strides)
            if _kind(result) is self.cls and result is not a and result._hint is not None:
                known[key] = dict(vars(result))
            return result

        return instead

    def constant(self, torchs: Any) -> Any:
        """A number as a node."""
        known: dict[int, dict[str, Any]] = {}

        def instead(a: Any, number: int) -> Any:
            if a.shape_env is not self.env or _kind(number) is not int:
                return torchs(a, number)
            held = known.get(number)
            if held is None:
                held = known[number] = dict(vars(torchs(a, number)))
            return self.again(held)

        return instead

    def as_int(self, torchs: Any) -> Any:
        """The number that a node stands for, ``None`` if it may vary."""
        known: dict[Any, int | None] = {}

        def instead(a: Any) -> Any:
            if a.shape_env is not self.env:
                return torchs(a)
            key = self.expression(a)
            number = known.get(key, _MISSING)
            if number is _MISSING:
                number = known[key] = torchs(a)
            return number

        return instead

    def decided(self, torchs: Any) -> Any:
        """Whether a condition holds at the sizes of the trace, which is a guard from then on."""
        known: dict[Any, bool] = {}
        suppressed = self.env._suppress_guards_tls

        def instead(a: Any, file: str, line: int) -> bool:
            if a.shape_env is not self.env or a._hint is None:
                return bool(torchs(a, file, line))
            key = self.expression(a), a.pytype, suppressed()
            holds = known.get(key)
            if holds is None:
                holds = known[key] = bool(torchs(a, file, line))
            return holds

        return instead

    def evaluated(self, torchs: Any) -> Any:
        """The value of a node at the sizes of the trace, which is a guard from then on."""
        known: dict[Any, Any] = {}
        suppressed = self.env._suppress_guards_tls

        def instead(node: Any, size_oblivious: bool = False, *more: Any, **how: Any) -> Any:
            if node.shape_env is not self.env or more or how.keys() - {"fallback_value"}:
                return torchs(node, size_oblivious, *more, **how)
            fallback = how.get("fallback_value")
            key = self.expression(node), node.pytype, size_oblivious, fallback, suppressed()
            value = known.get(key, _MISSING)
            if value is _MISSING:
                value = torchs(node, size_oblivious, **how)
                if node._hint is not None:
                    known[key] = value
            return value

        return instead


# By the name that torch gives all methods of a kind.
_KINDS: dict[str, Any] = {
    "binary_magic_impl": _Tables.binary,
    "unary_magic_impl": _Tables.unary,
    "sizes_strides_impl": _Tables.layout,
}
