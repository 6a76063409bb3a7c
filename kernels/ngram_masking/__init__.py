"""Whole-G-gram masking."""

from dnazen_kernels.ngram_masking.op import MaskedBatch, ngram_masking

__all__ = ["MaskedBatch", "ngram_masking"]
