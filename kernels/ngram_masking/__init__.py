"""Whole-G-gram masking."""

from dnazen_kernels.ngram_masking.op import IGNORE_INDEX, MASK_SHARE, RANDOM_SHARE, MaskedBatch, ngram_masking

__all__ = ["IGNORE_INDEX", "MASK_SHARE", "RANDOM_SHARE", "MaskedBatch", "ngram_masking"]
