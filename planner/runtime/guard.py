"""What a plan was made for, checked before each planned step.

What the capture depended on is an :class:`~planner.capture.expectation.Expectation`.  Anything else is a
``StalePlanError`` that names the first difference; nothing is guessed.  The check walks cached
references, some tenths of a microsecond per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import parametrized_weights_are_cached, pytree
from planner.capture.expectation import Expectation, TensorSpec, autocast_state
from planner.capture.module import home_of
from planner.capture.refusals import (
    has_hooks,
    has_parametrizations,
    is_sharded,
    sharded_message,
    weights_cached,
)
from planner.errors import PlannerError, StalePlanError

__all__ = ["Guard", "OtherAnswerError"]


class OtherAnswerError(StalePlanError):
    """The forward asks the batch for a yes or a no, and this one answers otherwise than that of the plan.

    ``what``  the question and the answers.
    """

    def __init__(self, what: str, place: str) -> None:
        super().__init__(
            f"{what}, so it takes another path. A plan from a file has one: planner.enable plans for either "
            "as it comes, and so does an applied plan that was made here",
            setting=f"its batch: {place}",
        )
        self.what = what


class Guard:
    """An expectation bound to one model instance.

    ``parameters``  names of its parameters; what stands in their place for a call may be another tensor.
    """

    def __init__(self, model: nn.Module, expected: Expectation) -> None:
        self.model, self.expected = model, expected
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        found = [(n, type(m).__name__) for n, m in model.named_modules()]
        wanted = [(n, t) for n, t, _ in expected.modules]
        if found != wanted:
            raise StalePlanError(
                f"this plan was made for a model with {len(wanted)} modules, "
                f"{_first_difference(wanted, found)}; plan the model you want to run"
            )
        self._modules = [
            (m, flag, _sizes(m)) for m, (_, _, flag) in zip(model.modules(), expected.modules, strict=True)
        ]
        self._computes_weights = has_parametrizations(model)
        self._read = expected.read.bind(model)
        self._edges = [(m._modules, k, child) for m in model.modules() for k, child in m._modules.items()]
        self._slots = [(*self._slot(name), name, spec) for name, spec in expected.parameters.items()]
        self._tied = [(*self._slot(name), name, first) for name, first in expected.tied.items()]
        known = {*expected.parameters, *expected.tied}
        extra = [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n not in known]
        if extra:
            raise StalePlanError(
                f"{type(model).__name__} has {extra[0]!r}, which the plan does not know; make a new plan"
            )
        self.tensors()

    def _slot(self, name: str) -> tuple[dict[str, Any], str]:
        """The dict that holds a parameter or buffer, and its key there."""
        path, _, key = name.rpartition(".")
        owner = self.model.get_submodule(path)
        where: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
        if key not in where:
            raise StalePlanError(
                f"the plan needs {name!r}, which {type(self.model).__name__} does not have; make a new plan"
            )
        return where, key

    def tensors(self) -> dict[str, torch.Tensor]:
        """Current parameters and buffers by name; ``StalePlanError`` if one is not what was planned."""
        out = {}
        for where, key, name, spec in self._slots:
            tensor = where.get(key)
            if (
                tensor is None
                or tensor.shape != spec.shape
                or tensor.dtype != spec.dtype
                or (tensor.device != spec.device or tensor.requires_grad != spec.requires_grad)
                or tensor.stride() != spec.stride
                or (spec.offset is not None and tensor.storage_offset() != spec.offset)
            ):
                now = None if tensor is None else TensorSpec.of(tensor, placed=spec.offset is not None)
                frozen = now is not None and replace(now, requires_grad=spec.requires_grad) == spec
                raise StalePlanError(
                    f"{name} was {_described(spec)} when the plan was made and is "
                    f"{'gone' if now is None else _described(now)}; make a new plan",
                    setting=f"{name}: requires_grad" if frozen else None,
                )
            out[name] = tensor
        for where, key, name, first in self._tied:
            if where.get(key) is not out[first]:
                raise StalePlanError(
                    f"{name} and {first} were one tensor when the plan was made and are two; make a new plan"
                )
        return out

    def check_modules(self) -> None:
        """Same modules, same training flags, no hooks that the graph would skip."""
        root = self.model
        if self._computes_weights and parametrized_weights_are_cached():
            raise weights_cached(type(root).__name__)
        for module, flag, size in self._modules:
            if module.training is not flag:
                path = next(n for n, m in root.named_modules() if m is module)
                raise StalePlanError(
                    f"{path or 'the model'} has training={module.training}, the plan was made with "
                    f"training={flag}; make a new plan, or set the flag back",
                    setting=f"{path or 'the model'}: training",
                )
            if _sizes(module) != size:
                path = next(n for n, m in root.named_modules() if m is module)
                raise StalePlanError(
                    f"a submodule, parameter or buffer of {path or type(root).__name__} was added or "
                    "removed; make a new plan"
                )
            if module is not root and has_hooks(module):
                path = next(n for n, m in root.named_modules() if m is module)
                if is_sharded(module):
                    raise PlannerError(sharded_message(path))
                raise PlannerError(
                    f"{path} has a hook; a planned step runs one graph and would skip it. Remove it, "
                    "register it on the model itself, or call plan.restore(model)"
                )
        for modules, key, child in self._edges:
            if modules.get(key) is not child:
                raise StalePlanError(f"submodule {key!r} was replaced after planning; make a new plan")
        if not self._read.holds:  # by identity; what follows looks at values
            self._read = self.expected.read.bind(root, self._read)

    def check_inputs(self, leaves: Sequence[Any], in_spec: Any, *, sized: bool = True) -> None:
        """Same structure, sizes, strides, dtypes, devices and constants; all but sizes if not ``sized``."""
        expected = self.expected
        if in_spec != expected.in_spec:
            raise StalePlanError(
                f"{type(self.model).__name__} was planned for {_form(expected.in_spec)} and is called with "
                f"{_form(in_spec)}; pass the inputs the same way (positional or by keyword), or make a new "
                "plan"
            )
        for i, (leaf, want) in enumerate(zip(leaves, expected.leaves, strict=True)):
            if isinstance(want, TensorSpec):
                if isinstance(leaf, torch.Tensor) and (want.fits(leaf) if sized else _same_kind(leaf, want)):
                    continue
                placed = want.offset is not None
                got = (
                    _described(TensorSpec.of(leaf, placed=placed))
                    if isinstance(leaf, torch.Tensor)
                    else repr(leaf)
                )
                raise StalePlanError(
                    f"input {self._label(i)} is {got}; the plan was made for {_described(want)}. Plan "
                    "with dynamic=True, plan once per shape, or pad the batch to the planned size"
                )
            if leaf is not want and (type(leaf) is not type(want) or leaf != want):
                got = _described(TensorSpec.of(leaf)) if isinstance(leaf, torch.Tensor) else repr(leaf)
                raise StalePlanError(
                    f"input {self._label(i)} is {got}; the plan was made for {want!r}. Plan once for each"
                )
        state = autocast_state(home_of(self.model, leaves))
        if state != expected.autocast:
            raise StalePlanError(
                f"autocast is {state[1] or 'off'}, it was {expected.autocast[1] or 'off'} when the plan was "
                "made; plan under the same autocast context as you train"
            )

        if torch.get_default_dtype() is not expected.default_dtype:
            raise StalePlanError(
                f"torch's default dtype is {torch.get_default_dtype()}, it was {expected.default_dtype} when "
                "the plan was made; make a new plan, or set it back (torch.set_default_dtype)"
            )
        if sized:
            self.check_answers(leaves)

    def check_answers(self, leaves: Sequence[Any]) -> None:
        """``OtherAnswerError`` where a batch of the planned kind is one for another graph."""
        found = self.expected.asked.difference([x for x in leaves if isinstance(x, torch.Tensor)])
        if found is not None:
            place, now = found
            raise OtherAnswerError(
                f"the forward of {type(self.model).__name__} asks its batch at {place}: the answer is {now} "
                f"and was {not now} for the batch that was planned for",
                place,
            )

    def _label(self, index: int) -> str:
        args, kwargs = pytree.tree_unflatten(list(range(len(self.expected.leaves))), self.expected.in_spec)
        for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
            if leaf == index:
                return pytree.keystr(path[1:])
        return str(index)


def _sizes(module: nn.Module) -> tuple[int, int, int]:
    return len(module._modules), len(module._parameters), len(module._buffers)


def _same_kind(tensor: torch.Tensor, want: TensorSpec) -> bool:
    """Equal in all but sizes."""
    if want.offset is not None and tensor.storage_offset() != want.offset:
        return False
    return (tensor.dim(), tensor.dtype, tensor.device, tensor.requires_grad) == (
        len(want.shape),
        want.dtype,
        want.device,
        want.requires_grad,
    )


def _described(spec: TensorSpec) -> str:
    placed = "" if spec.offset is None else f", {spec.offset} elements into its storage"
    return f"{spec}, strides {spec.stride}, requires_grad={spec.requires_grad}{placed}"


def _form(spec: Any) -> str:
    """How a call passes its arguments: ``2 positional inputs, keywords a, b``."""
    args, kwargs = pytree.tree_unflatten([...] * spec.num_leaves, spec)
    parts = [f"{len(args)} positional input{'s' * (len(args) != 1)}"] if args else []
    parts += [f"keyword{'s' * (len(kwargs) != 1)} {', '.join(kwargs)}"] if kwargs else []
    nested = any(leaf is not ... for leaf in (*args, *kwargs.values()))
    form = " and ".join(parts) or "no inputs"
    return f"{form}, nested as {args or ''}{kwargs or ''}" if nested else form


def _first_difference(wanted: list[tuple[str, str]], found: list[tuple[str, str]]) -> str:
    for (name, kind), other in zip(wanted, found, strict=False):
        if (name, kind) != other:
            return f"where it has {kind} {name!r} this one has {other[1]} {other[0]!r}"
    return f"this one has {len(found)}"
