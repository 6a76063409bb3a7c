"""The definition of the fusion, dense, and the same on packed input in plain PyTorch; paper section 2.3, eq. (4)."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from dnazen_kernels.ngram_edges import NgramEdges


def ngram_fusion_dense(
    hidden_states: torch.Tensor, ngram_hidden_states: torch.Tensor, ngram_position_matrix: torch.Tensor
) -> torch.Tensor:
    """`hidden_states[b, s] + sum_g ngram_position_matrix[b, s, g] * ngram_hidden_states[b, g]` on padded input.

    `hidden_states` is `[B, S, H]`, `ngram_hidden_states` `[B, G, H]` and the 0/1 `ngram_position_matrix` `[B, S, G]`;
    returns `[B, S, H]` in the dtype of `hidden_states`, accumulated in fp32 (fp64 if any input is fp64).
    """
    dtype = accumulation_dtype(hidden_states, ngram_hidden_states)
    device = hidden_states.device.type
    # autocast would round both to bf16; shapes alone, on "meta", know no autocast
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        added = torch.einsum("bsg,bgh->bsh", ngram_position_matrix.to(dtype), ngram_hidden_states.to(dtype))
    return (hidden_states.to(dtype) + added).to(hidden_states.dtype)


def ngram_fusion_index_add(
    hidden_states: torch.Tensor, ngram_hidden_states: torch.Tensor, edges: NgramEdges
) -> torch.Tensor:
    """The same sum on packed input, one edge at a time: `out[t] += ngram_hidden_states[j]` for every edge (t, j).

    `hidden_states` is `[T, H]`, `ngram_hidden_states` `[N, H]`.
    """
    token_offsets, token_ngrams = edges.token_offsets, edges.token_ngrams
    dtype = accumulation_dtype(hidden_states, ngram_hidden_states)
    token_ngrams = token_ngrams if len(ngram_hidden_states) else token_ngrams[:0]  # they name no row
    numbers = torch.arange(token_ngrams.shape[0], dtype=token_offsets.dtype, device=token_offsets.device)
    edge_tokens = torch.searchsorted(token_offsets, numbers, right=True) - 1
    is_used = numbers < token_offsets[-1]
    edge_states = ngram_hidden_states.to(dtype).index_select(0, token_ngrams)
    edge_states = torch.where(is_used[:, None], edge_states, 0)
    edge_tokens = edge_tokens.clamp(max=hidden_states.shape[0] - 1)
    return hidden_states.to(dtype).index_add(0, edge_tokens, edge_states).to(hidden_states.dtype)


def residual_layer_norm_eager(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm of `x + residual` over the last dimension, in the dtype of that sum (under autocast too)."""
    hidden_states = x + residual
    dtype = hidden_states.dtype
    return F.layer_norm(hidden_states, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(dtype)


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
