"""Triton kernels of whole-G-gram masking: rows of both CSR views gather, each output is written once, no atomics.

Six kernels and two scans. A survivor's new number and the number of edges before it are one int64 to the scan: the
number in the upper half, the edges in the lower.
"""

import torch
import triton
import triton.language as tl

from dnazen_kernels.ngram_edges import NgramEdges

BLOCK = 256  # rows per program
HALF = tl.constexpr(32)  # bits
LOWER_HALF = tl.constexpr((1 << 32) - 1)


@triton.jit
def _block(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _count_in_row(flags_ptr, offsets_ptr, indices_ptr, row, exists):
    """How many of a row's edges lead to a flag that is set."""
    start = tl.load(offsets_ptr + row, mask=exists, other=0).to(tl.int64)
    end = tl.load(offsets_ptr + (row + 1), mask=exists, other=0).to(tl.int64)
    count = tl.zeros_like(start)
    for k in range(tl.max(end - start)):
        index = tl.load(indices_ptr + (start + k), mask=start + k < end, other=0).to(tl.int64)
        count += tl.load(flags_ptr + index, mask=start + k < end, other=0)
    return count


@triton.jit(do_not_specialize=["num_rows"])
def _any_kernel(own_ptr, flags_ptr, offsets_ptr, indices_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    """out[row] = own[row] or any flag of its edges; own may be None, for False."""
    row = _block(BLOCK)
    found = _count_in_row(flags_ptr, offsets_ptr, indices_ptr, row, row < num_rows) > 0
    if own_ptr is not None:
        found |= tl.load(own_ptr + row, mask=row < num_rows, other=0) != 0
    tl.store(out_ptr + row, found, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_ngrams", "num_sequences"])
def _survivors_kernel(
    masked_ptr, ngram_offsets_ptr, ngram_tokens_ptr, ngram_cu_seqlens_ptr, kept_ptr, scan_ptr, num_ngrams,
    num_sequences, BLOCK: tl.constexpr,
):  # fmt: skip
    """kept[j]: G-gram j is none of the padding behind the last sequence and has no masked token; scan[j + 1]: its
    contribution to the two sums, scan[0]: zero.
    """
    ngram = _block(BLOCK) - 1
    exists = (ngram >= 0) & (ngram < tl.load(ngram_cu_seqlens_ptr + num_sequences))
    kept = exists & (_count_in_row(masked_ptr, ngram_offsets_ptr, ngram_tokens_ptr, ngram, exists) == 0)
    size = tl.load(ngram_offsets_ptr + (ngram + 1), mask=kept, other=0).to(tl.int64)
    size -= tl.load(ngram_offsets_ptr + ngram, mask=kept, other=0)
    tl.store(kept_ptr + ngram, kept, mask=(ngram >= 0) & (ngram < num_ngrams))
    tl.store(scan_ptr + (ngram + 1), (kept.to(tl.int64) << HALF) + size, mask=ngram < num_ngrams)


@triton.jit(do_not_specialize=["num_tokens"])
def _token_counts_kernel(kept_ptr, token_offsets_ptr, token_ngrams_ptr, counts_ptr, num_tokens, BLOCK: tl.constexpr):
    """counts[t + 1]: the survivors over token t; counts[0]: zero."""
    token = _block(BLOCK) - 1
    exists = (token >= 0) & (token < num_tokens)
    count = _count_in_row(kept_ptr, token_offsets_ptr, token_ngrams_ptr, token, exists)
    tl.store(counts_ptr + (token + 1), count, mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_ngrams", "num_sequences", "num_edges"])
def _compact_ngrams_kernel(
    kept_ptr, scan_ptr, ids_ptr, cu_seqlens_ptr, offsets_ptr, tokens_ptr, new_ids_ptr, new_cu_seqlens_ptr,
    new_offsets_ptr, new_tokens_ptr, counts_ptr, num_ngrams, num_sequences, num_edges, BLOCK: tl.constexpr,
):  # fmt: skip
    """Survivors and their edges to the front, the defined tail behind them; the same lanes do both."""
    lane = _block(BLOCK)
    total = tl.load(scan_ptr + num_ngrams)
    num_kept, num_kept_edges = total >> HALF, total & LOWER_HALF
    tl.store(new_ids_ptr + lane, tl.zeros_like(lane), mask=(lane >= num_kept) & (lane < num_ngrams))
    tl.store(new_offsets_ptr + lane, num_kept_edges, mask=(lane >= num_kept) & (lane <= num_ngrams))
    tl.store(new_tokens_ptr + lane, tl.zeros_like(lane), mask=(lane >= num_kept_edges) & (lane < num_edges))
    tl.store(counts_ptr + lane, tl.where(lane == 0, num_kept, num_kept_edges), mask=lane < 2)

    first = tl.load(cu_seqlens_ptr + lane, mask=lane <= num_sequences, other=0).to(tl.int64)
    new_first = tl.load(scan_ptr + first, mask=lane <= num_sequences, other=0) >> HALF
    tl.store(new_cu_seqlens_ptr + lane, new_first, mask=lane <= num_sequences)

    kept = tl.load(kept_ptr + lane, mask=lane < num_ngrams, other=0) != 0
    before = tl.load(scan_ptr + lane, mask=kept, other=0)
    number, edge = before >> HALF, before & LOWER_HALF
    tl.store(new_ids_ptr + number, tl.load(ids_ptr + lane, mask=kept, other=0), mask=kept)
    tl.store(new_offsets_ptr + number, edge, mask=kept)
    start = tl.load(offsets_ptr + lane, mask=kept, other=0).to(tl.int64)
    end = tl.load(offsets_ptr + (lane + 1), mask=kept, other=0).to(tl.int64)
    for k in range(tl.max(end - start)):
        inside = start + k < end
        tl.store(new_tokens_ptr + (edge + k), tl.load(tokens_ptr + (start + k), mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_edges"])
def _compact_tokens_kernel(
    kept_ptr, scan_ptr, offsets_ptr, ngrams_ptr, new_offsets_ptr, new_ngrams_ptr, num_tokens, num_edges,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The edges of each token that lead to survivors, with the survivors' new numbers."""
    lane = _block(BLOCK)
    num_kept_edges = tl.load(new_offsets_ptr + num_tokens)
    tl.store(new_ngrams_ptr + lane, tl.zeros_like(lane), mask=(lane >= num_kept_edges) & (lane < num_edges))
    exists = lane < num_tokens
    start = tl.load(offsets_ptr + lane, mask=exists, other=0).to(tl.int64)
    end = tl.load(offsets_ptr + (lane + 1), mask=exists, other=0).to(tl.int64)
    new_edge = tl.load(new_offsets_ptr + lane, mask=exists, other=0).to(tl.int64)
    for k in range(tl.max(end - start)):
        ngram = tl.load(ngrams_ptr + (start + k), mask=start + k < end, other=0).to(tl.int64)
        kept = tl.load(kept_ptr + ngram, mask=start + k < end, other=0) != 0
        number = tl.load(scan_ptr + ngram, mask=kept, other=0) >> HALF
        tl.store(new_ngrams_ptr + new_edge, number, mask=kept)
        new_edge += kept.to(tl.int64)


def mask_ngrams(
    drawn: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    edges: NgramEdges,
    whole_ngram: bool,
) -> list[torch.Tensor]:
    """The same as in `reference.py`, on the device, without a host synchronisation."""
    num_tokens, num_ngrams, num_edges = len(drawn), len(ngram_input_ids), len(edges.token_ngrams)
    num_sequences = len(ngram_cu_seqlens) - 1
    ids, cu_seqlens = ngram_input_ids.contiguous(), ngram_cu_seqlens.contiguous()
    by_token = edges.token_offsets.contiguous(), edges.token_ngrams.contiguous()
    by_ngram = edges.ngram_offsets.contiguous(), edges.ngram_tokens.contiguous()
    drawn = drawn.contiguous().view(torch.int8)

    def grid(num_rows: int) -> tuple[int]:
        return (max(1, triton.cdiv(num_rows, BLOCK)),)

    if whole_ngram:
        hit, masked = drawn.new_empty(num_ngrams), torch.empty_like(drawn)
        _any_kernel[grid(num_ngrams)](None, drawn, *by_ngram, hit, num_ngrams, BLOCK)
        _any_kernel[grid(num_tokens)](drawn, hit, *by_token, masked, num_tokens, BLOCK)
    else:
        masked = drawn.clone()  # operators must not return their inputs

    kept, scan = drawn.new_empty(num_ngrams), ids.new_empty(num_ngrams + 1, dtype=torch.int64)
    _survivors_kernel[grid(num_ngrams + 1)](masked, *by_ngram, cu_seqlens, kept, scan, num_ngrams, num_sequences, BLOCK)
    scan = scan.cumsum(0)
    new_ids, new_cu_seqlens, new_offsets, new_tokens = map(torch.empty_like, (ids, cu_seqlens, *by_ngram))
    counts = drawn.new_empty(2, dtype=torch.int32)
    _compact_ngrams_kernel[grid(max(num_ngrams, num_edges, num_sequences) + 1)](
        kept, scan, ids, cu_seqlens, *by_ngram, new_ids, new_cu_seqlens, new_offsets, new_tokens, counts,
        num_ngrams, num_sequences, num_edges, BLOCK,
    )  # fmt: skip

    token_counts, new_ngrams = map(torch.empty_like, by_token)
    _token_counts_kernel[grid(num_tokens + 1)](kept, *by_token, token_counts, num_tokens, BLOCK)
    new_token_offsets = token_counts.cumsum(0, dtype=token_counts.dtype)
    _compact_tokens_kernel[grid(max(num_tokens, num_edges))](
        kept, scan, *by_token, new_token_offsets, new_ngrams, num_tokens, num_edges, BLOCK
    )
    return [
        masked.view(torch.bool), new_ids, new_cu_seqlens, new_token_offsets, new_ngrams, new_offsets, new_tokens, counts
    ]  # fmt: skip
