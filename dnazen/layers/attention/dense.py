"""Attention with a dense bias, in plain PyTorch: the reference, `eager`, and `sdpa`. Both read lengths on the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dnazen.layers.attention.alibi import alibi_bias
from dnazen.layers.padding import PaddedLayout

# (query, key, value), each [..., heads, head_dim] -> (context of that shape, weights [B, heads, S, S] or None)
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)  # not a tuple, which ZeRO-3 and checkpointing would take apart
class PackedAttention:
    """An `Attention` that can also take query, key and value as one, and writes their gradients as one."""

    separate: Attention
    packed: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # qkv [T, 3, heads, head_dim]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.separate(query, key, value)


def attend_packed(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention of `qkv [..., 3, heads, head_dim]`; unless it is packed, its three gradients are copied together."""
    return attention.packed(qkv) if isinstance(attention, PackedAttention) else attention(*qkv.unbind(-3))


def padded_attention(cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor | None = None) -> Attention:
    """Attention on padded `[B, S, heads, head_dim]` by explicit softmax in fp32, with its weights."""
    is_padding = torch.arange(max_seqlen, device=cu_seqlens.device) >= cu_seqlens.diff()[:, None]
    is_padding = is_padding[:, None, None, :]
    # Finite, not -inf: a sequence with no G-gram is padding only, and its softmax must not be NaN.
    mask = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill(is_padding, -1e30)
    mask = mask if slopes is None else mask + alibi_bias(slopes, max_seqlen)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = torch.softmax(scores.float() + mask, dim=-1).to(value.dtype)
        return (weights @ value).transpose(1, 2), weights

    return attend


def _sequence_bounds(cu_seqlens: Tensor, max_seqlen: int, total: int) -> list[int]:
    """`cu_seqlens` on the host.

    Raises:
        ValueError: it does not ascend from 0 to `total` in steps of at most `max_seqlen`.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"cu_seqlens: expected to ascend from 0 to {total} by at most {max_seqlen}, the longest sequence's length, "
            f"found {bounds}"
        )
    return bounds


def eager_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """Attention on packed `[T, heads, head_dim]` that pads, runs `padded_attention`, and unpads."""
    _sequence_bounds(cu_seqlens, max_seqlen, total)
    layout = PaddedLayout.from_cu_seqlens(cu_seqlens, max_seqlen, total)
    padded = padded_attention(cu_seqlens, max_seqlen, slopes)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        context, weights = padded(*map(layout.pad, (query, key, value)))
        return layout.unpad(context), weights

    return attend


def sdpa_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """Attention on packed `[T, heads, head_dim]`: one call of SDPA for each run of sequences of equal length."""
    bounds = _sequence_bounds(cu_seqlens, max_seqlen, total)
    runs: list[list[int]] = []  # [start, number of sequences, length]
    for start, end in zip(bounds, bounds[1:]):
        if runs and runs[-1][2] == end - start:
            runs[-1][1] += 1
        elif end > start:
            runs.append([start, 1, end - start])
    bias = None if slopes is None else alibi_bias(slopes, max_seqlen)
    masks = [None if bias is None else bias[None, :, :length, :length] for _, _, length in runs]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        contexts = [query[:0] + key[:0] + value[:0]]  # without a run the (zero) gradient still reaches all three
        for (start, count, length), mask in zip(runs, masks):
            q, k, v = (
                states[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
                for states in (query, key, value)
            )
            if mask is not None and not query.is_cpu:
                mask = mask.to(query.dtype)  # the CPU kernel takes an fp32 bias with bf16 states, those for CUDA do not
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts), None

    return attend
