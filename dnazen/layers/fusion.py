"""The end of every sub-layer: LayerNorm of the sum with the residual, and on top of it the fusion of the G-grams."""

from collections.abc import Callable

from torch import Tensor, nn

from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import residual_layer_norm
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense, residual_layer_norm_eager

# (x, residual, weight, bias, eps, G-gram states to add to the tokens they cover, or None) -> states
AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def packed_add_norm(edges: NgramEdges, impl: str) -> AddNorm:
    """On packed `[T, H]`, in one pass where kernels run; `impl` is that of `dnazen_kernels`."""

    def add_norm(x, residual, weight, bias, eps, ngram_hidden_states):
        ngrams = () if ngram_hidden_states is None else (ngram_hidden_states, edges)
        return residual_layer_norm(x, residual, weight, bias, eps, *ngrams, impl=impl)

    return add_norm


def padded_add_norm(ngram_position_matrix: Tensor) -> AddNorm:
    """On padded `[B, S, H]`, by the dense definition; `ngram_position_matrix` is `[B, S, G]`."""

    def add_norm(x, residual, weight, bias, eps, ngram_hidden_states):
        states = residual_layer_norm_eager(x, residual, weight, bias, eps)
        if ngram_hidden_states is None:
            return states
        return ngram_fusion_dense(states, ngram_hidden_states, ngram_position_matrix)

    return add_norm


class ResidualLayerNorm(nn.LayerNorm):
    """LayerNorm of `x + residual`, and the G-grams' states (if given) added.

    All of it happens in the forward of the module that owns the parameters: ZeRO-3 gathers them for that call alone.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, add_norm: AddNorm, ngram_hidden_states: Tensor | None = None
    ) -> Tensor:
        return add_norm(x, residual, self.weight, self.bias, self.eps, ngram_hidden_states)
