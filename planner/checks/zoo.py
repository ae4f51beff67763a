"""The models the demo and the CUDA check plan: real families, made from configurations, no downloads.

Five shapes of training step that stress a planner differently: a BERT inside a sentence-transformers
``CrossEncoder`` (the loss is outside the model), a vision-language model of InternVL2's shape, a
GPT2 with its loss inside, a residual network with BatchNorm and in-place ReLU, and a U-Net whose
skips span the whole step.  Dropout is on wherever the family has it; weights are random.

``demo`` sizes take about a second per step on one CPU core and keep far more bytes in activations
than in parameters; ``large`` sizes are those of the published models, for a GPU.

Known weakness: random weights and random batches say nothing about a model's accuracy, which no plan
changes; lengths of real text vary more than those made here.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.errors import PlannerError

__all__ = [
    "MODELS",
    "Example",
    "ResNet",
    "UNet",
    "cross_encoder_example",
    "gpt2",
    "gpt2_example",
    "internvl",
    "internvl_batch",
    "internvl_example",
    "resnet_example",
    "token_batch",
    "unet_example",
]

Size = Literal["demo", "large"]
Where = torch.device | str


@dataclass(frozen=True, eq=False)
class Example:
    """A model in training mode with one batch.

    ``model``    what is planned.
    ``inputs``   keyword arguments of its forward.
    ``loss_fn``  outputs -> scalar; ``None`` if the model returns its own loss.
    ``whole``    the module that contains ``model``, where that is not ``model`` itself.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    loss_fn: Callable[[Any], Tensor] | None = None
    whole: nn.Module | None = None

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.inputs.items() if isinstance(v, Tensor))
        return f"{self.name}: {count / 1e6:.1f} M parameters; {shapes}"


def _hf(package: str) -> Any:
    """Import a package of the ``hf`` extra, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PlannerError(
            f"this model needs {package}, which cannot be imported ({error}); "
            "install the extra: pip install 'rematplan[hf]'"
        ) from error


def _seeded(build: Callable[[], nn.Module], device: Where, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Build under a seed that leaves the caller's random state alone; in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().train()
    first = next(model.parameters())
    if (first.device, first.dtype) == (torch.device(device), dtype):
        return model  # torch cannot move fake parameters, not even to where they are
    return model.to(device=device, dtype=dtype)


# ------------------------------------------------------------------------------------------- models


def gpt2(**config: Any) -> nn.Module:
    """GPT2 with a language-model head; keyword arguments are those of ``GPT2Config``."""
    hf = _hf("transformers")
    defaults = {"use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**defaults, **config}))
    model.loss_type = "ForCausalLM"  # what it falls back to, with a warning, for this class's name
    return model


def internvl(
    *, image: int, patch: int, vision: Mapping[str, Any], text: Mapping[str, Any], image_token: int = 1
) -> nn.Module:
    """A vision-language model of InternVL2's shape: ViT, pixel shuffle and projector, Qwen2.

    ``image``, ``patch``  pixels per side; an image becomes ``(image / patch / 2) ** 2`` tokens.
    ``vision``, ``text``  further arguments of the two towers' configurations; dropout of attention is 0.1
    unless they say otherwise.
    """
    hf = _hf("transformers")
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(
            image_size=[image, image], patch_size=[patch, patch], **{"attention_dropout": 0.1, **vision}
        ),
        text_config=hf.Qwen2Config(use_cache=False, **{"attention_dropout": 0.1, **text}),
        image_token_id=image_token,
        image_seq_length=(image // patch // 2) ** 2,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm, around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Bottleneck residual network; ``depths=(3, 4, 6, 3), width=64`` is ResNet-50.

    ``forward(pixels, labels=None)``: pixels (batch, 3, height, width); returns logits
    (batch, classes), or the mean cross-entropy when labels (batch,) are given.
    """

    def __init__(
        self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000, channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages: list[nn.Module] = []
        features = width
        for level, depth in enumerate(depths):
            inner = width * 2**level
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(features, inner, 2 if block == 0 and level > 0 else 1))
                features = 4 * inner
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(features, classes)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stages(self.stem(pixels))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits if labels is None else F.cross_entropy(logits, labels)


