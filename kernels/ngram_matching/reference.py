"""G-gram matching on the CPU: numpy, no loop over tokens or sequences; paper section 2.2."""

import numpy as np
import torch

from dnazen_kernels.ngram_matching.table import FREE, MAX_LENGTH, MIN_LENGTH, NgramTable, home_slots, pack_ngrams

NUM_LENGTHS = MAX_LENGTH - MIN_LENGTH + 1


def match_ngrams(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    table: NgramTable,
    max_ngrams: int | None,
    capacity: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """The tensors of `NgramMatches`, in order: as large as `capacity`, or without it as needed."""
    tokens, bounds, table_keys, table_ids, table_prefilter = (
        tensor.cpu().numpy() for tensor in (input_ids, cu_seqlens, table.keys, table.ids, table.prefilter)
    )
    tokens = tokens.astype(np.int32 if 2 * table.bits <= 31 else np.int64)
    bounds = bounds.astype(np.int64)

    # Occurrences in order of position, then length; a cell is one of the lengths at one of the positions.
    ends = np.repeat(bounds[1:], np.diff(bounds))
    cells, slots = _find_occurrences(tokens, ends, table_keys, table_prefilter, table.bits, table.hash_bits)
    order = np.argsort(cells)
    cells, slots = cells[order], slots[order]
    starts, sizes = cells // NUM_LENGTHS, cells % NUM_LENGTHS + MIN_LENGTH
    sequences = np.searchsorted(bounds, starts, side="right") - 1

    # The occurrences of one G-gram in one sequence are one; G-grams are in order of their first occurrence.
    order = _stable_order(slots)
    is_first = _differs_from_previous(slots[order]) | _differs_from_previous(sequences[order])
    is_new = np.empty(len(slots), bool)
    is_new[order] = is_first
    first = np.flatnonzero(is_new)
    ngrams = np.empty(len(slots), np.int64)
    ngrams[order] = (np.cumsum(is_new) - 1)[order[is_first]][np.cumsum(is_first) - 1]
    num_found = len(first)
    if max_ngrams is not None:
        rank = np.arange(len(first)) - np.searchsorted(sequences[first], sequences[first])
        kept = rank < max_ngrams
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
    ngram_offsets = _offsets(edge_ngrams, len(first))

    # As many of the first G-grams as fit, with their edges.
    num_wanted = len(first)
    num_ngrams, num_edges = capacity or (num_wanted, len(edge_ngrams))
    num_kept = min(num_ngrams, int(np.searchsorted(ngram_offsets, num_edges, side="right")) - 1)
    num_kept_edges = int(ngram_offsets[num_kept])
    edge_ngrams, ngram_tokens, first = edge_ngrams[:num_kept_edges], ngram_tokens[:num_kept_edges], first[:num_kept]

    counts = [num_kept, num_kept_edges, num_found - num_wanted, num_wanted - num_kept]
    more_ngrams, more_edges = num_ngrams - num_kept, num_edges - num_kept_edges
    int32 = np.int32
    fields = (
        np.pad(table_ids[slots[first]], (0, more_ngrams)),
        _offsets(sequences[first], len(bounds) - 1),
        _offsets(ngram_tokens, len(tokens)),
        np.pad(edge_ngrams[_stable_order(ngram_tokens)].astype(int32), (0, more_edges)),
        np.pad(ngram_offsets[: num_kept + 1], (0, more_ngrams), mode="edge"),
        np.pad(ngram_tokens.astype(int32), (0, more_edges)),
        np.array(counts, int32),
    )
    return [torch.from_numpy(field).to(input_ids.device) for field in fields]


def _find_occurrences(
    tokens: np.ndarray, ends: np.ndarray, keys: np.ndarray, prefilter: np.ndarray, bits: int, hash_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cells `position * NUM_LENGTHS + length - MIN_LENGTH` with a G-gram, by length, and its slot in the table."""
    pairs = (tokens[:-1] << bits) | tokens[1:]
    may_start = prefilter[pairs & (len(prefilter) - 1)]
    candidates = np.flatnonzero(may_start)
    may_start, room = may_start[candidates], ends[candidates] - candidates
    cells, slots = [], []
    for column in range(NUM_LENGTHS):
        length = column + MIN_LENGTH
        starts = candidates[(may_start >> length & 1 != 0) & (room >= length)]
        wanted = pack_ngrams(tokens, starts, length, bits)
        slot = home_slots(wanted, hash_bits)
        pending = np.arange(len(slot))
        while len(pending):
            pending = pending[(keys[slot[pending]] != wanted[pending]) & (keys[slot[pending]] != FREE)]
            slot[pending] += 1
        found = np.flatnonzero(keys[slot] != FREE)
        cells.append(starts[found] * NUM_LENGTHS + column)
        slots.append(slot[found])
    return np.concatenate(cells), np.concatenate(slots)


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
