"""A model that is a stack of blocks, taken apart: what runs before them, one block of each kind, what runs
behind them.

No block is run to see what comes into the next: what a block is given shows in a forward on fake tensors in
which each block hands its input on.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensor, FakeTensorMode, fake_mode_of, pytree
from planner.capture.as_eager.values import Values
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, capture
from planner.errors import PlannerError

__all__ = ["Call", "Stack"]


@dataclass(frozen=True, eq=False)
class Call:
    """What one block is called with; its first argument is what the block before it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def beside(self) -> list[torch.Tensor]:
        """Tensors that it is given by the root beside that: masks, positions."""
        leaves = pytree.tree_leaves((self.args[1:], self.kwargs))
        return [x for x in leaves if isinstance(x, torch.Tensor)]


class _Passes(nn.Module):
    """Stands for a block: hands its input on, or ``instead`` of it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.hears = True
        self.instead: torch.Tensor | None = None
        self.block = (block,)  # no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                self.__dict__["block"][0], name
            )  # attention_type and the like, which the root reads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.hears:
            self.calls.append(Call(args, kwargs))
        return args[0] if self.instead is None else self.instead


class _Before(nn.Module):
    """The root up to its first block."""

    def __init__(self, root: nn.Module, first: _Passes) -> None:
        super().__init__()
        self.root, self.first = root, (first,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self.first[0]
        first.hears = True
        self.root(*args, **kwargs)
        first.hears = False
        return first.calls.pop().args[0]


class _Behind(nn.Module):
    """The root from what its last block gives."""

    def __init__(self, root: nn.Module, last: _Passes) -> None:
        super().__init__()
        self.root, self.last = root, (last,)

    def forward(self, given: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = self.last[0]
        last.instead = given
        try:
            return self.root(*args, **kwargs)
        finally:
            last.instead = None


@dataclass(eq=False)
class Stack:
    """A model, its blocks, and a twin of its root in which they hand on what they are given.

    ``dtype``  that the forward reads parameters in, ``None``: their own.
    """

    model: nn.Module
    path: str
    inputs: Inputs
    dtype: torch.dtype | None
    blocks: list[nn.Module] = field(init=False)
    calls: list[Call] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = list(self._list().children())
        if not self.blocks:
            raise PlannerError(f"{self.path} of {type(self.model).__name__} has no blocks")
        self._stand_ins = [_Passes(block) for block in self.blocks]
        self.mode = self._mode()
        memo: dict[int, Any] = {id(b): s for b, s in zip(self.blocks, self._stand_ins, strict=True)}
        self._root = self._twin(self.model, memo)
        self.inputs = self._on_fakes(self.inputs)
        values = Values(self.inputs)
        values.begin(self.inputs.tensors())
        with self.mode, values.watching(), values.told_to_libraries():
            self._root(*self.inputs.args, **self.inputs.kwargs)
        if any(len(s.calls) != 1 or not _takes_tensor(s.calls[0]) for s in self._stand_ins):
            raise PlannerError(
                f"{type(self.model).__name__} does not call each block of {self.path} once in a forward, on "
                "a tensor that the block before it gave: planned for a cluster are models that are one stack"
            )
        self.calls = [s.calls.pop() for s in self._stand_ins]
        for stand_in in self._stand_ins:  # traces of a part are to leave nothing on the others
            stand_in.hears = False

    def _list(self) -> nn.Module:
        try:
            return self.model.get_submodule(self.path)
        except AttributeError:
            names = [n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
            raise PlannerError(
                f"{type(self.model).__name__} has no {self.path!r}; its lists of modules are {names}"
            ) from None

    def _mode(self) -> FakeTensorMode:
        first = next(self.model.parameters(), None)
        return (
            fake_mode_of(first)
            if isinstance(first, FakeTensor)
            else FakeTensorMode(allow_non_fake_inputs=True)
        )

    def _on_fakes(self, given: Inputs) -> Inputs:
        def fake(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
                return x
            with self.mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

        args, kwargs = pytree.tree_map(fake, (given.args, given.kwargs))
        return Inputs(args, kwargs)

    def _twin(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy whose parameters are those that the forward reads; it shares what it does not cast."""
        of: dict[int, Any] = {id(self.mode): self.mode, **memo}
        of.update((id(b), b) for b in module.buffers())
        for p in module.parameters():
            casts = self.dtype is not None and p.is_floating_point()
            read = p.detach().to(self.dtype) if casts else p.detach()
            of[id(p)] = nn.Parameter(read, requires_grad=p.requires_grad)
        return copy.deepcopy(module, of)

    # -- what is captured ----------------------------------------------------------------------------

    def kind_of(self, number: int) -> Hashable:
        """What tells blocks apart that need captures of their own."""
        block, call = self.blocks[number], self.calls[number]
        modules = tuple((n, type(m).__name__, m.extra_repr(), _settings(m)) for n, m in block.named_modules())
        sizes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        given = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
        return modules, sizes, given

    def before(self) -> JointGraph:
        """The step up to the first block; modules are below "root"."""
        return capture(_Before(self._root, self._stand_ins[0]), self.inputs)

    def block(self, number: int) -> JointGraph:
        """The step of one block."""
        twin, call = self._twin(self.blocks[number], {}), self.calls[number]
        given = Inputs((self._boundary(call), *call.args[1:]), call.kwargs)
        return capture(twin, given, used=frozenset({0}))

    def behind(self) -> JointGraph:
        """The step from what the last block gives; modules are below "root"."""
        given = self._boundary(self.calls[-1])
        inputs = (given, self.inputs.args, self.inputs.kwargs)
        return capture(_Behind(self._root, self._stand_ins[-1]), Inputs(inputs, {}))

    def _boundary(self, call: Call) -> torch.Tensor:
        x: torch.Tensor = call.args[0]
        with self.mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return made.requires_grad_()


def _takes_tensor(call: Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], torch.Tensor)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Plain numbers and words on it, but for its own number."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and "idx" not in name
    )
