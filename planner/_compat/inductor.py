"""How inductor splits, lowers and compiles a graph; and what its generated code allocates."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import operator
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

__all__ = [
    "IS_REALIZED",
    "Lowered",
    "Split",
    "allocated_peak",
    "allocated_peaks",
    "compile_as_torch",
    "compile_split",
    "copy_of",
    "forward_and_backward",
    "has_channels_last",
    "has_symbols",
    "is_exact",
    "is_fused",
    "is_last_compile",
    "is_lowered",
    "is_profiled",
    "is_view_of_operand",
    "keeps_products_apart",
    "laid_out",
    "lowered",
    "recompile_limit",
    "seeded",
    "stored",
    "torchs_partition",
    "torchs_split",
    "writes",
]

log = logging.getLogger(__name__)

aten = torch.ops.aten

# (joint module, number of the forward's outputs, positions of static inputs) -> forward and backward
Split = Callable[[fx.GraphModule, int, Any], tuple[fx.GraphModule, fx.GraphModule]]

# Key of ``node.meta``: inductor stores what the node makes instead of writing it into its readers; 2.11+
IS_REALIZED = "inductor_realize_to_strides"

# Libraries' kernels that inductor calls though it has lowerings for them.
_LIBRARY = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward, aten._int_mm,
    aten.mkldnn_rnn_layer,
}  # fmt: skip


def _as_written(*, is_backward: bool, sparing: bool) -> dict[str, Any]:
    """Settings under which kernels run in the order in which a graph calls them, a backward's on operands
    that are laid out as it says.

    ``sparing``  what is dead is freed, rather than held for the next result of its size.
    """
    order: dict[str, Any] = {"reorder_for_peak_memory": False, "reorder_for_locality": False}
    order |= {"layout_optimization": False} if is_backward else {}
    return order | {"allow_buffer_reuse": False} if sparing else order


# What is written into its readers, beside what torch tags as pointwise.
_INLINED = {
    aten.full, aten.full_like, aten.arange, aten.scalar_tensor, aten.clone, aten.embedding, aten.gather,
    aten.index, aten._unsafe_index, aten._unsafe_masked_index, aten.constant_pad_nd, aten.where, aten.copy,
    aten.slice_scatter, aten.select_scatter, aten.masked_fill, aten.index_select, aten.flip, aten.roll,
    aten.empty, aten.zeros, aten.ones, aten.expand, aten.repeat, aten.tril, aten.triu, aten.diagonal_scatter,
    aten._to_copy, aten.lift_fresh_copy, aten.ones_like, aten.zeros_like, aten.new_zeros, aten.new_ones,
    aten.new_full,
    torch.ops.prims.convert_element_type, torch.ops.prims.iota, torch.ops.prims.fma,
    torch.ops.prims.inductor_random, torch.ops.prims.inductor_randint, torch.ops.prims.inductor_lookup_seed,
    torch.ops.prims._low_memory_max_pool_offsets_to_indices,
}  # fmt: skip


# What a processor rounds to the one nearest number, or does not round at all: however it is compiled, the
# same operands give the same bits.  Approximated functions do not, nor sums in an order of their own.
_EXACT = {
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.abs, aten.sqrt, aten.rsqrt,
    aten.reciprocal, aten.relu, aten.maximum, aten.minimum, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.where, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.logical_and, aten.logical_or,
    aten.logical_not, aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.bitwise_not, aten.sign,
    aten.floor, aten.ceil, aten.round, aten.trunc, aten.masked_fill, aten.isnan, aten.isinf,
    torch.ops.prims.convert_element_type, torch.ops.prims.iota, torch.ops.prims.inductor_random,
    torch.ops.prims.inductor_randint, torch.ops.prims.inductor_lookup_seed,
    aten.full, aten.full_like, aten.arange, aten.scalar_tensor, aten.clone, aten.embedding, aten.gather,
    aten.index, aten._unsafe_index, aten._unsafe_masked_index, aten.constant_pad_nd, aten.copy,
    aten.slice_scatter, aten.select_scatter, aten.index_select, aten.flip, aten.roll, aten.repeat, aten.tril,
    aten.triu, aten.cat,
}  # fmt: skip


def is_exact(node: fx.Node) -> bool:
    """Whether a call gives the same bits for the same operands, whichever loop it is compiled into.

    Where numbers are shorter than 32 bits what is passed on within a loop is not rounded to them: no.
    """
    short = (torch.float16, torch.bfloat16)
    given = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if any(isinstance(x, torch.Tensor) and x.dtype in short for x in given):
        return is_view_of_operand(node) or not is_lowered(node)
    return is_view_of_operand(node) or not is_lowered(node) or _packet(node) in _EXACT


def keeps_products_apart(device: torch.device) -> bool:
    """Whether a product and a sum are rounded one by one where they are compiled for ``device``; 2.3+."""
    from torch._inductor import config

    return device.type == "cpu" and config.cpp.enable_floating_point_contract_flag == "off"


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def is_view_of_operand(node: fx.Node) -> bool:
    """Whether a call makes another look at an operand and no storage."""
    schema = getattr(node.target, "_schema", None)
    if node.target is operator.getitem or schema is None:
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def is_lowered(node: fx.Node) -> bool:
    """Whether inductor writes the loops of a call itself, and takes operands that are not stored; 2.11+."""
    from torch._inductor import lowering

    if node.target is operator.getitem or _packet(node) in _LIBRARY:
        return False
    return node.target in lowering.lowerings and node.target not in lowering.fallbacks


def is_fused(node: fx.Node) -> bool:
    """Whether the loops of such a call are written into those of its readers."""
    if not is_lowered(node):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _packet(node) in _INLINED


def forward_and_backward(
    joint: fx.GraphModule, saved: list[fx.Node], sizes: list[fx.Node], *, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two modules of ``joint``, in which nothing behind ``saved`` and ``sizes`` is read across; 2.9+."""
    from torch._functorch import partitioners

    halves = partitioners._extract_fwd_bwd_modules(joint, saved, sizes, num_fwd_outputs=num_fwd_outputs)
    for half in halves:  # what may draw random numbers is kept, read or not, attention without dropout too
        for node in reversed(list(half.graph.nodes)):
            if node.op == "call_function" and not node.users and not writes(node):
                half.graph.erase_node(node)
        half.recompile()
    return halves


