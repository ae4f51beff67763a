"""A graph as Python that runs: what every stage before the program prints.

The form is that of lightning-thunder's traces: what was done stands above the code, so that any two stages
can be read side by side.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import fx

from planner.capture import meta

__all__ = ["code_of", "headed"]


def headed(lines: Iterable[str], *functions: str) -> str:
    """Functions below their provenance, one comment a line, and the imports that any of them needs."""
    parts = [function.partition("\n\n\n") for function in functions]
    imports = sorted({line for above, _, _ in parts for line in above.splitlines()})
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + "\n".join(imports) + "".join(f"\n\n\n{body.rstrip()}" for _, _, body in parts) + "\n"


def code_of(name: str, arguments: Mapping[fx.Node, str], calls: Iterable[fx.Node], results: Any) -> str:
    """Imports, three newlines, and the function ``name``, which runs ``calls`` in their order.

    ``arguments``  its parameters, in order, and what each stands for.
    ``results``    what it returns: nodes, in tuples, lists and dicts.
    """
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in arguments:
        new[node] = graph.placeholder(node.name)
    for node in calls:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(fx.map_arg(results, new.__getitem__))
    code = graph.python_code("self")
    _, definition, rest = code.src.partition("def forward(self")
    signature, newline, body = rest.partition("\n")
    told = [f"    # {new[n].name}: {what}{_form(n)}\n" for n, what in arguments.items()]
    text = f"def {name}({signature.removeprefix(',').lstrip()}{newline}{''.join(told)}{body.rstrip()}\n"
    needed = [_import(k, v) for k, v in code.globals.items() if re.search(rf"\b{re.escape(k)}\b", text)]
    assert definition
    return "\n".join(sorted({"import torch", *filter(None, needed)})) + f"\n\n\n{text}"


def _form(node: fx.Node) -> str:
    """Dtype and sizes of a tensor, as ``, float32[16, 8]``."""
    made = meta.value(node)
    if not isinstance(made, torch.Tensor):
        return ""
    return f", {str(made.dtype).removeprefix('torch.')}{list(made.shape)}"


def _import(name: str, found: Any) -> str:
    """The statement that makes ``name`` stand for ``found``; "" where Python has it."""
    if isinstance(found, ModuleType):
        return f"import {found.__name__}" + ("" if found.__name__ == name else f" as {name}")
    if isinstance(found, float):
        return f"from math import {name}"  # inf or nan
    if found is type(None):
        return f"{name} = type(None)"
    module = inspect.getmodule(found)
    return "" if module is None else f"from {module.__name__} import {found.__name__} as {name}"
