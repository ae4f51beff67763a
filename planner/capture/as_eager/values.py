"""What a forward asks of the values of its batch is answered by the batch, as in eager.

``if (labels == -100).any():``, ``if mask.all():``, ``torch.equal(a, b)`` ask for a yes or a no.  A trace has
no values; but where what is asked depends on nothing but the arguments of the call, the arguments that the
step is captured at have the answer.  :class:`Values` writes down each op of a traced forward that reads
nothing else, lets those run on the arguments that a question hangs on, once it comes, and keeps them as a
program that asks any other batch the same (:class:`~planner.capture.state.asked.Asked`).  Nothing runs where
nothing is asked.

Numbers (``lengths.max().item()``) are not answered: each would be a graph of its own.  Nor is what hangs on
parameters, buffers or random numbers.  All of these a step of one graph cannot have.

transformers asks whether attention needs its mask, and asks that only of tensors that have values: while it
is traced it makes the mask in any case, and attention then runs another, slower kernel, on keys that are
repeated for grouped queries.  It is told that nobody traces, of tensors that have an answer here.

Known weakness: this names two functions in ``transformers.masking_utils``; a version without them is traced
as it wants to be, with masks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import fx

from planner import _compat
from planner._compat import READS_VALUES, FakeTensor, OpOverload, TorchDispatchMode
from planner.capture.as_eager.places import is_ours, users_place
from planner.capture.inputs import Inputs
from planner.capture.sizes import Sizes
from planner.capture.state.asked import Asked

__all__ = ["Values"]

_identity, _kind_of = id, type  # a capture replaces the builtins, for code outside torch (as_eager.questions)

_MASKING = "transformers.masking_utils"
_MADE = "_planner_value"  # on a tensor: in which run, by which op, as which of its results
_aten: Any = torch.ops.aten
_PURE = frozenset({"aten", "prims"})  # others' ops may look at what is no argument
_COMPUTED = torch.SymFloat, torch.SymBool
_LIFTS = frozenset({_aten.lift_fresh.default, _aten.lift_fresh_copy.default, _aten.lift.default})


@dataclass(frozen=True)
class _Given:
    """An argument of the call, by its position among the tensors."""

    position: int


@dataclass(frozen=True)
class _Made:
    """A result of an op, by the number of both."""

    op: int
    result: int


@dataclass(frozen=True)
class _Op:
    """``func(*args, **kwargs)``, tensors by where they come from.

    ``reads``, ``touches``  storages that it reads, and that it writes or hands out.
    """

    func: Any
    args: Any
    kwargs: Any
    reads: frozenset[int]
    touches: frozenset[int]
    is_list: bool = False


class _NotOfBatch(Exception):
    """A tensor that does not depend on the batch alone."""


def _written(func: OpOverload) -> tuple[str, ...]:
    """Names of the arguments that the op writes into."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _is_pure(func: OpOverload) -> bool:
    """Whether what the op gives depends on its arguments alone."""
    return torch.Tag.nondeterministic_seeded not in func.tags and func.namespace in _PURE