def stored(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What a kernel made, apart from the calls that read it: they are not joined to it; 2.6+."""
    strides = node.meta["val"].stride()
    return node if any(isinstance(n, torch.SymInt) for n in strides) else laid_out(graph, node, strides)


def laid_out(graph: fx.Graph, node: fx.Node, strides: Sequence[int]) -> fx.Node:
    """What ``node`` makes, with dimensions in the order of ``strides``: a copy where it is not; 2.6+."""
    from torch._inductor import inductor_prims

    new = graph.call_function(inductor_prims.force_stride_order, (node, list(strides)))
    value = node.meta["val"]
    new.meta = {**node.meta, "val": value.new_empty_strided(value.shape, strides)}
    return new


def has_channels_last(gm: fx.GraphModule) -> bool:
    """Whether inductor lays out the convolutions of a graph with the channels last; 2.1+."""
    from torch._inductor.graph import GraphLowering

    return bool(GraphLowering.decide_layout_opt(gm, is_inference=False))


def writes(node: fx.Node) -> bool:
    """Whether a call acts on something else than its results."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and (schema.is_mutable or "c10d" in schema.name)) or (
        node.is_impure() and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
    )


@functools.cache
def _partitioner() -> Any:
    """The class of our partitioner: what it derives from is imported with inductor, which takes a while."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn  # 2.9+

    class Partitioner(CustomPartitionerFn):
        def __init__(self, split: Split, key: str | None) -> None:
            self.split, self.key = split, key

        def uuid(self) -> Any:
            return self.key

        def __reduce__(self) -> Any:  # as part of a cache's key
            return str, (self.key,)

        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            return self.split(gm, kwargs["num_fwd_outputs"], kwargs.get("static_lifetime_input_indices"))

    return Partitioner


@functools.cache
def _choices(*, sparing: bool) -> Any:
    """What decides which loops become one: those between the same two calls of libraries' kernels.

    Inductor otherwise joins whatever reads the same, and what is made again late would be made early.

    ``sparing``  only a loop and one that reads what it makes: of two that read the same, the first's operands
                 are gone before the second's results are there.
    """
    from torch._inductor.choices import InductorChoices  # 2.6+

    class BetweenKernels(InductorChoices):
        @staticmethod
        def can_fuse(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            kernels = getattr(scheduler, "_kernels_at", None)
            if kernels is None:
                kernels = sorted(n.min_order for n in scheduler.nodes if n.is_extern())
                scheduler._kernels_at = kernels
            first, last = min(node1.min_order, node2.min_order), max(node1.max_order, node2.max_order)
            if bisect(kernels, first) != bisect(kernels, last) and not (
                node1.is_extern() or node2.is_extern()
            ):
                return False
            return bool(InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score))

        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            joins = InductorChoices.can_fuse_horizontal
            return not sparing and bool(joins(scheduler, node1, node2, shared_data_score))

    return BetweenKernels()


def _return_as_given(gm: fx.GraphModule) -> None:
    """Let inductor return arguments that ``gm`` returns as they are.

    A weight that a convolution reads with its channels last is otherwise returned as that copy, which is held
    until the backward then, beside the weight.  What a user sees is not laid out anew; 2.9+.
    """
    (output,) = gm.graph.find_nodes(op="output")
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    given = {i for i, n in enumerate(returned) if isinstance(n, fx.Node) and n.op == "placeholder"}
    seen = output.meta.get("user_visible_output_idxs", ())
    output.meta["user_visible_output_idxs"] = sorted({*seen, *given})


@contextlib.contextmanager
def _loops_apart(apart: bool) -> Iterator[None]:
    """On a CPU each loop is a function of its own; otherwise all between two calls are one, and what the last
    of them makes has memory before the first begins.  Process-global, put back; 2.2+.
    """
    from torch._inductor.codegen.cpp import CppScheduling

    before = CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
    if apart:
        CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = 0
    try:
        yield
    finally:
        CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = before


@contextlib.contextmanager
def _gradients_as_given() -> Iterator[None]:
    """Gradients of convolutions run on operands that lie as :func:`laid_out` says.

    Inductor lays them out as the gradient of the weight lies, which for a convolution of each channel by
    itself is in rows either way: 2.13+.  Before, they lie as the graph says.  Process-global, put back.
    """
    from torch._inductor import inductor_prims
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    conv = importlib.import_module("torch._inductor.kernel.conv")
    op = aten.convolution_backward.default
    as_is, before = getattr(conv, "aten_convolution_backward_fallback", None), lowerings.get(op)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        operands = V.graph.current_node.args[:2]
        given = [getattr(n, "target", None) is inductor_prims.force_stride_order for n in operands]
        return (as_is if all(given) else before)(*args, **kwargs)  # type: ignore[misc]

    if as_is is not None and before is not None:
        lowerings[op] = lowering
    try:
        yield
    finally:
        if before is not None:
            lowerings[op] = before


@contextlib.contextmanager
def _written(*, sparing: bool) -> Iterator[None]:
    with _loops_apart(sparing), _gradients_as_given():
        yield


def compile_split(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    split: Split,
    *,
    key: str | None = None,
    inner: Callable[..., Any] | None = None,
    as_written: bool = True,
    sparing: bool = False,
) -> Callable[..., Any]:
    """``gm`` compiled by inductor, its joint graph split by ``split``; 2.9+.

    ``key``         what its answers depend on, for the caches of compiled code; ``None``: nothing is cached.
    ``inner``       compiles each half instead of inductor's code generator: (graph module, inputs, settings).
    ``as_written``  calls of libraries run in the order of the halves, and loops stay between them.
    ``sparing``     loops that only read the same stay apart too, and what is dead is freed at once.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.virtualized import V

    def compiled(*args: Any, **kwargs: Any) -> Any:
        settings = _as_written(is_backward=bool(kwargs.get("is_backward")), sparing=sparing)
        _return_as_given(args[0])
        choices = _choices(sparing=sparing)
        with V.set_choices_handler(choices), config.patch(settings), _written(sparing=sparing):
            return compile_fx_inner(*args, **kwargs)

    own = copy_of(gm)
    patches: dict[str, Any] = {"custom_partitioner_fn": _partitioner()(split, key)}
    made: Any = compile_fx(
        own, inputs, inner or (compiled if as_written else compile_fx_inner), config_patches=patches
    )
    return made


