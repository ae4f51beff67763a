"""What a node of a captured graph carries beside its call: one table, and one way in and out for each entry.

An fx node has a dict, ``node.meta``, that torch's tracer fills and that every stage here adds to.

=============  =======================================  ==========================  =========================
key            holds                                    written by                  read by
=============  =======================================  ==========================  =========================
``val``        fake tensor(s) or number that it makes   torch; each pass; sizes     everyone: :func:`value`,
                                                                                    :func:`tensor`
``symbolic``   ``val`` before sizes became numbers      capture/sizes               graph/nodes (no-ops)
``size``       sympy expression of a size that varies   capture/sizes, traced       graph/draft, variants
``desc``       torch's description of an input, or of   torch                       capture/traced
               each output (on the output node)
``custom``     ``{"module": path}`` of the module at    capture/flat_model          graph/nodes
               work, by ``torch.fx.traceback``
``seq_nr``     number of the autograd formula           torch                       graph/training_graph
``is_gradient  whether the engine adds up gradients     torch                       rewrite/prune
_acc``         here
``adds_reads`` which operand of the engine's sum came  capture/pieces, casts       rewrite/apart
               before the other, where both are
               gradients of what is read twice
``is_engines`` whether that sum is left to the engine   passes/inplace              rewrite/emit
``casts_back`` whether autocast cast a parameter, and  capture/as_eager/casts      rewrite/apart
               this casts its gradient back
``again``      (target, args) of any further execution  passes: buffers,            training_graph, rewrite
                                                        batch_norm
``draw``       the node that draws a dropout's mask     passes/dropout              training_graph, rewrite
``rng_state``  the node that notes the generator's      passes/random_state         training_graph, rewrite
               state
``over``       the operand on whose storage it lies     passes/inplace              training_graph
``instead_of`` the call that makes the same apart from  rewrite/emit                rewrite/prune, segments
               its first operand, which it writes over
``cast_in``    number of the autocast context   capture/as_eager/casts      capture/as_eager/casts
               that it was traced in
``goes_on``    whether an input is what other code  capture/joint_graph         passes/gradients
               made, into which its gradient goes on
``recompute``  whether it is a further execution        rewrite/emit                whoever reads the program
=============  =======================================  ==========================  =========================

Keys that torch alone writes and reads (stack traces and the like) are carried along by :func:`describe`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = [
    "adds_reads",
    "again",
    "cast_in",
    "casts_back",
    "describe",
    "description",
    "draw",
    "forget_symbolic",
    "formula",
    "goes_on",
    "instead_of",
    "is_engines",
    "module",
    "note_adds_reads",
    "note_again",
    "note_cast_in",
    "note_casts_back",
    "note_draw",
    "note_goes_on",
    "note_instead_of",
    "note_is_engines",
    "note_over",
    "note_recompute",
    "note_rng_state",
    "note_size",
    "note_symbolic",
    "over",
    "recomputes",
    "rng_state",
    "set_value",
    "size",
    "sums_gradients",
    "symbolic",
    "tensor",
    "value",
]


def value(node: fx.Node) -> Any:
    """What the call makes: a fake tensor, a nest of them, a number; ``None`` if nothing."""
    return node.meta.get("val")


def tensor(node: fx.Node) -> torch.Tensor:
    """What the call makes, where that is one tensor."""
    made: torch.Tensor = node.meta["val"]
    return made


def set_value(node: fx.Node, made: Any) -> None:
    """From here on the call makes ``made``."""
    node.meta["val"] = made


def describe(node: fx.Node, made: Any, like: fx.Node | None = None, *, same_work: bool = True) -> None:
    """Give ``node`` an entry of its own: it makes ``made``, and for the rest is as ``like``.

    ``same_work``  ``False``: of ``like`` only the module that was at work.
    """
    if like is None:
        node.meta = {"val": made}
    elif same_work:
        node.meta = {**like.meta, "val": made}
    else:
        node.meta = {"val": made, "custom": like.meta.get("custom", {})}


def symbolic(node: fx.Node) -> Any:
    """What the call makes before its sizes became numbers; as :func:`value` where they always were."""
    return node.meta.get("symbolic", node.meta.get("val"))


def note_symbolic(node: fx.Node, made: Any) -> None:
    """``made`` is what the call makes at symbolic sizes."""
    node.meta["symbolic"] = made


def forget_symbolic(node: fx.Node) -> None:
    """Whatever the call makes from here on, it is not what was traced."""
    node.meta.pop("symbolic", None)


def size(node: fx.Node) -> Any:
    """Expression of the size that the node is; ``None`` where it is none."""
    return node.meta.get("size")


def note_size(node: fx.Node, expression: Any) -> None:
    """The node is a size, a number or an expression of the capture's symbols."""
    node.meta["size"] = expression


