"""The contract of G-gram matching and its registration with PyTorch."""

from typing import NamedTuple, Optional

import torch

from dnazen_kernels._runtime import resolve_impl
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_matching.table import NgramTable


class NgramMatches(NamedTuple):
    """The G-grams of a packed batch of T tokens and B sequences: N G-grams, E (token, G-gram) edges.

    With a capacity of (G-grams, edges), N and E are that, and padding is behind what was found: G-grams of id 0 that
    belong to no sequence and have no edges, and behind the edges zeros. Two G-grams with 5 edges, at a capacity of (4,
    8):

        ngram_input_ids = [17, 4, 0, 0]         ngram_offsets = [0, 2, 5, 5, 5]
        ngram_cu_seqlens = [0, 2]               ngram_tokens = [1, 2, 2, 3, 4, 0, 0, 0]
        counts = [2, 5, 0, 0]
    """

    ngram_input_ids: torch.Tensor  # [N] int64
    ngram_cu_seqlens: torch.Tensor  # [B + 1] int32
    edges: NgramEdges  # int32
    counts: torch.Tensor  # [4] int32: G-grams, edges, G-grams cut by max_ngrams, G-grams cut by the capacity


def ngram_matching(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    table: NgramTable,
    max_ngrams: int | None = None,
    *,
    capacity: tuple[int, int] | None = None,
    impl: str = "auto",
) -> NgramMatches:
    """Find every place where a G-gram of the table occurs inside one sequence; paper section 2.2.

    Overlaps are allowed. A G-gram that occurs several times in a sequence is one G-gram with the union of its
    positions. Within a sequence the order is by first position, then by length.

    All implementations return the same integers. With a capacity the shapes follow from the arguments alone, so
    "triton" never waits for the device and a captured or compiled step can hold it. It launches 1 kernel, 3 sorts, 3
    scans, 5 binary searches and about 80 gathers and elementwise operations. `dnazen.batches.device` measures the
    capacity on the first epoch's batches, with room to spare, and makes a batch anew where `counts[3]` says that it was
    too small.

    Args:
        input_ids: `[T]` integers; special tokens may be among them, for no G-gram holds one. On the CPU they are
            checked to fit the table; on a device, one that does not belongs to no G-gram.
        cu_seqlens: `[B + 1]` integers, where each sequence starts; no G-gram reaches across. Its values are checked on
            the CPU only, for on a device that would cost a synchronisation.
        table: on the device of `input_ids`.
        max_ngrams: at most so many G-grams per sequence, the first in the order above; None for no limit.
        capacity: at most so many G-grams and edges in all. The longest run of first G-grams that fits is returned; the
            rest is counted. None for as many as there are, which "reference" alone can do and no compiler can trace.
        impl: "auto", "triton" or "reference".

    Raises:
        TypeError: `input_ids` or `cu_seqlens` is not of integers.
        ValueError: wrong shapes; a table on another device; `cu_seqlens` that does not describe `input_ids`; tokens
            that do not fit the table; a negative limit or capacity; "triton" without a capacity; an unknown `impl`.
        RuntimeError: `impl="triton"` cannot run here.
    """
    # only the reference, which goes through the host, can tell how many there are
    impl = resolve_impl("reference" if capacity is None and impl == "auto" else impl, input_ids.device)
    if not torch.compiler.is_compiling():
        _check(input_ids, cu_seqlens, table, max_ngrams, capacity, impl)
    if capacity is not None:
        fields = table.keys, table.ids, table.prefilter, table.bits, table.hash_bits
        found = torch.ops.dnazen.ngram_matching(input_ids, cu_seqlens, *fields, max_ngrams, *capacity, impl)
    else:
        from dnazen_kernels.ngram_matching.reference import match_ngrams

        found = match_ngrams(input_ids, cu_seqlens, table, max_ngrams, None)
    ngram_input_ids, ngram_cu_seqlens, *edges, counts = found
    return NgramMatches(ngram_input_ids, ngram_cu_seqlens, NgramEdges(*edges), counts)


@torch.library.custom_op("dnazen::ngram_matching", mutates_args=())
def _ngram_matching(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keys: torch.Tensor,
    ids: torch.Tensor,
    prefilter: torch.Tensor,
    bits: int,
    hash_bits: int,
    max_ngrams: Optional[int],  # noqa: UP045, what infer_schema of older PyTorch reads
    num_ngrams: int,
    num_edges: int,
    impl: str,
) -> list[torch.Tensor]:
    if impl == "triton":
        from dnazen_kernels.ngram_matching.triton_impl import match_ngrams
    else:
        from dnazen_kernels.ngram_matching.reference import match_ngrams
    table = NgramTable(keys, ids, prefilter, bits, hash_bits)
    with torch.cuda.device_of(input_ids):
        return match_ngrams(input_ids, cu_seqlens, table, max_ngrams, (num_ngrams, num_edges))


@_ngram_matching.register_fake
def _(input_ids, cu_seqlens, keys, ids, prefilter, bits, hash_bits, max_ngrams, num_ngrams, num_edges, impl):
    sizes = len(cu_seqlens), len(input_ids) + 1, num_edges, num_ngrams + 1, num_edges, 4
    return [ids.new_empty(num_ngrams), *(ids.new_empty(size, dtype=torch.int32) for size in sizes)]


def _check(input_ids, cu_seqlens, table, max_ngrams, capacity, impl) -> None:
    for name, tensor in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be of integers, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(tensor.shape)}")
        if tensor.device != table.keys.device:
            raise ValueError(f"{name} must be on {table.keys.device} like the table, got {tensor.device}")
    if max_ngrams is not None and max_ngrams < 0:
        raise ValueError(f"max_ngrams must not be negative, got {max_ngrams}")
    if capacity is not None and min(capacity) < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    if capacity is None and impl == "triton":
        raise ValueError("capacity must be (G-grams, edges) for impl='triton', got None")
    if input_ids.device.type == "cpu":
        tokens, starts = input_ids.numpy(), cu_seqlens.numpy()
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(tokens) or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"cu_seqlens must rise from 0 to {len(tokens)}, got {starts.tolist()[:8]}...")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << table.bits:
            raise ValueError(f"input_ids must lie in [0, {1 << table.bits}), got {tokens.min()} to {tokens.max()}")
