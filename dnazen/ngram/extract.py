"""G-gram extraction: frequent runs of tokens that are tied by pointwise mutual information; paper section 2.1.

A delimiter goes between two neighbours whose pair is rare or has a low PMI; other pairs are linked. The runs between
delimiters are the candidates. Whether a pair is linked depends on its two tokens alone, so every occurrence of a
candidate lies in a run of linked pairs, and after the pairs are counted only such runs need a look.
Everything streams over blocks of whole sequences, in two passes: pairs; then candidates, together with the occurrences
of all that could be one. A candidate of two tokens occurs as often as its pair, which the first pass has counted.
"""

import collections
import functools
import mmap
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from dnazen_kernels.ngram_matching import ngram_matching
from dnazen_kernels.ngram_matching.table import LENGTH_SHIFT, pack_ngrams, token_bits
from tqdm import tqdm

from dnazen.data.tokenizer import save_tokenizer, tokenizer_checksum
from dnazen.data.workers import call_forked, fork_pool
from dnazen.files import InputError, atomic_directory, sha256_file, write_json
from dnazen.ngram.vocab import MANIFEST_FILE, NGRAM_FILE, NgramVocabulary

Shard = tuple[np.ndarray, np.ndarray]  # tokens, and the offsets [n + 1] of its sequences
Block = tuple[int, int, int]  # shard, first sequence, end of sequences
BLOCK_TOKENS = 1 << 22  # temporary arrays take some 200 MiB


@dataclass
class NgramExtraction:
    """Extracted G-grams in the order of their ids (1, 2, ...), and what was seen on the way."""

    ngrams: list[tuple[int, ...]]
    counts: list[int]  # occurrences anywhere in the corpus, overlaps counted
    pmis: list[float]  # bits; of the weakest pair of neighbours
    num_tokens: int
    num_pairs: int
    num_linked_pairs: int  # distinct
    num_candidates: int
    num_pieces: dict[int, int]  # runs between delimiters by length in tokens, 2 to max_len
    num_long_pieces: int  # longer runs: dropped or split


