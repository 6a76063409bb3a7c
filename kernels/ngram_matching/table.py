"""A G-gram vocabulary as a hash table that both implementations search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

MIN_LENGTH, MAX_LENGTH = 2, 5
LENGTH_SHIFT = 60  # a key holds the G-gram's length in bits 60 to 62 and its tokens below
PREFILTER_BITS = 24  # exact for pairs of 12-bit tokens; larger vocabularies share entries, which costs time only
FREE = -1  # no key is negative
HASH_MULTIPLIER = 0x1E3779B97F4A7C15  # odd; its product's highest bits depend on all bits of the key


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


def home_slots(keys: np.ndarray, hash_bits: int) -> np.ndarray:
    """Where the search for each key begins: multiplicative hashing, the highest bits of the product."""
    return (keys * HASH_MULTIPLIER) >> (64 - hash_bits) & ((1 << hash_bits) - 1)


@dataclass(frozen=True)
class NgramTable:
    """Open addressing: a key lies in its home slot, or else in the next free one.

    There are `2 ** hash_bits` home slots, at least two per key. Keys pushed off their end lie behind it, so a search
    never wraps around, and the last slot is always free, so it always ends.
    """

    keys: torch.Tensor  # [S] int64
    ids: torch.Tensor  # [S] int64, 0 in free slots
    prefilter: torch.Tensor  # uint8 by the first two tokens: bit n is set if a G-gram of n tokens begins with them
    bits: int  # per token in a key
    hash_bits: int

    @classmethod
    def build(cls, ngrams: Sequence[Sequence[int]], ids: Sequence[int], vocab_size: int) -> "NgramTable":
        """Build the table of different `ngrams` of 2 to 5 tokens, whose k-th has the id `ids[k]`, on the CPU.

        Raises:
            ValueError: a length outside 2..5, a G-gram given twice, a token outside [0, vocab_size), or keys over 63
                bits.
        """
        for ngram in ngrams:
            if not MIN_LENGTH <= len(ngram) <= MAX_LENGTH:
                raise ValueError(f"G-grams must have {MIN_LENGTH} to {MAX_LENGTH} tokens, got {tuple(ngram)}")
        if len(set(map(tuple, ngrams))) != len(ngrams):
            raise ValueError("G-grams must differ from each other, got one twice")
        sizes = np.array([len(ngram) for ngram in ngrams], np.int64)
        tokens = np.array([token for ngram in ngrams for token in ngram], np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"tokens must lie in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
        bits = token_bits(vocab_size, int(sizes.max(initial=MIN_LENGTH)))
        starts = np.cumsum(sizes) - sizes
        pairs = ((tokens[starts] << bits) | tokens[starts + 1]) & ((1 << PREFILTER_BITS) - 1)
        prefilter = np.zeros(1 << min(2 * bits, PREFILTER_BITS), np.uint8)
        keys = np.empty(len(sizes), np.int64)
        for length in range(MIN_LENGTH, MAX_LENGTH + 1):
            chosen = sizes == length
            keys[chosen] = pack_ngrams(tokens, starts[chosen], length, bits)
            prefilter[pairs[chosen]] |= 1 << length

        # In order of their homes, each key takes its home, or the slot after the last key's if that is further on.
        hash_bits = max(1, (2 * len(keys) - 1).bit_length())
        homes = home_slots(keys, hash_bits)
        order, numbers = np.argsort(homes, kind="stable"), np.arange(len(keys))
        slots = np.maximum.accumulate(homes[order] - numbers) + numbers
        size = max(1 << hash_bits, slots.max(initial=0) + 1) + 1
        table_keys, table_ids = np.full(size, FREE, np.int64), np.zeros(size, np.int64)
        table_keys[slots], table_ids[slots] = keys[order], np.asarray(ids, np.int64)[order]
        keys_and_ids = torch.from_numpy(table_keys), torch.from_numpy(table_ids)
        return cls(*keys_and_ids, torch.from_numpy(prefilter), bits, hash_bits)

    def to(self, device: torch.device | str) -> "NgramTable":
        """The table on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("keys", "ids", "prefilter")}
        return replace(self, **tensors)
