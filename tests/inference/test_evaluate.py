"""`dnazen evaluate`: another genome, and what of it the training text has."""

import json

import numpy as np
import pytest
import torch

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import train_tokenizer
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.build import build_ngrams
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME
from tests.helpers.sequences import other_strand


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of 100 kb, a model that has not been trained, and other texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    sequence = next(read_fasta(PACKAGED_GENOME)).sequence
    (folder / "own.fa").write_text(f">own\n{sequence[:100_000]}\n")
    other = "".join(np.random.default_rng(0).choice(list("ACGT"), 30_000))
    reverse = other_strand(sequence[:30_000])
    (folder / "other.fa").write_text(f">other\n{other}\n>reverse\n{reverse}\n")
    tokenizer = train_tokenizer([sequence[:100_000]], vocab_size=64)
    build_corpus([folder / "own.fa"], tokenizer, folder / "corpus", max_tokens=126, validation_fraction=0.1)
    corpus = Corpus.open(folder / "corpus")
    build_ngrams(corpus, folder / "ngrams", min_pmi=0.5)
    vocabulary = load_ngrams(folder / "ngrams", corpus)
    torch.manual_seed(0)
    config = DNAZenConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_hidden_ngram_layers=1, ngram_vocab_size=vocabulary.vocab_size, neighbor_window=1,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("unk", "cls", "sep", "pad", "mask")},
    )  # fmt: skip
    DNAZenForMaskedLM(config).save_pretrained(folder / "model")
    corpus.tokenizer.save_pretrained(folder / "model")
    vocabulary.save_pretrained(folder / "model", corpus.tokenizer)
    return folder


def evaluate(folder, output, *fasta):
    options = ["--fasta", *(str(folder / name) for name in fasta)] if fasta else []
    line = [
        "evaluate",
        "--model",
        str(folder / "model"),
        "--corpus",
        str(folder / "corpus"),
        "--output-dir",
        str(output),
    ]
    return main([*line, *options])


@pytest.mark.slow
def test_overlap_is_counted_on_both_strands_and_what_shares_nothing_stands_apart(folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path / "out", "other.fa") == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # half is random; the other half is the reverse complement of the training text, but for what that holds out
    assert 0.38 < record["overlap_with_training_text"] < 0.5
    apart = record["sequences_that_share_nothing"]
    assert 0 < apart["num_sequences"] < record["num_sequences"]
    output = capsys.readouterr().out
    assert "does not predict hidden tokens as well as counting" in output and "share none with it" in output
    assert f"({apart['num_targets']:,} hidden tokens)" in output


def test_held_out_part_is_the_default(folder, tmp_path):
    assert evaluate(folder, tmp_path / "own") == 0
    record = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    assert record["num_sequences"] <= len(Corpus.open(folder / "corpus").validation)
    uniform = record["scores"]["unigram"]["bits_per_base"]
    assert 1.9 < uniform["mean"] < 2.3


def test_a_corpus_of_another_tokenizer_is_refused(folder, tmp_path, capsys):
    tokenizer = train_tokenizer([next(read_fasta(folder / "other.fa")).sequence], vocab_size=32)
    build_corpus([folder / "own.fa"], tokenizer, tmp_path / "corpus", max_tokens=126)
    line = ["evaluate", "--model", str(folder / "model"), "--corpus", str(tmp_path / "corpus")]
    assert main([*line, "--output-dir", str(tmp_path / "out")]) == 1
    assert "expected a corpus made with the tokenizer of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
