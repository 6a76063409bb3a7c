"""Attention with a dense bias, in plain PyTorch: the reference, `eager`, and `sdpa`. Both read lengths on the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dnazen.layers.attention.alibi import alibi_bias
from dnazen.layers.padding import PaddedLayout

# what a call of SDPA costs beside its work: as much as so many pairs of positions
_PAIRS_OF_A_CALL = 4096
# rows of a line that is filled up: masks of longer ones, of each sequence its own, would take more memory than states
_WIDEST_PADDED = 128

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


def _group_by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Which sequences to attend to in one call each: their indices, ascending, without those of length 0.

    A sequence joins those of its length, and a longer one's group where the padding of its line costs less than a call
    of its own would.
    """
    groups: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)].tolist():
        length, width = lengths[index], lengths[groups[-1][0]] if groups else 0
        is_near = width <= _WIDEST_PADDED and width**2 - length**2 <= _PAIRS_OF_A_CALL
        if width and (width == length or is_near):
            groups[-1].append(index)
        else:
            groups.append([index])
    return sorted((np.sort(group) for group in groups), key=lambda group: group[0])


def sdpa_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """Attention on packed `[T, heads, head_dim]`: one call of SDPA for each group of sequences of about equal length.

    In the groups' order each sequence has a line as wide as the longest of its group.
    """
    bounds = np.array(_sequence_bounds(cu_seqlens, max_seqlen, total))
    lengths, device = np.diff(bounds), cu_seqlens.device
    bias = None if slopes is None else alibi_bias(slopes, max_seqlen)
    line_starts, num_rows = np.zeros_like(lengths), 0
    shapes: list[tuple[int, int]] = []  # of each group: sequences, and rows of a line
    masks: list[Tensor | None] = []
    for group in _group_by_length(lengths):
        width = int(lengths[group].max())
        mask = None if bias is None else bias[None, :, :width, :width]
        if lengths[group].min() < width:
            is_padding = torch.from_numpy(np.arange(width) >= lengths[group, None])
            padding = torch.zeros(is_padding.shape).masked_fill(is_padding, -torch.inf).to(device)[:, None, None]
            mask = padding if mask is None else mask + padding
        line_starts[group] = num_rows + width * np.arange(len(group))
        num_rows += width * len(group)
        shapes.append((len(group), width))
        masks.append(mask)
    positions = np.repeat(line_starts - bounds[:-1], lengths) + np.arange(total)
    is_in_place = num_rows == total and bool((np.diff(positions) == 1).all())
    layout = None if is_in_place else PaddedLayout(torch.from_numpy(positions).to(device), 1, num_rows)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        # the CPU's kernel is quicker in fp32, four times in backward where the processor knows no bf16
        dtype = torch.promote_types(query.dtype, torch.float32) if query.is_cpu else query.dtype
        states = [x if layout is None else layout.pad(x).squeeze(0) for x in (query, key, value)]
        lines = zip(*(x.to(dtype).split([count * width for count, width in shapes]) for x in states))
        contexts = []
        with torch.autocast(device.type, enabled=False):
            for (count, width), mask, group in zip(shapes, masks, lines):
                mask = None if mask is None else mask.to(dtype)
                q, k, v = (x.unflatten(0, (count, width)).transpose(1, 2) for x in group)
                context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                contexts.append(context.transpose(1, 2).flatten(0, 1))
        context = torch.cat(contexts).to(query.dtype)
        return context if layout is None else layout.unpad(context.unsqueeze(0)), None

    return attend