def compile_as_torch(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """``gm`` compiled by inductor, its joint graph split as torch would; 2.0+."""
    from torch._inductor.compile_fx import compile_fx

    made: Any = compile_fx(copy_of(gm), inputs)
    return made


def compiles_later(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[], Callable[..., Any]]:
    """Compiles a graph that Dynamo gives now as torch does, with what is known of it now; 2.1+."""
    from torch._guards import TracingContext, tracing

    context = TracingContext.try_get()

    def compile_now() -> Callable[..., Any]:
        with tracing(context):
            return compile_as_torch(gm, inputs)

    return compile_now


def torchs_split(joint: fx.GraphModule, forwards: int, static: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two modules of ``joint`` as torch splits it where no memory is to be saved; 2.0+."""
    from torch._functorch.partitioners import default_partition

    return default_partition(joint, (), num_fwd_outputs=forwards)


def torchs_partition(
    joint: fx.GraphModule, forwards: int, budget: float, static: Any = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two modules of ``joint``, which is used up, as torch splits it for an
    ``activation_memory_budget``; 2.4+.
    """
    from torch._functorch import config, partitioners

    with config.patch(activation_memory_budget=budget):
        return partitioners.min_cut_rematerialization_partition(
            joint, (), num_fwd_outputs=forwards, static_lifetime_input_indices=static
        )


def seeded(gm: fx.GraphModule) -> None:
    """Let calls that draw from a seed draw the same from the same one, run by the dispatcher; 2.1+."""
    from torch._inductor import inductor_prims

    def random(size: Any, seed: torch.Tensor, mode: str, *, offset: int = 0) -> torch.Tensor:
        source = torch.Generator(seed.device).manual_seed(int(seed))
        draw = torch.rand if mode == "rand" else torch.randn
        return draw(size, device=seed.device, generator=source)

    def randint(low: int, high: int, size: Any, seed: torch.Tensor, *, offset: int = 0) -> torch.Tensor:
        source = torch.Generator(seed.device).manual_seed(int(seed))
        return torch.randint(low, high, size, device=seed.device, generator=source)

    instead = {inductor_prims.random: random, inductor_prims.randint: randint}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in instead:
            node.target = instead[node.target]


def has_symbols(value: Any) -> bool:
    """Whether a tensor's sizes, or a number, are symbols; 2.1+."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(n, torch.SymInt) for n in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_last_compile() -> bool:
    """Whether Dynamo, which compiles now, gives up on that piece of code the next time; 2.5+."""
    from torch._guards import CompileContext

    known = CompileContext.current_compile_id()
    count = getattr(known, "frame_compile_id", None)
    return count is not None and count + 1 == recompile_limit()


def recompile_limit() -> int:
    """How often a piece of code is compiled before Dynamo leaves it to eager; 2.5+."""
    from torch._dynamo import config

    return int(config.recompile_limit)


def allocated_peak(run: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator had handed out while ``run`` ran, beyond those before; 1.9+.

    The generated code allocates below the dispatcher, so no mode sees it.
    """
    return allocated_peaks([run])[0]


def allocated_peaks(runs: Sequence[Callable[[], Any]]) -> list[int]:
    """The same of each of ``runs``, in order; what a run returns lives to its end, and no longer.

    Raises ``RuntimeError`` inside of another profile, which it would end.
    """
    if is_profiled():
        raise RuntimeError("bytes are measured with torch.profiler, which is at work: measure outside of it")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        for run in runs:
            with torch.profiler.record_function(_RUN):
                kept = run()
            del kept
    results: Any = seen.profiler
    events = sorted(results.kineto_results.events(), key=lambda e: e.start_ns())
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == _RUN]
    memory = [e for e in events if e.name() == "[memory]"]
    peaks = []
    for began, ended in spans:
        now = most = 0
        for event in memory:
            if began <= event.start_ns() <= ended:
                now += event.nbytes()
                most = max(most, now)
        peaks.append(most)
    return peaks


_RUN = "a run whose memory is looked at"


def is_profiled() -> bool:
    """Whether torch.profiler is at work; 1.9+."""
    return bool(torch._C._autograd._profiler_enabled())


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own and the same constants."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    found = graph.graph_copy(gm.graph, env)
    out = graph.output(found)
    (end,) = gm.graph.find_nodes(op="output")
    out.meta = dict(end.meta)
    made = fx.GraphModule(gm, graph)
    return as_dynamos(made, gm)


def as_dynamos(made: fx.GraphModule, gm: fx.GraphModule) -> fx.GraphModule:
    """``made``, a copy of Dynamo's ``gm``, with what Dynamo knows of its inputs; 2.7+.

    Which of them stay where they are, that is.  Torch's partition saves a parameter, which is there in any
    case, rather than a view of it that it thinks is new, and CUDA graphs do not copy it.
    """
    made.meta = dict(gm.meta)
    for old, new in zip(
        gm.graph.find_nodes(op="placeholder"), made.graph.find_nodes(op="placeholder"), strict=True
    ):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = gm._param_name_to_source
    return made


class _Nothing:
    """What stands for a compiled kernel that does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    run = __call__


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    """Generated code that is executed compiles nothing; process-global, put back."""
    from torch._inductor.async_compile import AsyncCompile

    names = [n for n in ("cpp", "cpp_pybinding", "triton", "halide", "pallas") if hasattr(AsyncCompile, n)]
    before = {n: AsyncCompile.__dict__[n] for n in (*names, "wait")}
    for name in names:
        setattr(AsyncCompile, name, lambda self, *args, **kwargs: _Nothing())
    AsyncCompile.wait = lambda self, scope: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(AsyncCompile, name, function)


@dataclass(frozen=True)
class Lowered:
    """The Python that inductor generates for a graph, to be run on fakes: it computes nothing."""

    source: str
    constants: dict[str, Any]
    mode: Any

    def run(self, args: list[Any]) -> Any:
        """What it returns for fake ``args``, a list that it clears.  To be called under the fake mode."""
        scope: dict[str, Any] = {"__name__": "generated"}
        with _no_kernels():
            exec(compile(self.source, "<generated>", "exec"), scope)
        scope.update(self.constants)

        def empty(device: str) -> Callable[..., torch.Tensor]:
            def made(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
                return torch.empty_strided(size, stride, dtype=dtype, device=device)

            return made

        for name in list(scope):
            if name.startswith("empty_strided_"):
                scope[name] = empty("cuda" if name.endswith("cuda") else "cpu")
        scope["reinterpret_tensor"] = lambda x, size, stride, offset=0: torch.as_strided(
            x, size, stride, x.storage_offset() + offset
        )
        scope["assert_size_stride"] = scope["assert_alignment"] = lambda *args, **kwargs: None
        return scope["call"](args)


def lowered(
    gm: fx.GraphModule,
    *,
    is_backward: bool,
    visible: Sequence[int],
    donated: Sequence[int] = (),
    as_written: bool = True,
    sparing: bool = False,
) -> Lowered:
    """``gm``, which is used up, as inductor would compile it; 2.9+.

    ``visible``     positions of outputs that the user sees; ``donated`` of inputs that it may write over.
    ``as_written``, ``sparing``  as for :func:`compile_split`.
    """
    from torch._guards import TracingContext, detect_fake_mode, tracing

    c: Any = importlib.import_module("torch._inductor.compile_fx")
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    fake_mode = detect_fake_mode(inputs)
    (output,) = gm.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(visible)
    if as_written:
        _return_as_given(gm)
    context = TracingContext(fake_mode)
    context.fw_metadata = SimpleNamespace(bw_donated_idxs=list(donated))  # type: ignore[assignment]
    c.view_to_reshape(gm)
    with (
        torch.no_grad(),
        V.set_fake_mode(fake_mode),
        tracing(context),
        DebugContext(),
        V.set_choices_handler(_choices(sparing=sparing)) if as_written else contextlib.nullcontext(),
        _written(sparing=sparing) if as_written else contextlib.nullcontext(),
        c.config.patch(_as_written(is_backward=is_backward, sparing=sparing) if as_written else {}),
        c.config.patch(
            {"cpp.simdlen": 1}
        ),  # loops that nobody runs: not in vectors, which take long to write
    ):
        c.fake_tensor_prop(gm, inputs)
        c._recursive_record_original_output_strides(gm)
        c._recursive_post_grad_passes(gm, is_inference=False)
        lowering = GraphLowering(
            gm, example_inputs=inputs, shape_env=c.shape_env_from_inputs(inputs), graph_id=0,
            cpp_wrapper=False, is_inference=False, is_backward=is_backward,
        )  # fmt: skip
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return Lowered(str(getattr(code, "value", code)), dict(lowering.constants), fake_mode)
