"""The definition of the fusion, dense, and the same on packed input in plain PyTorch; paper section 2.3, eq. (4)."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from dnazen_kernels.ngram_edges import NgramEdges

# of the generator SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): what its state
# grows by, and its two multipliers
SPLITMIX64 = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


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
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    num_dropped: int = 0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm of `dropout(x) + residual` over the last dimension, in the dtype of that sum (under autocast too).

    Drop-out as in `keep_mask`, on `[T, H]`.
    """
    if num_dropped and seed is not None:
        num_rows, hidden_size = x.shape
        kept = keep_mask(seed, num_rows, hidden_size, num_dropped, x.dtype)
        hidden_states = torch.add(residual, x * kept, alpha=65536 / (65536 - num_dropped))  # scaled in fp32
    else:
        hidden_states = x + residual
    dtype = hidden_states.dtype
    return F.layer_norm(hidden_states, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(dtype)


def sum_to_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` as it is; the sum of its gradient over all but the last dimension goes to `bias`, which it holds already."""
    return x if bias is None else _SumToBias.apply(x, bias)


class _SumToBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum(tuple(range(grad.dim() - 1)), dtype=ctx.dtype)


def keep_mask(
    seed: torch.Tensor, num_rows: int, hidden_size: int, num_dropped: int, dtype: torch.dtype
) -> torch.Tensor:
    """What drop-out keeps, 1 in `[num_rows, hidden_size]`, and what it drops, 0, in `dtype`.

    Columns 4j to 4j + 3 of row i take 16 bits each, the lowest first, of number i * ceil(hidden_size / 4) + j of the
    generator SplitMix64 with `seed` (a scalar, int64), and are kept unless that is, as a signed number, among the
    `num_dropped` smallest of all 65536. Any number of the sequence can be had without those before it.
    """
    gamma, *multipliers = (number - 2**64 for number in SPLITMIX64)  # the same bits, signed
    numbers = -(-hidden_size // 4)
    first = torch.arange(num_rows, device=seed.device) * numbers + 1
    number = (seed + first * gamma)[:, None] + torch.arange(numbers, device=seed.device) * gamma
    for shift, multiplier in zip((30, 27), multipliers):
        number = _xor_shifted(number, shift).mul_(multiplier)
    draws = _xor_shifted(number, 31).view(torch.int16)[:, :hidden_size]
    return draws.ge_(num_dropped - 32768).to(dtype)  # in place, for a detour over bool takes longer than the draws


def _xor_shifted(number: torch.Tensor, shift: int) -> torch.Tensor:
    """`number ^ (number >> shift)` of 64-bit numbers without a sign, in place."""
    return number.bitwise_xor_((number >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
