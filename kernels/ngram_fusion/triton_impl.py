"""Triton kernels of the fusion: a row is summed up by one program in a fixed order, so no atomics and the same bits.

`H` is a compile-time constant: where it is a multiple of 256 per warp the masks fold away, and where it is one of 8
rows are known to be aligned, so that loads take 16 bytes.
Offsets of rows are int64; sums are in `ACC`, fp32, or fp64 for fp64 tensors.
"""

import torch
import triton
import triton.language as tl

from dnazen_kernels.ngram_fusion.reference import SPLITMIX64, accumulation_dtype

GAMMA, MULTIPLIER_1, MULTIPLIER_2 = map(tl.constexpr, SPLITMIX64)
EDGES_AT_ONCE = tl.constexpr(4)  # unrolled, so that several rows are on their way at the same time
# of the backward, all resident at once (README.md); with drop-out a warp holds half the columns, for want of registers
WARPS_PER_SM, WARPS_PER_SM_WITH_DROPOUT = 8, 12


@triton.jit
def _add_covering_rows(total, values_ptr, offsets_ptr, indices_ptr, row, columns, H: tl.constexpr):
    """`total` plus the rows `indices[offsets[row]:offsets[row + 1]]` of `values`."""
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for first in range(start, end, EDGES_AT_ONCE):
        for k in tl.static_range(EDGES_AT_ONCE):
            index = tl.load(indices_ptr + first + k, mask=first + k < end, other=0).to(tl.int64)
            width = tl.where(first + k < end, H, 0)
            value = tl.load(values_ptr + index * H + columns, mask=columns < width, other=0)
            total += value.to(total.dtype)
    return total


