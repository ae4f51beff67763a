"""The joint graph of a module from one run of its forward; torch's own tracer runs it twice.

The first of torch's runs finds out which inputs the forward writes into and which outputs need gradients, the
second one is traced.  Where the outputs share no memory with anything, as those of a planned step do, all of
that is known once the traced run is through: the placeholders of the outputs' gradients are put in then, and
the backward is traced behind it.  The graph is torch's, node by node.

What torch treats apart is left to it (:class:`NotInOneRun`): inputs that are one memory under two names, that
wrap other tensors, that need gradients and are written into, whose memory or sizes change, or that the
backward writes into; effects in order; nothing to differentiate.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.config as _functorch_config
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
)

__all__ = ["NotInOneRun", "joint_in_one_run", "run_as_traced"]

_C: Any = torch._C
_BACKWARD = "is_backward"  # how torch marks nodes of the backward
_DYNAMOS = "_torchdynamo_"  # what it notes for itself, the first time that it comes by a function of torch's

# What prepares a module for torch's own tracer is known to take these; 2.13.  Under 2.11, which takes one
# more, torch's own tracer runs: what notes which formula a call belongs to is set in other places there.
_PREPARES = frozenset({
    "mod", "args", "kwargs", "decompositions", "keep_inference_input_mutations", "ignore_shape_env",
    "flatten", "force_non_lazy_backward_lowering", "disable_functionalization", "_record_nn_module_stack",
    "_disable_torch_fn_metadata_mode",
})  # fmt: skip

# Writes into what a graph of its own within the step is given are made behind it; 2.14+
_WRITES_LEAVE: dict[str, Any] = (
    {"_keep_input_mutations": False}
    if "_keep_input_mutations" in inspect.signature(FunctionalTensorMode).parameters
    else {}
)


class NotInOneRun(Exception):
    """A step that only torch's own tracer, which runs the forward twice, takes."""


def _of(name: str) -> Any:
    return importlib.import_module(f"torch._functorch.{name}")


def knows_torch() -> bool:
    """Whether this is a torch whose tracer :func:`joint_in_one_run` is known to stand for."""
    prepare = getattr(_of("aot_autograd"), "prepare_aot_module_simplified", None)
    return prepare is not None and inspect.signature(prepare).parameters.keys() == _PREPARES


def joint_in_one_run(module: nn.Module, args: tuple[Any, ...]) -> fx.GraphModule:
    """As ``aot_export_joint_with_descriptors(stack, module, args)`` leaves its graph; 2.13+.

    Raises ``NotInOneRun``; then the forward may have run.
    """
    if _functorch_config.functionalize_rng_ops or _functorch_config.backward_pass_autocast != "off":
        raise NotInOneRun("other settings of the tracer")
    flat_fn, given, descs, mode, env = _prepared(module, args)
    if any(type(x) is not FakeTensor for x in given):
        raise NotInOneRun("inputs that wrap others")
    joint = _Joint(flat_fn, descs)

    def joint_helper(primals: list[Any]) -> Any:  # by whose argument placeholders are named
        return joint.step(primals)

    proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
    with _as_torch_traces(mode, env) as joint.mode:
        traced: fx.GraphModule = proxies.make_fx(
            joint_helper,
            decomposition_table={},
            record_module_stack=True,
            _disable_torch_fn_metadata_mode=True,
        )(_each_alone(given))
    return joint.finished(traced)


