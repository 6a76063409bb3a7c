"""G-gram extraction: frequent runs of tokens that are tied by pointwise mutual information; paper section 2.1.

A delimiter goes between two neighbours whose pair is rare or has a low PMI; other pairs are linked. The runs between
delimiters are the candidates. Whether a pair is linked depends on its two tokens alone, so every occurrence of a
candidate lies in a run of linked pairs, and after the pairs are counted only such runs need a look.
Everything streams over blocks of whole sequences, in two passes (`dnazen.ngram.count`): pairs; then candidates,
together with the occurrences of all that could be one. A candidate of two tokens occurs as often as its pair, which the
first pass has counted.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dnazen.data.tokenizer import save_tokenizer, tokenizer_checksum
from dnazen.files import InputError, atomic_directory, sha256_file, write_json
from dnazen.ngram.count import PairCounts, Runs, Shard, count_pairs, count_runs, take_share, token_size
from dnazen.ngram.group import ALONE, Group
from dnazen.ngram.vocab import MANIFEST_FILE, NGRAM_FILE, NgramVocabulary
from dnazen_kernels.ngram_matching import ngram_matching
from dnazen_kernels.ngram_matching.table import LENGTH_SHIFT, token_bits

TABLE_FILE = "ngrams.tsv"


class Links(NamedTuple):
    """The pairs of neighbours that belong together, and what their PMI is computed from."""

    token_counts: np.ndarray  # int64 [2 ** bits]
    num_pairs: int  # of neighbours, in all
    pairs: np.ndarray  # int64, codes as in `PairCounts`, rising
    pair_counts: np.ndarray  # int64


@dataclass
class NgramExtraction:
    """Extracted G-grams in the order of their ids (1, 2, ...), and what was seen on the way."""

    ngrams: list[tuple[int, ...]]
    counts: list[int]  # occurrences anywhere in the corpus, overlaps counted
    pmis: list[float]  # bits; of the weakest pair of neighbours
    num_tokens: int
    num_pairs: int
    num_linked_pairs: int  # distinct
    num_runs: int  # distinct, of linked pairs: what memory goes by
    num_candidates: int
    num_pieces: dict[int, int]  # runs between delimiters by length in tokens, 2 to max_len
    num_long_pieces: int  # longer runs: dropped or split


def extract_ngrams(
    shards: Sequence[Shard],
    group: Group = ALONE,
    *,
    vocab_size: int,
    min_pmi: float = 2.0,
    min_count: int = 5,
    min_pair_count: int = 5,
    min_len: int = 2,
    max_len: int = 5,
    long_pieces: str = "drop",
    num_workers: int = 1,
    device: str = "cpu",
) -> NgramExtraction | None:
    """Extract the G-grams of a corpus; the result depends on neither `group`, `num_workers`, `device`, nor the shards.

    `pmi(a, b) = log2 p(ab) - log2 p(a) - log2 p(b)` in fp64, with p(ab) the pair's share of all pairs of neighbours
    and p(a) the token's share of all tokens. Memory: see `count_pairs` and `count_runs`. The tokens themselves are
    mapped block by block.

    Args:
        shards: tokens (no special ones) and offsets of the sequences; nothing reaches across a sequence's end.
        group: processes that call this with the same arguments, and each look at a share of the sequences.
        vocab_size: number of BPE tokens.
        min_pmi: bits; a pair below it gets a delimiter, as does one seen fewer than `min_pair_count` times.
        min_count: candidates with fewer occurrences are dropped.
        min_len, max_len: of a G-gram, in tokens.
        long_pieces: "drop" runs longer than `max_len`, or "split" them from the left into pieces of `max_len`; what
            is left over is a candidate too unless shorter than `min_len`.
        num_workers: processes on the CPU.
        device: "cpu" or "cuda".

    Returns:
        The G-grams; None in all processes of the group but the first.

    Raises:
        InputError: an argument out of range; no sequence; a token id not below `vocab_size`; another process failed.
    """
    parameters = dict(min_count=min_count, min_pair_count=min_pair_count, min_len=min_len, max_len=max_len)
    parameters |= dict(min_pmi=min_pmi, long_pieces=long_pieces, num_workers=num_workers)
    bits = check_parameters(shards, vocab_size, **parameters)
    share = take_share(shards, group.rank, group.size)
    options = dict(bits=bits, num_workers=num_workers, device=device, show_progress=group.rank == 0)
    with group.together():
        table = count_pairs(share, vocab_size=vocab_size, **options)
    for counts in table:
        group.add(counts)
    # one process decides for all: another processor's logarithm may differ in its last bit
    with group.together():
        links = link_pairs(table, min_pmi, min_pair_count) if group.rank == 0 else None
    links = group.broadcast(links)
    del table, counts
    with group.together():
        runs, num_pieces = count_runs(
            share, linked_pairs=links.pairs, min_len=min_len, max_len=max_len, long_pieces=long_pieces, **options
        )
    group.add(num_pieces)
    runs = group.exchange(runs)
    with group.together():
        chosen = choose_runs(runs, links, min_count)
    parts = group.gather(chosen)
    return list_ngrams(parts, links, num_pieces) if parts else None


def check_parameters(
    shards: Sequence[Shard],
    vocab_size: int,
    *,
    min_pmi: float,
    min_len: int,
    max_len: int,
    long_pieces: str,
    **positive: int,
) -> int:
    """Bits of a token in a key; InputError if a parameter of `extract_ngrams` is out of range."""
    if not 2 <= min_len <= max_len <= 5:
        raise InputError(f"min_len and max_len: expected 2 <= min_len <= max_len <= 5, found {min_len} and {max_len}")
    if math.isnan(min_pmi):
        raise InputError(f"min_pmi: expected a number of bits, found {min_pmi}")
    if long_pieces not in ("drop", "split"):
        raise InputError(f"long_pieces: expected 'drop' or 'split', found {long_pieces!r}")
    for name, value in {**positive, "number of sequences": sum(len(offsets) - 1 for _, offsets in shards)}.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")
    try:
        return token_bits(vocab_size, max_len)
    except ValueError as error:
        raise InputError(str(error)) from error


def link_pairs(table: PairCounts, min_pmi: float, min_pair_count: int) -> Links:
    """The pairs that get no delimiter."""
    pairs = np.flatnonzero(table.pairs >= min_pair_count)
    links = Links(table.tokens, int(table.pairs.sum()), pairs, table.pairs[pairs])
    linked = measure_pmis(links) >= min_pmi
    return links._replace(pairs=pairs[linked], pair_counts=links.pair_counts[linked])


def measure_pmis(links: Links) -> np.ndarray:
    """PMI of each pair, fp64, in bits."""
    bits, num_tokens = token_size(links.token_counts), links.token_counts.sum()
    firsts, seconds = links.pairs >> bits, links.pairs & ((1 << bits) - 1)
    log_p = [np.log2(links.token_counts[tokens] / num_tokens) for tokens in (firsts, seconds)]
    return np.log2(links.pair_counts / links.num_pairs) - log_p[0] - log_p[1]


class ChosenRuns(NamedTuple):
    """The G-grams among some runs."""

    keys: np.ndarray  # int64
    counts: np.ndarray  # int64
    num_candidates: int
    num_runs: int


def choose_runs(runs: Runs, links: Links, min_count: int) -> ChosenRuns:
    """The candidates that occur at least `min_count` times."""
    keys, counts = (array[runs.are_candidates].numpy() for array in (runs.keys, runs.counts))
    are_pairs = keys >> LENGTH_SHIFT == 2
    counts[are_pairs] = links.pair_counts[np.searchsorted(links.pairs, keys[are_pairs] & ((1 << LENGTH_SHIFT) - 1))]
    return ChosenRuns(keys[counts >= min_count], counts[counts >= min_count], len(keys), len(runs.keys))


def list_ngrams(parts: Sequence[ChosenRuns], links: Links, num_pieces: np.ndarray) -> NgramExtraction:
    """Put the G-grams of all parts in order.

    Args:
        num_pieces: as `count_runs` returns it.
    """
    bits, max_len = token_size(links.token_counts), len(num_pieces) - 2
    keys, counts = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:2])
    missing = np.arange(max_len) >= (keys >> LENGTH_SHIFT)[:, None]
    shifts = bits * ((keys >> LENGTH_SHIFT)[:, None] - 1 - np.arange(max_len))
    # -1 after the end sorts a G-gram before those that it begins.
    tokens = np.where(missing, -1, keys[:, None] >> np.where(missing, 0, shifts) & ((1 << bits) - 1))
    of_pair = np.searchsorted(links.pairs, np.where(missing[:, 1:], 0, tokens[:, :-1] << bits | tokens[:, 1:]))
    pair_pmis = measure_pmis(links)
    pmis = np.where(missing[:, 1:], np.inf, pair_pmis[of_pair] if len(pair_pmis) else np.inf).min(1)
    del missing, shifts, of_pair
    order = np.lexsort((*tokens.T[::-1], -counts))
    numbers = list(range(1 << bits))  # all G-grams share one object of each, and are unpacked some at a time: memory
    rows = (row for some in np.split(order, range(1 << 16, len(order), 1 << 16)) for row in tokens[some].tolist())
    return NgramExtraction(
        ngrams=[tuple([numbers[token] for token in row if token >= 0]) for row in rows],
        counts=counts[order].tolist(),
        pmis=pmis[order].tolist(),
        num_tokens=int(links.token_counts.sum()),
        num_pairs=links.num_pairs,
        num_linked_pairs=len(links.pairs),
        num_runs=sum(part.num_runs for part in parts),
        num_candidates=sum(part.num_candidates for part in parts),
        num_pieces=dict(enumerate(num_pieces[2:-1].tolist(), 2)),
        num_long_pieces=int(num_pieces[-1]),
    )


def build_ngrams(
    corpus: Any, output_dir: str | PathLike, group: Group = ALONE, **parameters: Any
) -> dict[str, Any] | None:
    """Extract the G-grams of a corpus' training split and write `ngram.json`, `ngrams.tsv`, `manifest.json` and the
    tokenizer.

    `corpus` is a `dnazen.data.corpus.Corpus`; `group` and `parameters` are those of `extract_ngrams`. Returns the
    manifest, in the first process of the group, which writes.

    Raises:
        InputError: `output_dir` is taken; no G-gram passes the thresholds; see `extract_ngrams`.
    """
    start = time.perf_counter()
    tokenizer = corpus.tokenizer
    parameters = {**extract_ngrams.__kwdefaults__, **parameters}
    first = group.rank == 0
    with group.together(), atomic_directory(output_dir) if first else contextlib.nullcontext() as directory:
        group.agree("corpus", f"{corpus.path} with checksum {corpus.checksum}")
        extraction = extract_ngrams(corpus.train.shards, group, vocab_size=len(tokenizer), **parameters)
        if not first:
            return None
        seconds = round(time.perf_counter() - start, 3)
        vocabulary = write_ngrams(directory, extraction, tokenizer, corpus.path, parameters)
        density = measure_density(vocabulary, corpus)
        return write_manifest(directory, extraction, parameters, [corpus.checksum], tokenizer, seconds, density)


def write_ngrams(
    directory: Path,
    extraction: NgramExtraction,
    tokenizer: PreTrainedTokenizerBase,
    source: str | PathLike,
    parameters: dict[str, Any],
) -> NgramVocabulary:
    """Write `ngram.json`, `ngrams.tsv` and the tokenizer.

    Raises:
        InputError: there is no G-gram in `source`.
    """
    ngrams = extraction.ngrams
    if not ngrams:
        now = "--min-pair-count {min_pair_count} --min-count {min_count} --min-pmi {min_pmi}".format(**parameters)
        raise InputError(
            f"{source}: none of {extraction.num_candidates:,} candidates from {extraction.num_tokens:,} tokens"
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
    """Write `manifest.json`, the last file of the folder; returns what is in it."""
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


def measure_density(vocabulary: NgramVocabulary, corpus: Any, max_sequences: int = 1000) -> tuple[float, float]:
    """Mean number of G-grams matched in a training sequence, and the share of its tokens that they cover.

    Looks at the first `max_sequences` sequences.
    """
    sequences = [corpus.train[index] for index in range(min(max_sequences, len(corpus.train)))]
    cu_seqlens = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    tokens = torch.from_numpy(np.concatenate(sequences))
    matches = ngram_matching(tokens, torch.from_numpy(cu_seqlens), vocabulary.table(len(corpus.tokenizer)))
    covered = int(matches.token_offsets.diff().count_nonzero())
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
