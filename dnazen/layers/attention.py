"""Self-attention of both encoders: one door to the implementations, and the two projections."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnazen.layers.padding import PaddedLayout

# (query, key, value), each [..., heads, head_dim] -> (context of that shape, weights [B, heads, S, S] or None)
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes, `[num_heads]` fp32 (Press et al. 2022, section 3, and their rule for other head counts).

    For n = 2^k heads the geometric sequence that starts at 2^(-8/n) with that ratio; for any other n the slopes of the
    power of two below n, then every second slope of the power of two above it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [4 * (head + 1) / power for head in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32, device=device)


def alibi_bias(num_heads: int, max_seqlen: int, device: torch.device | str | None = None) -> Tensor:
    """Bidirectional ALiBi, `-slope_h * |i - j|`: `[num_heads, max_seqlen, max_seqlen]` fp32."""
    position = torch.arange(max_seqlen, device=device, dtype=torch.float32)
    return alibi_slopes(num_heads, device)[:, None, None] * -(position[:, None] - position[None, :]).abs()


def padded_attention(cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None = None) -> Attention:
    """Attention on padded `[B, S, heads, head_dim]` by explicit softmax in fp32, with its weights."""
    is_padding = torch.arange(max_seqlen, device=cu_seqlens.device) >= cu_seqlens.diff()[:, None]
    is_padding = is_padding[:, None, None, :]
    # Finite, not -inf: a sequence with no G-gram is padding only, and its softmax must not be NaN.
    mask = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill(is_padding, -1e30)
    mask = mask if bias is None else mask + bias

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = torch.softmax(scores.float() + mask, dim=-1).to(value.dtype)
        return (weights @ value).transpose(1, 2), weights

    return attend


def eager_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, bias: Tensor | None) -> Attention:
    """Attention on packed `[T, heads, head_dim]` that pads, runs `padded_attention`, and unpads."""
    layout = PaddedLayout.from_cu_seqlens(cu_seqlens, max_seqlen, total)
    padded = padded_attention(cu_seqlens, max_seqlen, bias)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = padded(layout.pad(query), layout.pad(key), layout.pad(value))
        return layout.unpad(context), weights

    return attend


def sdpa_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, bias: Tensor | None) -> Attention:
    """Attention on packed `[T, heads, head_dim]`: one call of SDPA for each run of sequences of equal length."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"cu_seqlens: expected to ascend from 0 to {total} by at most {max_seqlen}, the longest sequence's length, "
            f"found {bounds}"
        )
    runs: list[list[int]] = []  # [start, number of sequences, length]
    for start, length in zip(bounds, lengths):
        if runs and runs[-1][2] == length:
            runs[-1][1] += 1
        elif length:
            runs.append([start, 1, length])
    masks = [None if bias is None else bias[None, :, :length, :length] for _, _, length in runs]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        contexts = [query[:0] + key[:0] + value[:0]]  # without a run the (zero) gradient still reaches all three
        for (start, count, length), mask in zip(runs, masks):
            run = (
                states[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
                for states in (query, key, value)
            )
            if mask is not None and not query.is_cpu:
                mask = mask.to(query.dtype)  # the CPU kernel takes an fp32 bias with bf16 states, those for CUDA do not
            context = F.scaled_dot_product_attention(*run, attn_mask=mask)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts), None

    return attend


IMPLEMENTATIONS = {"sdpa": sdpa_attention, "eager": eager_attention}


def packed_attention(
    implementation: str, cu_seqlens: Tensor, max_seqlen: int, total: int, bias: Tensor | None = None
) -> Attention:
    """The attention of all layers of one encoder in one forward pass, on packed `[total, heads, head_dim]`.

    `implementation` is "sdpa", or "eager", which also returns the weights; any other is a ValueError. `cu_seqlens` is
    `[B + 1]` int32, and a sequence may be empty; `bias [heads, max_seqlen, max_seqlen]` is added to the scores.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, found {implementation!r}")
    return IMPLEMENTATIONS[implementation](cu_seqlens, max_seqlen, total, bias)


class FusedSelfAttention(nn.Module):
    """E4BU's attention: one projection whose rows are q, k, v, each split into heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, hidden_states: Tensor, attention: Attention) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        context, weights = attention(query, key, value)
        return context.flatten(-2), weights


class SelfAttention(nn.Module):
    """The G-gram encoder's attention: three projections, as in BERT."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, attention: Attention) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.query, self.key, self.value)
        )
        context, weights = attention(query, key, value)
        return context.flatten(-2), weights