def run_as_traced(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Run ``module`` as :func:`joint_in_one_run` does, without a graph; behind a call of that."""
    flat_fn, given, _, mode, env = _prepared(module, args)
    away = _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(_C.DispatchKey.Functionalize))
    uncached = importlib.import_module("torch.fx.experimental.proxy_tensor").disable_autocast_cache
    with _as_torch_traces(mode, env), away, uncached():
        flat_fn(*map(_of("_aot_autograd.functional_utils").to_fun, _each_alone(given)))


def _prepared(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, list[Any], list[Any], Any, Any]:
    """``module`` as a function of parameters, buffers and ``args``; these as fakes; what each is; their mode
    and shape environment."""
    if not knows_torch():
        raise NotInOneRun("another version of torch")
    prepare = _of("aot_autograd").prepare_aot_module_simplified
    flat_fn, _, _, _, given, descs, _, mode, env, _, _, _ = prepare(
        module, args, {}, None, keep_inference_input_mutations=False, ignore_shape_env=False, flatten=True,
        force_non_lazy_backward_lowering=True, _disable_torch_fn_metadata_mode=True,
    )  # fmt: skip
    return flat_fn, given, descs, mode, env


def _each_alone(given: list[Any]) -> list[Any]:
    """``given``, where one that comes again is another on the same memory."""
    seen: set[int] = set()
    alone = []
    for x in given:
        alone.append(x.detach().requires_grad_(x.requires_grad) if id(x) in seen else x)
        seen.add(id(x))
    return alone


@contextlib.contextmanager
def _as_torch_traces(mode: Any, env: Any) -> Iterator[FunctionalTensorMode]:
    """What torch's tracer sets before it runs anything."""
    dispatcher: Any = importlib.import_module("torch._dispatch.python")
    compiled: Any = importlib.import_module("torch._dynamo.compiled_autograd")
    utils: Any = importlib.import_module("torch._dynamo.utils")
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(compiled._disable())
        put(torch.autograd.set_multithreading_enabled(False))
        put(torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), check_nan=False))  # of no values
        put(utils.preserve_rng_state())
        put(mode)
        if env is not None:
            put(dispatcher.enable_python_dispatcher())
        put(utils._disable_saved_tensors_hooks_during_tracing())
        put(dispatcher.enable_python_dispatcher())
        yield put(FunctionalTensorMode(_allow_token_discovery=True, **_WRITES_LEAVE))


