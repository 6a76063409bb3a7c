"""Which sequences of a benchmark's CSV files occur in a corpus, on either strand."""

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dnazen.data.fasta import reverse_complement
from dnazen.data.tables import read_sequences
from dnazen.data.workers import map_in_order
from dnazen.files import sha256_file

# A sequence is looked for by its first 32 bases, which fill 64 bits; shorter ones would be found by chance.
ANCHOR_BASES = 32
_BLOCK_TOKENS = 1 << 18  # temporary arrays take some 50 MB
_FILTER_BITS = 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads anchors over the filter
_CODES = np.zeros(256, np.uint64)
_CODES[list(b"CGT")] = (1, 2, 3)

Shard = tuple[str, dict[str, np.ndarray]]  # split, and its arrays tokens, offsets and pieces


class Targets(NamedTuple):
    """The sequences of one CSV file that are looked for."""

    path: Path
    sha256: str
    sequences: list[str]
    num_short: int  # not looked for: under 32 bases
    num_ambiguous: int  # not looked for: with a letter other than A, C, G, T (or U), which no corpus has


class _Block(NamedTuple):
    shard: int
    first: int
    end: int  # sequences whose bases may begin an occurrence


def load_targets(path: str | PathLike) -> Targets:
    """Read the column `sequence` of a CSV file, plain or compressed; InputError as `read_sequences`."""
    path, sequences = Path(path), list(read_sequences(path))
    clean = [sequence for sequence in sequences if not sequence.strip("ACGT")]
    long = [sequence for sequence in clean if len(sequence) >= ANCHOR_BASES]
    return Targets(path, sha256_file(path), long, len(clean) - len(long), len(sequences) - len(clean))


def find_leaks(
    targets: Sequence[Targets], shards: Sequence[Shard], spelling: Sequence[str], num_workers: int
) -> list[dict[str, Any]]:
    """Count the sequences of each file that occur in the training and in the validation split, on either strand.

    A sequence occurs where it lies, whole, in pieces that are neighbours in their record and in a shard; one that
    straddles the border of two splits, or of two shards, is not counted. `spelling` has the bases of each token id.
    """
    patterns = [strand for target in targets for s in target.sequences for strand in (s, reverse_complement(s))]
    finder = _Finder(patterns, shards, spelling)
    found = {split: np.zeros(len(patterns), bool) for split, _ in shards}
    total = sum(len(arrays["tokens"]) for _, arrays in shards)
    with tqdm(desc="looking for leaks", unit=" tokens", unit_scale=True, total=total) as progress:
        for block, hits in map_in_order(finder, _iterate_blocks(shards), num_workers if patterns else 1):
            split, arrays = shards[block.shard]
            found[split][hits] = True
            progress.update(int(arrays["offsets"][block.end] - arrays["offsets"][block.first]))
    report, first = [], 0
    for target in targets:
        end = first + 2 * len(target.sequences)
        hits = {split: int(is_found[first:end].reshape(-1, 2).any(1).sum()) for split, is_found in found.items()}
        report.append(
            {
                "path": "/".join(target.path.parts[-2:]),  # in GUE the file name alone says little
                "sha256": target.sha256,
                "sequences": len(target.sequences),
                "skipped_short": target.num_short,
                "skipped_ambiguous": target.num_ambiguous,
                **{f"in_{split}": count for split, count in sorted(hits.items())},
            }
        )
        first = end
    return report


class _Finder:
    """Which patterns begin in a block of sequences."""

    def __init__(self, patterns: Sequence[str], shards: Sequence[Shard], spelling: Sequence[str]):
        anchors = np.array([_anchor_codes(pattern[:ANCHOR_BASES].encode())[0] for pattern in patterns], np.uint64)
        order = np.argsort(anchors, kind="stable")
        self._anchors, self._order = anchors[order], order
        self._patterns = [pattern.encode() for pattern in patterns]
        self._longest = max(map(len, patterns), default=0)
        self._shards, self._spelling = shards, spelling
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_hash(anchors)] = True

    def __call__(self, block: _Block) -> list[int]:
        text, size = self._join(block)
        if not self._patterns or len(text) < ANCHOR_BASES:
            return []
        codes = _anchor_codes(text)[:size]
        places = np.flatnonzero(self._filter[_hash(codes)])
        firsts = np.searchsorted(self._anchors, codes[places], side="left")
        ends = np.searchsorted(self._anchors, codes[places], side="right")
        hits: set[int] = set()
        for place, first, end in zip(places[ends > firsts], firsts[ends > firsts], ends[ends > firsts]):
            for pattern in self._order[first:end].tolist():
                if pattern not in hits and text.startswith(self._patterns[pattern], place):
                    hits.add(pattern)
        return sorted(hits)

    def _join(self, block: _Block) -> tuple[bytes, int]:
        """The bases of a block and of what an occurrence may need behind it, N where neighbours are none; how many of
        them may begin an occurrence. The other strand of a piece, if the corpus has it, says nothing new."""
        _, arrays = self._shards[block.shard]
        tokens, offsets, pieces = (arrays[part] for part in ("tokens", "offsets", "pieces"))
        parts, length, size, previous = [], 0, 0, None
        for number in range(block.first, len(pieces)):
            if number >= block.end and length >= size + self._longest:
                break
            record, start, bases, reverse = pieces[number].item()
            if not reverse:
                if previous != (record, start):
                    parts.append("N")
                    length += 1
                ids = tokens[offsets[number] : offsets[number + 1]].tolist()
                parts.append("".join(map(self._spelling.__getitem__, ids)))
                length += bases
                previous = (record, start + bases)
            if number < block.end:
                size = length
        return "".join(parts).encode(), size


def _anchor_codes(text: bytes) -> np.ndarray:
    """The 32 letters from each place on, in 64 bits; what is no base counts as A."""
    codes = _CODES[np.frombuffer(text, np.uint8)]
    for width in (1, 2, 4, 8, 16):
        codes = codes[:-width] << np.uint64(2 * width) | codes[width:]
    return codes


def _hash(codes: np.ndarray) -> np.ndarray:
    return (codes * _MULTIPLIER) >> np.uint64(64 - _FILTER_BITS)


def _iterate_blocks(shards: Sequence[Shard]) -> Iterator[_Block]:
    for number, (_, arrays) in enumerate(shards):
        offsets, first = arrays["offsets"], 0
        while first < len(offsets) - 1:
            end = max(int(np.searchsorted(offsets, offsets[first] + _BLOCK_TOKENS, side="right")) - 1, first + 1)
            yield _Block(number, first, end)
            first = end
