"""Finding the G-grams of a vocabulary in sequences of tokens."""

from dnazen_kernels.ngram_matching.reference import NgramMatches, NgramTable, ngram_matching

__all__ = ["NgramMatches", "NgramTable", "ngram_matching"]