class _Joint:
    """The function that is traced: forward and backward of ``flat_fn`` on stand-ins of its inputs."""

    mode: FunctionalTensorMode

    def __init__(self, flat_fn: Any, descs: list[Any]) -> None:
        self._flat_fn, self._in = flat_fn, descs
        self._tangents: list[Any] = []  # descriptors
        self._out: list[Any] = []
        self._utils = _of("_aot_autograd.functional_utils")

    def step(self, primals: list[Any]) -> Any:
        """Outputs and gradients, of fakes."""
        proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
        described = _of("_aot_autograd.descriptors")
        away = _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(_C.DispatchKey.Functionalize))
        with fx.traceback.preserve_node_meta(), proxies.maybe_enable_thunkify(), away:
            stand_ins = [self._utils.to_fun(x) for x in primals]
            autocast = _of("_aot_autograd.utils")._get_autocast_states
            before = autocast()
            outs = list(self._flat_fn(*stand_ins))
            if autocast() != before:
                raise NotInOneRun("the forward leaves autocast otherwise than it was")
            self._refuse_outputs(stand_ins, outs)
            written = self._written(stand_ins, primals)
            for x in stand_ins:
                torch._sync(x)  # type: ignore[attr-defined]
            grads = self._backward(proxies, stand_ins, outs)
            if self.mode._tokens or self._written(stand_ins, primals) != written:
                raise NotInOneRun("the backward writes into inputs, or has effects in order")
        mutated = [described.InputMutationAOTOutput(self._in[i]) for i in written]
        plain = [described.PlainAOTOutput(i) for i in range(len(outs))]
        ends = [
            None if g is None else described.GradAOTOutput(d) for g, d in zip(grads, self._in, strict=True)
        ]
        self._out = [*mutated, *plain, *ends]
        results = [*(stand_ins[i] for i in written), *outs]
        of = self._utils.from_fun
        return tuple([of(x) for x in results]), tuple([of(x) for x in grads])

    def _refuse_outputs(self, stand_ins: list[Any], outs: list[Any]) -> None:
        kinds = {type(x) for x in outs}
        if kinds != {FunctionalTensor} or self.mode._tokens:
            raise NotInOneRun("outputs that are no tensors, or effects in order")
        storages = Counter(x.untyped_storage()._cdata for x in (*stand_ins, *outs))
        if any(storages[x.untyped_storage()._cdata] > 1 or x._base is not None for x in outs):
            raise NotInOneRun("outputs that share memory")
        if not any(x.requires_grad for x in outs):
            raise NotInOneRun("nothing to differentiate")

    def _written(self, stand_ins: list[Any], primals: list[Any]) -> list[int]:
        """Which inputs hold other values than before."""
        utils, written = self._utils, []
        storages = Counter(x.untyped_storage()._cdata for x in primals)
        for i, (x, given) in enumerate(zip(stand_ins, primals, strict=True)):
            if utils.has_metadata_mutation(x, given, check_only_storage_mutation=False):
                raise NotInOneRun("an input whose sizes or memory change")
            if utils.was_inductor_storage_resized(x):
                raise NotInOneRun("an input whose memory grows")
            if utils.has_data_mutation(x):
                if x.requires_grad or given.requires_grad:
                    raise NotInOneRun("an input that needs gradients is written into")
                if storages[given.untyped_storage()._cdata] > 1:
                    raise NotInOneRun("an input that is written into shares memory with another")
                written.append(i)
        return written

    def _backward(self, proxies: Any, stand_ins: list[Any], outs: list[Any]) -> list[Any]:
        needed = [(i, x) for i, x in enumerate(outs) if x.requires_grad]
        tangents = self._placeholders(proxies, needed)
        ends = [x for x in stand_ins if x.requires_grad]
        if not ends:
            raise NotInOneRun("nothing to differentiate by")
        roots = [x.grad_fn for _, x in needed if x.grad_fn is not None]
        _of("_aot_autograd.logging_utils").setup_stacktrace_preservation_hooks(roots)
        self.mode._tokens_forward_output, self.mode._tokens = self.mode._tokens, {}
        wrappers = _of("_aot_autograd.graph_capture_wrappers")
        with (
            wrappers.set_partitioner_tag_is_backward(),
            fx.traceback.preserve_node_meta(),
            wrappers.disable_autocast(),
        ):
            made = iter(
                torch.autograd.grad([x for _, x in needed], ends, grad_outputs=tangents, allow_unused=True)
            )
        return [next(made) if x.requires_grad else None for x in stand_ins]

    def _placeholders(self, proxies: Any, needed: list[tuple[int, Any]]) -> list[Any]:
        """Stand-ins of the gradients of outputs, each with a placeholder that is put behind the others."""
        described = _of("_aot_autograd.descriptors")
        tracer = proxies.get_proxy_mode().tracer
        last = [n for n in tracer.graph.nodes if n.op == "placeholder"][-1]
        alike = {key: value for key, value in last.meta.items() if key not in ("val", "tensor_meta")}
        stand_ins = []
        for number, (i, out) in enumerate(needed, 1):
            fake = self._tangent_of(proxies, self._utils.from_fun(out))
            with tracer.graph.inserting_after(last):
                proxy = tracer.create_proxy("placeholder", f"tangents_{number}", (), {})
            last = proxy.node
            last.meta = alike | {"partitioner_tag": _BACKWARD}
            with proxies.disable_proxy_modes_tracing():
                proxies.track_tensor_tree(fake, proxy, constant=None, tracer=tracer)
            self._tangents.append(described.TangentAOTInput(described.PlainAOTOutput(i)))
            stand_ins.append(self._utils.to_fun(fake))
        return stand_ins

    def _tangent_of(self, proxies: Any, out: Any) -> Any:
        """A fake like the gradient of ``out``, on memory of its own."""
        laid_out = _of("_aot_autograd.collect_metadata_analysis").coerce_tangent_and_suggest_memory_format
        if out.layout is not torch.strided:
            raise NotInOneRun("an output that is not laid out by strides")
        with proxies.disable_proxy_modes_tracing(), disable_functional_mode():
            like = laid_out(out.view(out.shape))[0]
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    def finished(self, traced: fx.GraphModule) -> fx.GraphModule:
        """With descriptors, with what the backward's nodes have from the forward's, without dead code."""
        utils: Any = importlib.import_module("torch._dynamo.utils")
        graph: Any = traced.graph
        placeholders = graph.find_nodes(op="placeholder")
        for node, desc in zip(placeholders, [*self._in, *self._tangents], strict=True):
            node.meta["desc"] = desc
        (output,) = graph.find_nodes(op="output")
        output.meta["desc"] = self._out
        info = graph._codegen.pytree_info
        inputs = [0] * len(self._in), [0] * len(self._tangents)
        graph._codegen.pytree_info = info._replace(
            orig_args=["primals", "tangents"], in_spec=pytree.tree_flatten(inputs)[1]
        )
        utils.assert_no_fake_params_or_buffers(traced)
        _note_modules(graph)
        graph.eliminate_dead_code()
        self._utils.assert_functional_graph(graph)
        traced.recompile()
        return traced


def _note_modules(graph: fx.Graph) -> None:
    """Nodes of the backward are of the module whose forward made them; torch tells by autograd's numbers."""
    made_by: dict[int, Any] = {}  # what it says, but for what Dynamo notes for itself
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if number is None:
            continue
        if node.meta.get("partitioner_tag") != _BACKWARD:
            if number not in made_by:
                custom = node.meta.get("custom")
                made_by[number] = custom and {k: v for k, v in custom.items() if not k.startswith(_DYNAMOS)}
        elif not node.meta.get("is_gradient_acc", False):
            told = made_by.get(number)
            if told is not None:
                node.meta["custom"] = {**node.meta.get("custom", {}), **told}
