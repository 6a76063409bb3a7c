"""A small real corpus: the first 300 kb of the packaged genome, with its own tokenizer and G-grams."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.genome import prepare_part


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
    prepare_part(folder, num_bases=300_000, max_tokens=126)
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_hidden_ngram_layers": 1, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(size))
    (folder / "dropout.json").write_text(json.dumps({**size, "hidden_dropout_prob": 0.1}))
    return Prepared(folder / "part.fa", folder / "corpus", folder / "ngrams", folder / "model.json", folder / "dropout.json")
