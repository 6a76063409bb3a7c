"""The packages flash-attn (FlashAttention-2) and flash-attn-4: ALiBi in their kernels, no padding, no dense bias."""

from torch import Tensor

from dnazen.layers.attention.dense import Attention


def flash_attention_2(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-2, whose ALiBi is `-slope * |i - j|` where nothing is causal (its `alibi_slopes`, fp32)."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        context = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, alibi_slopes=slopes
        )
        return context, None

    return attend


def flash_attention_4(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-4; it has no `alibi_slopes`: ALiBi is a `score_mod` that reads them from an auxiliary tensor."""
    from flash_attn.cute.interface import flash_attn_varlen_func

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