def description(node: fx.Node) -> Any:
    """Torch's descriptor of a placeholder; of the output node, one for each output."""
    return node.meta["desc"]


def module(node: fx.Node) -> str | None:
    """Path of the module whose forward made the node (a backward node has its forward's)."""
    return (node.meta.get("custom") or {}).get("module")


def formula(node: fx.Node) -> int | None:
    """Number of the autograd formula that the call is part of."""
    number: int | None = node.meta.get("seq_nr")
    return number


def sums_gradients(node: fx.Node) -> bool:
    """Whether the call is the engine's own, which adds up the gradients of a tensor that is read twice."""
    return bool(node.meta.get("is_gradient_acc", False))


def adds_reads(node: fx.Node) -> int | None:
    """Which operand came first of a sum of gradients for one parameter or input; ``None``: it is no such."""
    first: int | None = node.meta.get("adds_reads")
    return first


def note_adds_reads(node: fx.Node, first: int = 0) -> None:
    """The call adds two gradients for what the step reads more than once; operand ``first`` came first."""
    node.meta = {**node.meta, "adds_reads": first}


def is_engines(node: fx.Node) -> bool:
    """Whether the engine is given what the call adds, instead of the sum."""
    return bool(node.meta.get("is_engines", False))


def note_is_engines(node: fx.Node) -> None:
    """The engine is given what the call adds, and adds it."""
    node.meta = {**node.meta, "is_engines": True}


def casts_back(node: fx.Node) -> bool:
    """Whether the call makes of the gradient of autocast's cast that of the parameter."""
    return bool(node.meta.get("casts_back", False))


def note_casts_back(node: fx.Node) -> None:
    """Autocast cast a parameter, and the call casts the gradient back."""
    node.meta = {**node.meta, "casts_back": True}


def cast_in(node: fx.Node) -> int | None:
    """Number of the outermost autocast context that the call was traced in; ``None``: outside of any."""
    number: int | None = node.meta.get("cast_in")
    return number


def note_cast_in(node: fx.Node, number: int) -> None:
    """The call was traced in this context of autocast."""
    node.meta["cast_in"] = number


def goes_on(node: fx.Node) -> bool:
    """Whether other code made this input, so that its gradient goes on into the backward of that."""
    return bool(node.meta.get("goes_on", False))


def note_goes_on(node: fx.Node) -> None:
    """Other code made this input, and waits for its gradient."""
    node.meta["goes_on"] = True


def again(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Target and arguments of a further execution, where they are not those of the first."""
    found: tuple[Any, tuple[Any, ...]] | None = node.meta.get("again")
    return found


def note_again(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """A further execution calls ``target`` on ``args``."""
    node.meta["again"] = (target, args)


def draw(node: fx.Node) -> fx.Node | None:
    """The draw that a dropout's application comes with, where one kernel makes both."""
    found: fx.Node | None = node.meta.get("draw")
    return found


def note_draw(node: fx.Node, drawn: fx.Node) -> None:
    """``node`` applies the mask of ``drawn``."""
    node.meta["draw"] = drawn


def rng_state(node: fx.Node) -> fx.Node | None:
    """What a replay of a random call starts from."""
    found: fx.Node | None = node.meta.get("rng_state")
    return found


def note_rng_state(node: fx.Node, state: fx.Node) -> None:
    """``node`` draws from a generator at ``state``."""
    node.meta["rng_state"] = state


def over(node: fx.Node) -> fx.Node | None:
    """The operand on whose storage the call writes its result."""
    found: fx.Node | None = node.meta.get("over")
    return found


def note_over(node: fx.Node, operand: fx.Node) -> None:
    """``node`` writes its result over ``operand``; entries shared with other nodes stay as they are."""
    node.meta = {**node.meta, "over": operand}


def instead_of(node: fx.Node) -> Any:
    """The call that makes the same apart from its first operand, over which this one writes it."""
    return node.meta.get("instead_of")


def note_instead_of(node: fx.Node, target: Any) -> None:
    """``node`` writes over its first operand what ``target`` would make apart from it."""
    node.meta = {**node.meta, "instead_of": target}


def recomputes(node: fx.Node) -> bool:
    """Whether a call of a rewritten program is a further execution."""
    return bool(node.meta.get("recompute", False))


def note_recompute(node: fx.Node, further: bool, like: fx.Node) -> None:
    """``node`` is one execution of ``like``, ``further`` or the first."""
    node.meta = {**like.meta, "recompute": further}
