"""Parameters that are spread over ranks: FSDP2's shards, and DTensors; asked for where there are any."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn


def is_spread(kind: type) -> bool:
    """Whether tensors of this class are DTensors, whose ops run on what each rank has of them; 2.5+."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and issubclass(kind, found.DTensor)


def is_in_flight(kind: type) -> bool:
    """Whether tensors of this class are what a collective gives, waited for at their first use; 2.1+."""
    found = sys.modules.get("torch.distributed._functional_collectives")
    return found is not None and issubclass(kind, found.AsyncCollectiveTensor)


def local_of(tensor: Any) -> torch.Tensor:
    """What this rank has of a DTensor, the same object each time, or what a collective gave; 2.5+."""
    here: Any = tensor._local_tensor if is_spread(type(tensor)) else tensor
    if is_in_flight(type(here)):
        here.trigger_wait()
        here = here.elem
    found: torch.Tensor = here
    return found


def layout_of(tensor: Any) -> Any:
    """How a DTensor is spread: a mesh, placements, sizes of the whole; hashable; 2.5+."""
    return tensor._spec


def alike_spread(one: Any, other: Any) -> bool:
    """Whether two layouts are of one mesh and one way to spread; 2.5+."""
    return bool(one.mesh == other.mesh and one.placements == other.placements)


def spread(local: torch.Tensor, layout: Any) -> Any:
    """The DTensor of which this rank has ``local``; 2.5+."""
    from torch.distributed.tensor import DTensor

    make: Any = DTensor
    return make(local, layout, requires_grad=False)


def gradient_layout(layout: Any) -> Any:
    """How the gradient of a DTensor is spread unless something says otherwise: as it is, but that parts of a
    sum have the gradient of the sum; 2.5+.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    placements = tuple(Replicate() if p.is_partial() else p for p in layout.placements)
    return DTensorSpec(layout.mesh, placements, tensor_meta=layout.tensor_meta)


def frames_of_spread() -> list[CodeType]:
    """Code of DTensor's methods and of the hooks of parallel styles, which by itself is nothing to compile;
    2.5+.
    """
    found = sys.modules.get("torch.distributed.tensor")
    styles = sys.modules.get("torch.distributed.tensor.parallel.style")
    if found is None:
        return []
    names = ("from_local", "to_local", "redistribute", "full_tensor")
    functions = [found.distribute_module, *(getattr(found.DTensor, name) for name in names)]
    for style in () if styles is None else vars(styles).values():
        if isinstance(style, type):
            functions += [
                getattr(style, name) for name in vars(style) if name.startswith(("_prepare", "_apply"))
            ]
    codes = [f.__code__ for f in functions if hasattr(f, "__code__")]
    return codes + [inner for code in codes for inner in code.co_consts if isinstance(inner, CodeType)]


def is_masked(layout: Any) -> bool:
    """Whether a DTensor is a row-wise embedding's before it is added up, with a mask outside of it; 2.5+."""
    return any(hasattr(p, "mask_buffer") for p in layout.placements)


@contextlib.contextmanager
def masks_of_traces_apart() -> Iterator[None]:
    """What a trace noted of a row-wise embedding, whose graph ended before it was added up, is no reason for
    another run of it to say no; 2.5+.

    Torch keeps the mask of rows on an object that all calls share (2.13).
    """
    found: Any = sys.modules.get("torch.distributed.tensor._ops._mask_buffer")
    if found is None:
        yield
        return
    buffer, before = found.MaskBuffer, found.MaskBuffer.materialize_mask

    def materialize(self: Any, mask: torch.Tensor) -> None:
        if self.data is not None and type(self.data) is not type(mask):
            self.data, self.refcount = None, 0
        before(self, mask)

    buffer.materialize_mask = materialize
    try:
        yield
    finally:
        buffer.materialize_mask = before


def is_collective(target: Any) -> bool:
    """Whether a call in a traced graph begins a collective, which another waits for; 2.1+."""
    return getattr(target, "namespace", "") == "_c10d_functional" and not is_wait(target)


