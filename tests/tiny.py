"""Models small enough to plan in a fraction of a second, and one way to hold a planned step to eager's.

``both`` runs the same seeded steps on a twin of the model and on the model with its plan, and compares
what a training loop can see: outputs, gradients, buffers, random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import prepare

__all__ = [
    "Mlp",
    "assert_same_bits",
    "assert_steps_equal",
    "batch",
    "bert",
    "bert_batch",
    "blocks",
    "call",
    "gpt2",
    "gpt2_batch",
    "planned",
    "run",
    "seeded",
]

Inputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


class Mlp(nn.Module):
    """Three layers with a norm, dropout and a residual: logits (batch, 4), or a loss if given labels."""

    def __init__(self, width: int = 16, p: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.drop = nn.Dropout(p)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(x))
        h = h + self.drop(torch.tanh(self.second(self.norm(h))))
        out: Tensor = self.last(h)
        return out if labels is None else F.cross_entropy(out, labels)


# How a process of a test starts.  A fork has imported all that tests and package need, which takes several
# times as long as what they run; torch's backward survives none in a build for GPUs, with or without one.
START = "fork" if torch.version.cuda is None and torch.version.hip is None else "spawn"


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """``build()`` in training mode, the same weights at every call; the global generator is not touched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().train()


def batch(rows: int = 32, seed: int = 0, *, labels: bool = False) -> dict[str, Tensor]:
    """``x`` (rows, 8), and ``labels`` (rows,) on request."""
    random = torch.Generator().manual_seed(seed)
    out = {"x": torch.randn(rows, 8, generator=random)}
    if labels:
        out["labels"] = torch.randint(0, 4, (rows,), generator=random)
    return out


def blocks(n: int = 4, width: int = 32) -> nn.Module:
    """A plain chain of ``n`` blocks, each a linear layer, GELU and dropout."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2)) for _ in range(n))
    )


def gpt2(layers: int = 2) -> nn.Module:
    """Hugging Face's GPT2, with its dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=layers, n_head=2, use_cache=False)
    return GPT2LMHeadModel(config)


def gpt2_batch(seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` (2, 16)."""
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def bert(layers: int = 2) -> nn.Module:
    """Hugging Face's BERT with a classifier of three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def bert_batch(seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (rows, 16), ``labels`` (rows,)."""
    random = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 64, (rows, 16), generator=random),
        "attention_mask": torch.ones(rows, 16, dtype=torch.long),
        "labels": torch.randint(0, 3, (rows,), generator=random),
    }


def planned(
    model: nn.Module,
    inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    solver: str = "recompute_all",
) -> Plan:
    """A plan with room to spare: by default one that recomputes whatever can be recomputed."""
    return prepare(model, inputs, loss_fn=loss_fn, costs="roofline").plan_bytes(10**9, search=Search(solver))


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """``model`` at a tuple, a mapping or one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for v in tree.values() for t in _tensors(v)]
    if isinstance(tree, (tuple, list)):
        return [t for v in tree for t in _tensors(v)]
    fields = getattr(tree, "__dataclass_fields__", None)
    return [t for name in fields for t in _tensors(getattr(tree, name))] if fields else []


def run(
    model: nn.Module,
    inputs: Inputs,
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    seed: int = 0,
    steps: int = 2,
) -> dict[str, Tensor]:
    """``steps`` forwards and backwards, gradients added up; everything a loop could look at, copied.

    The loss is ``loss_fn(outputs)``, the output's ``loss``, or the sum of squares of every output that
    requires grad.
    """
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    seen: dict[str, Tensor] = {}
    for step in range(steps):
        outputs = call(model, inputs)
        if loss_fn is not None:
            loss = loss_fn(outputs)
        elif isinstance(getattr(outputs, "loss", None), Tensor):
            loss = outputs.loss
        else:
            tracked = [t for t in _tensors(outputs) if t.requires_grad]
            loss = (
                tracked[0]
                if tracked[0].dim() == 0 and len(tracked) == 1
                else sum(t.square().sum() for t in tracked)
            )
        loss.backward()
        seen |= {f"output {step}.{i}": t.detach().clone() for i, t in enumerate(_tensors(outputs))}
        seen[f"kind {step}"] = torch.tensor(list(type(outputs).__name__.encode()))
        seen |= {f"buffer {step}.{n}": b.detach().clone() for n, b in model.named_buffers()}
    seen |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    leaves = (
        inputs.values() if isinstance(inputs, Mapping) else [inputs] if isinstance(inputs, Tensor) else inputs
    )
    for i, leaf in enumerate(t for x in leaves for t in _tensors(x)):
        if leaf.grad is not None:
            seen[f"input gradient {i}"] = leaf.grad.clone()
            leaf.grad = None
    model.zero_grad(set_to_none=True)
    seen["rng"] = torch.get_rng_state()
    return seen


def assert_same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert got.keys() == want.keys()
    differ = [n for n in want if got[n].dtype != want[n].dtype or not _equal(got[n], want[n])]
    assert not differ, f"{len(differ)} of {len(want)} differ: {differ[:5]}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def assert_steps_equal(
    model: nn.Module,
    inputs: Inputs,
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    solver: str = "recompute_all",
    steps: int = 2,
) -> Plan:
    """Plan ``model``, apply, and hold ``steps`` steps to those of a twin that has no plan."""
    twin = copy.deepcopy(model)
    plan = planned(model, inputs, loss_fn, solver=solver)
    plan.apply(model)
    assert_same_bits(run(model, inputs, loss_fn, steps=steps), run(twin, inputs, loss_fn, steps=steps))
    return plan
