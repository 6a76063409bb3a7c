"""The look-up as a Triton kernel, and the rest of the matching as sorts and scans of static shape on the device.

A cell is one of the four lengths at one of the positions; there is one position more than there are tokens, with
nothing in it, so that no tensor below is empty. Some twenty int64 tensors of one entry per cell are
alive at the most, so it takes about 1 KiB of device memory per token while it runs.
"""

import torch
import triton
import triton.language as tl

from dnazen_kernels.ngram_matching.table import (
    FREE,
    HASH_MULTIPLIER,
    LENGTH_SHIFT,
    MAX_LENGTH,
    MIN_LENGTH,
    NgramTable,
)

BLOCK = 256  # positions per program
NUM_LENGTHS = MAX_LENGTH - MIN_LENGTH + 1
CONSTANTS = {"LENGTH_SHIFT": LENGTH_SHIFT, "HASH_MULTIPLIER": HASH_MULTIPLIER, "FREE": FREE}
NONE = 2**63 - 1  # sorts behind every G-gram


@triton.jit(do_not_specialize=["num_positions"])
def _look_up_kernel(
    tokens_ptr, ends_ptr, prefilter_ptr, keys_ptr, slots_ptr, num_positions, prefilter_size, bits, hash_bits,
    LENGTH_SHIFT: tl.constexpr, HASH_MULTIPLIER: tl.constexpr, FREE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slots[position, length - 2]: where in the table the G-gram of that length lies that starts there; -1 for none."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    room = tl.load(ends_ptr + position, mask=position < num_positions, other=0) - position  # to the sequence's end
    tokens = tl.load(tokens_ptr + position, mask=room >= 1, other=0).to(tl.int64)
    valid = tokens >> bits == 0
    lengths = tl.zeros_like(position)
    for length in tl.static_range(2, 6):
        token = tl.load(tokens_ptr + (position + length - 1), mask=room >= length, other=0).to(tl.int64)
        valid &= token >> bits == 0
        tokens = tokens << bits | token
        if length == 2:
            pair = tokens & (prefilter_size - 1)
            lengths = tl.load(prefilter_ptr + pair, mask=valid & (room >= 2), other=0).to(tl.int64)
        key = tokens | (length << LENGTH_SHIFT)
        pending = valid & (room >= length) & (lengths >> length & 1 != 0)
        slot = (key * HASH_MULTIPLIER) >> (64 - hash_bits) & ((1 << hash_bits) - 1)
        found = tl.full([BLOCK], -1, tl.int64)
        while tl.max(pending.to(tl.int32)) > 0:
            entry = tl.load(keys_ptr + slot, mask=pending, other=FREE)
            found = tl.where(pending & (entry == key), slot, found)
            pending &= (entry != key) & (entry != FREE)
            slot += 1
        tl.store(slots_ptr + (position * 4 + length - 2), found, mask=position < num_positions)


def match_ngrams(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    table: NgramTable,
    max_ngrams: int | None,
    capacity: tuple[int, int],
) -> list[torch.Tensor]:
    """The same as in `reference.py`, on the device, without a host synchronisation."""
    num_tokens, (num_ngrams, num_edges) = len(input_ids), capacity
    arange = torch.arange(NUM_LENGTHS * (num_tokens + 1) + num_ngrams + num_edges, device=input_ids.device)
    positions, cells = arange[: num_tokens + 1], arange[: NUM_LENGTHS * (num_tokens + 1)]
    rows, edges = arange[: num_ngrams + 1], arange[:num_edges]

    cu_seqlens = cu_seqlens.long()
    sequences = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    ends = cu_seqlens[(sequences + 1).clamp(max=len(cu_seqlens) - 1)]
    slots = torch.empty(len(cells), dtype=torch.int64, device=input_ids.device)
    _look_up_kernel[(triton.cdiv(len(positions), BLOCK),)](
        input_ids.contiguous(), ends, table.prefilter, table.keys, slots, len(positions), len(table.prefilter),
        table.bits, table.hash_bits, **CONSTANTS, BLOCK=BLOCK,
    )  # fmt: skip

    # The occurrences of one G-gram in one sequence are one; G-grams are in order of their first occurrence.
    sequences = sequences.repeat_interleave(NUM_LENGTHS)
    groups, order = torch.sort(torch.where(slots >= 0, sequences << 32 | slots, NONE), stable=True)
    is_first = _differs_from_previous(groups) & (groups != NONE)
    is_first = is_first.scatter(0, order, is_first)  # by cell
    found = _running_count(is_first)
    if max_ngrams is not None:
        is_first &= found[:-1] - found[cu_seqlens * NUM_LENGTHS][sequences] < max_ngrams
    wanted = _running_count(is_first)
    numbers = torch.where(is_first, wanted[:-1], NONE)
    numbers = torch.where(groups != NONE, numbers[order[torch.searchsorted(groups, groups)]], NONE)

    # Edges by G-gram: an occurrence adds only the tokens that the G-gram's previous one has not covered.
    numbers, by_number = torch.sort(numbers, stable=True)
    order = order[by_number]
    starts = order // NUM_LENGTHS
    ends = starts + order % NUM_LENGTHS + MIN_LENGTH
    starts = torch.where(_differs_from_previous(numbers), starts, torch.maximum(starts, ends.roll(1)))
    edges_before = _running_count(torch.where(numbers != NONE, ends - starts, 0))
    firsts = torch.searchsorted(numbers, rows)
    offsets = edges_before[firsts]

    # As many of the first G-grams as fit, with their edges.
    num_kept = ((rows <= wanted[-1]) & (offsets <= num_edges)).sum() - 1
    offsets = offsets[torch.minimum(rows, num_kept)]
    is_edge = edges < offsets[-1]
    occurrences = (torch.searchsorted(edges_before, edges, right=True) - 1).clamp(max=len(cells) - 1)
    tokens = torch.where(is_edge, starts[occurrences] + edges - edges_before[occurrences], num_tokens)
    sorted_tokens, by_token = torch.sort(tokens, stable=True)
    return [
        torch.where(rows[:-1] < num_kept, table.ids[slots[order[firsts[:-1]]]], 0),
        torch.minimum(wanted[cu_seqlens * NUM_LENGTHS], num_kept).int(),
        torch.searchsorted(sorted_tokens, positions, out_int32=True),
        torch.where(is_edge, numbers[occurrences][by_token], 0).int(),
        offsets.int(),
        torch.where(is_edge, tokens, 0).int(),
        torch.stack([num_kept, offsets[-1], found[-1] - wanted[-1], wanted[-1] - num_kept]).int(),
    ]


def _running_count(values: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, ..., n values."""
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))


def _differs_from_previous(values: torch.Tensor) -> torch.Tensor:
    """Bool: where a new value begins; True at the start."""
    return torch.nn.functional.pad(values[1:] != values[:-1], (1, 0), value=True)
