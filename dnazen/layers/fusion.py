"""The end of every sub-layer: drop-out, LayerNorm of the sum with the residual, and on top of it the fusion of the
G-grams.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnazen.layers.linear import Linear, multiply
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import residual_layer_norm
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense, residual_layer_norm_eager, sum_to_bias

# (x, residual, weight, bias, eps, G-gram states to add to the tokens they cover or None, the bias that x holds and that
# lacks its gradient or None, probability of drop-out) -> states
AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None, float], Tensor]


def packed_add_norm(edges: NgramEdges, impl: str) -> AddNorm:
    """On packed `[T, H]`, in one pass where kernels run; `impl` is that of `dnazen_kernels`."""

    def add_norm(x, residual, weight, bias, eps, ngram_hidden_states, x_bias, dropout_p):
        ngrams = () if ngram_hidden_states is None else (ngram_hidden_states, edges)
        # From torch's generator of the device: what sets that one back (a checkpointed layer, a resumed run) gives the
        # same masks, and nothing waits. One for each call, not one of a pass with the layer's number, which compiled
        # layers, one code for all, would have to be compiled anew for.
        seed = torch.randint(2**63 - 1, (), device=x.device) if dropout_p else None
        return residual_layer_norm(
            x, residual, weight, bias, eps, *ngrams, dropout_p=dropout_p, seed=seed, x_bias=x_bias, impl=impl
        )

    return add_norm


def padded_add_norm(ngram_position_matrix: Tensor) -> AddNorm:
    """On padded `[B, S, H]`, by the dense definition; `ngram_position_matrix` is `[B, S, G]`."""

    def add_norm(x, residual, weight, bias, eps, ngram_hidden_states, x_bias, dropout_p):
        x = F.dropout(sum_to_bias(x, x_bias), dropout_p)
        states = residual_layer_norm_eager(x, residual, weight, bias, eps)
        if ngram_hidden_states is None:
            return states
        return ngram_fusion_dense(states, ngram_hidden_states, ngram_position_matrix)

    return add_norm


class ResidualLayerNorm(nn.LayerNorm):
    """LayerNorm of `dropout(x) + residual`, and the G-grams' states (if given) added.

    All of it happens in the forward of the module that owns the parameters: ZeRO-3 gathers them for that call alone.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor,
        add_norm: AddNorm,
        ngram_hidden_states: Tensor | None,
        x_bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        return add_norm(x, residual, self.weight, self.bias, self.eps, ngram_hidden_states, x_bias, dropout_p)


def residual_output(
    linear: Linear,
    dropout: nn.Dropout,
    norm: ResidualLayerNorm,
    hidden_states: Tensor,
    residual: Tensor,
    add_norm: AddNorm,
    ngram_hidden_states: Tensor | None = None,
) -> Tensor:
    """`norm` of `dropout(linear(hidden_states))` and `residual`.

    The gradient of the linear layer's bias is left to `add_norm`, which has the rows to sum at hand. A layer that is
    more than itself (with adapters, or with hooks, as ZeRO-3's) is called as it is, and sees to its own gradients.
    """
    x_bias = None
    if torch.is_grad_enabled() and linear.bias.requires_grad and _is_plain(linear):
        x_bias = linear.bias
        x = multiply(hidden_states, linear.weight, x_bias.detach())
    else:
        x = linear(hidden_states)
    return norm(x, residual, add_norm, ngram_hidden_states, x_bias, dropout.p if dropout.training else 0.0)


def _is_plain(linear: nn.Module) -> bool:
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
    return type(linear) is Linear and not any(hooks)
