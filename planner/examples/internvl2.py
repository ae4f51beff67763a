"""Fine-tune a model of InternVL2's structure with ``grad_checkpoint`` held to a budget.

    python -m planner.examples.internvl2 --grad_checkpoint --budget_gb 0.02
    python -m planner.examples.internvl2 --grad_checkpoint --budget_gb 0.02 --loop plain
    python -m planner.examples.internvl2 --help

InternViT, pixel shuffle, a two-layer projector and Qwen2, as transformers' InternVL classes have them, with
random weights.  The arguments have the names of InternVL's own fine-tuning script: ``grad_checkpoint``,
``freeze_backbone`` (the vision tower), ``use_llm_lora`` (a rank).  Beside them stands ``budget_gb``; without
it ``grad_checkpoint`` means the library's own checkpointing, every layer.  The one line that makes the
difference is the call of :func:`planner.enable` in :func:`prepared_model`.

The data are made on the spot.  A row is an image cut into tiles, some bright and some dark, a prompt, and
an answer that names the brightness of every tile.  Rows differ in tiles and words, so that hardly two
batches have one shape; only the answer is learnt, labels elsewhere are -100.

To train a published checkpoint, let :func:`internvl2` return
``InternVLForConditionalGeneration.from_pretrained(...)`` and :class:`Tiles` a processor's output.

Known limit: one device a process.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

import planner
from planner.checks import zoo

__all__ = ["Arguments", "Shape", "Tiles", "Training", "batch_of", "internvl2", "main", "train"]

log = logging.getLogger(__name__)

PAD, IMAGE, DARK, BRIGHT, END, WORDS = 0, 1, 2, 3, 4, 5  # token ids; words of prompts from WORDS up
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: pixels per side of a tile and of a patch, and the two towers' configurations."""

    image: int
    patch: int
    vision: dict[str, Any]
    text: dict[str, Any]

    @property
    def tokens_per_tile(self) -> int:
        """Pixel shuffle makes one token of four patches."""
        return (self.image // self.patch // 2) ** 2


SHAPES = {
    "tiny": Shape(
        image=64,
        patch=8,
        vision={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "attention_dropout": 0.0,
            "hidden_dropout_prob": 0.1,
        },
        text={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 512,
            "attention_dropout": 0.0,
        },
    ),
    # InternVL2-1B: InternViT-300M, whose other sizes are the configuration's defaults, and Qwen2-0.5B.
    "1b": Shape(
        image=448,
        patch=14,
        vision={"attention_bias": True, "attention_dropout": 0.0},
        text={
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151655,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "attention_dropout": 0.0,
        },
    ),
}


@dataclass
class Arguments:
    """What the script takes beside transformers' ``TrainingArguments``."""

    size: Literal["tiny", "1b"] = field(default="tiny", metadata={"help": "Sizes of the model."})
    loop: Literal["trainer", "plain"] = field(
        default="trainer", metadata={"help": "transformers' Trainer, or a loop written by hand."}
    )
    grad_checkpoint: bool = field(default=False, metadata={"help": "Save memory by recomputing."})
    budget_gb: float | None = field(
        default=None,
        metadata={
            "help": "What a whole step may take, in GB of 10**9 bytes; needs --grad_checkpoint, "
            "which otherwise recomputes every layer."
        },
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    use_llm_lora: int = field(
        default=0, metadata={"help": "Rank of LoRA on the language model (needs peft); 0: train all of it."}
    )
    rows: int = field(default=24, metadata={"help": "Rows of made-up data."})
    max_tiles: int = field(default=4, metadata={"help": "Most tiles of an image."})

    def __post_init__(self) -> None:
        if self.budget_gb is not None and not self.grad_checkpoint:
            raise ValueError("budget_gb says what grad_checkpoint may take; it needs grad_checkpoint")
        if self.use_llm_lora < 0 or self.rows < 1 or self.max_tiles < 1:
            raise ValueError("use_llm_lora is 0 or a rank; rows and max_tiles are 1 or more")


@dataclass
class Training(TrainingArguments):
    """transformers' arguments with defaults that suit the made-up data."""

    output_dir: str = "internvl2"
    per_device_train_batch_size: int = 4
    learning_rate: float = 2e-3
    logging_steps: int = 1
    save_strategy: str = "no"


class Tiles(Dataset[dict[str, Tensor]]):
    """Images of 1 to ``max_tiles`` tiles, a prompt of 4 to 20 words, and the brightness of each tile.

    A row: ``pixel_values`` (tiles, 3, side, side), ``input_ids`` and ``labels`` (length,).  The same for
    the same index, whatever was asked for before.
    """

    def __init__(self, shape: Shape, rows: int, max_tiles: int) -> None:
        self.shape, self.rows, self.max_tiles = shape, rows, max_tiles

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        random = torch.Generator().manual_seed(index)

        def draw(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=random)

        tiles, words = int(draw(1, self.max_tiles + 1, 1)), int(draw(4, 21, 1))
        bright = draw(0, 2, tiles)
        side = self.shape.image
        pixels = torch.randn(tiles, 3, side, side, generator=random)
        pixels += (2 * bright - 1).view(-1, 1, 1, 1)
        image = torch.full((tiles * self.shape.tokens_per_tile,), IMAGE)
        prompt = torch.cat([image, draw(WORDS, self.shape.text["vocab_size"], words)])
        answer = torch.cat([torch.where(bright == 1, BRIGHT, DARK), torch.tensor([END])])
        return {
            "pixel_values": pixels,
            "input_ids": torch.cat([prompt, answer]),
            "labels": torch.cat([torch.full_like(prompt, IGNORED), answer]),
        }


def batch_of(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch: all their tiles in one tensor, text padded at the end to the longest."""

    def padded(name: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "input_ids": padded("input_ids", PAD),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": padded("labels", IGNORED),
    }


def internvl2(shape: Shape) -> Any:
    """The model, its weights drawn from torch's generator."""
    return zoo.internvl(
        image=shape.image, patch=shape.patch, vision=shape.vision, text=shape.text, image_token=IMAGE
    )


def prepared_model(arguments: Arguments, **planning: Any) -> Any:
    """The model as it is to be trained: frozen, adapted, and its switch enabled for the budget.

    ``planning``: further options of :func:`planner.enable`.
    """
    model = internvl2(SHAPES[arguments.size]).train()
    if arguments.freeze_backbone:
        model.model.vision_tower.requires_grad_(False)
    if arguments.use_llm_lora:
        model = _with_lora(model, arguments.use_llm_lora)
        if not arguments.freeze_backbone:
            model.get_base_model().model.vision_tower.requires_grad_(True)
    if arguments.budget_gb is not None:
        planner.enable(model, arguments.budget_gb, **planning)
    return model


def _with_lora(model: nn.Module, rank: int) -> Any:
    """LoRA on every projection of the language model; the projector is trained as it is."""
    peft = importlib.import_module("peft")
    layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.05,
        target_modules=layers,
        modules_to_save=["multi_modal_projector"],
    )
    return peft.get_peft_model(model, config)


def with_trainer(
    model: nn.Module,
    data: Tiles,
    training: TrainingArguments,
    *,
    grad_checkpoint: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Train with transformers' ``Trainer``; the loss of each logged step."""
    if grad_checkpoint:
        training.activation_checkpointing = training.gradient_checkpointing = True
    trainer = Trainer(
        model, training, data_collator=batch_of, train_dataset=data, callbacks=list(callbacks) or None
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_plain_loop(
    model: Any, data: Tiles, training: TrainingArguments, *, grad_checkpoint: bool
) -> list[float]:
    """Train with a loop; the loss of each step.

    Of ``training`` it reads device, batch size, epochs, learning rate, ``max_grad_norm``, seed, ``bf16``.
    """
    device = training.device
    model.to(device)
    if grad_checkpoint:
        model.gradient_checkpointing_enable()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate)
    order = torch.Generator().manual_seed(training.seed)
    rows = training.per_device_train_batch_size
    loader = DataLoader(data, rows, shuffle=True, generator=order, collate_fn=batch_of)
    half = torch.autocast(device.type, torch.bfloat16) if training.bf16 else contextlib.nullcontext()
    losses = []
    for _ in range(int(training.num_train_epochs)):
        for batch in loader:
            with half:
                loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
            loss.backward()
            clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def train(
    arguments: Arguments,
    training: TrainingArguments,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **planning: Any,
) -> tuple[Any, list[float]]:
    """Build a model and train it: the model and its losses.

    ``callbacks`` go to the ``Trainer``, ``planning`` to :func:`planner.enable`.
    """
    set_seed(training.seed)
    model = prepared_model(arguments, **planning)
    data = Tiles(SHAPES[arguments.size], arguments.rows, arguments.max_tiles)
    if arguments.loop == "plain":
        return model, with_plain_loop(model, data, training, grad_checkpoint=arguments.grad_checkpoint)
    losses = with_trainer(
        model, data, training, grad_checkpoint=arguments.grad_checkpoint, callbacks=callbacks
    )
    return model, losses


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("planner").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    parser = HfArgumentParser((Arguments, Training), description=(__doc__ or "").splitlines()[0])
    arguments, training = parser.parse_args_into_dataclasses(None if argv is None else list(argv))
    model, losses = train(arguments, training, time_limit_s=10.0)
    log.info("losses of %d steps: first %.4f, last %.4f", len(losses), losses[0], losses[-1])
    plan = planner.plan_of(model)
    if plan is not None:
        log.info("the plan of the last batch:\n%s", plan.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