def extract_ngrams(
    shards: Sequence[Shard],
    *,
    vocab_size: int,
    min_pmi: float = 2.0,
    min_count: int = 5,
    min_pair_count: int = 5,
    min_len: int = 2,
    max_len: int = 5,
    long_pieces: str = "drop",
    num_workers: int = 1,
) -> NgramExtraction:
    """Extract the G-grams of a corpus; the result does not depend on `num_workers` or on how shards are cut.

    `pmi(a, b) = log2 p(ab) - log2 p(a) - log2 p(b)` in fp64, with p(ab) the pair's share of all pairs of neighbours
    and p(a) the token's share of all tokens. Memory: two tables of vocab_size^2 int64 (128 MiB each for 4,096 tokens),
    one of them shared by all workers; a block per worker; and some 50 bytes for each distinct run of 3 to `max_len`
    tokens whose pairs are all linked. The tokens themselves are mapped block by block.

    Args:
        shards: tokens (no special ones) and offsets of the sequences; nothing reaches across a sequence's end.
        vocab_size: number of BPE tokens.
        min_pmi: bits; a pair below it gets a delimiter, as does one seen fewer than `min_pair_count` times.
        min_count: candidates with fewer occurrences are dropped.
        min_len, max_len: of a G-gram, in tokens.
        long_pieces: "drop" runs longer than `max_len`, or "split" them from the left into pieces of `max_len`; what
            is left over is a candidate too unless shorter than `min_len`.

    Raises:
        InputError: an argument out of range; no sequence; a token id not below `vocab_size`.
    """
    if not 2 <= min_len <= max_len <= 5:
        raise InputError(f"min_len and max_len: expected 2 <= min_len <= max_len <= 5, found {min_len} and {max_len}")
    if long_pieces not in ("drop", "split"):
        raise InputError(f"long_pieces: expected 'drop' or 'split', found {long_pieces!r}")
    blocks = list(_iterate_blocks(shards))
    positive = {"min_count": min_count, "min_pair_count": min_pair_count, "num_workers": num_workers}
    for name, value in {**positive, "number of sequences": len(blocks)}.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")
    try:
        bits = token_bits(vocab_size, max_len)
    except ValueError as error:
        raise InputError(str(error)) from error

    run = functools.partial(_run, blocks, num_workers, shards)
    token_counts, pair_counts = _shared_zeros(1 << bits), _shared_zeros(1 << 2 * bits)
    lock = multiprocessing.get_context("fork").Lock()
    collections.deque(run("counting pairs", _count_pairs, vocab_size, bits, token_counts, pair_counts, lock), maxlen=0)
    num_tokens, num_pairs = int(token_counts.sum()), int(pair_counts.sum())

    pairs = np.flatnonzero(pair_counts >= min_pair_count)
    log_p = [np.log2(token_counts[tokens] / num_tokens) for tokens in (pairs >> bits, pairs & ((1 << bits) - 1))]
    pmis = np.log2(pair_counts[pairs] / num_pairs) - log_p[0] - log_p[1]
    pairs, pmis = pairs[pmis >= min_pmi], pmis[pmis >= min_pmi]
    linked = np.zeros(len(pair_counts), bool)
    linked[pairs] = True

    is_candidate = np.zeros(len(pair_counts), bool)
    num_pieces, runs = np.zeros(max_len + 2, np.int64), _NO_RUNS
    for candidates, more_runs, histogram in run(
        "counting candidates", _count_runs, linked, bits, min_len, max_len, long_pieces == "split"
    ):
        is_candidate[candidates] = True
        runs = _merge_runs([runs, more_runs])
        num_pieces += histogram
    candidates = np.flatnonzero(is_candidate)
    keys = np.concatenate((candidates | 2 << LENGTH_SHIFT, runs.keys[runs.are_candidates]))
    counts = np.concatenate((pair_counts[candidates], runs.counts[runs.are_candidates]))
    num_candidates, num_pieces = len(keys), num_pieces.tolist()

    keys, counts = keys[counts >= min_count], counts[counts >= min_count]
    missing = np.arange(max_len) >= (keys >> LENGTH_SHIFT)[:, None]
    shifts = bits * ((keys >> LENGTH_SHIFT)[:, None] - 1 - np.arange(max_len))
    # -1 after the end sorts a G-gram before those that it begins.
    tokens = np.where(missing, -1, keys[:, None] >> np.where(missing, 0, shifts) & ((1 << bits) - 1))
    of_pair = np.searchsorted(pairs, np.where(missing[:, 1:], 0, tokens[:, :-1] << bits | tokens[:, 1:]))
    ngram_pmis = np.where(missing[:, 1:], np.inf, pmis[of_pair] if len(pmis) else np.inf).min(1)
    order = np.lexsort((*tokens.T[::-1], -counts))
    return NgramExtraction(
        ngrams=[tuple(token for token in row if token >= 0) for row in tokens[order].tolist()],
        counts=counts[order].tolist(),
        pmis=ngram_pmis[order].tolist(),
        num_tokens=num_tokens,
        num_pairs=num_pairs,
        num_linked_pairs=len(pairs),
        num_candidates=num_candidates,
        num_pieces=dict(enumerate(num_pieces[2:-1], 2)),
        num_long_pieces=num_pieces[-1],
    )


