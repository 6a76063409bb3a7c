"""Real batches for the benchmarks: sequences of a genome, its G-grams, and how many there are."""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dnazen.cli.main import main as dnazen
from dnazen.data.corpus import Corpus
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_masking import MaskedBatch, ngram_masking
from dnazen_kernels.ngram_matching import NgramMatches, NgramTable, ngram_matching

CLS, SEP, MASK, FIRST_MASKABLE = 1, 2, 4, 5  # as in DNABERT-2's tokenizer and those that `dnazen tokenizer` trains
MASKING = {"mlm_probability": 0.15, "mask_token_id": MASK}


class Genome(NamedTuple):
    """Sequences of tokens without special ones, in the genome's order, and the G-grams found in them."""

    name: str
    sequences: list[list[int]]
    vocabulary: dict[tuple[int, ...], int]
    vocab_size: int  # of the tokenizer


class Batch(NamedTuple):
    """T tokens of whole sequences, special tokens among them, what matching finds in it and masking leaves of that."""

    sequences: list[list[int]]
    vocabulary: dict[tuple[int, ...], int]
    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    table: NgramTable
    masking: dict  # arguments of `ngram_masking` beside the tokens and the G-grams
    matches: NgramMatches
    masked: MaskedBatch


def add_genome_arguments(parser: argparse.ArgumentParser) -> None:
    """--fasta and --tokenizer."""
    parser.add_argument("--fasta", default=PACKAGED_GENOME, help="a genome (the packaged one)")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json (one trained on the genome)")


def load_genomes(fasta: str | Path, tokenizer: str | Path | None, lengths: tuple[int, ...]) -> dict[int, Genome]:
    """The genome cut into sequences of at most so many tokens, special ones included, by that number."""
    genomes = {}
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is None:
            tokenizer = f"{folder}/tokenizer"
            _run("tokenizer", "--fasta", fasta, "--output-dir", tokenizer)
        for length in lengths:
            corpus, ngrams = f"{folder}/{length}", f"{folder}/{length}-ngrams"
            source = ("--fasta", fasta, "--tokenizer", tokenizer)
            _run("corpus", *source, "--output-dir", corpus, "--max-tokens", length - 2)
            _run("ngrams", "--corpus", corpus, "--output-dir", ngrams)
            genomes[length] = open_genome(corpus, ngrams, Path(fasta).name.split(".")[0])
    return genomes


def open_genome(corpus: str | Path, ngrams: str | Path, name: str) -> Genome:
    """What `dnazen corpus` and `dnazen ngrams` wrote."""
    opened = Corpus.open(corpus)
    vocabulary = load_ngrams(ngrams, opened)
    ngram_ids = dict(zip(vocabulary.ngrams, vocabulary.ids, strict=True))
    sequences = [opened.train[index].tolist() for index in range(len(opened.train.lengths))]
    return Genome(name, sequences, ngram_ids, 1 + max(map(max, sequences)))


def _run(*words: object) -> None:
    if dnazen([str(word) for word in words]) != 0:
        raise SystemExit(f"dnazen {words[0]} failed")


def make_batch(genome: Genome, num_tokens: int) -> Batch:
    """The genome's first sequences that make up at most `num_tokens` tokens, on the CPU."""
    ends = np.cumsum([len(sequence) + 2 for sequence in genome.sequences])
    chosen = genome.sequences[: int(np.searchsorted(ends, num_tokens, side="right"))]
    sequences = [[CLS, *sequence, SEP] for sequence in chosen]
    input_ids = torch.tensor([token for sequence in sequences for token in sequence])
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0, dtype=torch.int32)
    table = NgramTable.build(list(genome.vocabulary), list(genome.vocabulary.values()), genome.vocab_size)
    matches = ngram_matching(input_ids, cu_seqlens, table)
    masking = {
        **MASKING,
        "maskable": input_ids >= FIRST_MASKABLE,
        "random": torch.from_numpy(np.random.default_rng(0).random((len(input_ids), 3))),
        "maskable_ids": torch.arange(FIRST_MASKABLE, genome.vocab_size),
    }
    masked = ngram_masking(input_ids, **ngrams_of(matches), **masking).trimmed()
    return Batch(sequences, genome.vocabulary, input_ids, cu_seqlens, table, masking, matches, masked)


def ngrams_of(fields: NgramMatches | MaskedBatch) -> dict[str, torch.Tensor | NgramEdges]:
    """The G-grams and their edges, by the names of `ngram_masking`'s arguments."""
    return {name: getattr(fields, name) for name in ("ngram_input_ids", "ngram_cu_seqlens", "edges")}
