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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn

from planner import _compat
from planner.capture import meta
from planner.capture.as_eager.backward import Noted
from planner.capture.as_eager.casts import cast_once
from planner.capture.as_eager.generators import Generators
from planner.capture.as_eager.questions import Questions
from planner.capture.as_eager.values import Values
from planner.capture.flat_model import FlatModel, apart, exported, module_paths
from planner.capture.inputs import Inputs
from planner.capture.on_fakes import output_on_fakes, step_on_fakes
from planner.capture.outputs import LossFn, OutputTemplate, template_of
from planner.capture.pieces import ReadsOf, note_summands, summands
from planner.capture.printed import headed
from planner.capture.refusals import checkpoints_itself, explained, refuse_unplannable
from planner.capture.sizes import Dims, Sizes, fake_inputs
from planner.capture.state.asked import Asked
from planner.capture.state.effects import Effects, attributes_kept
from planner.capture.state.second_call import settled
from planner.capture.state.watched import Watched, watched
from planner.capture.step_checks import (
    refuse_formulas_of_values,
    refuse_loose_parameters,
    refuse_side_effects,
    refuse_sparse,
)
from planner.capture.traced import Traced, told_apart
from planner.errors import PlannerError, TraceError

__all__ = ["NO_GRADIENT", "JointGraph", "capture", "capture_piece"]

log = logging.getLogger(__name__)

NO_GRADIENT = "no gradient reaches any parameter or input of this region from its outputs"

EVERY = frozenset(range(1 << 12))  # outputs, whatever their number

# A trace changes what is the whole process's (see capture).
_ONE_AT_A_TIME = threading.RLock()


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
    ``asked``      what it asked of the batch's values, and what was answered.
    ``chunks``     of rows, in which the loss is to be computed.
    ``unread``     outputs that are not made for the caller, by their number in the model's output, and name.
    ``order``      of the backward: "given" by the trace, or "free" (:mod:`planner.graph.ordered`).
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
    asked: Asked = field(default_factory=Asked, repr=False)
    chunks: int = 1
    unread: tuple[tuple[int, str], ...] = ()
    order: Literal["given", "free"] = "given"

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

    def reading(self, outputs: Collection[int]) -> JointGraph:
        """The same step where of the model's outputs the caller reads only these."""
        names = [leaf.name for leaf in self.template.leaves]
        unread = tuple((i, name) for i, name in enumerate(names) if i not in outputs)
        if not unread or self.unread:
            return self
        template = self.template.reading(outputs)
        symbolic = None if self.symbolic is None else self.symbolic.reading(outputs)
        step = self.step.reading(outputs)
        return replace(self, step=step, symbolic=symbolic, template=template, unread=unread)

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Which of the model's outputs are differentiated, by their number in what it returns."""
        gone = {i for i, _ in self.unread}
        numbers = (i for i in range(len(self.template.leaves) + len(gone)) if i not in gone)
        return tuple(i for i, leaf in zip(numbers, self.template.leaves, strict=True) if leaf.differentiated)

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
    drops: bool = False,
) -> JointGraph:
    """Trace one training step of ``model`` at ``inputs``.

    ``used``: which of the model's output tensors are differentiated, where that is known already.
    ``dims``: which dimensions of which input tensor are symbols; ``None``: none of any.
    ``drops``: what it returns that no graph can carry, such as a cache, is not handed out.
    No memory is allocated and nothing of the model changes: not its buffers, its flags, its random state;
    but for numbers and strings that its first call corrects (:mod:`planner.capture.state.second_call`).
    While it traces it changes settings that are the whole process's (the tracer's registries, an environment
    variable that libraries read) and puts them back: captures of several threads wait for each other.

    Raises ``TraceError`` where the step is not one graph, ``TypeError`` for inputs that do not fit
    ``model.forward``, ``PlannerError`` where there is nothing to train.
    """
    with _ONE_AT_A_TIME, _compat.saved_tensors_hooks_set_aside(), _compat.collecting_seldom():
        return _captured(model, Inputs.of(model, inputs), loss_fn, used, dims, drops)


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
    with _ONE_AT_A_TIME, _compat.saved_tensors_hooks_set_aside(), _compat.collecting_seldom():
        _, fake, _ = fake_inputs(model, flat, None)
        reads = ReadsOf()
        with torch.inference_mode(False), torch.enable_grad(), explained(model):
            every = EVERY if used is None else used
            step = FlatModel(model, flat, fake, in_spec, every, records=False, watch=reads)
            with fx_traceback.preserve_node_meta():
                module = _exported(step, fake, reads)
        traced = told_apart(module, step.names, tuple(step.rebound))
        fewer = cast_once(module, traced.parameters, traced.gradients)
    _note_what_goes_on(traced, given)
    refuse_formulas_of_values(traced)
    refuse_sparse(traced)
    if not traced.gradients and not traced.input_gradients:
        raise PlannerError(NO_GRADIENT)
    assert step.template is not None
    whole: dict[str | int, fx.Node] = {}
    whole.update(traced.gradients.items())
    whole.update(traced.input_gradients.items())
    terms = {
        key: summands(node, reads.counts.get(key, 1) - fewer.get(str(key), 0)) for key, node in whole.items()
    }
    joint = JointGraph(traced, None, step.template, in_spec, given.let_go(), sees_loss=False)
    return joint, {key: nodes for key, nodes in terms.items() if len(nodes) > 1}


