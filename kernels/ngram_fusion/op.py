"""The fusion on packed input as two gathers: one over the CSR view by token, one (backward) by G-gram."""

import torch
import torch.nn.functional as F
from dnazen_kernels._runtime import resolve_impl
from dnazen_kernels.ngram_fusion.reference import accumulation_dtype, ngram_fusion_index_add


def ngram_fusion(
    hidden_states: torch.Tensor,
    ngram_hidden_states: torch.Tensor,
    token_offsets: torch.Tensor,
    token_ngrams: torch.Tensor,
    ngram_offsets: torch.Tensor,
    ngram_tokens: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Add to each token the states of the G-grams that cover it; paper section 2.3, eq. (4).

    The sum is 0/1 weighted and accumulated in fp32 (fp64 if any input is fp64). Forward and backward are gathers
    in a fixed order: no atomics, the same bits on every run. Only indices are kept for the backward, O(T + E).

    Args:
        hidden_states: token states `[T, H]`, floating point.
        ngram_hidden_states: G-gram states `[N, H]`, floating point; N may be 0.
        token_offsets, token_ngrams: `[T + 1]` and `[E]`, int32 or int64: which G-grams cover token t.
        ngram_offsets, ngram_tokens: `[N + 1]` and `[E]`, of the same type: which tokens G-gram j covers. Both views
            must describe the same edges; that is not checked, for it would cost a device synchronisation.
        impl: "auto", or "reference" for `index_add`.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit together; an unknown `impl`.
    """
    _check(hidden_states, ngram_hidden_states, token_offsets, token_ngrams, ngram_offsets, ngram_tokens)
    resolve_impl(impl, hidden_states.device)
    if impl == "reference":
        return ngram_fusion_index_add(hidden_states, ngram_hidden_states, token_offsets, token_ngrams)
    return _NgramFusion.apply(
        hidden_states, ngram_hidden_states, token_offsets, token_ngrams, ngram_offsets, ngram_tokens
    )


class _NgramFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, ngram_hidden_states, token_offsets, token_ngrams, ngram_offsets, ngram_tokens):
        ctx.save_for_backward(ngram_offsets, ngram_tokens)
        ctx.ngram_dtype = ngram_hidden_states.dtype
        dtype = accumulation_dtype(hidden_states, ngram_hidden_states)
        added = _gather_sum(ngram_hidden_states.to(dtype), token_offsets, token_ngrams)
        return (hidden_states.to(dtype) + added).to(hidden_states.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        ngram_offsets, ngram_tokens = ctx.saved_tensors
        grad = grad_output.to(accumulation_dtype(grad_output))
        return grad_output, _gather_sum(grad, ngram_offsets, ngram_tokens).to(ctx.ngram_dtype), None, None, None, None


def _gather_sum(values: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Row i is the sum of `values[indices[offsets[i]:offsets[i + 1]]]`; zeros for an empty row."""
    if indices.shape[0] == 0:
        return values.new_zeros(offsets.shape[0] - 1, values.shape[1])
    return F.embedding_bag(indices, values, offsets, mode="sum", include_last_offset=True)


def _check(hidden_states, ngram_hidden_states, token_offsets, token_ngrams, ngram_offsets, ngram_tokens) -> None:
    hidden_size = hidden_states.shape[-1]
    for name, states in (("hidden_states", hidden_states), ("ngram_hidden_states", ngram_hidden_states)):
        if not states.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {states.dtype}")
        if states.dim() != 2 or states.shape[1] != hidden_size:
            raise ValueError(f"{name} must have shape [rows, {hidden_size}], got {list(states.shape)}")
    for name, tensor, size in (
        ("token_offsets", token_offsets, len(hidden_states) + 1),
        ("token_ngrams", token_ngrams, token_ngrams.numel()),
        ("ngram_offsets", ngram_offsets, len(ngram_hidden_states) + 1),
        ("ngram_tokens", ngram_tokens, token_ngrams.numel()),
    ):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dtype != token_offsets.dtype:
            raise TypeError(f"{name} must be int32 or int64 like the other CSR tensors, got {tensor.dtype}")
        if tensor.shape != (size,):
            raise ValueError(f"{name} must have shape [{size}], got {list(tensor.shape)}")