class Values:
    """The ops of the run of a forward that depend on its arguments alone, and what it asked of them."""

    def __init__(self, inputs: Inputs, sizes: Sizes | None = None) -> None:
        self._tensors: Sequence[torch.Tensor] = inputs.real or inputs.tensors()
        self._recorded, self._sizes = inputs.answers, sizes
        self._known: dict[OpOverload, tuple[tuple[str, ...], bool]] = {}
        self.begin(())

    def begin(self, stand_ins: Iterable[torch.Tensor]) -> None:
        """A forward runs, on these for the tensors of the batch."""
        self._given = list(stand_ins)  # kept, so that no identity comes again
        self._places = {_identity(t): _Given(i) for i, t in reversed([*enumerate(self._given)])}
        self._ops: list[_Op] = []
        self._alive: list[Any] = []  # storages, so that no identity comes again
        self._spoiled: dict[int, int] = {}  # storages that hold something else too, from which op on
        self._questions: list[tuple[int, bool, str]] = []  # op, answer, place
        self._used = 0  # of the recorded answers

    # -- what runs -------------------------------------------------------------------------------------

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """``func(*args, **kwargs)`` gave ``result``."""
        if not isinstance(func, OpOverload):
            self._spoil((args, kwargs))
            return
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = _written(func), _is_pure(func)
        written, pure = known
        try:
            if not pure:
                raise _NotOfBatch
            reads: set[int] = set()
            op_args, op_kwargs = self._come_from(args, reads), self._come_from(kwargs or {}, reads)
        except _NotOfBatch:
            if written:
                self._spoil(self._named(func, args, kwargs, written))
            return
        several = issubclass(_kind_of(result), (tuple, list))  # a stand-in would be asked for its class
        made = result if several else (result,)
        touches: set[int] = set()
        for x in self._named(func, args, kwargs, written) if written else ():
            self._storages(x, touches)
        number = len(self._ops)
        for k, x in enumerate(made):
            if isinstance(x, torch.Tensor):
                self._storages(x, touches)
                if self._origin(x) is None:
                    vars(x)[_MADE] = self._ops, _Made(number, k)
        if touches:
            self._ops.append(_Op(func, op_args, op_kwargs, frozenset(reads), frozenset(touches), several))

    def _origin(self, tensor: torch.Tensor) -> _Given | _Made | None:
        given = self._places.get(_identity(tensor))
        if given is not None:
            return given
        ops, made = vars(tensor).get(_MADE, (None, None))
        return made if ops is self._ops else None

    def _come_from(self, x: Any, reads: set[int]) -> Any:
        """``x`` with tensors by where they come from."""
        kind = _kind_of(x)
        if kind in (list, tuple):
            return kind([self._come_from(item, reads) for item in x])
        if kind is dict:
            return {key: self._come_from(item, reads) for key, item in x.items()}
        if kind in _COMPUTED:
            raise _NotOfBatch
        if not isinstance(x, torch.Tensor):
            return x
        origin = self._origin(x)
        if origin is None:
            if kind is torch.Tensor and _compat.has_values(x):  # written in the code, or a watched setting
                return x
            raise _NotOfBatch
        self._storages(x, reads)
        return origin

    def _storages(self, x: Any, into: set[int]) -> None:
        kind = _kind_of(x)
        if issubclass(kind, (list, tuple)):
            for item in x:
                self._storages(item, into)
        elif kind in _compat.STAND_INS:
            key = _compat.storage_key(x)
            self._alive.append(x.untyped_storage())
            into.add(key)

    def _spoil(self, x: Any) -> None:
        spoiled: set[int] = set()
        for tensor in _compat.pytree.tree_leaves(x):
            self._storages(tensor, spoiled)
        for storage in spoiled:
            self._spoiled.setdefault(storage, len(self._ops))

    @staticmethod
    def _named(func: OpOverload, args: Any, kwargs: Any, names: Sequence[str]) -> list[Any]:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        return [given[name] for name in names if name in given]

    # -- what is asked ---------------------------------------------------------------------------------

    def is_known(self, tensor: Any) -> bool:
        """Whether a question about ``tensor`` has an answer here."""
        origin = self._origin(tensor) if isinstance(tensor, torch.Tensor) else None
        if origin is None:
            return False
        needed = self._needed(_compat.storage_key(tensor), len(self._ops))
        return needed is not None and self._is_answered(needed, origin)

    def answer(self, func: Any, args: Any) -> Any:
        """The yes or no that ``func``, which reads a value, gives in eager; ``NotImplemented``: unknown."""
        first = args[0]
        if func is _aten._local_scalar_dense.default:
            if first.dtype is not torch.bool or first.numel() != 1:
                return NotImplemented
            return self._answered(((_aten.any.default, (first,)),))
        if first.dtype is not args[1].dtype:
            return NotImplemented
        if func is _aten.allclose.default:
            return self._answered(((_aten.isclose.default, tuple(args)), (_aten.all.default, None)))
        if func is not _aten.equal.default:
            return NotImplemented
        if first.shape != args[1].shape:
            return False
        return self._answered(((_aten.eq.Tensor, tuple(args)), (_aten.all.default, None)))

    def _answered(self, ops: tuple[tuple[Any, Any], ...]) -> Any:
        kept = len(self._ops)
        for func, args in ops:
            number, reads = len(self._ops), set[int]()
            try:
                origins = (_Made(number - 1, 0),) if args is None else self._come_from(args, reads)
            except _NotOfBatch:
                del self._ops[kept:]
                return NotImplemented
            if args is None:
                reads = {-number}
            self._ops.append(_Op(func, origins, {}, frozenset(reads), frozenset({-number - 1})))
        last = len(self._ops) - 1
        needed = self._needed(-last - 1, last + 1)
        if needed is None or not self._is_answered(needed, None):
            del self._ops[kept:]
            return NotImplemented
        asked = self._asked([(last, False, "")])
        if self._has_values(needed):
            (answer,) = asked.of(self._tensors)
        else:
            answer, self._used = self._recorded[self._used], self._used + 1
        self._questions.append((last, answer, _asking_line()))
        return answer

    def _needed(self, storage: int, end: int) -> list[int] | None:
        """The ops before ``end`` that make what is in ``storage``; ``None`` where others do too."""
        wanted, needed = {storage}, []
        if self._spoiled.get(storage, end + 1) <= end:
            return None
        for number in reversed(range(end)):
            op = self._ops[number]
            if not wanted.isdisjoint(op.touches):
                if any(self._spoiled.get(read, end) <= number for read in op.reads):
                    return None
                needed.append(number)
                wanted |= op.reads
        return needed[::-1]

    def _read(self, needed: Iterable[int], origin: Any = None) -> set[int]:
        """Positions of the tensors of the batch that these ops read."""
        found = _compat.pytree.tree_leaves([(self._ops[n].args, self._ops[n].kwargs) for n in needed])
        return {x.position for x in (*found, origin) if isinstance(x, _Given)}

    def _has_values(self, needed: Iterable[int], origin: Any = None) -> bool:
        read = self._read(needed, origin)
        return not any(isinstance(self._tensors[i], FakeTensor) or self._tensors[i].is_meta for i in read)

    def _is_answered(self, needed: Iterable[int], origin: Any) -> bool:
        return self._has_values(needed, origin) or self._used < len(self._recorded)

    # -- the program -----------------------------------------------------------------------------------

    def asked(self) -> Asked:
        """All that was asked whose answer another batch may not give."""
        each = [(question, self._asked([question])) for question in self._questions]
        varying = [question for question, asked in each if asked.reads or asked.lengths]
        if not varying:
            return Asked()
        of_values = tuple(question[1] for question, asked in each if asked.reads)
        return replace(self._asked(varying), of_values=of_values)

    def _asked(self, questions: Sequence[tuple[int, bool, str]]) -> Asked:
        needed: set[int] = set()
        for last, _, _ in questions:
            found = self._needed(-last - 1, last + 1)
            assert found is not None
            needed.update(found)
        with _compat.modes_set_aside():  # which would make constants without values
            program = _Program(self._ops, sorted(needed), self._read(needed))
        results = [program.made[last] for last, _, _ in questions]
        distinct = list(dict.fromkeys(results))
        return Asked(
            program.module(distinct),
            tuple(program.given),
            tuple(program.lengths),
            self._sizes if program.lengths else None,
            tuple(map(distinct.index, results)),
            tuple(answer for _, answer, _ in questions),
            tuple(place for _, _, place in questions),
        )

    # -- who is told -----------------------------------------------------------------------------------

    def watching(self) -> _Watching:
        """A mode under which a forward on tensors without memory is noted and answered."""
        return _Watching(self)

    @contextlib.contextmanager
    def told_to_libraries(self) -> Iterator[None]:
        """transformers' masks are made as eager makes them, where what they ask of tensors has an answer."""
        masking = sys.modules.get(_MASKING)
        answers: dict[str, Callable[..., bool]] = {
            "is_tracing": lambda tensor=None: tensor is not None and not self.is_known(tensor),
            "is_torchdynamo_exporting": lambda: False,
        }
        if masking is None or not answers.keys() <= vars(masking).keys():
            yield
            return
        before = {name: vars(masking)[name] for name in answers}
        vars(masking).update(answers)
        try:
            yield
        finally:
            vars(masking).update(before)