def _captured(
    model: nn.Module,
    given: Inputs,
    loss_fn: LossFn | None,
    used: frozenset[int] | None,
    dims: Dims | None,
    drops: bool,
) -> JointGraph:
    refuse_unplannable(model, given.tensors())
    given.check(model)
    flat, in_spec = given.flatten()
    mode, fake, sizes = fake_inputs(model, flat, dims)
    trace = _trace(model, given, loss_fn, used, (fake, sizes), drops)
    traced = _told_apart(trace, given)
    _refuse_what_no_graph_does(model, given, trace, traced)
    step, template = trace.step, trace.step.template
    read = watched(model, step.reads, step.effects.written, step.placed)
    assert template is not None
    _refuse_without_gradient(model, traced, template)
    sees_loss = loss_fn is None and used is None and _is_loss(traced, template)
    joint = JointGraph(
        traced,
        trace.loss,
        template,
        in_spec,
        given.let_go(),
        sees_loss,
        read=read,
        asked=trace.values.asked(),
    )
    if sizes is None:
        return joint
    with explained(model, trace.calls):
        sizes = sizes.guarded(mode)
    bound = dict(zip(sizes.symbols, sizes.read(given.tensors()), strict=True))
    loss_at = None if loss_fn is None else functools.partial(_loss_at, model, loss_fn)
    return replace(joint, step=traced.at(bound), sizes=sizes, symbolic=traced, loss_at=loss_at)


@dataclass(frozen=True, eq=False)
class _Trace:
    """What a trace leaves: the module exported of ``step``, and what was watched meanwhile.

    ``behind``  attributes of the model that the backward changed; ``calls``: of ``torch.utils.checkpoint``.
    """

    module: fx.GraphModule
    step: FlatModel
    reads: ReadsOf
    values: Values
    behind: Effects
    calls: _compat.CheckpointCalls
    loss: Traced | None


def _trace(
    model: nn.Module,
    given: Inputs,
    loss_fn: LossFn | None,
    used: frozenset[int] | None,
    at: tuple[list[Any], Sizes | None],
    drops: bool,
) -> _Trace:
    """Trace the step ``at`` these fake inputs and sizes; what its forward asks is answered as in eager."""
    fake, sizes = at
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
        reads, values = ReadsOf(), Values(given, sizes)
        flat, in_spec = given.flatten()
        step = FlatModel(model, flat, fake, in_spec, used, watch=reads, drops=drops, values=values)
        noted = Noted(model)
        with module_paths(model), generators.watched(), noted.watched():
            module = _exported(step, fake, reads)
        if calls.count:
            raise checkpoints_itself(type(model).__name__, "its forward calls torch.utils.checkpoint")
        questions.refuse(type(model).__name__)
        noted.refuse()
        again = functools.partial(step_on_fakes, model, given)
        step.installed.refuse(again)
        generators.refuse(model, module, again, step.effects.left)
    return _Trace(module, step, reads, values, behind, calls, loss)


def _exported(step: FlatModel, fake: list[Any], reads: ReadsOf) -> fx.GraphModule:
    try:
        return exported(step, tuple(x for x in fake if isinstance(x, torch.Tensor)))
    finally:
        step.installed.remove()
        reads.forget()


def _told_apart(trace: _Trace, given: Inputs) -> Traced:
    """The step as forward and backward, with its casts made once and its sums of gradients noted."""
    traced = told_apart(trace.module, trace.step.names, tuple(trace.step.rebound))
    fewer = cast_once(trace.module, traced.parameters, traced.gradients)
    _note_sums(traced, trace.reads.counts - fewer)
    _note_what_goes_on(traced, given)
    return traced


def _refuse_what_no_graph_does(model: nn.Module, given: Inputs, trace: _Trace, traced: Traced) -> None:
    """``TraceError`` where the step does or reads more than its graph would."""
    step, behind = trace.step, trace.behind
    refuse_formulas_of_values(traced)
    refuse_sparse(traced)
    refuse_loose_parameters(model, trace.module)
    refuse_side_effects(model, given, step.effects, step.reads, traced.mutations.keys(), step.alike)
    step.installed.refuse_changes(behind.touched, {name for name, *_ in behind.changed})
    if behind.changed and not settled(model, behind, lambda: step_on_fakes(model, given)):
        step.installed.refuse_changes(behind.touched)


def _refuse_without_gradient(model: nn.Module, traced: Traced, template: OutputTemplate) -> None:
    if not traced.gradients and not traced.input_gradients:
        raise PlannerError(
            f"no gradient reaches any parameter of {type(model).__name__} from its outputs "
            f"({', '.join(x.name for x in template.leaves) or 'none'}); pass loss_fn, or labels if the model "
            "computes its own loss"
        )


def _is_loss(traced: Traced, template: OutputTemplate) -> bool:
    """Whether one output is differentiated, and it is a scalar."""
    chosen = [i for i, x in enumerate(template.leaves) if x.differentiated]
    return len(chosen) == 1 and meta.tensor(traced.outputs[chosen[0]]).numel() == 1


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


def _trace_loss(model: nn.Module, inputs: Inputs, loss_fn: LossFn) -> tuple[Traced, frozenset[int]]:
    """The joint graph of ``loss_fn`` on the model's outputs, and which outputs it reads; sizes are fixed."""
    template, tensors = template_of(type(model).__name__, output_on_fakes(model, inputs), None)
    inner = _Loss(template, loss_fn)
    leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
    traced = told_apart(exported(inner, leaves), {})
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
        return (apart(loss),)