def _double_conv(channels_in: int, channels_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """U-Net for segmentation (Ronneberger et al., MICCAI 2015): skips that span the whole step.

    ``forward(pixels, masks=None)``: pixels (batch, 3, height, width), sides divisible by
    ``2 ** levels``; returns logits (batch, classes, height, width), or the mean cross-entropy when
    masks (batch, height, width) are given.
    """

    def __init__(self, width: int = 64, levels: int = 4, classes: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            _double_conv(3 if level == 0 else widths[level - 1], widths[level], dropout)
            for level in range(levels)
        )
        self.bottom = _double_conv(widths[-2], widths[-1], dropout)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, 2) for level in reversed(range(levels))
        )
        self.merge = nn.ModuleList(
            _double_conv(2 * widths[level], widths[level], dropout) for level in reversed(range(levels))
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
        skips = []
        x = pixels
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        logits: Tensor = self.head(x)
        return logits if masks is None else F.cross_entropy(logits, masks)


# ------------------------------------------------------------------------------------------ batches


def token_batch(batch: int, length: int, vocabulary: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Token ids, labels and a mask (batch, length); rows are padded at the end to varying lengths."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (batch, length), generator=random)
    lengths = torch.randint(max(1, 3 * length // 4), length + 1, (batch, 1), generator=random)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def internvl_batch(
    batch: int, length: int, vocabulary: int, *, image: int, patch: int, image_token: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """One image (3, image, image) and ``length`` tokens of text in each row; labels on the text."""
    found = token_batch(batch, length, vocabulary, seed=seed)
    count = (image // patch // 2) ** 2
    front = torch.full((batch, count), image_token)
    pixels = torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(seed + 1))
    return {
        "pixel_values": pixels,
        "input_ids": torch.cat([front, found["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), found["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), found["labels"]], 1),
    }


def _placed(inputs: Mapping[str, Any], device: Where, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on the device, floating ones in ``dtype``."""
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


# --------------------------------------------------------------------------------------- the five


def cross_encoder_example(
    device: Where = "cpu", dtype: torch.dtype = torch.float32, size: Size = "demo"
) -> Example:
    """A BERT re-ranker in a sentence-transformers ``CrossEncoder``, its tokenizer made on the spot.

    ``whole`` is the CrossEncoder, ``model`` the BERT inside it (``whole[0].model``); the loss, binary
    cross-entropy on the logits, is outside both, as sentence-transformers has it.
    """
    hf, sbert = _hf("transformers"), _hf("sentence_transformers")
    width, layers, batch, words, length = (
        (256, 6, 12, 4096, 128) if size == "demo" else (768, 12, 32, 30522, 512)
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {
        word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(words - len(special)))])
    }
    tokenizer = hf.BertTokenizer(vocab=vocabulary, model_max_length=length)
    config = hf.BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=1,
    )
    bert: Any = _seeded(lambda: hf.BertForSequenceClassification(config), "cpu", dtype)
    with tempfile.TemporaryDirectory() as folder:  # a CrossEncoder is only made from a saved model
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        whole: Any = sbert.CrossEncoder(
            folder, device=str(device), num_labels=1, model_kwargs={"dtype": dtype}
        )
    random = torch.Generator().manual_seed(1)
    picks = torch.randint(0, words - len(special), (batch, 2, length), generator=random)
    pairs = []
    for row, (query, passage) in enumerate(picks.tolist()):
        cut = length - 3 - length // 8 - row  # the tokenizer adds 3 tokens; lengths differ by row
        pairs.append((_words(query[: length // 8]), _words(passage[:cut])))
    inputs = _placed(whole.preprocess(pairs), device, dtype)
    targets = torch.rand(batch, generator=random).to(device=device, dtype=dtype)

    def loss_fn(outputs: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.logits.squeeze(-1), targets)

    model = whole.train()[0].model
    return Example("BERT in a CrossEncoder", model, inputs, loss_fn, whole)


def _words(numbers: list[int]) -> str:
    return " ".join(f"w{number}" for number in numbers)


def internvl_example(
    device: Where = "cpu", dtype: torch.dtype = torch.float32, size: Size = "demo"
) -> Example:
    """A vision-language model of InternVL2-1B's shape, scaled down for the demo."""
    vision: dict[str, Any]
    if size == "demo":
        image, patch, batch, length, words = 112, 8, 6, 64, 2048
        vision = {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        }
        text = {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 512,
        }
        text |= {"num_key_value_heads": 2, "vocab_size": words}
    else:
        image, patch, batch, length, words = 448, 14, 4, 768, 151655
        vision = {"attention_bias": True}  # the defaults are InternViT-300M's otherwise: 24 layers of 1024
        text = {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "intermediate_size": 4864,
        }
        text |= {"num_key_value_heads": 2, "vocab_size": words}
    model = _seeded(lambda: internvl(image=image, patch=patch, vision=vision, text=text), device, dtype)
    inputs = internvl_batch(batch, length, words, image=image, patch=patch)
    return Example("InternVL2-shaped VLM", model, _placed(inputs, device, dtype))


def gpt2_example(device: Where = "cpu", dtype: torch.dtype = torch.float32, size: Size = "demo") -> Example:
    """GPT2, next-token loss inside the model; ``large`` is the 124 M model."""
    if size == "demo":
        width, layers, batch, length, words = 256, 6, 4, 256, 4096
    else:
        width, layers, batch, length, words = 768, 12, 8, 1024, 50257
    config = {"n_embd": width, "n_layer": layers, "n_head": width // 64, "n_positions": length}
    model = _seeded(lambda: gpt2(vocab_size=words, **config), device, dtype)
    return Example("GPT2", model, _placed(token_batch(batch, length, words), device, dtype))


def resnet_example(device: Where = "cpu", dtype: torch.dtype = torch.float32, size: Size = "demo") -> Example:
    """ResNet-50: BatchNorm, in-place ReLU; the demo's has half the width and a quarter of the pixels."""
    width, classes, batch, side = (32, 100, 8, 112) if size == "demo" else (64, 1000, 64, 224)
    model = _seeded(lambda: ResNet(width=width, classes=classes), device, dtype)
    random = torch.Generator().manual_seed(1)
    inputs = {
        "pixels": torch.randn(batch, 3, side, side, generator=random),
        "labels": torch.randint(0, classes, (batch,), generator=random),
    }
    return Example("ResNet-50", model, _placed(inputs, device, dtype))


def unet_example(device: Where = "cpu", dtype: torch.dtype = torch.float32, size: Size = "demo") -> Example:
    """A U-Net with dropout and BatchNorm, per-pixel loss inside the model."""
    width, classes, batch, side = (16, 8, 4, 128) if size == "demo" else (64, 8, 16, 256)
    model = _seeded(lambda: UNet(width=width, classes=classes), device, dtype)
    random = torch.Generator().manual_seed(1)
    inputs = {
        "pixels": torch.randn(batch, 3, side, side, generator=random),
        "masks": torch.randint(0, classes, (batch, side, side), generator=random),
    }
    return Example("U-Net", model, _placed(inputs, device, dtype))


MODELS: Mapping[str, Callable[..., Example]] = MappingProxyType(
    {
        "bert": cross_encoder_example,
        "internvl": internvl_example,
        "gpt2": gpt2_example,
        "resnet": resnet_example,
        "unet": unet_example,
    }
)
