"""Passes that restate the joint graph for memory; none changes a number that it computes.

In order, each a function in :mod:`planner.graph.passes` that says what it did:

* ``load``: aliases and views that change nothing are removed, a size that varies becomes an argument, and
  whatever computed it goes;
* ``chunk_loss``: where asked for, the loss runs for some tokens after the other
(:mod:`planner.graph.chunks`);
* ``write_parts``: a write into a part of a storage is one call again, with a form that is in place;
* ``copy_gradients``: a gradient that autograd would have to copy is copied in the graph, so that the engine
  always takes it as it is and memory is known to the byte;
* ``split_dropout``: ``native_dropout`` becomes the draw of a mask and its application, so that either can be
  repeated without the other;
* ``note_random_state``: each random op is preceded by a note of the generator's state, from which it can be
  replayed;
* ``update_buffers``: a buffer's new value is written into it in the forward, once, whatever is recomputed;
* ``cudnn_batch_norms`` and ``onednn_lstms``: kernels are eager's;
* ``order``: forward work that only the backward reads moves to where the backward first reads it;
* ``write_in_place``: calls of the backward write their result over an operand that nobody reads later.

A loss outside the model runs in eager as it is: of its graph only the no-ops go.

``print(normalize(joint))`` shows the outcome as Python that runs, below what each pass did and how long it
took; ``TORCH_LOGS="+planner"`` says the same while it happens.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from planner.capture import meta
from planner.capture.joint_graph import JointGraph
from planner.capture.printed import code_of, headed
from planner.capture.traced import Traced
from planner.errors import TraceError
from planner.graph.chunks.chunked import Chunked
from planner.graph.chunks.write import chunk_loss
from planner.graph.draft import Did, Draft, loaded
from planner.graph.nodes import is_check, is_random, talks
from planner.graph.passes import batch_norm, lstm
from planner.graph.passes.buffers import update_buffers
from planner.graph.passes.dropout import split_dropout
from planner.graph.passes.gradients import copy_gradients
from planner.graph.passes.inplace import leave_sums_to_engine, write_in_place
from planner.graph.passes.random_state import note_random_state
from planner.graph.passes.slices import write_parts

__all__ = ["Normalized", "Ordered", "Pass", "normalize"]

log = logging.getLogger(__name__)

_PASSES: tuple[tuple[str, Callable[[Draft], Did]], ...] = (
    ("write_parts", write_parts),
    ("copy_gradients", copy_gradients),
    ("split_dropout", split_dropout),
    ("note_random_state", note_random_state),
    ("update_buffers", update_buffers),
    ("cudnn_batch_norms", batch_norm.as_eager),
    ("onednn_lstms", lstm.as_eager),
)


@dataclass(frozen=True)
class Pass:
    """What one pass did to a graph, and in how long.

    ``counts``  how often, by what: ``{"copies": 12}``.
    """

    name: str
    counts: tuple[tuple[str, int], ...]
    seconds: float

    def __str__(self) -> str:
        done = ", ".join(f"{count} {what}" for what, count in self.counts)
        return f"{self.name}: {done}, {self.seconds * 1e3:.0f} ms"


@dataclass(frozen=True, eq=False)
class Ordered:
    """A graph whose calls are in the order in which they run.

    ``sources``        placeholder -> (kind, name), in graph order.
    ``constants``      tensors the trace baked in, by placeholder name.
    ``outputs``        node per tensor leaf of the model's output.
    ``tangents``       index of an output -> placeholder of its gradient.
    ``gradients``      parameter name, or input position -> node.
    ``forward``        calls in program order; ``backward``: in engine order, each after what only it needs.
    ``pinned``         calls that no plan may run twice.
    ``storage_bytes``  storage -> expression of its bytes, where they vary.
    ``passes``         what was done, in order.
    ``chunked``        losses that are computed in chunks.
    """

    graph: fx.Graph
    sources: dict[fx.Node, tuple[str, str | int]]
    constants: dict[str, torch.Tensor]
    outputs: tuple[fx.Node, ...]
    tangents: dict[int, fx.Node]
    gradients: dict[str | int, fx.Node]
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    pinned: frozenset[fx.Node]
    storage_bytes: dict[int, object]
    passes: tuple[Pass, ...]
    chunked: tuple[Chunked, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where it runs: the device of its gradients."""
        return meta.tensor(next(iter(self.gradients.values()))).device

    def function(self, name: str) -> str:
        """The graph as the Python function ``name`` of its sources; imports above it."""
        named = {node: f"{kind} {what}" for node, (kind, what) in self.sources.items()}
        gradients = {str(k): n for k, n in self.gradients.items()}
        results = {"outputs": list(self.outputs), "gradients": gradients}
        return code_of(name, named, (*self.forward, *self.backward), results)


