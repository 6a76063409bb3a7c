"""G-gram extraction: frequent pieces of text whose tokens are tied by pointwise mutual information; paper section 2.1.

First all pairs of neighbours are counted, which says which are linked (`dnazen.ngram.links`). Then the pieces between
delimiters are looked up, which are the candidates, together with all runs of linked pairs (`dnazen.ngram.count` draws
both). Whether a pair is linked depends on its two tokens alone, so wherever a candidate occurs, its pairs are linked
too, and counting runs counts all its occurrences. A candidate of two tokens occurs as often as its pair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dnazen.defaults import DEVICE, LONG_PIECES, MAX_LEN, MIN_COUNT, MIN_LEN, MIN_PAIR_COUNT, MIN_PMI, NUM_WORKERS
from dnazen.files import InputError
from dnazen.ngram.count import Runs, Shard, count_pairs, count_runs, token_size
from dnazen.ngram.links import Links, link_pairs, measure_pmis
from dnazen_kernels.ngram_matching.table import LENGTH_SHIFT, token_bits


@dataclass
class NgramExtraction:
    """Extracted G-grams in the order of their ids (1, 2, ...), and what was seen on the way."""

    ngrams: list[tuple[int, ...]]
    counts: list[int]  # occurrences anywhere in the corpus, overlaps counted
    pmis: list[float]  # bits; of the weakest pair of neighbours
    num_tokens: int
    num_pairs: int
    num_linked_pairs: int  # distinct
    num_runs: int  # distinct, as in `Runs`: what memory goes by
    num_candidates: int  # distinct
    num_pieces: dict[int, int]  # by length in tokens, 2 to max_len
    num_long_pieces: int  # of more tokens: dropped or split


def extract_ngrams(
    shards: Sequence[Shard],
    *,
    vocab_size: int,
    min_pmi: float = MIN_PMI,
    min_count: int = MIN_COUNT,
    min_pair_count: int = MIN_PAIR_COUNT,
    min_len: int = MIN_LEN,
    max_len: int = MAX_LEN,
    long_pieces: str = LONG_PIECES,
    num_workers: int = NUM_WORKERS,
    device: str = DEVICE,
) -> NgramExtraction:
    """Extract the G-grams of a corpus; the result depends on neither `num_workers`, `device`, nor the shards.

    Memory: see `count_pairs` and `count_runs`. The tokens themselves are mapped block by block.

    Args:
        shards: tokens (no special ones) and offsets of the sequences; nothing reaches across a sequence's end.
        vocab_size: number of BPE tokens.
        min_pmi: bits (`measure_pmis`); a pair below it is not linked.
        min_count: candidates with fewer occurrences are dropped.
        min_pair_count: nor is a pair linked that is seen less often.
        min_len, max_len: of a G-gram, in tokens.
        long_pieces: "drop" pieces longer than `max_len`, or "split" them from the left; what is left over is a
            candidate too unless shorter than `min_len`.
        num_workers: processes on the CPU.
        device: "cpu" or "cuda".

    Raises:
        InputError: an argument out of range; no sequence; a token id not below `vocab_size`.
    """
    parameters = dict(min_count=min_count, min_pair_count=min_pair_count, min_len=min_len, max_len=max_len)
    parameters |= dict(min_pmi=min_pmi, long_pieces=long_pieces, num_workers=num_workers)
    bits = check_parameters(shards, vocab_size, **parameters)
    options = dict(bits=bits, num_workers=num_workers, device=device)
    links = link_pairs(count_pairs(shards, vocab_size=vocab_size, **options), min_pmi, min_pair_count)
    options |= dict(min_len=min_len, max_len=max_len, long_pieces=long_pieces)
    runs, num_pieces = count_runs(shards, linked_pairs=links.pairs, **options)
    return list_ngrams([choose_runs(runs, links, min_count)], links, num_pieces)


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


class ChosenRuns(NamedTuple):
    """The G-grams among some runs, and how many runs and candidates those were."""

    keys: np.ndarray  # int64, as in `Runs`
    counts: np.ndarray  # int64
    num_candidates: int
    num_runs: int


def choose_runs(runs: Runs, links: Links, min_count: int) -> ChosenRuns:
    """The candidates that occur at least `min_count` times."""
    keys, counts = (array[runs.are_candidates].numpy() for array in (runs.keys, runs.counts))
    are_pairs = keys >> LENGTH_SHIFT == 2
    counts[are_pairs] = links.pair_counts[np.searchsorted(links.pairs, keys[are_pairs] & ((1 << LENGTH_SHIFT) - 1))]
    return ChosenRuns(keys[counts >= min_count], counts[counts >= min_count], len(keys), len(runs.keys))


def list_ngrams(chosen: Sequence[ChosenRuns], links: Links, num_pieces: np.ndarray) -> NgramExtraction:
    """Give the G-grams their ids: the most frequent first; equal counts by token ids, (5, 9) before (5, 9, 0).

    Args:
        chosen: the G-grams among all runs, each once.
        num_pieces: as `count_runs` returns it.
    """
    bits, max_len = token_size(links.token_counts), len(num_pieces) - 2
    keys, counts = (np.concatenate(arrays) for arrays in list(zip(*chosen, strict=True))[:2])
    missing = np.arange(max_len) >= (keys >> LENGTH_SHIFT)[:, None]
    shifts = bits * ((keys >> LENGTH_SHIFT)[:, None] - 1 - np.arange(max_len))
    # -1 after the end sorts a G-gram before those that it begins.
    tokens = np.where(missing, -1, keys[:, None] >> np.where(missing, 0, shifts) & ((1 << bits) - 1))
    of_pair = np.searchsorted(links.pairs, np.where(missing[:, 1:], 0, tokens[:, :-1] << bits | tokens[:, 1:]))
    pair_pmis = measure_pmis(*links)
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
        num_runs=sum(some.num_runs for some in chosen),
        num_candidates=sum(some.num_candidates for some in chosen),
        num_pieces=dict(enumerate(num_pieces[2:-1].tolist(), 2)),
        num_long_pieces=int(num_pieces[-1]),
    )
