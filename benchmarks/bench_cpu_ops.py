"""Matching and masking on one CPU core, against plain Python.

    python -m pytest benchmarks/bench_cpu_ops.py

Checks first that both give the same integers, then times both in the same run and prints tokens per second and their
ratio. The tokens and the vocabulary are yeast's where its genome and DNABERT-2's tokenizer lie beside the project, else
made up with yeast's density of G-grams. Fails below the floor of 3 M tokens/s and, for a batch as a GPU takes it, 25
times plain Python; in a batch of 8,000 tokens the fixed cost of some hundred array operations is half the time.
"""

import timeit
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.batches import ngrams_of
from dnazen.cli.main import main
from dnazen.data.corpus import Corpus
from dnazen.ngram.vocab import load_ngrams
from dnazen_kernels.ngram_masking import ngram_masking
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching
from tests.helpers.oracles import as_lists, mask_slowly, match_slowly

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CLS, SEP, MASK, VOCAB_SIZE = 1, 2, 4, 4096
MIN_TOKENS_PER_SECOND = 3e6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, list[list[int]], dict[tuple[int, ...], int]]:
    """Where it comes from, sequences of tokens, and the vocabulary."""
    genome, folder = SHARED / "genomes" / "sacCer3.fa.gz", tmp_path_factory.mktemp("yeast")
    if not genome.is_file():
        return "made up", *make_up_corpus()
    tokenizer, corpus, ngrams = SHARED / "tokenizer", folder / "corpus", folder / "ngrams"
    assert main(f"corpus --fasta {genome} --tokenizer {tokenizer} --output-dir {corpus}".split()) == 0
    assert main(f"ngrams --corpus {corpus} --output-dir {ngrams}".split()) == 0
    opened = Corpus.open(corpus)
    vocabulary = load_ngrams(ngrams, opened)
    sequences = [opened.train[index].tolist() for index in range(160)]
    return "yeast", sequences, dict(zip(vocabulary.ngrams, vocabulary.ids, strict=True))


def make_up_corpus() -> tuple[list[list[int]], dict[tuple[int, ...], int]]:
    """160 sequences of 410 random tokens, 7 of 100 of which begin one of 12,358 G-grams, mostly pairs."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([2, 3, 4, 5], 12_358, p=[0.88, 0.07, 0.03, 0.02])
    ngrams = list({tuple(rng.integers(5, VOCAB_SIZE, length).tolist()) for length in lengths})
    sequences = []
    for _ in range(160):
        sequence: list[int] = []
        while len(sequence) < 410:
            sequence += (
                ngrams[rng.integers(len(ngrams))] if rng.random() < 0.075 else [int(rng.integers(5, VOCAB_SIZE))]
            )
        sequences.append(sequence)
    return sequences, {ngram: ngram_id for ngram_id, ngram in enumerate(ngrams, 1)}


@pytest.mark.benchmark(disable_gc=True)
@pytest.mark.parametrize("num_sequences, min_ratio", [(20, 8), (160, 25)])
def test_matching_and_masking(benchmark, capsys, corpus, num_sequences, min_ratio):
    source, sequences, vocabulary = corpus
    sequences = [[CLS, *sequence, SEP] for sequence in sequences[:num_sequences]]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0, dtype=torch.int32)
    table = NgramTable.build(list(vocabulary), list(vocabulary.values()), VOCAB_SIZE)
    options = {
        "input_ids": tokens,
        "maskable": tokens >= 5,
        "random": torch.from_numpy(np.random.default_rng(1).random((len(tokens), 3))),
        "mlm_probability": 0.15,
        "mask_token_id": MASK,
        "maskable_ids": torch.arange(5, VOCAB_SIZE),
    }
    lists = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in options.items()}

    def ours():
        return ngram_masking(**options, **ngrams_of(ngram_matching(tokens, cu_seqlens, table))).trimmed()

    def plain_python():
        return mask_slowly({**lists, **match_slowly(sequences, vocabulary)}, whole_ngram=True)

    torch.set_num_threads(1)
    assert as_lists(ours()) == plain_python()
    # The fastest of both is compared, without garbage collection: other work of the machine is no part of either.
    benchmark(ours)
    speed = len(tokens) / benchmark.stats.stats.min
    plain_speed = len(tokens) / min(timeit.repeat(plain_python, number=1, repeat=5))
    benchmark.extra_info.update(tokens_per_second=speed, plain_python_tokens_per_second=plain_speed)
    num_ngrams = len(ngram_matching(tokens, cu_seqlens, table).ngram_input_ids)
    with capsys.disabled():
        print(
            f"\n{source}, {len(tokens):,} tokens, {num_ngrams / len(tokens):.3f} G-grams per token: {speed / 1e6:.1f} "
            f"M tokens/s, plain Python {plain_speed / 1e6:.3f} M tokens/s, {speed / plain_speed:.0f} times"
        )
    assert speed >= MIN_TOKENS_PER_SECOND and speed >= min_ratio * plain_speed
