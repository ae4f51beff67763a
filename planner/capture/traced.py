"""A joint graph whose inputs and results have been told apart, by what the tracer left on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

from planner._compat import descriptors
from planner.capture import meta
from planner.capture.printed import code_of
from planner.capture.sizes import evaluate
from planner.errors import TraceError

__all__ = ["Traced", "told_apart"]


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

    def reading(self, outputs: Collection[int]) -> Traced:
        """The same graph where only these outputs are handed out, numbered anew."""
        number = {old: new for new, old in enumerate(sorted(outputs))}
        kept = {number[i]: node for i, node in self.outputs.items() if i in number}
        tangents = {number[i]: node for i, node in self.tangents.items() if i in number}
        return replace(self, outputs=kept, tangents=tangents)

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


def told_apart(module: fx.GraphModule, names: dict[str, str], rebound: tuple[str, ...] = ()) -> Traced:
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
            assert node.target is torch.ops.aten.clone.default  # see apart
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