def is_wait(target: Any) -> bool:
    """Whether a call in a traced graph waits for a collective; 2.1+."""
    return getattr(target, "__name__", "").startswith("wait_tensor.")


def run_collective(call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The result of a collective of a traced graph ("all_reduce.default"), when it is there; 2.1+."""
    name, overload = call.split(".")
    functional: Any = torch.ops._c10d_functional
    made: torch.Tensor = functional.wait_tensor(getattr(getattr(functional, name), overload)(*args, **kwargs))
    return made


def talks(target: Any) -> bool:
    """Whether a call in a traced graph talks to other ranks."""
    return getattr(target, "namespace", "") in ("_c10d_functional", "_dtensor")


@contextlib.contextmanager
def no_draws_of_spread() -> Iterator[None]:
    """``RuntimeError`` where an op on a DTensor draws random numbers by an offset of its rank (CUDA), which
    another run of the same op would not find again; 2.5+.
    """
    random: Any = sys.modules.get("torch.distributed.tensor._random")
    if random is None:
        yield
        return
    tracker, before = random.OffsetBasedRNGTracker, {}

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an op on a DTensor draws random numbers, whose offset is the rank's own")

    for name in ("_distribute_region", "_compute_rng_offsets"):
        if name in vars(tracker):
            before[name] = vars(tracker)[name]
            setattr(tracker, name, refuse)
    try:
        yield
    finally:
        for name, was in before.items():
            setattr(tracker, name, was)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to ``module`` itself (FSDP2); 2.6+."""
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def checkpointed_around(model: nn.Module) -> str:
    """The path of a module of torch's that checkpoints what ``fully_shard`` was applied to, or of one with a
    checkpoint among its hooks; "": there is none; 2.6+.
    """
    wrappers = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    contract = sys.modules.get("torch.distributed._composable.contract")
    for path, module in model.named_modules():
        is_around = wrappers is not None and isinstance(module, wrappers.CheckpointWrapper)
        inside = (inner for inner in module.modules() if inner is not module)
        hooked = contract is not None and "checkpoint" in (contract._get_registry(module) or {})
        if hooked or (is_around and any(map(is_fully_sharded, inside))):
            return path or type(module).__name__
    return ""


def compiled_part(model: nn.Module) -> str | None:
    """The path of a module that is compiled by itself, in place or in a wrapper; ``None``: none is; 2.0+."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    for path, module in model.named_modules():
        is_wrapper = frames is not None and isinstance(module, frames.OptimizedModule)
        if is_wrapper or getattr(module, "_compiled_call_impl", None) is not None:
            return path
    return None


def gathers(hook: Any) -> bool:
    """Whether a hook on a gradient is FSDP2's, which gathers parameters and hands the gradient on; 2.6+."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")


def shard_groups(model: nn.Module) -> list[Any]:
    """What ``fully_shard`` keeps of parameters that are gathered together, each once; 2.6+.

    It does not change once the model has run.
    """
    return list(_groups(model))


def _groups(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        state: Any = module._get_fsdp_state() if is_fully_sharded(module) else None  # type: ignore[operator]
        if state is None:
            continue
        # one for each mesh that parameters of a module are on; 2.12+, before that one or none
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` as its optimizer has them, whether they are gathered now or not."""
    shards = {
        id(of._unsharded_param): of.sharded_param
        for group in _groups(model)
        for of in group.fsdp_params
        if hasattr(of, "_unsharded_param")
    }
    found = (shards.get(id(p), p) for p in model.parameters())
    return list({id(p): p for p in found}.values())


def spread_parameters(model: nn.Module) -> list[str]:
    """Parameters that are DTensors, other than by FSDP2 alone: their ops may talk to other ranks; 2.6+."""
    shards = {
        id(of.sharded_param) for group in _groups(model) for of in group.fsdp_params if not of.is_dtensor
    }
    gathered = gathered_names(model)
    return [
        name
        for name, p in model.named_parameters()
        if id(p) not in shards and (is_spread(type(p)) or (id(p) in gathered and is_spread(type(p.data))))
    ]


def gathered_names(model: nn.Module) -> dict[int, str]:
    """The paths of parameters in ``model`` by the identity of what its forward reads, where FSDP2 gathers it;
    those that were gathered before.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, str] = {}
    for group in _groups(model):
        for of in group.fsdp_params:
            info = of._module_info
            path = paths.get(id(info.module))
            if path is not None and hasattr(of, "_unsharded_param"):
                found[id(of._unsharded_param)] = f"{path}.{info.param_name}".lstrip(".")
    return found


def held_by_shards(model: nn.Module) -> list[torch.Tensor]:
    """What FSDP2 holds on the device beside the shards: gathered parameters, gradients that are yet to be
    reduced, buffers of collectives that are not let go of.
    """
    found: list[Any] = []
    for group in _groups(model):
        for of in group.fsdp_params:
            found += of.all_gather_outputs
            found += [of.sharded_param, of._sharded_param_data, of.unsharded_accumulated_grad]
            found.append(getattr(of, "_sharded_post_forward_param_data", None))
            if hasattr(of, "_unsharded_param"):
                found.append(of._unsharded_param.grad)
        found.append(group._partial_reduce_output)
        context = group.comm_ctx
        results = [group._all_gather_result]
        state = getattr(context, "all_gather_state", None)
        results += [] if state is None else [state.all_gather_result]
        found += [result.all_gather_output for result in results if result is not None]
        found += [state.reduce_scatter_input for state in _reductions(context)]
    return list({id(x): x for x in found if isinstance(x, torch.Tensor)}.values())


def _reductions(context: Any) -> list[Any]:
    """Reductions whose buffers are held; several at once from 2.13 on."""
    many = getattr(context, "reduce_scatter_states", None)
    if many is None:
        one = getattr(context, "reduce_scatter_state", None)
        return [] if one is None else [one]
    return list(many)


def unreduced_gradients(groups: Sequence[Any]) -> list[torch.Tensor]:
    """Gradients that FSDP2 holds whole, of micro-batches whose gradients are not reduced."""
    found = []
    for group in groups:
        for of in group.fsdp_params:
            own = of._unsharded_param.grad if hasattr(of, "_unsharded_param") else None
            found += [g for g in (own, of.unsharded_accumulated_grad) if g is not None]
    return found


def sharding_now(groups: Sequence[Any]) -> Hashable:
    """The settings of FSDP2 that a step's memory depends on, and what is gathered at this moment."""
    return tuple(
        (
            group.reduce_grads,
            group.all_reduce_grads,
            group.reshard_after_backward,
            group.post_forward_mesh_info is None,
            group.is_sharded,
        )
        for group in groups
    )


_HEARERS: dict[Callable[[torch.UntypedStorage, int], None], int] = {}


def hear_resizes(hearer: Callable[[torch.UntypedStorage, int], None]) -> None:
    """From here on ``hearer(storage, bytes before)`` is called where a storage is resized from Python, which
    no op shows; 2.0+.
    """
    if not _HEARERS:
        torch.UntypedStorage.resize_ = _resized  # type: ignore[method-assign,assignment]
    _HEARERS[hearer] = _HEARERS.get(hearer, 0) + 1


def hear_no_resizes(hearer: Callable[[torch.UntypedStorage, int], None]) -> None:
    """Undo one :func:`hear_resizes`."""
    _HEARERS[hearer] -= 1
    if not _HEARERS[hearer]:
        del _HEARERS[hearer]
    if not _HEARERS:
        del torch.UntypedStorage.resize_


_RESIZE = torch.UntypedStorage.resize_


def _resized(storage: torch.UntypedStorage, size: int) -> Any:
    before = storage.nbytes()
    result = _RESIZE(storage, size)
    for hearer in list(_HEARERS):
        hearer(storage, before)
    return result
