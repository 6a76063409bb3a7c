"""Triton kernels of a codebook: distance and arg-min in one, and sums by code in a fixed order.

`D` and the number of codes are constants of a run. A product is three of TF32, which leave out 2^-22 of it: one alone
has three digits, and would choose another code wherever two are about as near; fp32's own take several times as long.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dnazen_kernels.ngram_fusion.triton_impl import ngram_fusion

CONSTANTS = dict(BLOCK_N=64, BLOCK_K=64, BLOCK_D=32, num_warps=4)
# of a code, that one program sums: a code that most rows have would keep a single program busy when all others are done
ROWS_AT_ONCE = 128


@triton.jit(do_not_specialize=["num_rows"])
def _code_lookup_kernel(
    states_ptr, codes_ptr, norms_ptr, out_ptr, num_rows, NUM_CODES: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n] = argmin_k norms[k] - 2 <states[n], codes[k]>, the first of several."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_N], tl.int32)
    for first_code in range(0, NUM_CODES, BLOCK_K):
        codes = first_code + tl.arange(0, BLOCK_K).to(tl.int64)
        is_code = codes < NUM_CODES
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for first_column in range(0, D, BLOCK_D):
            columns = first_column + tl.arange(0, BLOCK_D)
            inside = columns < D
            state = tl.load(
                states_ptr + rows[:, None] * D + columns[None, :], mask=is_row[:, None] & inside[None, :], other=0
            )
            code = tl.load(
                codes_ptr + codes[None, :] * D + columns[:, None],
                mask=is_code[None, :] & inside[:, None],
                other=0,
            )
            products = tl.dot(state.to(tl.float32), code.to(tl.float32), products, input_precision="tf32x3")
        scores = tl.load(norms_ptr + codes, mask=is_code, other=float("inf"))[None, :] - 2 * products
        score, index = tl.min(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.where(score < least, first_code + index, nearest)
        least = tl.minimum(score, least)
    tl.store(out_ptr + rows, nearest.to(tl.int64), mask=is_row)


def code_lookup(states, codes):
    """`[N]` int64, the nearest of `codes [K, D]` for each of `states [N, D]`."""
    out = states.new_empty(len(states), dtype=torch.int64)
    norms = codes.float().square().sum(1)
    constants = dict(NUM_CODES=len(codes), D=codes.shape[1], **CONSTANTS)
    grid = (triton.cdiv(len(states), CONSTANTS["BLOCK_N"]),)
    if len(states):
        _code_lookup_kernel[grid](states.contiguous(), codes.contiguous(), norms, out, len(states), **constants)
    return out


def code_sums(states, indices, num_codes):
    """Counts and sums by code: rows in the order of their codes, summed in parts, and then the parts of each code."""
    ordered, order = indices.sort(stable=True)
    numbers = torch.arange(num_codes + 1, device=indices.device)
    first_row = torch.searchsorted(ordered, numbers)
    counts = first_row.diff()
    first_part = F.pad(((counts + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE).cumsum(0), (1, 0))
    parts = torch.arange(len(indices) // ROWS_AT_ONCE + num_codes + 1, device=indices.device)  # as many at most
    code = torch.searchsorted(first_part, parts, right=True) - 1  # num_codes, behind the last
    part_rows = (first_row[code] + (parts - first_part[code]) * ROWS_AT_ONCE).clamp(max=len(indices))
    partial = ngram_fusion(None, states, part_rows, order, torch.float32)
    return counts, ngram_fusion(None, partial, first_part, parts, torch.float32)
