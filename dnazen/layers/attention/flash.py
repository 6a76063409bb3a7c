"""The packages flash-attn (FlashAttention-2) and flash-attn-4: ALiBi in their kernels, no padding, no dense bias."""

import torch
from torch import Tensor

from dnazen.layers.attention.dense import Attention


def cover_all_rows(cu_seqlens: Tensor, max_seqlen: int, total: int) -> Tensor:
    """`cu_seqlens` with sequences added for the rows behind its end, each of at most `max_seqlen`, most of them empty.

    The kernels write neither output nor gradient of a row that is in no sequence: both would be whatever the memory
    held before. How many sequences are added depends on `max_seqlen` and `total` alone, so that the host need not wait.
    """
    steps = torch.arange(1, -(-total // max_seqlen) + 1, device=cu_seqlens.device, dtype=torch.int32)
    return torch.cat([cu_seqlens, (cu_seqlens[-1:] + steps * max_seqlen).clamp(max=total)])


def flash_attention_2(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-2, whose ALiBi is `-slope * |i - j|` where nothing is causal (its `alibi_slopes`, fp32)."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    cu_seqlens = cover_all_rows(cu_seqlens, max_seqlen, total)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        context = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, alibi_slopes=slopes
        )
        return context, None

    return attend


def flash_attention_4(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-4; it has no `alibi_slopes`, so ALiBi is a `score_mod` that reads them from an auxiliary tensor."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    cu_seqlens = cover_all_rows(cu_seqlens, max_seqlen, total)
    modification = {}
    if slopes is not None:
        from dnazen.layers.attention.flash_4_alibi import alibi, alibi_backward

        modification = {"score_mod": alibi, "score_mod_bwd": alibi_backward, "aux_tensors": [slopes]}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        context, _ = flash_attn_varlen_func(
            query, key, value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, **modification,
        )  # fmt: skip
        return context, None

    return attend