def find_pieces(linked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of each maximal run of two or more tokens without a delimiter, in order.

    Args:
        linked: bool `[n - 1]` for n tokens; False where a delimiter goes between token i and i + 1.
    """
    links = np.flatnonzero(linked)
    breaks = np.flatnonzero(np.diff(links) != 1)
    starts, ends = links[np.append(0, breaks + 1)[: len(links)]], links[np.append(breaks, -1)[: len(links)]]
    return starts, ends - starts + 2


def build_ngrams(corpus: Any, output_dir: str | PathLike, **parameters: Any) -> dict[str, Any]:
    """Extract the G-grams of a corpus' training split and write `ngram.json`, `ngrams.tsv`, `manifest.json` and the
    tokenizer.

    `corpus` is a `dnazen.data.shards.Corpus`; `parameters` are those of `extract_ngrams`. Returns the manifest.

    Raises:
        InputError: `output_dir` is taken; no G-gram passes the thresholds; see `extract_ngrams`.
    """
    start = time.perf_counter()
    tokenizer = corpus.tokenizer
    parameters = {**extract_ngrams.__kwdefaults__, **parameters}
    with atomic_directory(output_dir) as directory:
        extraction = extract_ngrams(corpus.train.shards, vocab_size=len(tokenizer), **parameters)
        seconds = round(time.perf_counter() - start, 3)
        statistics = asdict(extraction)
        ngrams, counts, pmis = (statistics.pop(name) for name in ("ngrams", "counts", "pmis"))
        if not ngrams:
            now = "--min-pair-count {min_pair_count} --min-count {min_count} --min-pmi {min_pmi}".format(**parameters)
            raise InputError(
                f"{corpus.path}: none of {extraction.num_candidates:,} candidates from {extraction.num_tokens:,} tokens"
                " is a G-gram. In a small genome a pair of tokens is seldom seen: lower a threshold of `dnazen ngrams` "
                f"(now {now}), or make pairs more frequent with fewer tokens (`dnazen tokenizer --vocab-size 256`)"
            )
        lengths = [len(ngram) for ngram in ngrams]
        statistics["num_ngrams"] = len(ngrams)
        statistics["num_ngrams_by_length"] = {n: lengths.count(n) for n in sorted(set(lengths))}
        vocabulary = NgramVocabulary(ngrams, list(range(1, len(ngrams) + 1)))
        statistics["ngrams_per_sequence"], statistics["covered_tokens"] = measure_density(vocabulary, corpus)
        vocabulary.save_pretrained(directory, tokenizer)
        save_tokenizer(tokenizer, directory)
        with open(directory / "ngrams.tsv", "w") as file:
            file.write("id\ttokens\tbases\tlength\tcount\tpmi\n")
            for ngram_id, (ngram, count, pmi) in enumerate(zip(ngrams, counts, pmis, strict=True), 1):
                tokens = tokenizer.convert_ids_to_tokens(ngram)
                file.write(f"{ngram_id}\t{' '.join(tokens)}\t{''.join(tokens)}\t{len(ngram)}\t{count}\t{pmi:.4f}\n")
        manifest = {
            "parameters": parameters,
            "corpus_checksum": corpus.checksum,
            "tokenizer_checksum": tokenizer_checksum(tokenizer),
            "ngram_json_sha256": sha256_file(directory / NGRAM_FILE),
            "statistics": statistics,
            "seconds": seconds,
        }
        write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def measure_density(vocabulary: NgramVocabulary, corpus: Any, max_sequences: int = 1000) -> tuple[float, float]:
    """Mean number of G-grams matched in a training sequence, and the share of its tokens that they cover.

    Looks at the first `max_sequences` sequences.
    """
    sequences = [corpus.train[index] for index in range(min(max_sequences, len(corpus.train)))]
    cu_seqlens = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    tokens = torch.from_numpy(np.concatenate(sequences))
    matches = ngram_matching(tokens, torch.from_numpy(cu_seqlens), vocabulary.table(len(corpus.tokenizer)))
    covered = int(matches.token_offsets.diff().count_nonzero())
    return round(len(matches.ngram_input_ids) / len(sequences), 2), round(covered / int(cu_seqlens[-1]), 4)


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of an extraction, in lines of text."""
    statistics, parameters, seconds = (manifest[name] for name in ("statistics", "parameters", "seconds"))
    tokens, candidates, kept = (statistics[name] for name in ("num_tokens", "num_candidates", "num_ngrams"))
    rare, lengths = f"{candidates - kept:,} too rare", statistics["num_ngrams_by_length"]
    return "\n".join(
        [
            f"tokens      {tokens:,} in {seconds:.2f} s ({tokens / max(seconds, 1e-3) / 1e6:.1f} M tokens/s)",
            f"candidates  {candidates:,}: {kept:,} kept, {rare}",
            f"long runs   {statistics['num_long_pieces']:,} of more than {parameters['max_len']} tokens "
            f"({parameters['long_pieces']})",
            f"density     {statistics['ngrams_per_sequence']} G-grams in a sequence, over "
            f"{100 * statistics['covered_tokens']:.1f} % of its tokens",
            *(f"G-grams     {number:,} of {length} tokens" for length, number in lengths.items()),
        ]
    )


def _iterate_blocks(shards: Sequence[Shard]) -> Iterator[Block]:
    for number, (_, offsets) in enumerate(shards):
        first = 0
        while first < len(offsets) - 1:
            end = int(np.searchsorted(offsets, offsets[first] + BLOCK_TOKENS, side="right")) - 1
            yield number, first, max(end, first + 1)
            first = max(end, first + 1)


def _load_block(shards: Sequence[Shard], block: Block, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A block's tokens, the codes of its pairs of neighbours, and which pairs reach across a sequence's end."""
    tokens, offsets = shards[block[0]]
    offsets = offsets[block[1] : block[2] + 1]
    first, size = int(offsets[0]), int(offsets[-1] - offsets[0])
    if size and isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):  # a file's, not a part of one
        # A map of its own: the pages of one that stays would all count as this process' memory in the end.
        place = tokens.offset + first * tokens.itemsize
        tokens = np.asarray(np.memmap(tokens.filename, tokens.dtype, "r", place, size))
    else:
        tokens = np.asarray(tokens[first : first + size])
    codes = tokens[:-1].astype(np.int64)
    codes <<= bits
    codes |= tokens[1:]
    across = np.unique(offsets - offsets[0]) - 1
    return tokens, codes, across[1:-1]


def _count_pairs(blocks, shards, vocab_size, bits, token_counts, pair_counts, lock):
    """Add a share's counts to those that all workers share."""
    own_tokens, own_pairs = np.zeros_like(token_counts), np.zeros_like(pair_counts)
    for block in blocks:
        tokens, codes, across = _load_block(shards, block, bits)
        if len(tokens) and tokens.max() >= vocab_size:
            where = f"shard {block[0]}, sequences {block[1]} to {block[2] - 1}"
            raise InputError(f"{where}: expected token ids below {vocab_size}, found {tokens.max()}")
        own_tokens += np.bincount(tokens, minlength=len(own_tokens))
        np.add.at(own_pairs, codes, 1)
        np.subtract.at(own_pairs, codes[across], 1)
    with lock:
        token_counts += own_tokens
        pair_counts += own_pairs


class _Runs(NamedTuple):
    """Distinct runs of three or more tokens whose neighbours are all linked."""

    keys: np.ndarray  # int64, rising
    counts: np.ndarray  # int64, occurrences anywhere
    are_candidates: np.ndarray  # bool: found between two delimiters


_NO_RUNS = _Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


def _merge_runs(parts: Sequence[_Runs]) -> _Runs:
    keys, counts, are_candidates = (np.concatenate(arrays) for arrays in zip(*parts))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(firsts):
        return _NO_RUNS
    return _Runs(
        keys[firsts],
        np.add.reduceat(counts[order], firsts),
        np.logical_or.reduceat(are_candidates[order], firsts),
    )


def _count_runs(blocks, shards, linked, bits, min_len, max_len, split):
    """The pairs that are candidates, the longer runs, and how many pieces there are by length, all longer ones last."""
    is_candidate = np.zeros(len(linked), bool)
    histogram = np.zeros(max_len + 2, np.int64)
    found = [_NO_RUNS]
    for block in blocks:
        tokens, codes, across = _load_block(shards, block, bits)
        links = linked[codes]
        links[across] = False
        starts, sizes = find_pieces(links)
        histogram += np.bincount(np.minimum(sizes, max_len + 1), minlength=len(histogram))
        if split:
            parts = -(-sizes // max_len)
            done = max_len * (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts))
            starts, sizes = np.repeat(starts, parts) + done, np.minimum(np.repeat(sizes, parts) - done, max_len)
        if min_len == 2:
            is_candidate[codes[starts[sizes == 2]]] = True
        follows = np.append(links, False)
        places = np.flatnonzero(follows[:-1] & follows[1:])  # where three tokens or more are linked
        for n in range(3, max_len + 1):
            if n >= min_len:
                pieces = pack_ngrams(tokens, starts[sizes == n], n, bits)
                found.append(_Runs(pieces, np.zeros(len(pieces), np.int64), np.ones(len(pieces), bool)))
                keys = pack_ngrams(tokens, places, n, bits)
                found.append(_Runs(keys, np.ones(len(keys), np.int64), np.zeros(len(keys), bool)))
            places = places[follows[places + n - 1]]  # those with one more token linked
        # Merged when the new ones outgrow the old: all merges together cost as much as a few.
        if sum(len(runs.keys) for runs in found[1:]) > len(found[0].keys):
            found = [_merge_runs(found)]
    return np.flatnonzero(is_candidate), _merge_runs(found), histogram


def _run(
    blocks: list[Block], num_workers: int, shards: Sequence[Shard], what: str, function: Callable, *arguments: Any
) -> Iterator[Any]:
    """Yield `function(blocks, shards, *arguments)`, or that over a share of the blocks in each of several processes.

    In which order the processes' results come is left to chance.
    """
    shares = [blocks[i::num_workers] for i in range(min(num_workers, len(blocks)))]
    tokens_done = _shared_zeros(len(shares))
    with tqdm(desc=what, unit=" tokens", unit_scale=True, total=_count_tokens(blocks, shards)) as progress:

        def show() -> None:
            progress.update(int(tokens_done.sum()) - progress.n)

        def call(share: int) -> Any:
            def watch() -> Iterator[Block]:
                for block in shares[share]:
                    yield block
                    tokens_done[share] += _count_tokens([block], shards)
                    if len(shares) == 1:
                        show()

            return function(watch(), shards, *arguments)

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


def _count_tokens(blocks: Iterable[Block], shards: Sequence[Shard]) -> int:
    return sum(int(shards[shard][1][end] - shards[shard][1][first]) for shard, first, end in blocks)


def _shared_zeros(size: int) -> np.ndarray:
    """int64 `[size]` that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, 8 * size), np.int64)
