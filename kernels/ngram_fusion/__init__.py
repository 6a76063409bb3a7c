"""Adding to every token the states of the G-grams that cover it, alone or after residual and LayerNorm."""

from dnazen_kernels.ngram_fusion.op import ngram_fusion, residual_layer_norm

__all__ = ["ngram_fusion", "residual_layer_norm"]
