"""Adding to every token the states of the G-grams that cover it."""

from dnazen_kernels.ngram_fusion.op import ngram_fusion

__all__ = ["ngram_fusion"]
