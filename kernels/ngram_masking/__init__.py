"""Whole-G-gram masking."""

from dnazen_kernels.ngram_masking.op import IGNORE_INDEX, MaskedBatch, ngram_masking

__all__ = ["IGNORE_INDEX", "MaskedBatch", "ngram_masking"]
