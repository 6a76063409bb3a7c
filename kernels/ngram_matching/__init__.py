"""Finding the G-grams of a vocabulary in sequences of tokens."""

from dnazen_kernels.ngram_matching.op import NgramMatches, ngram_matching
from dnazen_kernels.ngram_matching.table import NgramTable

__all__ = ["NgramMatches", "NgramTable", "ngram_matching"]
