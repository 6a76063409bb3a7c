"""Self-attention of both encoders on packed input: the back-ends, the choice among them, and the projections.

A back-end is a function `(cu_seqlens [B + 1] int32, max_seqlen, total, slopes [heads] fp32 or None) -> Attention`,
called once for all layers of a forward pass; the token encoder calls its result by `attend_packed`. Each of the `total`
rows must belong to a sequence: kernels leave the output and the gradient of uncovered rows uninitialised.
"""

from dnazen.layers.attention.alibi import alibi_bias, alibi_slopes
from dnazen.layers.attention.dense import Attention, attend_packed, padded_attention
from dnazen.layers.attention.projections import FusedSelfAttention, SelfAttention
from dnazen.layers.attention.select import BACKENDS, Selection, packed_attention, select_attention

__all__ = [
    "BACKENDS", "Attention", "FusedSelfAttention", "Selection", "SelfAttention", "alibi_bias", "alibi_slopes",
    "attend_packed", "packed_attention", "padded_attention", "select_attention",
]  # fmt: skip
