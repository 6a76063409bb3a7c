"""Small models with random weights in folders of their own, for real sequences."""

from pathlib import Path

import pytest
import torch

from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import save_tokenizer, train_tokenizer
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.build import build_ngrams
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME
from tests.helpers.published import random_weights, write_dnabert2


@pytest.fixture(scope="session")
def genome() -> str:
    """The first 200 kb of the packaged genome."""
    return next(read_fasta(PACKAGED_GENOME)).sequence[:200_000]


@pytest.fixture(scope="session")
def model_folder(genome, tmp_path_factory) -> Path:
    """A DNAZEN with a masked-LM head, whose weights leave no part without a say."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "part.fa").write_text(f">part\n{genome}\n")
    tokenizer = train_tokenizer([genome], vocab_size=256)
    build_corpus([folder / "part.fa"], tokenizer, folder / "corpus", max_tokens=126, validation_fraction=0.05)
    build_ngrams(Corpus.open(folder / "corpus"), folder / "ngrams", min_pmi=0.7)
    vocabulary = load_ngrams(folder / "ngrams", Corpus.open(folder / "corpus"))
    config = DNAZenConfig(
        vocab_size=256, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        num_hidden_ngram_layers=2, ngram_vocab_size=vocabulary.vocab_size,
    )  # fmt: skip
    model = DNAZenForMaskedLM(config)
    table = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_weights(table))
    model.save_pretrained(folder / "final")
    save_tokenizer(tokenizer, folder / "final")
    vocabulary.save_pretrained(folder / "final", tokenizer)
    return folder / "final"


@pytest.fixture(scope="session")
def dnabert2_folder(genome, tmp_path_factory) -> Path:
    """A folder as DNABERT-2 is published: no G-grams."""
    folder = tmp_path_factory.mktemp("dnabert2")
    tokenizer = train_tokenizer([genome], vocab_size=256)
    write_dnabert2(folder, vocab_size=len(tokenizer), num_hidden_layers=6)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