@dataclass(frozen=True, eq=False)
class Normalized:
    """The model's step, ready to be counted, and that of a loss outside it."""

    step: Ordered
    loss: Ordered | None

    @property
    def code(self) -> str:
        """Python that runs: ``step`` (and ``loss``) on tensors, headed by what each pass did."""
        passes = [str(p) for p in self.step.passes]
        functions = [self.step.function("step")]
        if self.loss is not None:
            passes += [f"loss: {p}" for p in self.loss.passes]
            functions.append(self.loss.function("loss"))
        return headed(passes, *functions)

    def __str__(self) -> str:
        return self.code

    def __repr__(self) -> str:
        step = self.step
        loss = (
            "" if self.loss is None else f", {len(self.loss.forward) + len(self.loss.backward)} of the loss"
        )
        return f"Normalized({len(step.forward)} calls forward, {len(step.backward)} backward{loss})"


def normalize(joint: JointGraph) -> Normalized:
    """All passes, in order.

    Raises ``TraceError`` if an output or a buffer depends on output gradients.
    """
    loss = None if joint.loss is None else _ordered(joint.loss, passes=(), in_place=False)
    passes = _PASSES
    if joint.chunks > 1:
        passes = (("chunk_loss", functools.partial(chunk_loss, chunks=joint.chunks)), *passes)
    return Normalized(_ordered(joint.step, passes=passes, in_place=True), loss)


def _ordered(
    traced: Traced, passes: tuple[tuple[str, Callable[[Draft], Did]], ...], in_place: bool
) -> Ordered:
    done: list[Pass] = []
    started = time.perf_counter()

    def note(name: str, did: Did) -> None:
        nonlocal started
        now = time.perf_counter()
        done.append(Pass(name, tuple(did.items()), now - started))
        log.debug("%s", done[-1])
        started = now

    draft, did = loaded(traced)
    note("load", did)
    for name, run in passes:
        note(name, run(draft))
    forward, backward = _order(draft)
    note("order", {"calls forward": len(forward), "backward": len(backward)})
    if in_place:
        note(
            "leave_sums_to_engine",
            leave_sums_to_engine(backward, (*draft.gradients.values(), *draft.outputs)),
        )
        note(
            "write_in_place",
            write_in_place(backward, {*draft.gradients.values(), *draft.outputs}, draft.tangents.values()),
        )
    return Ordered(
        draft.graph,
        draft.sources,
        draft.constants,
        tuple(draft.outputs),
        draft.tangents,
        draft.gradients,
        tuple(forward),
        tuple(backward),
        frozenset(draft.pinned),
        draft.storage_bytes,
        tuple(done),
        tuple(draft.chunked),
    )


def _order(draft: Draft) -> tuple[list[fx.Node], list[fx.Node]]:
    """Forward calls in program order; backward calls in engine order, each after what only it needs."""
    tangents = set(draft.tangents.values())
    needs_tangent: set[fx.Node] = set()
    for node in draft.graph.nodes:
        if node in tangents or any(i in needs_tangent for i in node.all_input_nodes):
            needs_tangent.add(node)
    draws = [n for n in draft.graph.nodes if is_random(n)]
    once = [n for n in draft.graph.nodes if (is_check(n) or talks(n)) and n not in needs_tangent]
    in_forward = draft.reaches((*draft.outputs, *draft.updates, *draft.states, *draft.early, *draws, *once))
    if needs_tangent & in_forward:
        raise TraceError(
            "an output or a buffer depends on the gradients of the outputs; this cannot be planned"
        )
    calls = [n for n in draft.graph.nodes if n.op == "call_function"]
    backward: list[fx.Node] = []
    placed: set[fx.Node] = set(in_forward)
    for node in calls:
        if node in placed or node not in needs_tangent:
            continue
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [i for i in top.all_input_nodes if i.op == "call_function" and i not in placed]
            if missing:
                stack.extend(reversed(missing))
            else:
                stack.pop()
                if top not in placed:
                    placed.add(top)
                    backward.append(top)
    # Last, gradients that do not depend on any tangent (constants).
    backward.extend(node for node in calls if node not in placed)
    return [n for n in calls if n in in_forward], backward