class _Watching(TorchDispatchMode):
    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS_VALUES:
            found = self._values.answer(func, args)
            if found is not NotImplemented:
                return found
        result = func(*args, **(kwargs or {}))
        self._values.note(func, args, kwargs, result)
        return result


class _Program:
    """Ops as a graph of the tensors ``given`` of a batch and of ``lengths``, expressions of its sizes."""

    def __init__(self, ops: Sequence[_Op], needed: Sequence[int], given: Iterable[int]) -> None:
        self.graph, self.constants = fx.Graph(), torch.nn.Module()
        self.given = {i: self.graph.placeholder(f"input_{i}") for i in sorted(given)}
        self.lengths: dict[Any, fx.Node] = {}
        for x in _compat.pytree.tree_leaves([(ops[n].args, ops[n].kwargs) for n in needed]):
            if isinstance(x, torch.SymInt):
                self._length(x)
        writes = any(ops[n].func._schema.is_mutable for n in needed)
        self._whole = dict(self.given)
        if writes:  # into what may be the batch's own
            self._whole = {i: self._call(_aten.clone.default, (n,), {}) for i, n in self.given.items()}
        self._known: dict[Any, fx.Node] | None = None if writes else {}
        self.made: dict[int, fx.Node] = {}
        self._lists = {n for n in needed if ops[n].is_list}
        for n in needed:
            op = ops[n]
            func = _aten.clone.default if op.func in _LIFTS else op.func
            self.made[n] = self._call(func, self._nodes(op.args), self._nodes(op.kwargs))

    def _length(self, size: torch.SymInt) -> fx.Node | int:
        expression = _compat.expression_of(size)
        if isinstance(expression, int) or getattr(expression, "is_number", False):
            return int(expression)
        if expression not in self.lengths:
            name = f"length_{len(self.lengths)}"
            self.lengths[expression] = self.graph.placeholder(name)
        return self.lengths[expression]

    def _nodes(self, x: Any) -> Any:
        kind = _kind_of(x)
        if kind in (list, tuple):
            return kind([self._nodes(item) for item in x])
        if kind is dict:
            return {key: self._nodes(item) for key, item in x.items()}
        if kind is _Given:
            return self._whole[x.position]
        if kind is _Made:
            made = self.made[x.op]
            return self.graph.call_function(_item, (made, x.result)) if x.op in self._lists else made
        if kind is torch.SymInt:
            return self._length(x)
        if isinstance(x, torch.Tensor):
            name = f"constant_{len(list(self.constants.buffers()))}"
            self.constants.register_buffer(name, x.detach())
            return self.graph.get_attr(name)
        return x

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        known = getattr(self, "_known", None)
        key = repr((func, args, kwargs))  # nodes by their names
        if known is not None and key in known:
            return known[key]
        node = self.graph.call_function(func, args, kwargs)
        if known is not None:
            known[key] = node
        return node

    def module(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """That gives a tuple of these."""
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.constants, self.graph, "AskedOfBatch")


def _asking_line() -> str:
    """The user's line that asks, of which the trace is told by ours and torch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(str(frame.f_globals.get("__name__", ""))):
        frame = frame.f_back
    return users_place(frame) or "a line of its forward"


def _item(made: Any, k: int) -> Any:
    return made[k]