@triton.jit
def _is_kept(seed, row, H: tl.constexpr, BLOCK_H: tl.constexpr, NUM_DROPPED: tl.constexpr):
    """Which columns of the row drop-out keeps: a row of `keep_mask` in `reference.py`.

    Neighbours share a number, so that a thread makes those of its own columns and no others.
    """
    first = tl.cast(row, tl.uint64) * ((H + 3) // 4) + 1  # interpreted, a row may be an int
    number = seed.to(tl.uint64) + first * GAMMA + tl.arange(0, BLOCK_H // 4).to(tl.uint64) * GAMMA
    number = (number ^ (number >> 30)) * MULTIPLIER_1
    number = (number ^ (number >> 27)) * MULTIPLIER_2
    number ^= number >> 31
    words = tl.join(number.to(tl.int32), (number >> 32).to(tl.int32))
    draws = tl.join(words << 16, words)  # of 16 bits, on top; what is below them changes no comparison
    return tl.reshape(draws, [BLOCK_H]) >= (NUM_DROPPED - 32768) * 65536


@triton.jit
def _ngram_fusion_kernel(
    hidden_ptr, values_ptr, offsets_ptr, indices_ptr, out_ptr, H: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """out[t] = hidden[t] + sum of values[indices[offsets[t]:offsets[t + 1]]]; hidden may be None, for zero."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    if hidden_ptr is None:
        total = tl.zeros([BLOCK_H], ACC)
    else:
        total = tl.load(hidden_ptr + row * H + columns, mask=inside, other=0).to(ACC)
    total = _add_covering_rows(total, values_ptr, offsets_ptr, indices_ptr, row, columns, H)
    tl.store(out_ptr + row * H + columns, total, mask=inside)


@triton.jit
def _residual_layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, values_ptr, offsets_ptr, indices_ptr, out_ptr, mean_ptr,
    rstd_ptr, eps, H: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr, NUM_DROPPED: tl.constexpr,
):  # fmt: skip
    """z = dropout(x) + residual; out = (z - mean(z)) * rstd(z) * weight + bias, plus the covering rows unless values is
    None.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    z = tl.load(x_ptr + row * H + columns, mask=inside, other=0).to(ACC)
    if NUM_DROPPED > 0:
        is_kept = _is_kept(tl.load(seed_ptr), row, H, BLOCK_H, NUM_DROPPED)
        z = tl.where(is_kept, z * (65536 / (65536 - NUM_DROPPED)), 0)
    z += tl.load(residual_ptr + row * H + columns, mask=inside, other=0).to(ACC)
    mean = tl.sum(z) / H
    centred = tl.where(inside, z - mean, 0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / H + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0).to(ACC)
    out = centred * rstd * weight + tl.load(bias_ptr + columns, mask=inside, other=0).to(ACC)
    if values_ptr is not None:
        out = _add_covering_rows(out, values_ptr, offsets_ptr, indices_ptr, row, columns, H)
    tl.store(out_ptr + row * H + columns, out, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _residual_layer_norm_backward_kernel(
    grad_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dz_ptr, dx_ptr, partial_ptr, num_rows,
    H: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr, NUM_DROPPED: tl.constexpr, SUMS_X: tl.constexpr,
):  # fmt: skip
    """With n = (z - mean) * rstd and g = grad * weight: dz = rstd * (g - mean(g) - n * mean(g * n)), and dx is dz where
    drop-out kept x, scaled as x was; without drop-out the two are one.

    Program p takes the rows p, p + P, ...; its sums of grad * n, of grad and, if SUMS_X, of dx go to partial[0, p],
    partial[1, p] and partial[2, p].
    """
    program = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    weight = tl.load(weight_ptr + columns, mask=inside, other=0).to(ACC)
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
    weight_sum = tl.zeros([BLOCK_H], ACC)
    bias_sum = tl.zeros([BLOCK_H], ACC)
    x_sum = tl.zeros([BLOCK_H], ACC)
    # Rows of 16-bit numbers come through shared memory, with room for two: the next is on its way while one is summed.
    num_stages: tl.constexpr = 3 if grad_ptr.dtype.element_ty.primitive_bitwidth == 16 else 1
    for row in tl.range(program, num_rows, num_programs, num_stages=num_stages):
        grad = tl.load(grad_ptr + row * H + columns, mask=inside, other=0).to(ACC)
        z = tl.load(x_ptr + row * H + columns, mask=inside, other=0).to(ACC)
        if NUM_DROPPED > 0:
            is_kept = _is_kept(seed, row, H, BLOCK_H, NUM_DROPPED)
            z = tl.where(is_kept, z * (65536 / (65536 - NUM_DROPPED)), 0)
        z += tl.load(residual_ptr + row * H + columns, mask=inside, other=0).to(ACC)
        rstd = tl.load(rstd_ptr + row)
        normalized = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0)
        weighted = grad * weight
        projected = tl.sum(weighted) / H + normalized * (tl.sum(weighted * normalized) / H)
        dx = rstd * (weighted - projected)
        tl.store(dz_ptr + row * H + columns, dx, mask=inside)
        weight_sum += grad * normalized
        bias_sum += grad
        if NUM_DROPPED > 0:
            dx = tl.where(is_kept, dx * (65536 / (65536 - NUM_DROPPED)), 0)
            tl.store(dx_ptr + row * H + columns, dx, mask=inside)
        if SUMS_X:
            x_sum += dx
    tl.store(partial_ptr + program * H + columns, weight_sum, mask=inside)
    tl.store(partial_ptr + (num_programs + program) * H + columns, bias_sum, mask=inside)
    if SUMS_X:
        tl.store(partial_ptr + (2 * num_programs + program) * H + columns, x_sum, mask=inside)


def row_constants(hidden_size: int, accumulation: torch.dtype, columns_per_warp: int = 1024) -> dict:
    """Compile-time constants; each warp holds up to so many columns in registers."""
    block = max(triton.next_power_of_2(hidden_size), 4)  # a number's columns
    acc = tl.float64 if accumulation == torch.float64 else tl.float32
    return dict(H=hidden_size, BLOCK_H=block, ACC=acc, num_warps=min(max(block // columns_per_warp, 1), 16))


def backward_constants(hidden_size: int, accumulation: torch.dtype, num_dropped: int, sums_x: bool) -> dict:
    """Those of `_residual_layer_norm_backward_kernel`."""
    constants = row_constants(hidden_size, accumulation, columns_per_warp=512 if num_dropped else 1024)
    return constants | dict(NUM_DROPPED=num_dropped, SUMS_X=sums_x)


def ngram_fusion(hidden_states, values, offsets, indices, dtype=None):
    """`hidden_states` (None: zero) plus the rows of `values` that the CSR view names.

    In the dtype of the former, or summed and returned in `dtype`.
    """
    like = values if hidden_states is None else hidden_states
    out = like.new_empty(len(offsets) - 1, values.shape[1], dtype=dtype)
    constants = row_constants(values.shape[1], dtype or accumulation_dtype(values, like))
    _ngram_fusion_kernel[(len(out),)](*_contiguous(hidden_states, values, offsets, indices), out, **constants)
    return out


def residual_layer_norm(x, residual, weight, bias, eps, values, offsets, indices, num_dropped, seed):
    """`(out, mean, rstd)` of LayerNorm(dropout(x) + residual), plus the covering rows of `values` unless it is None."""
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = (x.new_empty(len(x), dtype=accumulation_dtype(x, residual)) for _ in range(2))
    inputs = _contiguous(x, residual, weight, bias, seed, values, offsets, indices)
    constants = row_constants(x.shape[1], mean.dtype)
    _residual_layer_norm_kernel[(len(x),)](*inputs, out, mean, rstd, eps, **constants, NUM_DROPPED=num_dropped)
    return out, mean, rstd


def residual_layer_norm_backward(grad, x, residual, weight, mean, rstd, num_dropped, seed, sums_x):
    """`(dz, dx, sums)`: the gradient of residual; that of x, empty where it is the same; and `sums [2 or 3, H]`, the
    gradients of weight and of bias and, if `sums_x`, the sum of dx.
    """
    constants = backward_constants(x.shape[1], mean.dtype, num_dropped, sums_x)
    dz = torch.empty_like(grad, memory_format=torch.contiguous_format)
    dx = x.new_empty(x.shape if num_dropped else 0)
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    warps_per_sm = WARPS_PER_SM_WITH_DROPOUT if num_dropped else WARPS_PER_SM
    num_programs = min(num_sms * max(warps_per_sm // constants["num_warps"], 1), len(x))
    partial = mean.new_empty(2 + sums_x, num_programs, x.shape[1])
    _residual_layer_norm_backward_kernel[(num_programs,)](
        *_contiguous(grad, x, residual, weight, mean, rstd, seed), dz, dx, partial, len(x), **constants
    )
    return dz, dx, partial.sum(1)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
