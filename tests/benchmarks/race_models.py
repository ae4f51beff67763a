"""The models of the race: seven families at published sizes, and the same shapes small enough for a CPU.

Each is built from a configuration with random weights, straight on the device and in the dtype asked
for, so that a billion parameters take a second on a GPU.  Dropout is on wherever the family has it by
default.  ``batch`` counts sequences or images; sequences of one batch are padded to differing lengths
where the family is used so (BERT as a re-ranker, InternVL), and packed where it is not (GPT2, Llama).

``BERT-large`` is the module inside a sentence-transformers ``CrossEncoder`` (its ``[0].model``) with the
CrossEncoder's loss, binary cross-entropy of the logits, outside the model; what a CrossEncoder adds
around it (tokenizer, saving) takes no part in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from planner.capture.outputs import LossFn
from planner.checks import zoo

__all__ = ["MODELS", "Contender", "Size", "build"]

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """One size of a family.

    ``batch``         sequences or images of a step in the race.
    ``make_model()``  the model on the CPU or wherever ``torch.device`` says.
    ``make_inputs``   keyword arguments of its forward for a batch of ``n``, on the CPU.
    ``items``         tokens (or images, 1) of one row.
    """

    batch: int
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[int], Inputs]
    items: int


@dataclass(frozen=True)
class Contender:
    """A family.

    ``blocks``      class names of its repeated blocks, which checkpointing by hand wraps.
    ``has_flag``    whether transformers' gradient checkpointing works on it.
    ``has_dropout`` whether a step draws random numbers.
    ``outer_loss``  makes the loss function for a batch of ``n``, where the loss is outside the model.
    """

    name: str
    unit: str
    large: Size
    small: Size
    blocks: tuple[str, ...]
    has_flag: bool = True
    has_dropout: bool = False
    outer_loss: Callable[[int, torch.device], LossFn] | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A family on a device: one model, and batches of any size."""

    family: Contender
    size: Size
    model: nn.Module
    device: torch.device
    dtype: torch.dtype

    def inputs(self, batch: int) -> Inputs:
        """A batch on the device, the same at every call."""
        made = self.size.make_inputs(batch)
        return {
            name: t.to(self.device, self.dtype if t.is_floating_point() else None) for name, t in made.items()
        }

    def loss_fn(self, batch: int) -> LossFn | None:
        outer = self.family.outer_loss
        return None if outer is None else outer(batch, self.device)

    def items(self, batch: int) -> int:
        """Tokens or images in a batch."""
        return batch * self.size.items


def build(name: str, device: torch.device, dtype: torch.dtype, *, large: bool) -> Case:
    """The family called ``name``, in training mode, weights from seed 0 of the device's own generator."""
    family = MODELS[name]
    size = family.large if large else family.small
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.device(device):
            model = size.make_model()
    return Case(family, size, model.to(device=device, dtype=dtype).train(), device, dtype)


def _random(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


# ---------------------------------------------------------------------------------------- batches


def _packed(length: int, words: int) -> Callable[[int], Inputs]:
    def make(batch: int) -> Inputs:
        ids = torch.randint(2, words, (batch, length), generator=_random(0), device="cpu")
        return {"input_ids": ids, "labels": ids.clone()}

    return make


def _pairs(length: int, words: int) -> Callable[[int], Inputs]:
    def make(batch: int) -> Inputs:
        made = zoo.token_batch(batch, length, words)
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    return make


def _relevance(batch: int, device: torch.device) -> LossFn:
    targets = torch.rand(batch, generator=_random(1), device="cpu").to(device)

    def loss_fn(outputs: Any) -> Tensor:
        logits = outputs.logits.squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))

    return loss_fn


def _images(side: int, classes: int, name: str = "pixels") -> Callable[[int], Inputs]:
    def make(batch: int) -> Inputs:
        return {
            name: torch.randn(batch, 3, side, side, generator=_random(1), device="cpu"),
            "labels": torch.randint(0, classes, (batch,), generator=_random(2), device="cpu"),
        }

    return make


def _masks(side: int, classes: int) -> Callable[[int], Inputs]:
    def make(batch: int) -> Inputs:
        return {
            "pixels": torch.randn(batch, 3, side, side, generator=_random(1), device="cpu"),
            "masks": torch.randint(0, classes, (batch, side, side), generator=_random(2), device="cpu"),
        }

    return make


