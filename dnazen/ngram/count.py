"""The two passes of G-gram extraction over the tokens: pairs of neighbours, then runs of linked ones.

Some pairs of tokens are *linked*: they belong together (`dnazen.ngram.links`). Between two neighbours that are not
linked goes a *delimiter*. With ab, bc and de linked:

    sequence    a b c d e f
    delimiters  a b c|d e|f
    pieces      abc, de        two tokens or more between delimiters: the candidates
    runs        ab, bc, abc, de    two tokens or more in a row within a piece

A candidate is counted wherever it is a run: if ab is a piece elsewhere, its occurrence in abc counts too.

Both passes stream over blocks of whole sequences, in this process or in several, on the CPU or on a GPU. All counts
are integers, so the result is the same. Counts of different sequences add up: `PairCounts` by `+`, `Runs` by
`merge_runs`.
"""

import mmap
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dnazen.files import InputError
from dnazen.processes import call_forked, cut_blocks, fork_pool
from dnazen_kernels.ngram_matching.table import LENGTH_SHIFT

Shard = tuple[np.ndarray, np.ndarray]  # tokens, and the offsets [n + 1] of its sequences
Block = tuple[int, int, int]  # shard, first sequence, end of sequences
BLOCK_TOKENS = 1 << 20  # temporary arrays take some 50 MiB, and stay where memory need not be asked for anew


class PairCounts(NamedTuple):
    """How often each token occurs, and each pair of neighbours.

    With 3 bits a token, the pair of tokens 5 and 2 is counted at code `5 << 3 | 2 = 42`.
    """

    tokens: np.ndarray  # int64 [2 ** bits]
    pairs: np.ndarray  # int64 [2 ** (2 * bits)], by code: first token << bits | second


class Runs(NamedTuple):
    """Distinct runs, and what was seen of each.

    Runs of two tokens are here only if they are candidates, and with a count of 0: the first pass has counted pairs.
    In the module's example: abc (count 1, a candidate) and de (count 0, a candidate); with `max_len` 2, de alone.
    """

    keys: torch.Tensor  # int64, rising; as in the table that matching uses
    counts: torch.Tensor  # int64, occurrences anywhere
    are_candidates: torch.Tensor  # bool: also found as a whole piece, or as what a long one was split into


NO_RUNS = Runs(*(torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool)))


class _Job(NamedTuple):
    """Sequences to look at, and with what."""

    shards: Sequence[Shard]
    bits: int  # of a token
    num_workers: int
    device: torch.device


def token_size(token_counts: np.ndarray) -> int:
    """Bits of a token in codes and keys, from the size of a table of all tokens."""
    return (len(token_counts) - 1).bit_length()


def count_pairs(
    shards: Sequence[Shard],
    *,
    vocab_size: int,
    bits: int,
    num_workers: int = 1,
    device: str = "cpu",
) -> PairCounts:
    """Count tokens and pairs of neighbours, none of them across a sequence's end.

    Memory: two tables of 2 ** (2 * bits) int64 (128 MiB each for 4,096 tokens), one of them shared by all workers; a
    block per worker.

    Raises:
        InputError: a token id not below `vocab_size`; no CUDA device; several workers on one.
    """
    totals = PairCounts(_shared_zeros(1 << bits), _shared_zeros(1 << 2 * bits))
    lock = multiprocessing.get_context("fork").Lock()
    job = _Job(shards, bits, num_workers, _pick_device(device, num_workers))
    for _ in _work_through(job, "counting pairs", _count_pairs, vocab_size, totals, lock):
        pass
    return totals


def count_runs(
    shards: Sequence[Shard],
    *,
    linked_pairs: np.ndarray,
    bits: int,
    min_len: int,
    max_len: int,
    long_pieces: str,
    num_workers: int = 1,
    device: str = "cpu",
) -> tuple[Runs, np.ndarray]:
    """Find the runs of `min_len` to `max_len` tokens, and which of them are candidates.

    Memory: 16 MiB for 4,096 tokens and a block per worker, and some 70 bytes for each distinct run.

    Args:
        linked_pairs: codes of pairs, as in `PairCounts`.
        long_pieces: "drop" pieces longer than `max_len`, or "split" them from the left: abcdefg into abcde and fg.

    Returns:
        The runs, and how many pieces have each length, int64 `[max_len + 2]`: entry n counts those of n tokens, the
        last entry all that are longer than `max_len`.

    Raises:
        InputError: no CUDA device; several workers on one.
    """
    linked = torch.zeros(1 << 2 * bits, dtype=torch.bool)
    linked[torch.from_numpy(linked_pairs)] = True
    found, num_pieces = [], np.zeros(max_len + 2, np.int64)
    job = _Job(shards, bits, num_workers, _pick_device(device, num_workers))
    arguments = linked, min_len, max_len, long_pieces == "split"
    for arrays, histogram in _work_through(job, "counting candidates", _count_runs, *arguments):
        _append_runs(found, Runs(*map(torch.from_numpy, arrays)))
        num_pieces += histogram
    return merge_runs(found) if len(found) > 1 else found[0], num_pieces


