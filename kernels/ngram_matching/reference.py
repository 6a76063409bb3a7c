"""G-gram matching on the CPU: numpy, no loop over tokens or sequences; paper section 2.2."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MIN_LENGTH, MAX_LENGTH = 2, 5
LENGTH_SHIFT = 60  # a key holds the G-gram's length in bits 60 to 62 and its tokens below
PREFILTER_BITS = 24  # exact for pairs of 12-bit tokens; larger vocabularies share entries, which costs time only


def token_bits(vocab_size: int, max_length: int) -> int:
    """Bits per token in a key; ValueError if G-grams of `max_length` tokens do not fit one."""
    bits = max(1, int(vocab_size - 1).bit_length())
    if 3 + max_length * bits > 63:
        needed = f"G-grams of {max_length} tokens from {vocab_size} need {3 + max_length * bits} bits"
        raise ValueError(f"{needed}, but a key has 63; use a smaller tokenizer or shorter G-grams")
    return bits


def pack_ngrams(tokens: np.ndarray, starts: np.ndarray, length: int, bits: int) -> np.ndarray:
    """int64 keys of the runs of `length` tokens that begin at `starts`."""
    keys = np.full(len(starts), length, np.int64) << (LENGTH_SHIFT - length * bits)
    for k in range(length):
        keys = (keys << bits) | tokens[starts + k]
    return keys


@dataclass(frozen=True)
class NgramTable:
    """A G-gram vocabulary made ready for matching."""

    keys: np.ndarray  # [K] int64, ascending: by length, then by tokens
    ids: np.ndarray  # [K] int64
    lengths: tuple[int, ...]  # the lengths that occur
    bits: int
    prefilter: np.ndarray  # uint8 by the first two tokens: bit n is set if a G-gram of n tokens begins with them

    @classmethod
    def build(cls, ngrams: Sequence[Sequence[int]], ids: Sequence[int], vocab_size: int) -> "NgramTable":
        """Build the table of `ngrams`, whose k-th has the id `ids[k]` and tokens in [0, vocab_size).

        Raises:
            ValueError: a length outside 2..5, a token out of range, a G-gram given twice, or keys over 63 bits.
        """
        sizes = np.array([len(ngram) for ngram in ngrams], np.int64)
        tokens = np.array([token for ngram in ngrams for token in ngram], np.int64)
        if len(ngrams) != len(ids):
            raise ValueError(f"ids must have one entry per G-gram ({len(ngrams)}), got {len(ids)}")
        for ngram in ngrams:
            if not MIN_LENGTH <= len(ngram) <= MAX_LENGTH:
                raise ValueError(f"G-grams must have {MIN_LENGTH} to {MAX_LENGTH} tokens, got {tuple(ngram)}")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"tokens must lie in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
        bits = token_bits(vocab_size, int(sizes.max(initial=MIN_LENGTH)))
        starts = np.cumsum(sizes) - sizes
        pairs = ((tokens[starts] << bits) | tokens[starts + 1]) & ((1 << PREFILTER_BITS) - 1)
        prefilter = np.zeros(1 << min(2 * bits, PREFILTER_BITS), np.uint8)
        keys = np.empty(len(sizes), np.int64)
        lengths = tuple(np.unique(sizes).tolist())
        for length in lengths:
            chosen = sizes == length
            keys[chosen] = pack_ngrams(tokens, starts[chosen], length, bits)
            prefilter[pairs[chosen]] |= 1 << length
        order = np.argsort(keys)
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            raise ValueError(f"G-grams must differ, got {tuple(ngrams[order[twice[0]]])} twice")
        return cls(keys[order], np.asarray(ids, np.int64)[order], lengths, bits, prefilter)


class NgramMatches(NamedTuple):
    """The G-grams of a packed batch of T tokens and B sequences: N G-grams, E (token, G-gram) edges."""

    ngram_input_ids: np.ndarray  # [N] int64
    ngram_cu_seqlens: np.ndarray  # [B + 1] int32
    token_offsets: np.ndarray  # [T + 1] int32
    token_ngrams: np.ndarray  # [E] int32, ascending within a token
    ngram_offsets: np.ndarray  # [N + 1] int32
    ngram_tokens: np.ndarray  # [E] int32, ascending within a G-gram
    num_dropped: int  # G-grams cut off by max_ngrams


def ngram_matching(
    input_ids: np.ndarray, cu_seqlens: np.ndarray, table: NgramTable, max_ngrams: int | None = None
) -> NgramMatches:
    """Find every place where a G-gram of the table occurs inside one sequence; paper section 2.2.

    Overlaps are allowed. A G-gram that occurs several times in a sequence is one G-gram with the union of its
    positions. Within a sequence the order is by first position, then by length.

    Args:
        input_ids: integer tokens `[T]`; special tokens may be among them, for no G-gram holds one.
        cu_seqlens: `[B + 1]`, where each sequence starts; no G-gram reaches across.
        max_ngrams: at most so many G-grams per sequence, the first in the order above; None for no limit.

    Raises:
        ValueError: `cu_seqlens` does not describe `input_ids`; a token that does not fit the table.
    """
    tokens = np.asarray(input_ids)
    cu_seqlens = np.asarray(cu_seqlens, np.int64)
    seqlens = np.diff(cu_seqlens)
    if len(cu_seqlens) == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens) or (seqlens < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {len(tokens)}, got {cu_seqlens.tolist()[:8]}...")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << table.bits:
        raise ValueError(f"input_ids must lie in [0, {1 << table.bits}), got {tokens.min()} to {tokens.max()}")
    tokens = tokens.astype(np.int32 if 2 * table.bits <= 31 else np.int64)

    # Occurrences in order of position, then length; rows are the table's.
    found = _find_occurrences(tokens, np.repeat(cu_seqlens[1:], seqlens), table)  # [T, lengths]
    cells = np.flatnonzero(found)
    rows = found.ravel()[cells] - 1
    starts, columns = np.divmod(cells, max(1, len(table.lengths)))
    sizes = np.asarray(table.lengths, np.int64)[columns]
    sequences = np.searchsorted(cu_seqlens, starts, side="right") - 1

    # The occurrences of one row in one sequence are one G-gram; G-grams are in order of their first occurrence.
    order = _stable_order(rows)
    is_first = _differs_from_previous(rows[order]) | _differs_from_previous(sequences[order])
    first = np.sort(order[is_first])
    ngrams = np.empty(len(rows), np.int64)
    ngrams[order] = np.searchsorted(first, order[is_first])[np.cumsum(is_first) - 1]
    num_dropped = 0
    if max_ngrams is not None:
        rank = np.arange(len(first)) - np.searchsorted(sequences[first], sequences[first])
        kept = rank < max_ngrams
        num_dropped = int((~kept).sum())
        of_kept = kept[ngrams]
        starts, sizes, ngrams = starts[of_kept], sizes[of_kept], (np.cumsum(kept) - 1)[ngrams[of_kept]]
        first = first[kept]

    # Edges by G-gram: an occurrence adds only the tokens that the G-gram's previous one has not covered.
    order = _stable_order(ngrams)
    starts, sizes, ngrams = starts[order], sizes[order], ngrams[order]
    ends = starts + sizes
    again = np.flatnonzero(~_differs_from_previous(ngrams))
    starts[again] = np.maximum(starts[again], ends[again - 1])
    counts = ends - starts
    edge_ngrams = np.repeat(ngrams, counts)
    ngram_tokens = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(len(edge_ngrams))

    return NgramMatches(
        ngram_input_ids=table.ids[rows[first]],
        ngram_cu_seqlens=_offsets(sequences[first], len(seqlens)),
        token_offsets=_offsets(ngram_tokens, len(tokens)),
        token_ngrams=edge_ngrams[_stable_order(ngram_tokens)].astype(np.int32),
        ngram_offsets=_offsets(edge_ngrams, len(first)),
        ngram_tokens=ngram_tokens.astype(np.int32),
        num_dropped=num_dropped,
    )


def _find_occurrences(tokens: np.ndarray, ends: np.ndarray, table: NgramTable) -> np.ndarray:
    """`[T, len(table.lengths)]` int32: the table row that starts at a token with that length, plus 1; else 0."""
    found = np.zeros((len(tokens), len(table.lengths)), np.int32)
    if len(tokens) < MIN_LENGTH:
        return found
    pairs = (tokens[:-1] << table.bits) | tokens[1:]
    may_start = table.prefilter[pairs & (len(table.prefilter) - 1)]
    candidates = np.flatnonzero(may_start)
    may_start, room = may_start[candidates], ends[candidates] - candidates
    for column, length in enumerate(table.lengths):
        starts = candidates[(may_start >> length & 1 != 0) & (room >= length)]
        keys = pack_ngrams(tokens, starts, length, table.bits)
        rows = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
        hit = table.keys[rows] == keys
        found[starts[hit], column] = rows[hit] + 1
    return found


def _stable_order(values: np.ndarray) -> np.ndarray:
    """Stable argsort of non-negative integers: a sort of (value, position) pairs, much faster than np.argsort."""
    shift = len(values).bit_length()
    return np.sort((values.astype(np.int64) << shift) | np.arange(len(values))) & ((1 << shift) - 1)


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    """Bool: where a new value begins; True at the start."""
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])


def _offsets(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """CSR offsets `[num_rows + 1]` of entries whose row numbers are `rows`."""
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(np.int32)
