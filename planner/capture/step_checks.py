"""What a traced step must not do, refused with its reason once there is a graph to see it in."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from planner._compat import pytree
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.capture.on_fakes import on_fakes
from planner.capture.state.effects import Effects
from planner.capture.state.reads import Reads
from planner.capture.state.second_call import Alike, alike, is_cache, settle
from planner.capture.traced import Traced
from planner.errors import TraceError

__all__ = ["refuse_formulas_of_values", "refuse_loose_parameters", "refuse_side_effects", "refuse_sparse"]

# Where no value is zero, eager divides by each; a trace, which sees no values, makes products of the others.
_DIVIDES = ("aten.prod", "aten.cumprod")


def refuse_formulas_of_values(traced: Traced) -> None:
    """Raise where a gradient is made by one formula or another, as values are."""
    trained = {traced.parameters[name] for name in traced.gradients}
    trained |= {traced.inputs[i] for i in traced.input_gradients}
    behind = set(traced.tangents.values())
    backward: set[int | None] = set()
    products = []
    for node in traced.module.graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
            backward.add(meta.formula(node))
        elif node.target is not torch.ops.aten.detach.default and not trained.isdisjoint(
            node.all_input_nodes
        ):
            trained.add(node)
            if str(getattr(node.target, "overloadpacket", "")) in _DIVIDES:
                products.append(node)
    for node in products:
        if meta.formula(node) in backward - {None}:
            raise TraceError(
                "eager makes the gradient of a product (prod, cumprod) by one formula or another, as values "
                "are zero or not, and a trace by another still, with other last bits. Multiply two halves, "
                "or plan the parts of the model around it"
            )


def refuse_sparse(traced: Traced) -> None:
    """Raise where a tensor is sparse: what it takes is known only when it is made."""
    for node in traced.module.graph.nodes:
        for x in pytree.tree_leaves(meta.value(node) if node.op != "output" else None):
            if isinstance(x, torch.Tensor) and x.layout != torch.strided:
                raise TraceError(
                    f"a tensor of its step is {str(x.layout).removeprefix('torch.')} ({node.name}), whose "
                    "size is known only when it is made; a plan is for dense ones (embeddings: sparse=False)"
                )


def refuse_side_effects(
    model: nn.Module,
    given: Inputs,
    effects: Effects,
    reads: Reads,
    updated: Collection[str],
    traced: Alike | None = None,
) -> None:
    """Raise for what the forward did beside computing, unless it does so at its first call only.

    ``updated``  names of the buffers that it writes, as it may.
    ``traced``   what a second run had in common with the first while it was traced, if that was seen.
    """
    if not effects.touched:
        return
    if traced and traced.ops and not traced.going and not effects.stored:
        settle(effects)
        return
    call, tensors = on_fakes(model, given)
    if effects.stored:
        constant = {n for n, _ in model.named_buffers()} - set(updated)
        if is_cache(model, call, [t for n, t in tensors.items() if n not in constant], reads.containers):
            return
        again = None
    else:
        again = alike(model, call, tensors, reads.containers)
        if again.ops and not again.going:
            settle(effects)
            return
    if effects.lost and (again is None or again.going):
        names = again.going if again else effects.lost
        raise TraceError(
            f"the forward of {type(model).__name__} stores tensors, adds to lists or counts in "
            f"{', '.join(names[:3])}; a planned step runs one graph and would not. Return them, keep "
            "them in buffers, or do it outside forward; where it is a cache that the first call fills, call "
            "the model once before planning"
        )
    if again and not again.ops:
        raise TraceError(
            f"the first call of {type(model).__name__} runs other code than those that come after it: it "
            f"changes {', '.join(effects.touched[:3])}; a planned step runs one graph. Call the model once "
            "before planning, if all later calls are alike"
        )


def refuse_loose_parameters(model: nn.Module, module: fx.GraphModule) -> None:
    """Raise for a tensor that eager would give a gradient, and which a graph takes for a constant."""
    for node in module.graph.find_nodes(op="get_attr"):
        constant = getattr(module, str(node.target), None)
        if isinstance(constant, torch.Tensor) and constant.requires_grad and constant.is_leaf:
            raise TraceError(
                f"the forward of {type(model).__name__} uses a tensor {tuple(constant.shape)} that requires "
                "grad and is no parameter of it, but of a module in a plain list, say, or a plain attribute: "
                "it would get no gradient. Register it (nn.ModuleList, nn.Parameter), or set its "
                "requires_grad to False"
            )
