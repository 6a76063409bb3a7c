"""Fixtures shared by all tests."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Triton reads this when a kernel is defined, so it must stand before any triton_impl module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that the workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
def device(request) -> torch.device:
    """Where kernels run: compiled on a GPU if there is one, else interpreted on the CPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real genomes, GUE and DNABERT-2's tokenizer, where they lie beside the project."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real data of {path}, which is absent")
    return path


class Prepared(NamedTuple):
    """Folders and files that a run needs: the first 120 kb of the packaged genome, its own tokenizer and G-grams."""

    fasta: Path
    corpus: Path
    ngrams: Path
    model: Path  # a configuration without drop-out
    dropout_model: Path

    def arguments(self) -> dict:
        """Arguments of a short run on them; a micro-batch is about 5 sequences."""
        return {
            "corpus": self.corpus, "ngrams": self.ngrams, "model": self.model, "max_batch_tokens": 640,
            "logging_steps": 1, "eval_steps": 4, "save_steps": 4, "max_steps": 4, "bf16": False,
            "residual_learning_rate": 0.5,
        }  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    from tests.helpers.genome import prepare_part

    folder = tmp_path_factory.mktemp("prepared")
    prepare_part(folder, num_bases=120_000, max_tokens=126)
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_hidden_ngram_layers": 1, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(size))
    (folder / "dropout.json").write_text(json.dumps({**size, "hidden_dropout_prob": 0.1}))
    return Prepared(
        folder / "part.fa", folder / "corpus", folder / "ngrams", folder / "model.json", folder / "dropout.json"
    )
