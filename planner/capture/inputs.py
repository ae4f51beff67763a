"""One batch as the arguments of ``model.forward``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensor, FakeTensorMode, pytree
from planner.capture.module import original_forward

__all__ = ["Inputs"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``model.forward`` as flat leaves, with the way back.

    ``made``  positions, among the tensors, of what other code computed and is to go on from with a gradient,
              where the tensors themselves no longer say so.
    ``real``  the batch's own tensors where these have no memory, until the step is captured; ``answers`` what
              is known to be answered where nobody has them (:mod:`planner.capture.as_eager.values`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: frozenset[int] = frozenset()
    real: tuple[torch.Tensor, ...] = ()
    answers: tuple[bool, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, inputs: object) -> Inputs:
        """A tuple is positional, a mapping is by keyword, a tensor is the one positional argument.

        ``None`` takes ``model.dummy_inputs`` or ``model.example_input_array``.
        """
        if inputs is None:
            for attribute in ("dummy_inputs", "example_input_array"):
                inputs = getattr(model, attribute, None)
                if inputs is not None:
                    log.debug("inputs taken from %s.%s", type(model).__name__, attribute)
                    break
            else:
                raise TypeError(
                    f"plan() needs inputs for {type(model).__name__}: pass inputs=(x, ...) or "
                    "inputs={'name': x, ...}, one batch of the size to plan for"
                )
        if isinstance(inputs, Inputs):
            return inputs.apart()
        if isinstance(inputs, torch.Tensor):
            return cls((inputs,), {}).apart()
        if isinstance(inputs, Mapping):
            return cls((), {str(k): v for k, v in inputs.items()}).apart()
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {}).apart()
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; pass a tuple of positional arguments or a dict of "
            "keyword arguments for model.forward"
        )

    def apart(self) -> Inputs:
        """The same, where another network made a tensor apart from what made it: its graph is not held, and
        the step can be run twice."""
        if not any(t.requires_grad and not t.is_leaf for t in self.tensors()):
            return self
        args, kwargs = pytree.tree_map_only(torch.Tensor, _leaf, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, made=self.of_others)

    @property
    def of_others(self) -> frozenset[int]:
        """Positions of the tensors whose gradients go on into the backward of the code that made them."""
        tensors = enumerate(self.tensors())
        return self.made | {i for i, t in tensors if t.requires_grad and not t.is_leaf}

    def check(self, model: nn.Module) -> None:
        """``TypeError`` unless ``model.forward`` takes these arguments."""
        signature = inspect.signature(original_forward(model))
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as e:
            raise TypeError(
                f"inputs do not fit {type(model).__name__}.forward: {e}. It takes "
                f"({', '.join(signature.parameters)})"
            ) from None

    def flatten(self) -> tuple[list[Any], Any]:
        """Leaves and the pytree spec of ``(args, kwargs)``, keywords in alphabetical order."""
        return pytree.tree_flatten((self.args, dict(sorted(self.kwargs.items()))))

    def without_data(self, *, until_captured: bool = False) -> Inputs:
        """The same with fake tensors: all that a plan needs, and no memory.

        ``until_captured``: with the batch as ``real``, which a capture looks at and lets go of.
        """
        flat, spec = self.flatten()
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def hollow(leaf: Any) -> Any:
            real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
            return mode.from_tensor(leaf, static_shapes=True) if real else leaf

        args, kwargs = pytree.tree_unflatten([hollow(x) for x in flat], spec)
        real = (self.real or tuple(self.tensors())) if until_captured else ()
        return replace(self, args=args, kwargs=kwargs, real=real)

    def let_go(self) -> Inputs:
        """The same without ``real``: what outlives a capture."""
        return replace(self, real=())

    def tensors(self) -> list[torch.Tensor]:
        """The tensor leaves, in order."""
        return [leaf for leaf in self.flatten()[0] if isinstance(leaf, torch.Tensor)]


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)
