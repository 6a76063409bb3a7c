"""The packages flash-attn (FlashAttention-2) and flash-attn-4: ALiBi in their kernels, no padding, no dense bias."""

from typing import Any

import torch
from torch import Tensor

from dnazen.layers.attention.dense import Attention, PackedAttention


def flash_attention_2(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-2, whose ALiBi is `-slope * |i - j|` where nothing is causal (its `alibi_slopes`, fp32)."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        context = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, alibi_slopes=slopes
        )
        return context, None

    def attend_packed(qkv: Tensor) -> tuple[Tensor, None]:
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, alibi_slopes=slopes), None

    return PackedAttention(attend, attend_packed)


def flash_attention_4(cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None) -> Attention:
    """FlashAttention-4; it has no `alibi_slopes`: ALiBi is a `score_mod` that reads them from an auxiliary tensor."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    modification: dict[str, Any] = {}
    if slopes is not None:
        from dnazen.layers.attention.flash_4_alibi import alibi, alibi_backward

        modification = {"score_mod": alibi, "score_mod_bwd": alibi_backward, "aux_tensors": [slopes]}
    bounds = {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen,
    }  # fmt: skip

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        context, _ = flash_attn_varlen_func(query, key, value, **bounds, **modification)
        return context, None

    def attend_packed(qkv: Tensor) -> tuple[Tensor, None]:
        return _PackedFlashAttention4.apply(qkv, bounds, modification), None

    return PackedAttention(attend, attend_packed)


class _PackedFlashAttention4(torch.autograd.Function):
    """What the package's own autograd function does, but for the gradients, which go into one tensor like `qkv`."""

    @staticmethod
    def forward(ctx, qkv: Tensor, bounds: dict[str, Any], modification: dict[str, Any]) -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        ctx.bounds, ctx.modification = bounds, dict(modification)
        modification = {name: value for name, value in modification.items() if name != "score_mod_bwd"}
        context, logsumexp, *_ = _flash_attn_fwd(*qkv.unbind(1), return_lse=True, **bounds, **modification)
        ctx.save_for_backward(qkv, context, logsumexp)
        return context

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        from flash_attn.cute.interface import _flash_attn_bwd

        qkv, context, logsumexp = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        into = dict(zip(("dq", "dk", "dv"), grad_qkv.unbind(1)))
        _flash_attn_bwd(*qkv.unbind(1), context, grad, logsumexp, **into, **ctx.bounds, **ctx.modification)
        return grad_qkv, None, None
