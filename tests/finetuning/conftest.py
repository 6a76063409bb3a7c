"""A small DNAZEN with random weights, and data that it can learn: sequences with or without a motif."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnazen.data.tokenizer import save_tokenizer, train_tokenizer
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import NgramVocabulary
from tests.helpers.sequences import random_bases, write_csv

MOTIF = "TATAAAGGCC"


def write_splits(folder: Path, make_row: Callable[[random.Random], dict], sizes=(64, 24, 24)) -> Path:
    """`train.csv`, `dev.csv` and `test.csv` of rows that `make_row` draws."""
    rng = random.Random(0)
    for split, size in zip(("train", "dev", "test"), sizes):
        write_csv(folder / f"{split}.csv", [make_row(rng) for _ in range(size)])
    return folder


def motif_row(rng: random.Random) -> dict:
    """One half of the sequences has the motif, three times."""
    label = rng.randrange(2)
    pieces = [random_bases(rng.randrange(8, 16), rng) for _ in range(4)]
    return {"sequence": (MOTIF if label else "").join(pieces), "label": label}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A DNAZEN of two layers with its tokenizer and 40 G-grams that occur in `data`; no drop-out."""
    folder = tmp_path_factory.mktemp("model") / "small"
    rng = random.Random(1)
    texts = [motif_row(rng)["sequence"] for _ in range(400)]
    tokenizer = train_tokenizer(texts, vocab_size=48)
    counts: dict[tuple[int, ...], int] = {}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for length in (2, 3):
            for start in range(len(ids) - length + 1):
                ngram = tuple(ids[start : start + length])
                counts[ngram] = counts.get(ngram, 0) + 1
    ngrams = sorted(counts, key=lambda ngram: (-counts[ngram], ngram))[:40]
    vocabulary = NgramVocabulary(ngrams, list(range(1, 41)))
    torch.manual_seed(0)
    config = DNAZenConfig(
        vocab_size=len(tokenizer), ngram_vocab_size=vocabulary.vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_hidden_ngram_layers=1, hidden_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    DNAZenForMaskedLM(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    vocabulary.save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two classes: with and without the motif."""
    return write_splits(tmp_path_factory.mktemp("data") / "motif", motif_row)
