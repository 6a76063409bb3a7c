"""`dnazen ngrams`: the folder with a corpus' G-grams, and what is said of it."""

import time
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import save_tokenizer, tokenizer_checksum
from dnazen.files import InputError, atomic_directory, sha256_file, write_json
from dnazen.ngram.extract import NgramExtraction, extract_ngrams
from dnazen.ngram.vocab import MANIFEST_FILE, NGRAM_FILE, NgramVocabulary
from dnazen_kernels.ngram_matching import ngram_matching

TABLE_FILE = "ngrams.tsv"


def build_ngrams(corpus: Corpus, output_dir: str | PathLike, **parameters: Any) -> dict[str, Any]:
    """Extract the G-grams of a corpus' training split, and write their folder; returns the manifest.

    The folder holds `ngram.json`, `ngrams.tsv`, `manifest.json` and the tokenizer. `parameters` are those of
    `extract_ngrams`.

    Raises:
        InputError: `output_dir` is taken; no G-gram passes the thresholds; see `extract_ngrams`.
    """
    start = time.perf_counter()
    tokenizer = corpus.tokenizer
    parameters = {**extract_ngrams.__kwdefaults__, **parameters}
    with atomic_directory(output_dir) as directory:
        extraction = extract_ngrams(corpus.train.shards, vocab_size=len(tokenizer), **parameters)
        seconds = round(time.perf_counter() - start, 3)
        vocabulary = write_ngrams(directory, extraction, tokenizer, str(corpus.path), parameters)
        density = measure_density(vocabulary, corpus)
        return write_manifest(directory, extraction, parameters, [corpus.checksum], tokenizer, seconds, density)


def write_ngrams(
    directory: Path,
    extraction: NgramExtraction,
    tokenizer: PreTrainedTokenizerBase,
    counted: str,
    parameters: dict[str, Any],
) -> NgramVocabulary:
    """Write `ngram.json`, `ngrams.tsv` and the tokenizer.

    Args:
        counted: what the G-grams are of, for the error.

    Raises:
        InputError: there is no G-gram.
    """
    ngrams = extraction.ngrams
    if not ngrams:
        now = "--min-pair-count {min_pair_count} --min-count {min_count} --min-pmi {min_pmi}".format(**parameters)
        raise InputError(
            f"{counted}: none of {extraction.num_candidates:,} candidates from {extraction.num_tokens:,} tokens"
            " is a G-gram. In a small genome a pair of tokens is seldom seen: lower a threshold of `dnazen ngrams` "
            f"(now {now}), or make pairs more frequent with fewer tokens (`dnazen tokenizer --vocab-size 256`)"
        )
    vocabulary = NgramVocabulary(ngrams, list(range(1, len(ngrams) + 1)))
    vocabulary.save_pretrained(directory, tokenizer)
    save_tokenizer(tokenizer, directory)
    rows = zip(ngrams, extraction.counts, extraction.pmis, strict=True)
    with open(directory / TABLE_FILE, "w") as file:
        file.write("id\ttokens\tbases\tlength\tcount\tpmi\n")
        for ngram_id, (ngram, count, pmi) in enumerate(rows, 1):
            tokens = tokenizer.convert_ids_to_tokens(ngram)
            file.write(f"{ngram_id}\t{' '.join(tokens)}\t{''.join(tokens)}\t{len(ngram)}\t{count}\t{pmi:.4f}\n")
    return vocabulary


def write_manifest(
    directory: Path,
    extraction: NgramExtraction,
    parameters: dict[str, Any],
    corpus_checksums: list[str],
    tokenizer: PreTrainedTokenizerBase,
    seconds: float,
    density: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Write `manifest.json`, the last file of the folder; returns what is in it.

    Args:
        corpus_checksums: of what the G-grams were counted in.
        seconds: that the extraction took.
        density: see `measure_density`.
    """
    statistics = dict(vars(extraction))
    lengths = [len(ngram) for ngram in statistics.pop("ngrams")]
    del statistics["counts"], statistics["pmis"]
    statistics["num_ngrams"] = len(lengths)
    statistics["num_ngrams_by_length"] = {n: lengths.count(n) for n in sorted(set(lengths))}
    if density:
        statistics["ngrams_per_sequence"], statistics["covered_tokens"] = density
    manifest = {
        "parameters": parameters,
        "corpus_checksums": corpus_checksums,
        "tokenizer_checksum": tokenizer_checksum(tokenizer),
        "ngram_json_sha256": sha256_file(directory / NGRAM_FILE),
        "statistics": statistics,
        "seconds": seconds,
    }
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def measure_density(vocabulary: NgramVocabulary, corpus: Corpus, max_sequences: int = 1000) -> tuple[float, float]:
    """Mean number of G-grams matched in a training sequence, and the share of its tokens that they cover.

    Looks at the first `max_sequences` sequences.
    """
    sequences = [corpus.train[index] for index in range(min(max_sequences, len(corpus.train)))]
    cu_seqlens = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    tokens = torch.from_numpy(np.concatenate(sequences))
    matches = ngram_matching(tokens, torch.from_numpy(cu_seqlens), vocabulary.table(len(corpus.tokenizer)))
    covered = int(matches.edges.token_offsets.diff().count_nonzero())
    return round(len(matches.ngram_input_ids) / len(sequences), 2), round(covered / int(cu_seqlens[-1]), 4)


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of an extraction, in lines of text."""
    statistics, parameters, seconds = (manifest[name] for name in ("statistics", "parameters", "seconds"))
    tokens, candidates, kept = (statistics[name] for name in ("num_tokens", "num_candidates", "num_ngrams"))
    rare, lengths = f"{candidates - kept:,} too rare", statistics["num_ngrams_by_length"]
    rate, density = "", []
    if "covered_tokens" in statistics:  # not of a merge, which sees no tokens
        rate = f" ({tokens / max(seconds, 1e-3) / 1e6:.1f} M tokens/s)"
        covered = f"over {100 * statistics['covered_tokens']:.1f} % of its tokens"
        density.append(f"density     {statistics['ngrams_per_sequence']} G-grams in a sequence, {covered}")
    return "\n".join(
        [
            f"tokens      {tokens:,} in {seconds:.2f} s{rate}",
            f"candidates  {candidates:,}: {kept:,} kept, {rare}",
            f"long runs   {statistics['num_long_pieces']:,} of more than {parameters['max_len']} tokens "
            f"({parameters['long_pieces']})",
            *density,
            *(f"G-grams     {number:,} of {length} tokens" for length, number in lengths.items()),
        ]
    )
