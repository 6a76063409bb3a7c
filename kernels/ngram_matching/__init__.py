"""Finding the G-grams of a vocabulary in sequences of tokens."""

from dnazen_kernels.ngram_matching.reference import (
    LENGTH_SHIFT,
    NgramMatches,
    NgramTable,
    ngram_matching,
    pack_ngrams,
    token_bits,
)

__all__ = ["LENGTH_SHIFT", "NgramMatches", "NgramTable", "ngram_matching", "pack_ngrams", "token_bits"]
