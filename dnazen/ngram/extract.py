"""G-gram extraction: frequent runs of tokens that are tied by pointwise mutual information; paper section 2.1.

A delimiter goes between two neighbours whose pair is rare or has a low PMI; other pairs are linked. The runs between
delimiters are the candidates. Whether a pair is linked depends on its two tokens alone, so every occurrence of a
candidate lies in a run of linked pairs, and after the pairs are counted only such runs need a look.
Everything streams over blocks of whole sequences, in three passes: pairs, candidates, occurrences.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from dnazen_kernels.ngram_matching import ngram_matching
from dnazen_kernels.ngram_matching.table import LENGTH_SHIFT, pack_ngrams, token_bits
from tqdm import tqdm

from dnazen.data.tokenizer import tokenizer_checksum
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
    and p(a) the token's share of all tokens. Memory: two tables of vocab_size^2 int64 and one block per worker, and
    the distinct candidates.

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
    (token_counts, pair_counts), *others = run("counting pairs", _count_pairs, vocab_size, bits)
    for more_tokens, more_pairs in others:
        token_counts += more_tokens
        pair_counts += more_pairs
    num_tokens, num_pairs = int(token_counts.sum()), int(pair_counts.sum())

    pairs = np.flatnonzero(pair_counts >= min_pair_count)
    log_p = [np.log2(token_counts[tokens] / num_tokens) for tokens in (pairs >> bits, pairs & ((1 << bits) - 1))]
    pmis = np.log2(pair_counts[pairs] / num_pairs) - log_p[0] - log_p[1]
    pairs, pmis = pairs[pmis >= min_pmi], pmis[pmis >= min_pmi]
    linked = np.zeros(len(pair_counts), bool)
    linked[pairs] = True

    parts = run("finding candidates", _collect_pieces, linked, bits, min_len, max_len, long_pieces == "split")
    candidates = np.unique(np.concatenate([keys for keys, _ in parts]))
    num_pieces = sum(histogram for _, histogram in parts).tolist()
    counts = sum(run("counting candidates", _count_occurrences, linked, bits, candidates, max_len))

    keys, counts = candidates[counts >= min_count], counts[counts >= min_count]
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
        num_candidates=len(candidates),
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
    """Extract the G-grams of a corpus' training split and write `ngram.json`, `ngrams.tsv` and `manifest.json`.

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
    tokens = np.asarray(tokens[offsets[0] : offsets[-1]])
    codes = tokens[:-1].astype(np.int64)
    codes <<= bits
    codes |= tokens[1:]
    across = np.unique(offsets - offsets[0]) - 1
    return tokens, codes, across[1:-1]


def _count_pairs(blocks, shards, vocab_size, bits):
    token_counts = np.zeros(1 << bits, np.int64)
    pair_counts = None
    for block in blocks:
        tokens, codes, across = _load_block(shards, block, bits)
        if len(tokens) and tokens.max() >= vocab_size:
            where = f"shard {block[0]}, sequences {block[1]} to {block[2] - 1}"
            raise InputError(f"{where}: expected token ids below {vocab_size}, found {tokens.max()}")
        token_counts += np.bincount(tokens, minlength=len(token_counts))
        more = np.bincount(codes, minlength=1 << 2 * bits)
        np.subtract.at(more, codes[across], 1)
        pair_counts = more if pair_counts is None else np.add(pair_counts, more, out=pair_counts)
    return token_counts, pair_counts


def _collect_pieces(blocks, shards, linked, bits, min_len, max_len, split):
    """The keys of the candidates, and how many runs there are by length; the last entry counts all longer ones."""
    found = [np.zeros(0, np.int64)]
    histogram = np.zeros(max_len + 2, np.int64)
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
        found += [pack_ngrams(tokens, starts[sizes == n], n, bits) for n in range(min_len, max_len + 1)]
        # Merged when the new ones outgrow the old: all merges together cost as much as a few.
        if sum(map(len, found[1:])) > len(found[0]):
            found = [np.unique(np.concatenate(found))]
    return np.concatenate(found), histogram


def _count_occurrences(blocks, shards, linked, bits, candidates, max_len):
    counts = np.zeros(len(candidates), np.int64)
    for block in blocks if len(candidates) else ():
        tokens, codes, across = _load_block(shards, block, bits)
        links = np.append(linked[codes], False)
        links[across] = False
        starts = np.flatnonzero(links)
        for n in range(2, max_len + 1):
            keys = np.sort(pack_ngrams(tokens, starts, n, bits))  # sorted, a search runs through the cache
            rows = np.minimum(np.searchsorted(candidates, keys), len(candidates) - 1)
            counts += np.bincount(rows[candidates[rows] == keys], minlength=len(counts))
            starts = starts[links[starts + n - 1]]  # those with one more token linked
    return counts


def _run(
    blocks: list[Block], num_workers: int, shards: Sequence[Shard], what: str, function: Callable, *arguments: Any
) -> list[Any]:
    """`function(blocks, shards, *arguments)`, or over one share of the blocks in each of several processes."""
    shares = [blocks[i::num_workers] for i in range(min(num_workers, len(blocks)))]
    with tqdm(desc=what, unit=" tokens", unit_scale=True, total=_count_tokens(blocks, shards)) as progress:

        def watch() -> Iterator[Block]:
            for block in blocks:
                yield block
                progress.update(_count_tokens([block], shards))

        if len(shares) <= 1:
            return [function(watch(), shards, *arguments)]
        # Forked processes inherit the arguments; pickled, memory maps would be copied whole.
        context = multiprocessing.get_context("fork")
        results = []
        with ProcessPoolExecutor(len(shares), context, _inherit, (function, (shards, *arguments))) as pool:
            for share, result in zip(shares, pool.map(_call_inherited, shares), strict=True):
                results.append(result)
                progress.update(_count_tokens(share, shards))
        return results


def _count_tokens(blocks: Iterable[Block], shards: Sequence[Shard]) -> int:
    return sum(int(shards[shard][1][end] - shards[shard][1][first]) for shard, first, end in blocks)


def _inherit(function: Callable, arguments: tuple) -> None:
    global _inherited
    _inherited = (function, arguments)


def _call_inherited(blocks: list[Block]) -> Any:
    function, arguments = _inherited
    return function(blocks, *arguments)
