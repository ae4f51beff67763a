"""From a live model and one batch to the joint graph of its training step.

The step is traced as the training loop would run it: parameters and buffers by name, forward,
backward to every trainable leaf, under fake tensors, so no activation memory exists at any time.
The tracer is AOTAutograd's (Ansel et al., "PyTorch 2", ASPLOS 2024) with no decompositions: layer
norms, attention, dropout and batch norm stay whole, and every kernel is the one eager would call.

Loss.  Three cases, decided here and carried on as which outputs are *differentiated*:

* the model returns its loss (:func:`planner.capture.outputs.loss_index`): that is what is
  differentiated; the gradient of any other output is undefined, as in ``out.loss.backward()``;
* ``loss_fn`` is given: it is traced by itself from the model's outputs, and the outputs it reads
  are differentiated;
* neither: every output that requires grad is, and output gradients are given from outside.

Sizes are those given, or symbols (:mod:`planner.capture.sizes`) that are then evaluated at those given.

Known limits: one graph, so control flow that reads tensor values cannot be captured; hooks that act
on the side are not part of a graph and are refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn

from planner import _compat
from planner._compat import descriptors, pytree
from planner.capture import meta
from planner.capture.as_eager.backward import Installed, Noted
from planner.capture.as_eager.casts import cast_once, contexts_noted
from planner.capture.as_eager.generators import Generators
from planner.capture.as_eager.masks import masks_as_eager
from planner.capture.as_eager.questions import Questions, stand_in, standing_in
from planner.capture.as_eager.recurrences import gru, lstm_gradients
from planner.capture.inputs import Inputs
from planner.capture.module import original_forward
from planner.capture.outputs import LossFn, OutputTemplate, template_of
from planner.capture.pieces import ReadsOf, note_summands, reached_from, summands
from planner.capture.printed import code_of, headed
from planner.capture.refusals import checkpoints_itself, explained, refuse_unplannable
from planner.capture.sizes import Dims, Sizes, evaluate, fake_inputs, fake_of
from planner.capture.state.effects import (
    Effects,
    alike,
    attributes_kept,
    is_cache,
    others_kept,
    settle,
    settled,
    tensors_kept,
)
from planner.capture.state.reads import Reads
from planner.capture.state.watched import Watched, watched
from planner.errors import PlannerError, TraceError

__all__ = ["NO_GRADIENT", "JointGraph", "Traced", "capture", "capture_piece"]

log = logging.getLogger(__name__)

NO_GRADIENT = "no gradient reaches any parameter or input of this region from its outputs"

EVERY = frozenset(range(1 << 12))  # outputs, whatever their number

# A trace changes what is the whole process's (see capture).
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Traced:
    """A joint graph whose placeholders and outputs have been told apart.

    ``parameters``, ``buffers``   placeholder by name; a tied parameter stands under its first name.
    ``inputs``                    placeholder by position among the tensor leaves of the inputs.
    ``tangents``                  placeholder by index among the graph's outputs.
    ``outputs``                   node by index of the output.
    ``mutations``                 name of a buffer -> node that holds its new value.
    ``gradients``                 name of a parameter -> node of its gradient.
    ``input_gradients``           position of an input -> node of its gradient.
    ``storage_bytes``             storage -> expression of its bytes, where they vary.
    ``rebound``                   those of ``mutations`` that the forward binds to a new tensor.
    """

    module: fx.GraphModule
    parameters: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: dict[int, fx.Node]
    tangents: dict[int, fx.Node]
    outputs: dict[int, fx.Node]
    mutations: dict[str, fx.Node]
    gradients: dict[str, fx.Node]
    input_gradients: dict[int, fx.Node]
    storage_bytes: dict[int, Any] = field(default_factory=dict)
    rebound: dict[str, fx.Node] = field(default_factory=dict)

    def at(self, values: Mapping[Any, int], *, fixed: bool = False) -> Traced:
        """A copy of a symbolic graph at the sizes of ``values``; ``fixed``: for these only."""
        module, nodes, storage_bytes = evaluate(self.module, values)
        if fixed:
            storage_bytes = {}
            for node in nodes.values():
                if meta.size(node) is not None:
                    meta.note_size(node, meta.value(node))

        moved = {
            f.name: {key: nodes[node] for key, node in getattr(self, f.name).items()}
            for f in fields(self)
            if f.name not in ("module", "storage_bytes")
        }
        return Traced(module, **moved, storage_bytes=storage_bytes)

    def function(self, name: str) -> str:
        """The graph as the Python function ``name`` of its placeholders and constants; imports above it."""
        kinds = {n: f"parameter {k}" for k, n in self.parameters.items()}
        kinds |= {n: f"buffer {k}" for k, n in self.buffers.items()}
        kinds |= {n: f"input {k}" for k, n in self.inputs.items()}
        kinds |= {n: f"tangent {k}" for k, n in self.tangents.items()}
        nodes = list(self.module.graph.nodes)
        given = {
            n: kinds.get(n, f"constant {n.target}") for n in nodes if n.op in ("placeholder", "get_attr")
        }
        results = {
            "outputs": [self.outputs[i] for i in sorted(self.outputs)],
            "buffers": self.mutations,
            "gradients": self.gradients | {str(i): n for i, n in self.input_gradients.items()},
        }
        return code_of(name, given, [n for n in nodes if n.op == "call_function"], results)

    def __repr__(self) -> str:
        return (
            f"Traced({len(self.module.graph.nodes)} nodes, {len(self.parameters)} parameters, "
            f"{len(self.buffers)} buffers, {len(self.gradients)} gradients, {len(self.mutations)} mutations)"
        )


@dataclass(frozen=True)
class JointGraph:
    """The captured training step.

    ``step``       the model's forward and backward.
    ``loss``       forward and backward of ``loss_fn`` on the outputs, or ``None``.
    ``template``   how to rebuild the model's output.
    ``in_spec``    pytree spec of ``(args, kwargs)``.
    ``sees_loss``  the first differentiated output is a scalar loss of the model itself.
    ``sizes``      symbols of the sizes that vary, ``None`` if all are fixed; ``symbolic`` is then
                   ``step`` as traced.
    ``loss_at``    traces the loss for inputs of given sizes: it runs in the user's hands, so what it
                   does to sizes is no condition on the step.
    ``read``       what the forward read besides its arguments and parameters.
    """

    step: Traced
    loss: Traced | None
    template: OutputTemplate
    in_spec: Any
    inputs: Inputs
    sees_loss: bool
    sizes: Sizes | None = None
    symbolic: Traced | None = None
    loss_at: Callable[[Inputs], Traced] | None = None
    read: Watched = field(default_factory=Watched, repr=False)

    def at(self, values: Sequence[int], *, fixed: bool = False) -> JointGraph:
        """The same capture at other sizes, for which its guards hold; the step is not traced again.

        ``fixed``: as if it had been captured there without symbols.
        """
        assert self.sizes is not None and self.symbolic is not None
        step = self.symbolic.at(dict(zip(self.sizes.symbols, values, strict=True)), fixed=fixed)
        inputs = self.sizes.inputs_at(self.inputs, values)
        loss = None if self.loss_at is None else self.loss_at(inputs)
        if fixed:
            return replace(self, step=step, loss=loss, inputs=inputs, sizes=None, symbolic=None)
        return replace(self, step=step, loss=loss, inputs=inputs)

    @property
    def code(self) -> str:
        """Python that runs: ``step`` (and ``loss``) on tensors, as captured."""
        functions = [self.step.function("step")]
        if self.loss is not None:
            functions.append(self.loss.function("loss"))
        return headed([repr(self)], *functions)

    def __str__(self) -> str:
        return self.code

    def __repr__(self) -> str:
        return f"JointGraph(step={self.step!r}, loss={self.loss!r}, outputs={len(self.template.leaves)})"


def capture(
    model: nn.Module,
    inputs: object = None,
    loss_fn: LossFn | None = None,
    *,
    used: frozenset[int] | None = None,
    dims: Dims | None = None,
) -> JointGraph:
    """Trace one training step of ``model`` at ``inputs``.

    ``used``: which of the model's output tensors are differentiated, where that is known already.
    ``dims``: which dimensions of which input tensor are symbols; ``None``: none of any.
    No memory is allocated and nothing of the model changes: not its buffers, its flags, its random
    state; but for numbers and strings that its first call corrects (:mod:`planner.capture.state.effects`).
    While it traces it changes settings that are the whole process's (the tracer's registries, an environment
    variable that libraries read) and puts them back: captures of several threads wait for each other.

    Raises ``TraceError`` where the step is not one graph, ``TypeError`` for inputs that do not fit
    ``model.forward``, ``PlannerError`` where there is nothing to train.
    """
    with _ONE_AT_A_TIME, _compat.saved_tensors_hooks_set_aside():
        return _captured(model, Inputs.of(model, inputs), loss_fn, used, dims)


def capture_piece(
    model: nn.Module, given: Inputs, used: frozenset[int] | None
) -> tuple[JointGraph, dict[str | int, list[fx.Node]]]:
    """As :func:`capture`, of a graph that Dynamo cut, which watches what was read and does what was done on
    the side; none of its outputs is the loss.

    And by name of a parameter, or position of an input, that autograd reads more than once: the gradients
    that it adds up, in its order.  Other readers of that tensor have gradients of their own, which come
    before or after each of these.
    """
    flat, in_spec = given.flatten()
    with _ONE_AT_A_TIME, _compat.saved_tensors_hooks_set_aside():
        _, fake, _ = fake_inputs(model, flat, None)
        reads = ReadsOf()
        with torch.inference_mode(False), torch.enable_grad(), explained(model):
            every = EVERY if used is None else used
            step = _FlatModel(model, flat, fake, in_spec, every, records=False, watch=reads)
            with fx_traceback.preserve_node_meta():
                try:
                    module = _exported(step, tuple(x for x in fake if isinstance(x, torch.Tensor)))
                finally:
                    step.installed.remove()
                    reads.forget()
        traced = _sort_out(module, step.names, tuple(step.rebound))
        fewer = cast_once(module, traced.parameters, traced.gradients)
    _note_what_goes_on(traced, given)
    _refuse_formulas_of_values(traced)
    _refuse_sparse(traced)
    if not traced.gradients and not traced.input_gradients:
        raise PlannerError(NO_GRADIENT)
    assert step.template is not None
    whole: dict[str | int, fx.Node] = {}
    whole.update(traced.gradients.items())
    whole.update(traced.input_gradients.items())
    terms = {
        key: summands(node, reads.counts.get(key, 1) - fewer.get(str(key), 0)) for key, node in whole.items()
    }
    joint = JointGraph(traced, None, step.template, in_spec, given, sees_loss=False)
    return joint, {key: nodes for key, nodes in terms.items() if len(nodes) > 1}


def _captured(
    model: nn.Module, given: Inputs, loss_fn: LossFn | None, used: frozenset[int] | None, dims: Dims | None
) -> JointGraph:
    refuse_unplannable(model, given.tensors())
    given.check(model)
    flat, in_spec = given.flatten()
    mode, fake, sizes = fake_inputs(model, flat, dims)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        attributes_kept(model) as behind,  # what the backward does: each forward puts its own back
        _compat.checkpoint_calls() as calls,
        Generators() as generators,
        explained(model, calls),
        _as_eager_asks(model) as questions,
    ):
        loss = None
        if loss_fn is not None:
            with attributes_kept(model):  # what it notes on the model, it notes in the user's own loop
                loss, used = _trace_loss(model, given, loss_fn)
        reads = ReadsOf()
        step = _FlatModel(model, flat, fake, in_spec, used, watch=reads)
        noted = Noted(model)
        with _module_paths(model), generators.watched(), noted.watched():
            try:
                module = _exported(step, tuple(x for x in fake if isinstance(x, torch.Tensor)))
            finally:
                step.installed.remove()
                reads.forget()
        if calls.count:
            raise checkpoints_itself(type(model).__name__, "its forward calls torch.utils.checkpoint")
        questions.refuse(type(model).__name__)
        noted.refuse()
        step.installed.refuse(functools.partial(_step_on_fakes, model, given))
        generators.refuse(model, module, lambda: _step_on_fakes(model, given), step.effects.left)
    traced = _sort_out(module, step.names, tuple(step.rebound))
    fewer = cast_once(module, traced.parameters, traced.gradients)
    _note_sums(traced, reads.counts - fewer)
    _note_what_goes_on(traced, given)
    _refuse_formulas_of_values(traced)
    _refuse_sparse(traced)
    _refuse_loose_parameters(model, module)
    _refuse_side_effects(model, given, step.effects, step.reads, traced.mutations.keys())
    step.installed.refuse_changes(behind.touched, {name for name, *_ in behind.changed})
    if behind.changed and not settled(model, behind, lambda: _step_on_fakes(model, given)):
        step.installed.refuse_changes(behind.touched)
    read = watched(model, step.reads, step.effects.written, step.placed)
    template = step.template
    assert template is not None
    if not traced.gradients and not traced.input_gradients:
        raise PlannerError(
            f"no gradient reaches any parameter of {type(model).__name__} from its outputs "
            f"({', '.join(x.name for x in template.leaves) or 'none'}); pass loss_fn, or labels if the model "
            "computes its own loss"
        )
    chosen = [i for i, x in enumerate(template.leaves) if x.differentiated]
    sees_loss = (
        loss_fn is None
        and used is None
        and len(chosen) == 1
        and meta.tensor(traced.outputs[chosen[0]]).numel() == 1
    )
    joint = JointGraph(traced, loss, template, in_spec, given, sees_loss, read=read)
    if sizes is None:
        return joint
    with explained(model, calls):
        sizes = sizes.guarded(mode)
    bound = dict(zip(sizes.symbols, sizes.read(given.tensors()), strict=True))
    loss_at = None if loss_fn is None else functools.partial(_loss_at, model, loss_fn)
    return replace(joint, step=traced.at(bound), sizes=sizes, symbolic=traced, loss_at=loss_at)


# Where no value is zero, eager divides by each; a trace, which sees no values, makes products of the others.
_DIVIDES = ("aten.prod", "aten.cumprod")


def _refuse_formulas_of_values(traced: Traced) -> None:
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


def _refuse_sparse(traced: Traced) -> None:
    """Raise where a tensor is sparse: what it takes is known only when it is made."""
    for node in traced.module.graph.nodes:
        for x in pytree.tree_leaves(meta.value(node) if node.op != "output" else None):
            if isinstance(x, torch.Tensor) and x.layout != torch.strided:
                raise TraceError(
                    f"a tensor of its step is {str(x.layout).removeprefix('torch.')} ({node.name}), whose "
                    "size is known only when it is made; a plan is for dense ones (embeddings: sparse=False)"
                )


def _note_sums(traced: Traced, reads: Counter[str | int]) -> None:
    """Note the sums of gradients that the engine makes where the step reads something more than once.

    Where they cannot be told apart they stay what they are, one sum.
    """
    whole: dict[str | int, fx.Node] = {}
    whole.update(traced.gradients.items())
    whole.update(traced.input_gradients.items())
    for key, gradient in whole.items():
        try:
            note_summands(gradient, reads[key])
        except TraceError as error:
            log.debug("of %s: %s", key, error)


def _note_what_goes_on(traced: Traced, given: Inputs) -> None:
    for i in given.of_others & traced.inputs.keys():
        meta.note_goes_on(traced.inputs[i])


def _refuse_side_effects(
    model: nn.Module, given: Inputs, effects: Effects, reads: Reads, updated: Collection[str]
) -> None:
    """Raise for what the forward did beside computing, unless it does so at its first call only.

    ``updated``  names of the buffers that it writes, as it may.
    """
    if not effects.touched:
        return
    call, tensors = _on_fakes(model, given)
    if effects.stored:
        constant = {n for n, _ in model.named_buffers()} - set(updated)
        if is_cache(model, call, [t for n, t in tensors.items() if n not in constant], reads.containers):
            return
        again = None
    else:
        again = alike(model, call, tensors, reads.containers)
        if again.ops and again.numbers:
            settle(effects)
            return
    if effects.lost and not (again and again.numbers):
        raise TraceError(
            f"the forward of {type(model).__name__} stores tensors or counts in "
            f"{', '.join(effects.lost[:3])}; a planned step runs one graph and would not. Return them, keep "
            "them in buffers, or do it outside forward; where it is a cache that the first call fills, call "
            "the model once before planning"
        )
    if again and not again.ops:
        raise TraceError(
            f"the first call of {type(model).__name__} runs other code than those that come after it: it "
            f"changes {', '.join(effects.touched[:3])}; a planned step runs one graph. Call the model once "
            "before planning, if all later calls are alike"
        )


def _refuse_loose_parameters(model: nn.Module, module: fx.GraphModule) -> None:
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


class _FlatModel(nn.Module):
    """The model as a function of flat tensors, each parameter once.

    Tied parameters would otherwise be two leaves whose gradients somebody has to add again; here
    autograd adds them inside the graph, in the order eager does.
    """

    def __init__(
        self,
        model: nn.Module,
        given: list[Any],
        fake: list[Any],
        spec: Any,
        used: frozenset[int] | None,
        *,
        records: bool = True,
        watch: ReadsOf | None = None,
    ) -> None:
        super().__init__()
        self.model, self.records, self.watch = model, records, watch
        self.given = (given,)  # no parameter among them is this module's
        self.fake, self.spec, self.used = fake, spec, used
        self.installed = Installed(model)
        self.names: dict[str, str] = {}
        self.rebound: list[str] = []  # buffers that the forward binds to a new tensor
        self.template: OutputTemplate | None = None
        self.reads, self.effects = Reads(), Effects()
        self.placed: frozenset[str | int] = frozenset()
        self.keeps_casts = torch.is_autocast_cache_enabled()
        for name, parameter in model.named_parameters():
            self.register_parameter(self._mangle(name), parameter)
        for name, buffer in model.named_buffers():
            self.register_buffer(self._mangle(name), buffer)
        self.training = model.training  # not train(): that would reset the flags below

    def _mangle(self, name: str) -> str:
        mangled = "|" + name.replace(".", "|")
        self.names[mangled] = name
        return mangled

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([(n, p) for n, p in self._parameters.items() if p is not None])

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return iter([(n, b) for n, b in self._buffers.items() if b is not None])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.installed.remove()
        state = {self.names[n]: t for n, t in (*self.named_parameters(), *self.named_buffers())}
        it = iter(tensors)
        flat = [next(it) if isinstance(x, torch.Tensor) else x for x in self.fake]
        for tensor, original in zip(flat, self.given[0], strict=True):
            if isinstance(tensor, torch.Tensor):
                stand_in(tensor, original)
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        after = dict(state)
        # The tracer calls this more than once, and each time is to find the model as it was.
        with attributes_kept(self.model, self.reads.containers) as self.effects:
            self.reads.look = self.effects.look
            with (
                self.reads.recording() if self.records else contextlib.nullcontext(),
                contexts_noted() if self.keeps_casts else contextlib.nullcontext(),
            ):
                output = _call(self.model, after, args, kwargs)
        self.installed.put(after)
        asked = {id(t) for t in self.reads.placed}
        self.placed |= {name for name, t in state.items() if id(t) in asked}
        self.placed |= {i for i, t in enumerate(tensors) if id(t) in asked}
        self.template, leaves = template_of(type(self.model).__name__, output, self.used)
        tracked: dict[str | int, torch.Tensor] = {}
        tracked.update(state)
        tracked.update(enumerate(tensors))
        self.template = replace(self.template, reached=reached_from(leaves, tracked))
        kept = zip(leaves, self.template.leaves, strict=True)
        results = [t if leaf.differentiated else t.detach() for t, leaf in kept]
        self.rebound = [name for name, t in after.items() if t is not state[name]]
        for name in self.rebound:
            old, new = state[name], after[name]
            if isinstance(old, nn.Parameter) or (old.shape, old.dtype) != (new.shape, new.dtype):
                raise TraceError(
                    f"the forward of {type(self.model).__name__} replaces {name}, {tuple(old.shape)} of "
                    f"{old.dtype}, by a tensor {tuple(new.shape)} of {new.dtype}; a plan can only update a "
                    "buffer's values"
                )
            results.append(new.detach())
        if self.watch is not None:
            self.watch.watch(tracked, results)
        return tuple(map(_apart, results))


class _Bare(nn.Module):
    """The model's own forward without the model's hooks, which go on firing around a planned step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with fx_traceback.annotate({"module": ""}):
            return original_forward(self.model)(*args, **kwargs)