def _tiles(tiles: int, text: int, image: int, patch: int, words: int) -> Callable[[int], Inputs]:
    """Rows of ``tiles`` image tiles and ``text`` tokens, the labels on the text."""
    per_row = tiles * (image // patch // 2) ** 2

    def make(batch: int) -> Inputs:
        found = zoo.token_batch(batch, text, words)
        front = torch.ones(batch, per_row, dtype=torch.long)  # the image token is 1
        return {
            "pixel_values": torch.randn(batch * tiles, 3, image, image, generator=_random(1)),
            "input_ids": torch.cat([front, found["input_ids"]], 1),
            "attention_mask": torch.cat([front, found["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(front, -100), found["labels"]], 1),
        }

    return make


# ----------------------------------------------------------------------------------------- models


def _gpt2(**config: int) -> Callable[[], nn.Module]:
    return lambda: zoo.gpt2(**config)


def _bert(**config: int) -> Callable[[], nn.Module]:
    return lambda: hf.BertForSequenceClassification(hf.BertConfig(num_labels=1, **config))


def _llama(**config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, **config))


def _internvl(
    image: int, patch: int, vision: dict[str, Any], text: dict[str, Any]
) -> Callable[[], nn.Module]:
    # InternVL2 trains without attention dropout; the zoo's default is another.
    vision, text = {"attention_dropout": 0.0, **vision}, {"attention_dropout": 0.0, **text}
    return lambda: zoo.internvl(image=image, patch=patch, vision=vision, text=text)


def _convnext(**config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**config))


_BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_BERT_SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 512,
}
_LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
_LLAMA_SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_QWEN2_HALF_B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151655,
}
_VLM_SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}

_ALL = (
    Contender(
        "gpt2-medium",
        "tokens",
        Size(8, _gpt2(n_embd=1024, n_layer=24, n_head=16, n_positions=1024), _packed(1024, 50257), 1024),
        Size(
            4,
            _gpt2(n_embd=128, n_layer=4, n_head=2, n_positions=128, vocab_size=1024),
            _packed(128, 1024),
            128,
        ),
        ("GPT2Block",),
        has_dropout=True,
    ),
    Contender(
        "bert-large",
        "tokens",
        Size(16, _bert(**_BERT_LARGE), _pairs(512, 30522), 512),
        Size(8, _bert(**_BERT_SMALL), _pairs(96, 1024), 96),
        ("BertLayer",),
        has_dropout=True,
        outer_loss=_relevance,
    ),
    Contender(
        "llama-1b",
        "tokens",
        Size(2, _llama(**_LLAMA_1B), _packed(2048, 128256), 2048),
        Size(4, _llama(**_LLAMA_SMALL), _packed(128, 1024), 128),
        ("LlamaDecoderLayer",),
    ),
    Contender(
        "internvl2-1b",
        "tokens",
        # InternViT-300M is the configuration's default but for its biases; 6 tiles of 256 tokens a row.
        Size(
            2,
            _internvl(448, 14, {"attention_bias": True}, _QWEN2_HALF_B),
            _tiles(6, 256, 448, 14, 151655),
            1792,
        ),
        Size(
            4,
            _internvl(64, 8, _VLM_SMALL, {**_VLM_SMALL, "num_key_value_heads": 2, "vocab_size": 512}),
            _tiles(1, 32, 64, 8, 512),
            48,
        ),
        ("InternVLVisionLayer", "Qwen2DecoderLayer"),
    ),
    Contender(
        "resnet-50",
        "images",
        Size(128, zoo.ResNet, _images(224, 1000), 1),
        Size(8, lambda: zoo.ResNet((2, 2, 2, 2), width=16, classes=10), _images(64, 10), 1),
        ("Bottleneck",),
        has_flag=False,
    ),
    Contender(
        "convnext-b",
        "images",
        Size(
            64,
            _convnext(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=1000),
            _images(224, 1000, "pixel_values"),
            1,
        ),
        Size(
            8,
            _convnext(hidden_sizes=[24, 48, 96, 192], depths=[2, 2, 4, 2], num_labels=10),
            _images(64, 10, "pixel_values"),
            1,
        ),
        ("ConvNextLayer",),
        has_flag=False,
    ),
    Contender(
        "unet",
        "images",
        Size(32, zoo.UNet, _masks(256, 8), 1),
        Size(4, lambda: zoo.UNet(width=8, levels=3, classes=4), _masks(64, 4), 1),
        ("Sequential",),  # its double convolutions
        has_flag=False,
        has_dropout=True,
    ),
)

MODELS: Mapping[str, Contender] = MappingProxyType({family.name: family for family in _ALL})
