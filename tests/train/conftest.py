"""A small real corpus: the first 300 kb of the packaged genome, with its own tokenizer and G-grams."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from dnazen.data.shards import Corpus, build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.ngram.extract import build_ngrams
from dnazen.train.prepare import PACKAGED_GENOME


class Prepared(NamedTuple):
    """Folders and files that a run needs."""

    fasta: Path
    corpus: Path
    ngrams: Path
    model: Path  # a configuration without drop-out
    dropout_model: Path

    def arguments(self) -> dict:
        """Arguments of a short run on them; a micro-batch is about 5 sequences."""
        return {
            "corpus": self.corpus, "ngrams": self.ngrams, "model": self.model, "max_batch_tokens": 640,
            "logging_steps": 1, "eval_steps": 4, "save_steps": 4, "max_steps": 4, "disable_tqdm": True, "bf16": False,
            "residual_learning_rate": 0.5,
        }  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    with gzip.open(PACKAGED_GENOME, "rt") as file:
        header, *lines = file.read().splitlines()
    sequence = "".join(lines)[:300_000]
    fasta = folder / "part.fa"
    fasta.write_text(f"{header}\n{sequence}\n")
    tokenizer = train_tokenizer([sequence], vocab_size=256)
    build_corpus([fasta], tokenizer, folder / "corpus", max_tokens=126, validation_fraction=0.05)
    build_ngrams(Corpus.open(folder / "corpus"), folder / "ngrams", min_pmi=0.7)
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_hidden_ngram_layers": 1, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(size))
    (folder / "dropout.json").write_text(json.dumps({**size, "hidden_dropout_prob": 0.1}))
    return Prepared(fasta, folder / "corpus", folder / "ngrams", folder / "model.json", folder / "dropout.json")
