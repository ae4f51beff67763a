"""Tiny sentence-transformers models, the texts they are trained on, and their trainers, made on the spot."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses as sentence_losses
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer, TrainerCallback

import planner
from tests.hf import FAST, QUIET, Peaks, losses_of

__all__ = [
    "TASKS",
    "Run",
    "Task",
    "cross_encoder",
    "lists",
    "pairs",
    "sentence_encoder",
    "train",
    "train_and_die",
]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 60


def _saved(folder: str, kind: type[Any], width: int, layers: int) -> None:
    config = BertConfig(
        vocab_size=WORDS + len(SPECIAL),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    names = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    BertTokenizer(vocab={n: i for i, n in enumerate(names)}, model_max_length=64).save_pretrained(folder)


def cross_encoder(width: int = 32, layers: int = 1) -> CrossEncoder:
    """A BERT with dropout, the same weights at every call."""
    with tempfile.TemporaryDirectory() as folder:
        _saved(folder, BertForSequenceClassification, width, layers)
        return CrossEncoder(folder, device="cpu", num_labels=1)


def sentence_encoder(width: int = 32, layers: int = 1) -> SentenceTransformer:
    """A BERT with mean pooling."""
    with tempfile.TemporaryDirectory() as folder:
        _saved(folder, BertModel, width, layers)
        return SentenceTransformer(folder, device="cpu")


def _text(random: torch.Generator, least: int, most: int) -> str:
    length = int(torch.randint(least, most + 1, (), generator=random))
    return " ".join(f"w{i}" for i in torch.randint(0, WORDS, (length,), generator=random).tolist())


def pairs(rows: int = 7, query: tuple[int, int] = (2, 6), passage: tuple[int, int] = (5, 40)) -> Dataset:
    """Queries, passages of 5 to 40 words, a label each: batches of many lengths, the last of fewer rows."""
    random = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {
            "query": [_text(random, *query) for _ in range(rows)],
            "passage": [_text(random, *passage) for _ in range(rows)],
            "label": [float(i % 2) for i in range(rows)],
        }
    )


def lists(rows: int = 3, seed: int = 0) -> Dataset:
    """Queries with two or three passages and as many grades each."""
    random = torch.Generator().manual_seed(seed)
    sizes = [2 + i % 2 for i in range(rows)]
    return Dataset.from_dict(
        {
            "query": [_text(random, 2, 6) for _ in range(rows)],
            "docs": [[_text(random, 5, 20) for _ in range(n)] for n in sizes],
            "labels": [[float(j % 2) for j in range(n)] for n in sizes],
        }
    )


@dataclass(frozen=True)
class Task:
    """A model, a loss and its data, and the trainer for them."""

    model: Callable[[], Any]
    loss: Callable[[Any], nn.Module]
    data: Callable[[], Dataset]
    trainer: type[Any]
    arguments: type[Any]
    batch: int = 4


def _texts() -> Dataset:
    return pairs().remove_columns("label")


TASKS: Mapping[str, Task] = {
    "binary": Task(
        cross_encoder,
        cross_losses.BinaryCrossEntropyLoss,
        pairs,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    ),
    "even": Task(
        cross_encoder,
        cross_losses.BinaryCrossEntropyLoss,
        lambda: pairs(8, (4, 4), (30, 30)),
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    ),
    "list": Task(
        cross_encoder, cross_losses.ListNetLoss, lists, CrossEncoderTrainer, CrossEncoderTrainingArguments, 2
    ),
    "negatives": Task(
        cross_encoder,
        lambda model: cross_losses.MultipleNegativesRankingLoss(model, num_negatives=1),
        lambda: pairs(8, (4, 4), (30, 30)).remove_columns("label"),
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    ),
    "sentences": Task(
        sentence_encoder,
        sentence_losses.MultipleNegativesRankingLoss,
        _texts,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    ),
}


@dataclass(frozen=True)
class Run:
    """A finished training: the model, what its trainer logged, and the peak of each whole step."""

    model: Any
    trainer: Any
    losses: list[float]
    peaks: list[int]


def train(
    name: str,
    folder: str | Path,
    budget_gb: float | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Run:
    """Train a task, with the switch on if there is a budget."""
    task = TASKS[name]
    model = task.model()
    if budget_gb is not None:
        planner.enable(model, budget_gb, **FAST)
        arguments = {"gradient_checkpointing": True, **arguments}
    peaks = Peaks()
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": task.batch, **QUIET, **arguments}
    trainer = task.trainer(
        model,
        task.arguments(str(folder), **settings),
        train_dataset=task.data(),
        eval_dataset=task.data(),
        loss=task.loss(model),
        callbacks=[peaks, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return Run(model, trainer, losses_of(trainer), peaks.bytes)


class Killed(TrainerCallback):
    """The process is gone after a step, as if the machine had failed: no handler runs, nothing is flushed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder: Path, budget_gb: float) -> None:
    """Train, be killed in the third step after a checkpoint, and never return."""
    train("even", folder, budget_gb, save_strategy="steps", save_steps=2, callbacks=[Killed(3)])