def merge_runs(found: Sequence[Runs]) -> Runs:
    """Each run once, in order: counts are added, and what is a candidate in one of `found` is a candidate."""
    keys, counts, are_candidates = map(torch.cat, zip(*found, strict=True))
    keys, places = keys.unique(return_inverse=True)
    return Runs(
        keys,
        torch.zeros_like(keys).scatter_add_(0, places, counts),
        torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, places[are_candidates], True),
    )


def read_slice(array: np.ndarray, first: int, end: int) -> np.ndarray:
    """`array[first:end]`; of a file, through a map of its own.

    The pages of a map that stays would all count as this process' memory in the end.
    """
    if first < end and isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):  # not a part of one
        return np.memmap(array.filename, array.dtype, "r", array.offset + first * array.itemsize, end - first)
    return array[first:end]


def find_pieces(linked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each piece begins and how many tokens it has, in order.

    For the module's example, `[True, True, False, True, False]` gives starts `[0, 3]` and sizes `[3, 2]`.

    Args:
        linked: bool `[n - 1]` for n tokens; False where a delimiter goes between token i and i + 1.
    """
    borders = torch.nn.functional.pad(linked.to(torch.int8), (1, 1)).diff()
    starts, ends = (borders == 1).nonzero()[:, 0], (borders == -1).nonzero()[:, 0]
    return starts, ends - starts + 1


def _pick_device(name: str, num_workers: int) -> torch.device:
    """The device called "cpu" or "cuda"."""
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu or cuda, found {name}")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise InputError("device: expected a CUDA device for cuda, found none that PyTorch can use; take cpu")
    if num_workers > 1:
        expected = "1 with device cuda (a shard for each of several GPUs: `dnazen ngrams count`)"
        raise InputError(f"num_workers: expected {expected}, found {num_workers}")
    return torch.device(name)


def _iterate_blocks(shards: Sequence[Shard]) -> Iterator[Block]:
    for number, (_, offsets) in enumerate(shards):
        yield from ((number, first, end) for first, end in cut_blocks(offsets, BLOCK_TOKENS))


def encode_pairs(tokens: torch.Tensor, offsets: np.ndarray, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes `[n - 1]` of the pairs of neighbours among n tokens, and which of them reach across a sequence's end.

    Args:
        tokens: int64 `[n]`.
        offsets: `[s + 1]`: where each of s sequences starts; the first need not be at 0.
    """
    across = np.unique(offsets - offsets[0])[1:-1].astype(np.int64) - 1
    return torch.add(tokens[1:], tokens[:-1], alpha=1 << bits), torch.from_numpy(across).to(tokens.device)


def add_pairs(
    token_counts: torch.Tensor,
    pair_counts: torch.Tensor,
    tokens: torch.Tensor,
    codes: torch.Tensor,
    across: torch.Tensor,
) -> None:
    """Add tokens and pairs, as `encode_pairs` has them, to tables as those of `PairCounts`."""
    token_counts += torch.bincount(tokens, minlength=len(token_counts))
    pair_counts.scatter_add_(0, codes, torch.ones_like(codes))
    pair_counts.scatter_add_(0, codes[across], torch.full_like(across, -1))


def _load_block(job: _Job, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's tokens, and of its pairs what `encode_pairs` says."""
    tokens, offsets = job.shards[block[0]]
    offsets = offsets[block[1] : block[2] + 1]
    tokens = torch.from_numpy(read_slice(tokens, int(offsets[0]), int(offsets[-1])).astype(np.int64)).to(job.device)
    return tokens, *encode_pairs(tokens, offsets, job.bits)


def _count_pairs(blocks, job, vocab_size, totals, lock):
    """Add a share's counts to those that all workers share."""
    token_counts, pair_counts = (torch.zeros(len(table), dtype=torch.int64, device=job.device) for table in totals)
    for block in blocks:
        tokens, codes, across = _load_block(job, block)
        if len(tokens) and int(tokens.max()) >= vocab_size:
            offsets = job.shards[block[0]][1]
            where = f"shard {block[0]}, tokens {offsets[block[1]]} to {offsets[block[2]] - 1}"
            raise InputError(f"{where}: expected token ids below {vocab_size}, found {tokens.max()}")
        add_pairs(token_counts, pair_counts, tokens, codes, across)
    with lock:
        for total, own in zip(totals, (token_counts, pair_counts), strict=True):
            total += own.cpu().numpy()


def _count_runs(blocks, job, linked, min_len, max_len, split):
    """The arrays of a share's runs, and how many pieces there are by length, as `count_runs` returns them."""
    linked = linked.to(job.device)
    is_candidate = torch.zeros_like(linked)
    histogram = torch.zeros(max_len + 2, dtype=torch.int64, device=job.device)
    found = [Runs(*(array.to(job.device) for array in NO_RUNS))]
    for block in blocks:
        tokens, codes, across = _load_block(job, block)
        links = linked.index_select(0, codes)
        links[across] = False
        starts, sizes = find_pieces(links)
        histogram += torch.bincount(sizes.clamp(max=max_len + 1), minlength=len(histogram))
        if split:  # with max_len 5, a piece of 7 tokens that starts at 3 becomes one of 5 at 3 and one of 2 at 8
            times = -(-sizes // max_len)
            order = torch.arange(int(times.sum()), device=job.device)
            before = max_len * (order - (times.cumsum(0) - times).repeat_interleave(times))
            starts = starts.repeat_interleave(times) + before
            sizes = (sizes.repeat_interleave(times) - before).clamp(max=max_len)
        if min_len == 2:
            is_candidate[codes[starts[sizes == 2]]] = True
        follows = torch.nn.functional.pad(links, (0, 1))
        places, more = (follows[:-1] & follows[1:]).nonzero()[:, 0], []  # where three tokens or more are linked
        for n in range(3, max_len + 1):
            if n >= min_len:
                pieces = _pack(tokens, starts[sizes == n], n, job.bits)
                more.append(Runs(pieces, torch.zeros_like(pieces), torch.ones_like(pieces, dtype=torch.bool)))
                keys = _pack(tokens, places, n, job.bits)
                more.append(Runs(keys, torch.ones_like(keys), torch.zeros_like(keys, dtype=torch.bool)))
            places = places[follows[places + n - 1]]  # those with one more token linked
        _append_runs(found, *more)
    pairs = is_candidate.nonzero()[:, 0] | 2 << LENGTH_SHIFT
    found.append(Runs(pairs, torch.zeros_like(pairs), torch.ones_like(pairs, dtype=torch.bool)))
    return [array.cpu().numpy() for array in merge_runs(found)], histogram.cpu().numpy()


def _append_runs(found: list[Runs], *more: Runs) -> None:
    """Add runs to a list, and merge it when the new ones outgrow the first: all merges together cost as a few."""
    found.extend(more)
    if sum(len(runs.keys) for runs in found[1:]) > len(found[0].keys):
        found[:] = [merge_runs(found)]


def _pack(tokens: torch.Tensor, starts: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """Keys of the runs of `length` tokens that begin at `starts`."""
    keys = torch.full_like(starts, length << (LENGTH_SHIFT - length * bits))
    for k in range(length):
        keys = keys << bits | tokens[starts + k]
    return keys


def _work_through(job: _Job, what: str, function: Callable, *arguments: Any) -> Iterator[Any]:
    """Yield `function(blocks, job, *arguments)`, or that over a share of the blocks in each of several processes.

    The processes' results come in no particular order. A process uses one core.
    """
    blocks = list(_iterate_blocks(job.shards))
    shares = [blocks[i :: job.num_workers] for i in range(max(1, min(job.num_workers, len(blocks))))]
    tokens_done = _shared_zeros(len(shares))
    total, num_threads = _count_tokens(blocks, job.shards), torch.get_num_threads()
    with tqdm(desc=what, unit=" tokens", unit_scale=True, total=total, disable=None) as progress:

        def show() -> None:
            progress.update(int(tokens_done.sum()) - progress.n)

        def call(share: int) -> Any:
            def watch() -> Iterator[Block]:
                for block in shares[share]:
                    yield block
                    tokens_done[share] += _count_tokens([block], job.shards)
                    if len(shares) == 1:
                        show()

            return function(watch(), job, *arguments)

        torch.set_num_threads(1)
        try:
            if len(shares) == 1:
                yield call(0)
                return
            with fork_pool(call, len(shares)) as pool:
                waiting = {pool.submit(call_forked, share) for share in range(len(shares))}
                while waiting:
                    ended, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_COMPLETED)
                    show()
                    while ended:
                        yield ended.pop().result()
        finally:
            torch.set_num_threads(num_threads)


def _count_tokens(blocks: Iterable[Block], shards: Sequence[Shard]) -> int:
    return sum(int(shards[shard][1][end] - shards[shard][1][first]) for shard, first, end in blocks)


def _shared_zeros(size: int) -> np.ndarray:
    """int64 `[size]` that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, 8 * size), np.int64)
