"""Small but real models the tests train: every family the planner promises, dropout on where it has it;
two layers in some, one where a second would be a copy.

``CASES`` holds the families.  ``PEERS`` are the four sizes at which other tools were measured, without
dropout, and ``PEERS_EAGER_MB`` their eager peaks above parameters and inputs (outputs dropped before
the backward).  All are built from configurations with random weights.
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

from planner.checks import zoo

__all__ = ["CASES", "PEERS", "PEERS_EAGER_MB", "Case"]

Batch = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A family: how to build it and make its batches.

    ``build()``            a model in training mode, the same weights at every call.
    ``make_inputs(seed)``  keyword arguments (a dict) or positional ones (a tuple) of its forward.
    ``loss_fn``            outputs -> scalar, where the loss is outside the model.
    ``drifts``             its plain capture is not bit-equal to eager (grouped-query attention takes
                           another branch of transformers when traced).
    """

    name: str
    build_model: Callable[[], nn.Module]
    make_inputs: Callable[[int], Batch]
    loss_fn: Callable[[Any], Tensor] | None = None
    drifts: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build_model().train()

    def __str__(self) -> str:
        return self.name


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gpt2() -> nn.Module:
    return zoo.gpt2(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128)


def _llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        attention_dropout=0.1,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=3,
    )
    return hf.BertForSequenceClassification(config)


def _bert_batch(seed: int) -> Batch:
    batch = zoo.token_batch(8, 64, 512, seed=seed)
    return {**batch, "labels": torch.randint(0, 3, (8,), generator=_random(seed))}


def _vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=64,
        patch_size=8,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_labels=10,
    )
    return hf.ViTForImageClassification(config)


def _convnext() -> nn.Module:
    config = hf.ConvNextConfig(
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 3, 1], drop_path_rate=0.2, num_labels=10
    )
    return hf.ConvNextForImageClassification(config)


def _pixels(batch: int, side: int, classes: int, name: str = "pixels") -> Callable[[int], Batch]:
    def make(seed: int) -> Batch:
        random = _random(seed)
        return {
            name: torch.randn(batch, 3, side, side, generator=random),
            "labels": torch.randint(0, classes, (batch,), generator=random),
        }

    return make


def _unet_batch(seed: int) -> Batch:
    random = _random(seed)
    return {
        "pixels": torch.randn(2, 3, 64, 64, generator=random),
        "masks": torch.randint(0, 4, (2, 64, 64), generator=random),
    }


def _internvl() -> nn.Module:
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    text |= {"num_key_value_heads": 2, "vocab_size": 512}
    return zoo.internvl(image=64, patch=8, vision=vision, text=text)


def _internvl_batch(seed: int) -> Batch:
    return zoo.internvl_batch(3, 32, 512, image=64, patch=8, seed=seed)


class _Translator(nn.Module):
    """nn.Transformer between an embedding and a head; returns logits (batch, target, vocabulary)."""

    def __init__(self, vocabulary: int = 256, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(
            width, 4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=256, batch_first=True
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        hidden = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits


def _translator_batch(seed: int) -> Batch:
    random = _random(seed)
    return tuple(torch.randint(0, 256, (8, length), generator=random) for length in (48, 40))


def _translator_loss(logits: Tensor) -> Tensor:
    wanted = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=512,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return hf.T5ForConditionalGeneration(config)


_ALL = (
    Case("gpt2", _gpt2, lambda seed: zoo.token_batch(4, 96, 512, seed=seed)),
    Case("llama", _llama, lambda seed: zoo.token_batch(4, 96, 512, seed=seed), drifts=True),
    Case("bert", _bert, _bert_batch),
    Case("vit", _vit, _pixels(4, 64, 10, "pixel_values")),
    Case("resnet", lambda: zoo.ResNet((2, 2, 2, 2), width=8, classes=10), _pixels(8, 64, 10)),
    Case("unet", lambda: zoo.UNet(width=8, levels=3, classes=4), _unet_batch),
    Case("internvl", _internvl, _internvl_batch, drifts=True),
    Case("transformer", _Translator, _translator_batch, _translator_loss),
    Case("convnext", _convnext, _pixels(8, 64, 10, "pixel_values")),
    Case("t5", _t5, lambda seed: zoo.token_batch(4, 64, 512, seed=seed)),
)

CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _ALL})


# ------------------------------------------------------------------------ sizes measured elsewhere


def _peers_gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return zoo.gpt2(vocab_size=4096, n_embd=256, n_layer=6, n_head=4, n_positions=256, **off)


def _peers_bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.BertForMaskedLM(config)


def _peers_batch(length: int) -> Callable[[int], Batch]:
    def make(seed: int) -> Batch:
        ids = torch.randint(0, 4096, (4, length), generator=_random(seed))
        return {"input_ids": ids, "labels": ids}

    return make


def _peers_convnext() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[32, 64, 128, 256], depths=[3, 3, 9, 3], num_labels=100)
    return hf.ConvNextForImageClassification(config)


_PEERS = (
    Case("peers-gpt2", _peers_gpt2, _peers_batch(256)),
    Case("peers-bert", _peers_bert, _peers_batch(128)),
    Case("peers-resnet", lambda: zoo.ResNet(width=32, classes=100), _pixels(8, 112, 100)),
    Case("peers-convnext", _peers_convnext, _pixels(8, 112, 100, "pixel_values")),
)

PEERS: Mapping[str, Case] = MappingProxyType({case.name: case for case in _PEERS})

# Measured with another meter, rounded to a tenth of 10**6 bytes.
PEERS_EAGER_MB: Mapping[str, float] = MappingProxyType(
    {"peers-gpt2": 228.8, "peers-bert": 78.2, "peers-resnet": 98.5, "peers-convnext": 76.9}
)
