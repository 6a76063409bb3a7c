"""PyTorch's FlexAttention: ALiBi and the bounds of sequences compiled into its kernel."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dnazen.layers.attention.dense import Attention
from dnazen.layers.compilation import compile_dynamic

BLOCK = 128  # rows and columns of a tile that is skipped or computed


@lru_cache
def _compiled_flex_attention():
    # without graph breaks: else, compiled too often, it would go on without its kernel in silence, in memory that grows
    # with the square of the number of rows
    return compile_dynamic(flex_attention)


def sequence_block_mask(cu_seqlens: Tensor, total: int) -> BlockMask:
    """Which tiles hold pairs of rows of one sequence, and which hold nothing else.

    From the first and last sequence of each tile's rows: `create_block_mask` would look at all `total ** 2` pairs.
    """
    row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True, out_int32=True)

    def same_sequence(batch, head, q_idx, kv_idx):
        return sequence[q_idx] == sequence[kv_idx]

    first_row = row[::BLOCK]
    last_row = (first_row + BLOCK - 1).clamp(max=total - 1)
    first, last = sequence[first_row], sequence[last_row]
    is_needed = (first[:, None] <= last) & (first <= last[:, None])
    is_whole = (first == last) & (last_row - first_row == BLOCK - 1)  # one sequence, and no row missing
    is_full = is_needed & is_whole & is_whole[:, None]

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Number of such tiles in each line, and their columns first."""
        tiles = tiles.to(torch.int32)[None, None]
        columns = tiles.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return tiles.sum(-1, dtype=torch.int32), columns

    return BlockMask.from_kv_blocks(
        *ordered(is_needed & ~is_full), *ordered(is_full), BLOCK, same_sequence, seq_lengths=(total, total)
    )


def packed_flex_attention(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlexAttention, compiled on a GPU. On a CPU it has no backward."""
    block_mask = sequence_block_mask(cu_seqlens, total)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        # Slopes of 0 where there is no ALiBi: one kernel for both encoders, for compiling takes long.
        slope = query.new_zeros(query.shape[1], dtype=torch.float32) if slopes is None else slopes

        def alibi(score, batch, head, q_idx, kv_idx):
            return score - slope[head] * (q_idx - kv_idx).abs()  # in a sequence, packed distances are the distances

        states = (states.transpose(0, 1)[None] for states in (query, key, value))
        attention = _compiled_flex_attention() if query.is_cuda else flex_attention
        return attention(*states, score_mod=alibi, block_mask=block_mask)[0].transpose(0, 1), None

    return attend