def _call(
    model: nn.Module, state: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``model`` with ``state`` for its parameters and buffers; ``state`` then holds what it left there."""
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    held = dict((*model.named_parameters(), *model.named_buffers()))
    pairs = {name: (tensor, held[name]) for name, tensor in state.items()}
    with others_kept(model), tensors_kept(model), standing_in(model, pairs):
        output = torch.func.functional_call(_Bare(model), named, args, kwargs)
    state.update({name: named[f"model.{name}"] for name in state})
    return output


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that tells the tracer to treat an output as a tensor of its own; :func:`_sort_out` removes it.

    Outputs that are views of each other, of inputs or of parameters would be handed out as their base
    and lose their gradients.
    """
    return tensor.clone()


def _exported(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    """The joint graph of ``module``, of the kernels that eager would run."""
    on_cpu = all(t.device.type == "cpu" for t in (*inputs, *module.parameters(), *module.buffers()))
    with (
        _compat.kernels_as_eager(gru, lstm_gradients, on_cpu),
        _compat.writes_keep_layout(),
        masks_as_eager(module, functools.partial(_compat.compiler_flags, lambda _: False)),
    ):
        return _compat.export_joint(module, inputs, {})


@contextlib.contextmanager
def _as_eager_asks(model: nn.Module) -> Iterator[Questions]:
    """What the model asks while it is traced is answered as eager answers it."""
    questions = Questions()
    try:
        with _compat.compiled_parts_as_eager(), questions.answered():
            yield questions
    except (
        Exception
    ):  # of whatever kind: it goes on, but where an answer was another than eager's, which is why
        questions.refuse(type(model).__name__)
        raise


def _loss_at(model: nn.Module, loss_fn: LossFn, inputs: Inputs) -> Traced:
    with (
        _ONE_AT_A_TIME,
        _compat.saved_tensors_hooks_set_aside(),
        torch.inference_mode(False),
        torch.enable_grad(),
        attributes_kept(model),
        explained(model),
        _as_eager_asks(model),
    ):
        return _trace_loss(model, inputs, loss_fn)[0]


def _output_on_fakes(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, without memory."""
    with attributes_kept(model):
        return _on_fakes(model, inputs)[0](contextlib.nullcontext())


def _on_fakes(
    model: nn.Module, inputs: Inputs
) -> tuple[Callable[[contextlib.AbstractContextManager[object]], Any], dict[str, torch.Tensor]]:
    """What runs the model without memory, within a context, and the tensors it is given, by name."""
    flat, spec = inputs.flatten()
    mode, fake, _ = fake_inputs(model, flat, None)
    state = {n: fake_of(mode, t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    args, kwargs = pytree.tree_unflatten(fake, spec)

    def call(around: contextlib.AbstractContextManager[object]) -> Any:
        with mode, _compat.values_unchecked(), around:
            return _call(model, dict(state), args, kwargs)

    inputs_given = {f"input {i}": x for i, x in enumerate(fake) if isinstance(x, torch.Tensor)}
    return call, {**state, **inputs_given}


def _step_on_fakes(
    model: nn.Module, inputs: Inputs, around: contextlib.AbstractContextManager[Any] | None = None
) -> None:
    """Forward and backward of the model, without memory; ``around``: a context for the backward."""
    outputs = pytree.tree_leaves(_output_on_fakes(model, inputs))
    roots = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    with _compat.fake_mode_of(roots[0]), around or contextlib.nullcontext():
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])


def _trace_loss(model: nn.Module, inputs: Inputs, loss_fn: LossFn) -> tuple[Traced, frozenset[int]]:
    """The joint graph of ``loss_fn`` on the model's outputs, and which outputs it reads; sizes are fixed."""
    template, tensors = template_of(type(model).__name__, _output_on_fakes(model, inputs), None)
    inner = _Loss(template, loss_fn)
    leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
    traced = _sort_out(_exported(inner, leaves), {})
    used = frozenset(traced.input_gradients)
    if not used:
        raise PlannerError("loss_fn's result does not depend on any output of the model that requires grad")
    return traced, used


class _Loss(nn.Module):
    def __init__(self, template: OutputTemplate, loss_fn: LossFn) -> None:
        super().__init__()
        self.template = template
        self.loss_fn = (loss_fn,)  # no submodule: its tensors are the loss's own, not the step's

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        loss = self.loss_fn[0](self.template.rebuild(list(tensors)))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = (
                f"a tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, torch.Tensor)
                else type(loss).__name__
            )
            raise PlannerError(f"loss_fn must return a scalar tensor, it returned {got}")
        return (_apart(loss),)


def _sort_out(module: fx.GraphModule, names: dict[str, str], rebound: tuple[str, ...] = ()) -> Traced:
    """Read the descriptors the tracer left on placeholders and outputs; the last outputs are ``rebound``."""
    d = descriptors
    out = Traced(module, {}, {}, {}, {}, {}, {}, {}, {})
    for node in module.graph.find_nodes(op="placeholder"):
        desc = meta.description(node)
        if isinstance(desc, d.ParamAOTInput):
            out.parameters[names[desc.target]] = node
        elif isinstance(desc, d.BufferAOTInput):
            out.buffers[names[desc.target]] = node
        elif isinstance(desc, d.PlainAOTInput):
            out.inputs[desc.idx] = node
        elif isinstance(desc, d.TangentAOTInput) and isinstance(desc.output, d.PlainAOTOutput):
            out.tangents[desc.output.idx] = node
        elif isinstance(desc, d.TangentAOTInput) and isinstance(desc.output, d.InputMutationAOTOutput):
            what = getattr(desc.output.mutated_input, "target", "an input")
            raise TraceError(
                f"the forward writes into {names.get(what, what)} (an embedding's max_norm does, and any "
                "in-place operation on a parameter or an input); a plan cannot carry that. "
                "Take it out of forward"
            )
        else:
            raise TraceError(
                "a parameter, buffer or input is a tensor that wraps others (quantized, nested, spread over "
                "devices); a plan is for plain tensors. Plan the parts of the model that have only such"
            )
    (output,) = module.graph.find_nodes(op="output")
    own = sum(isinstance(desc, d.PlainAOTOutput) for desc in meta.description(output)) - len(rebound)
    for node, desc in zip(output.args[0], meta.description(output), strict=True):
        if node is None:
            continue
        if isinstance(desc, d.PlainAOTOutput):
            assert node.target is torch.ops.aten.clone.default  # see _apart
            if desc.idx < own:
                out.outputs[desc.idx] = node.args[0]
            else:
                out.rebound[rebound[desc.idx - own]] = node.args[0]
        elif isinstance(desc, d.InputMutationAOTOutput) and isinstance(desc.mutated_input, d.BufferAOTInput):
            out.mutations[names[desc.mutated_input.target]] = node
        elif isinstance(desc, d.GradAOTOutput) and isinstance(desc.grad_of, d.ParamAOTInput):
            out.gradients[names[desc.grad_of.target]] = node
        elif isinstance(desc, d.GradAOTOutput) and isinstance(desc.grad_of, d.PlainAOTInput):
            out.input_gradients[desc.grad_of.idx] = node
        else:
            written = getattr(desc, "mutated_input", None)
            name = names.get(getattr(written, "target", ""))
            what = f"the parameter {name}" if name else f"input {getattr(written, 'idx', desc)}"
            raise TraceError(
                f"the forward writes into {what} in place; a plan can only update buffers. Work on a copy, "
                "or do it outside forward (a teacher that follows its student: after the optimizer's step)"
            )
    out.mutations.update(out.rebound)
    return out


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Leave the path of the running module in each node; see :func:`planner.capture.meta.module`."""
    paths = {id(module): name for name, module in model.named_modules()}
    open_contexts: list[contextlib.AbstractContextManager[None]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in paths:
            context = fx_traceback.annotate({"module": paths[id(module)]})
            context.__enter__()
            open_contexts.append(context)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in paths and open_contexts:
            open_contexts.pop().__exit__(None, None, None)

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        before.remove()
        after.remove()
        while open_contexts:  # an exception passed through the modules
            open_contexts.pop().__exit__(None, None, None)
