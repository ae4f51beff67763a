"""Tiny sentence-transformers models and the pairs they are trained on, made on the spot.

``python -m tests.rerankers FOLDER`` trains a CrossEncoder in a process of its own (see ``main``).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

__all__ = ["cross_encoder", "lists", "pairs", "sentence_encoder"]

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


def cross_encoder(width: int = 32, layers: int = 2) -> CrossEncoder:
    """A BERT with dropout, the same weights at every call."""
    with tempfile.TemporaryDirectory() as folder:
        _saved(folder, BertForSequenceClassification, width, layers)
        return CrossEncoder(folder, device="cpu", num_labels=1)


def sentence_encoder(width: int = 32, layers: int = 2) -> SentenceTransformer:
    """A BERT with mean pooling."""
    with tempfile.TemporaryDirectory() as folder:
        _saved(folder, BertModel, width, layers)
        return SentenceTransformer(folder, device="cpu")


def _text(random: torch.Generator, least: int, most: int) -> str:
    length = int(torch.randint(least, most + 1, (), generator=random))
    return " ".join(f"w{i}" for i in torch.randint(0, WORDS, (length,), generator=random).tolist())


def pairs(rows: int = 11, seed: int = 0, *, labels: bool = True) -> Dataset:
    """Queries, passages of 5 to 40 words and a label each; batches come in as many shapes."""
    random = torch.Generator().manual_seed(seed)
    columns: dict[str, Any] = {
        "query": [_text(random, 2, 6) for _ in range(rows)],
        "passage": [_text(random, 5, 40) for _ in range(rows)],
    }
    if labels:
        columns["label"] = [float(i % 2) for i in range(rows)]
    return Dataset.from_dict(columns)


def lists(rows: int = 5, seed: int = 0) -> Dataset:
    """Queries with two to four passages and as many grades each."""
    random = torch.Generator().manual_seed(seed)
    sizes = [2 + i % 3 for i in range(rows)]
    return Dataset.from_dict(
        {
            "query": [_text(random, 2, 6) for _ in range(rows)],
            "docs": [[_text(random, 5, 20) for _ in range(n)] for n in sizes],
            "labels": [[float(j % 2) for j in range(n)] for n in sizes],
        }
    )
