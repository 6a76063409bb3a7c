"""The fusion on packed input: its contract, and its Triton kernels as operators of torch.

Each operator sums the rows of one view of `NgramEdges`; the backward is the same sum over the other view.
"""

import torch
from torch import Tensor

from dnazen_kernels._runtime import check_states, check_tensor, resolve_impl
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion.reference import (
    accumulation_dtype,
    ngram_fusion_index_add,
    residual_layer_norm_eager,
    sum_to_bias,
)


def ngram_fusion(
    hidden_states: Tensor,
    ngram_hidden_states: Tensor,
    edges: NgramEdges,
    *,
    impl: str = "auto",
) -> Tensor:
    """Add to each token the states of the G-grams that cover it; paper section 2.3, eq. (4).

    The sum is 0/1 weighted and accumulated in fp32 (fp64 if any input is fp64). With Triton it is in a fixed order, the
    same bits on every run, and only indices are kept for the backward, O(T + E).

    Args:
        hidden_states: token states `[T, H]`, floating point.
        ngram_hidden_states: G-gram states `[N, H]`, floating point; N may be 0.
        edges: which G-grams cover which token.
        impl: "triton", "reference" (`index_add`), or "auto": Triton on a GPU, else the reference.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit together; an unknown `impl`.
        RuntimeError: `impl="triton"` cannot run here.
    """
    if not torch.compiler.is_compiling():
        check_states("hidden_states", hidden_states, "rows", hidden_states.shape[-1])
        _check_ngrams(hidden_states, ngram_hidden_states, edges)
    if resolve_impl(impl, hidden_states.device) == "reference":
        return ngram_fusion_index_add(hidden_states, ngram_hidden_states, edges)
    return _ngram_fusion(hidden_states, ngram_hidden_states, *edges)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ngram_hidden_states: Tensor | None = None,
    edges: NgramEdges | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    x_bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`LayerNorm(dropout(x) + residual) * weight + bias`, and on top of it, if there are G-grams, their fusion, in one
    pass.

    Statistics and sums are in fp32 (fp64 if `x` or `residual` is fp64); the reference rounds `dropout(x) + residual`,
    `weight` and `bias` to the output's dtype first, as PyTorch does. With Triton the backward keeps `x`, `residual`,
    two numbers per row and the seed, and its sums over rows are in a fixed order, the same bits on every run on the
    same device. What is dropped depends on `seed` and `H` alone, not on `impl`, device or dtype.

    Args:
        x, residual: `[T, H]`, floating point.
        weight, bias: `[H]`, floating point of any dtype.
        eps: added to the variance, in fp32.
        ngram_hidden_states, edges: as in `ngram_fusion`; both or neither.
        dropout_p: probability that an element of `x` is dropped, in [0, 1), to the nearest multiple of 2^-16; what is
            kept is divided by 1 minus that.
        seed: int64 scalar, drawn anew for every call; needed where `dropout_p` is above 0. See `keep_mask`.
        x_bias: `[H]`, a bias that `x` holds already and that was detached there. The output does not depend on it; its
            gradient, the sum of that of `x` over the rows, is taken here, where the rows are at hand.
        impl: as in `ngram_fusion`; the reference is `F.layer_norm`, then `index_add`.

    Returns:
        `[T, H]` in the dtype of `x + residual`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ngram_fusion`.
    """
    if not torch.compiler.is_compiling():
        check_states("weight", weight, "H")
        check_states("bias", bias, len(weight))
        check_states("x", x, "rows", len(weight))
        check_states("residual", residual, len(x), len(weight))
        if (ngram_hidden_states is None) != (edges is None):
            raise ValueError("ngram_hidden_states and edges must be given both or neither, got one of them")
        if ngram_hidden_states is not None and edges is not None:
            _check_ngrams(x, ngram_hidden_states, edges)
        if x_bias is not None:
            check_states("x_bias", x_bias, len(weight))
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
        if seed is not None:
            check_tensor("seed", seed, (), (torch.int64,), x.device)
        elif dropout_p:
            raise ValueError(f"seed must be given with dropout_p {dropout_p}, got None")
    num_dropped = min(round(dropout_p * 65536), 65535)  # of 65536
    if resolve_impl(impl, x.device) == "reference":
        x = sum_to_bias(x, x_bias)
        hidden_states = residual_layer_norm_eager(x, residual, weight, bias, eps, num_dropped, seed)
        if ngram_hidden_states is None or edges is None:
            return hidden_states
        return ngram_fusion_index_add(hidden_states, ngram_hidden_states, edges)
    unpacked = [None] * 4 if edges is None else edges
    return _residual_layer_norm(
        x, residual, weight, bias, eps, ngram_hidden_states, *unpacked, num_dropped, seed, x_bias
    )[0]


@torch.library.custom_op("dnazen::ngram_fusion", mutates_args=())
def _ngram_fusion(
    hidden_states: Tensor | None, ngram_hidden_states: Tensor,
    token_offsets: Tensor, token_ngrams: Tensor, ngram_offsets: Tensor, ngram_tokens: Tensor,
) -> Tensor:  # fmt: skip
    from dnazen_kernels.ngram_fusion import triton_impl

    with torch.cuda.device_of(ngram_hidden_states):
        return triton_impl.ngram_fusion(hidden_states, ngram_hidden_states, token_offsets, token_ngrams)


@_ngram_fusion.register_fake
def _(hidden_states, ngram_hidden_states, token_offsets, *_):
    like = ngram_hidden_states if hidden_states is None else hidden_states
    return like.new_empty(token_offsets.shape[0] - 1, ngram_hidden_states.shape[1])


def _ngram_fusion_context(ctx, inputs, output):
    _, ngram_hidden_states, *edges = inputs
    ctx.save_for_backward(*edges)
    ctx.ngram_dtype = ngram_hidden_states.dtype


def _ngram_fusion_backward(ctx, grad):
    grad_ngrams = (
        _grad_of_ngrams(grad, ctx.ngram_dtype, NgramEdges(*ctx.saved_tensors)) if ctx.needs_input_grad[1] else None
    )
    return grad if ctx.needs_input_grad[0] else None, grad_ngrams, None, None, None, None


def _grad_of_ngrams(grad: Tensor, dtype: torch.dtype, edges: NgramEdges) -> Tensor:
    """The gradients of the tokens that each G-gram covers, summed: the fusion with its two views swapped."""
    grad = grad.to(torch.promote_types(grad.dtype, dtype))
    return _ngram_fusion(None, grad, *edges.swapped()).to(dtype)


_ngram_fusion.register_autograd(_ngram_fusion_backward, setup_context=_ngram_fusion_context)


@torch.library.custom_op("dnazen::residual_layer_norm", mutates_args=())
def _residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, ngram_hidden_states: Tensor | None,
    token_offsets: Tensor | None, token_ngrams: Tensor | None, ngram_offsets: Tensor | None,
    ngram_tokens: Tensor | None, num_dropped: int, seed: Tensor | None, x_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from dnazen_kernels.ngram_fusion import triton_impl

    with torch.cuda.device_of(x):
        return triton_impl.residual_layer_norm(
            x, residual, weight, bias, eps, ngram_hidden_states, token_offsets, token_ngrams, num_dropped, seed
        )


@_residual_layer_norm.register_fake
def _(x, residual, *_):
    mean, rstd = (x.new_empty(x.shape[0], dtype=accumulation_dtype(x, residual)) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype)), mean, rstd


def _residual_layer_norm_context(ctx, inputs, output):
    x, residual, weight, bias, _, ngram_hidden_states, *edges, num_dropped, seed, x_bias = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed, *edges)
    ctx.num_dropped = num_dropped
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, ngram_hidden_states, x_bias)]


def _residual_layer_norm_backward(ctx, grad, _grad_mean, _grad_rstd):
    if grad is None:
        return (None,) * 13
    x, residual, weight, mean, rstd, seed, *edges = ctx.saved_tensors
    bias_dtype, ngram_dtype, x_bias_dtype = ctx.dtypes
    sums_x = ctx.needs_input_grad[12]
    grad_residual, grad_x, sums = _residual_layer_norm_backward_op(
        grad, x, residual, weight, mean, rstd, ctx.num_dropped, seed, sums_x
    )
    grad_ngrams = _grad_of_ngrams(grad, ngram_dtype, NgramEdges(*edges)) if ctx.needs_input_grad[5] else None
    return (
        grad_x if ctx.num_dropped else grad_residual.to(x.dtype), grad_residual.to(residual.dtype),
        sums[0].to(weight.dtype), sums[1].to(bias_dtype), None, grad_ngrams, *[None] * 6,
        sums[2].to(x_bias_dtype) if sums_x else None,
    )  # fmt: skip


_residual_layer_norm.register_autograd(_residual_layer_norm_backward, setup_context=_residual_layer_norm_context)


@torch.library.custom_op("dnazen::residual_layer_norm_backward", mutates_args=())
def _residual_layer_norm_backward_op(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, num_dropped: int,
    seed: Tensor | None, sums_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from dnazen_kernels.ngram_fusion import triton_impl

    with torch.cuda.device_of(x):
        return triton_impl.residual_layer_norm_backward(
            grad, x, residual, weight, mean, rstd, num_dropped, seed, sums_x
        )


@_residual_layer_norm_backward_op.register_fake
def _(grad, x, residual, weight, mean, rstd, num_dropped, seed, sums_x):
    grad_residual = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_residual, x.new_empty(x.shape if num_dropped else 0), mean.new_empty(2 + sums_x, x.shape[1])


def _check_ngrams(hidden_states: Tensor, ngram_hidden_states: Tensor, edges: NgramEdges) -> None:
    check_states("ngram_hidden_states", ngram_hidden_states, "rows", hidden_states.shape[1])
    edges.check(len(hidden_states), len(ngram_hidden_states), hidden_states.device)
