"""A codebook's look-up and sums: their contract, and their Triton kernels as operators of torch."""

import torch
from torch import Tensor

from dnazen_kernels._runtime import check_states, check_tensor, resolve_impl
from dnazen_kernels.code_lookup.reference import code_lookup_chunked, code_sums_index_add


def code_lookup(states: Tensor, codes: Tensor, *, impl: str = "auto") -> Tensor:
    """The nearest code of every row: `argmin_k |states[n] - codes[k]|^2`, the lowest k of several (VQDNA, stage 1).

    Distances are in fp32, without the term that all codes of a row share. No `[N, K]` is kept: with Triton distance and
    arg-min are one kernel, and the reference takes some rows at a time. There is no gradient.

    Args:
        states: rows `[N, D]`, floating point and finite; N may be 0.
        codes: the codebook `[K, D]`, floating point and finite, K at least 1.
        impl: "triton", "reference", or "auto": Triton on a GPU, else the reference.

    Returns:
        `[N]` int64. Where two codes are equally near but for the rounding of fp32, either.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit together; an unknown `impl`.
        RuntimeError: `impl="triton"` cannot run here.
    """
    if not torch.compiler.is_compiling():
        check_states("states", states, "rows", "D")
        check_states("codes", codes, "rows", "D")
        if len(codes) == 0:
            raise ValueError("codes must hold at least one code, got none")
        check_tensor("codes", codes, (len(codes), states.shape[1]), (codes.dtype,), states.device)
    if resolve_impl(impl, states.device) == "reference":
        return code_lookup_chunked(states.detach(), codes.detach())
    return _code_lookup(states.detach(), codes.detach())


def code_sums(states: Tensor, indices: Tensor, num_codes: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """How many rows have each code, and their sums: what an exponential moving average of a codebook needs.

    Sums are in fp32. With Triton they are in a fixed order, the same bits on every run, and use no atomics.

    Args:
        states: rows `[N, D]`, floating point; N may be 0.
        indices: `[N]` int64 from 0 to `num_codes - 1`, as of `code_lookup`.
        num_codes: K.
        impl: as in `code_lookup`.

    Returns:
        Counts `[K]` int64 and sums `[K, D]` fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as `code_lookup`.
    """
    if not torch.compiler.is_compiling():
        check_states("states", states, "rows", "D")
        check_tensor("indices", indices, (len(states),), (torch.int64,), states.device)
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1, got {num_codes}")
    if resolve_impl(impl, states.device) == "reference":
        return code_sums_index_add(states.detach(), indices, num_codes)
    return _code_sums(states.detach(), indices, num_codes)


@torch.library.custom_op("dnazen::code_lookup", mutates_args=())
def _code_lookup(states: Tensor, codes: Tensor) -> Tensor:
    from dnazen_kernels.code_lookup import triton_impl

    with torch.cuda.device_of(states):
        return triton_impl.code_lookup(states, codes)


@_code_lookup.register_fake
def _(states, codes):
    return states.new_empty(states.shape[0], dtype=torch.int64)


@torch.library.custom_op("dnazen::code_sums", mutates_args=())
def _code_sums(states: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    from dnazen_kernels.code_lookup import triton_impl

    with torch.cuda.device_of(states):
        return triton_impl.code_sums(states, indices, num_codes)


@_code_sums.register_fake
def _(states, indices, num_codes):
    return indices.new_empty(num_codes), states.new_empty(num_codes, states.shape[1], dtype=torch.float32)
