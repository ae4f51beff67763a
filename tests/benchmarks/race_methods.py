"""The peers of the race: each a context in which a model's step is taken the method's way.

* ``eager``: as it is.
* ``hf``: transformers' own flag (``use_reentrant=False``), or, for families without one, every block
  wrapped in ``torch.utils.checkpoint``.  Wrapped blocks update BatchNorm's running statistics twice.
* ``sac``: selective checkpointing of every block by op, as torchtitan's "selective, op" mode sets it: the
  outputs of attention and of every other matrix product are kept, the rest of the block runs again.
  torchtitan's Llama multiplies by ``aten.mm`` only; here ``addmm`` (linear layers with a bias) counts as a
  matrix product too, and a convolution as one, or for half of the families there would be nothing to keep.
* ``compile``: ``torch.compile`` with inductor, sizes fixed; ``compile-budget-B``: the same with
  ``torch._functorch.config.activation_memory_budget = B``.

A context yields what is called in the model's place, and leaves the model as it found it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.benchmarks.race_models import Case

__all__ = ["COMPILED", "HAND_MADE", "INDUCTOR_REASON", "Method", "is_compiled"]

Method = Callable[[Case], AbstractContextManager[nn.Module]]

INDUCTOR_REASON = (
    "plans run as eager kernels: planning the graph that inductor is handed (its custom partitioner) "
    "is not supported yet"
)

aten = torch.ops.aten

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.convolution.default})
KEPT = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def _eager(case: Case) -> AbstractContextManager[nn.Module]:
    return nullcontext(case.model)


@contextmanager
def _flag(case: Case) -> Iterator[nn.Module]:
    model: Any = case.model
    if not case.family.has_flag:
        with _wrapped(case) as wrapped:
            yield wrapped
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield model
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def _wrapped(case: Case, **options: Any) -> Iterator[nn.Module]:
    """Every block under ``torch.utils.checkpoint``."""
    blocks = [m for m in case.model.modules() if type(m).__name__ in case.family.blocks]
    if case.family.blocks == ("Sequential",):  # the U-Net's: convolution, norm, ... in one container
        blocks = [m for m in blocks if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
    if not blocks:
        raise ValueError(f"{case.family.name} has no block called {' or '.join(case.family.blocks)}")

    def run(original: Callable[..., Any], _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(original, *args, use_reentrant=False, **options, **kwargs)

    for block in blocks:
        block.forward = types.MethodType(partial(run, block.forward), block)
    try:
        yield case.model
    finally:
        for block in blocks:
            del block.forward


def _every_other_product() -> Any:
    """Contexts of one checkpointed block: a fresh count of products in its forward and in its recompute."""
    seen = {False: 0, True: 0}

    def policy(ctx: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = func in KEPT
        if func in PRODUCTS:
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _selective(case: Case) -> AbstractContextManager[nn.Module]:
    return _wrapped(case, context_fn=_every_other_product)


def _compiled(budget: float | None) -> Method:
    @contextmanager
    def applied(case: Case) -> Iterator[nn.Module]:
        from torch._functorch import config

        torch._dynamo.reset()
        share = {} if budget is None else {"activation_memory_budget": budget}
        try:
            with config.patch(share):  # read while the joint graph is cut, at the first call
                yield torch.compile(case.model, dynamic=False)  # type: ignore[misc]
        finally:
            torch._dynamo.reset()

    return applied


HAND_MADE: Mapping[str, Method] = MappingProxyType({"eager": _eager, "hf": _flag, "sac": _selective})
COMPILED: Mapping[str, Method] = MappingProxyType(
    {
        "compile": _compiled(None),
        "compile-budget-0.75": _compiled(0.75),
        "compile-budget-0.5": _compiled(0.5),
        "compile-budget-0.25": _compiled(0.25),
    }
)


def is_compiled(method: str) -> bool:
    """Whether a method's kernels are inductor's."""
    return method.startswith("compile") or method.endswith("inductor")
