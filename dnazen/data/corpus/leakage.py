"""Which sequences of a benchmark's CSV files occur in a corpus, on either strand.

Each sequence and its reverse complement is a pattern. The corpus is read block by block as text. Wherever the 32
letters from a place on are the first 32 of a pattern (its anchor), the rest of the pattern is compared.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dnazen.data.tables import read_sequences
from dnazen.dna import is_clean, reverse_complement
from dnazen.files import sha256_file
from dnazen.processes import cut_blocks, map_in_order

# A sequence is looked for by its first 32 bases, which fill 64 bits; shorter ones would be found by chance.
ANCHOR_BASES = 32
_BLOCK_TOKENS = 1 << 18  # temporary arrays take some 50 MB
_FILTER_BITS = 24
_PLACE_BITS = 33  # a record of 2^33 bases is longer than any chromosome
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
    clean = [sequence for sequence in sequences if is_clean(sequence)]
    long = [sequence for sequence in clean if len(sequence) >= ANCHOR_BASES]
    return Targets(path, sha256_file(path), long, len(clean) - len(long), len(sequences) - len(clean))


def find_leaks(
    targets: Sequence[Targets], shards: Sequence[Shard], id_to_token: Sequence[str], num_workers: int
) -> list[dict[str, Any]]:
    """Count the sequences of each file that occur in the training and in the validation split, on either strand.

    A sequence occurs where all of its bases lie in pieces of the corpus that follow each other without a gap in their
    record. Where some of those pieces are in one split and some in the other, it is counted in both.

    Args:
        targets: the files.
        shards: of the corpus.
        id_to_token: the bases of each token id.
        num_workers: processes.
    """
    patterns = [strand for target in targets for s in target.sequences for strand in (s, reverse_complement(s))]
    finder = _Finder(patterns, shards, id_to_token)
    found = {split: np.zeros(len(patterns), bool) for split, _ in shards}
    total = sum(len(arrays["tokens"]) for _, arrays in shards)
    with tqdm(desc="looking for leaks", disable=None, unit=" tokens", unit_scale=True, total=total) as progress:
        for block, hits in map_in_order(finder, _iterate_blocks(shards), num_workers if patterns else 1):
            for split, numbers in hits.items():
                found[split][numbers] = True
            arrays = shards[block.shard][1]
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


class _Span(NamedTuple):
    """A part of a block's text: the bases of one sequence, or an N between two that do not follow each other."""

    split: str | None  # of an N: None
    is_own: bool  # whether the sequence is of the block itself, so that patterns are looked for that begin in it
    bases: str


class _Finder:
    """Called with a block of sequences, finds the patterns that begin in it.

    A place is a base of a record, as one number: the record's number, shifted, and the base's.
    """

    def __init__(self, patterns: Sequence[str], shards: Sequence[Shard], id_to_token: Sequence[str]):
        anchors = np.array([_anchor_codes(pattern[:ANCHOR_BASES].encode())[0] for pattern in patterns], np.uint64)
        order = np.argsort(anchors, kind="stable")
        self._anchors, self._order = anchors[order], order
        self._patterns = [pattern.encode() for pattern in patterns]
        self._longest = max(map(len, patterns), default=0)
        self._shards, self._id_to_token = shards, id_to_token
        self._bridges = _find_bridges(shards) if patterns else {}
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_hash(anchors)] = True

    def __call__(self, block: _Block) -> dict[str, list[int]]:
        """The numbers of the patterns that begin in a block, by each split in which some of their bases lie."""
        spans = list(self._join(block)) if self._patterns else []
        text = "".join(span.bases for span in spans).encode()
        if len(text) < ANCHOR_BASES:
            return {}
        ends = list(itertools.accumulate(len(span.bases) for span in spans))
        own_ends = np.array(ends)  # for each span, the end of the block's own sequences that follow without a gap
        for i in range(len(spans) - 2, -1, -1):
            if spans[i + 1].is_own:
                own_ends[i] = own_ends[i + 1]
        codes = _anchor_codes(text)
        places = np.flatnonzero(self._filter[_hash(codes)])
        numbers = np.searchsorted(ends, places, side="right")
        are_own = np.array([span.is_own for span in spans])[numbers]
        places, numbers = places[are_own], numbers[are_own]
        firsts = np.searchsorted(self._anchors, codes[places], side="left")
        lasts = np.searchsorted(self._anchors, codes[places], side="right")
        hits: dict[str, set[int]] = {split: set() for split, _ in self._shards}
        own_hits, are_hits = hits[self._shards[block.shard][0]], lasts > firsts
        columns = (array[are_hits].tolist() for array in (places, own_ends[numbers], firsts, lasts))
        for place, core_end, first, last in zip(*columns):
            for pattern in self._order[first:last].tolist():
                bases = self._patterns[pattern]
                if pattern in own_hits and place + len(bases) <= core_end or not text.startswith(bases, place):
                    continue
                covered = spans[bisect_right(ends, place) : bisect_left(ends, place + len(bases)) + 1]
                for split in {span.split for span in covered}:
                    hits[split].add(pattern)
        return {split: sorted(patterns) for split, patterns in hits.items()}

    def _join(self, block: _Block) -> Iterator[_Span]:
        """The text of a block. Where its sequences stop following each other, what follows in the corpus is added.

        Of that as much as the longest pattern may need; then comes an N.
        """
        place = None
        for number, at, bases in self._read(block.shard, block.first, block.end):
            if place not in (None, at):
                yield from self._follow(place, block.shard, number)
            yield _Span(self._shards[block.shard][0], True, bases)
            place = at + len(bases)
        if place is not None:
            yield from self._follow(place, block.shard, block.end)

    def _follow(self, place: int, shard: int, number: int) -> Iterator[_Span]:
        """The sequences that follow from `place` on, as far as the longest pattern reaches, and an N.

        They are looked for in the shard from sequence `number` on, then wherever the bridges lead.
        """
        wanted = self._longest
        while wanted > 0:
            for _, at, bases in self._read(shard, number):
                if at != place or wanted <= 0:
                    break
                yield _Span(self._shards[shard][0], False, bases)
                place, wanted = place + len(bases), wanted - len(bases)
            if place not in self._bridges:
                break
            shard, number = self._bridges[place]
        yield _Span(None, False, "N")

    def _read(self, shard: int, first: int, end: int | None = None) -> Iterator[tuple[int, int, str]]:
        """Yield number, place and bases of a shard's sequences, but not of the other strand, which says nothing new."""
        tokens, offsets, pieces = (self._shards[shard][1][part] for part in ("tokens", "offsets", "pieces"))
        for number in range(first, len(pieces) if end is None else end):
            record, start, _, reverse = pieces[number].item()
            if not reverse:
                ids = tokens[offsets[number] : offsets[number + 1]].tolist()
                yield number, record << _PLACE_BITS | start, "".join(map(self._id_to_token.__getitem__, ids))


def _find_bridges(shards: Sequence[Shard]) -> dict[int, tuple[int, int]]:
    """Where the text goes on at places where the next sequence on disk is not the next of the record.

    For example, sequences 0, 1 and 3 of a record are in training and sequence 2, held out, is the first in validation:
    the place where 1 ends leads to validation's sequence 0, and that where 2 ends to training's third.

    Returns, by place, the shard and the number in it of the sequence that begins there.
    """
    heads, tails = [], [np.zeros(0, np.uint64)]
    for shard, (_, arrays) in enumerate(shards):
        numbers = np.flatnonzero(arrays["pieces"]["reverse"] == 0)
        pieces = arrays["pieces"][numbers]
        starts = pieces["record"].astype(np.uint64) << np.uint64(_PLACE_BITS) | pieces["start"].astype(np.uint64)
        ends = starts + pieces["length"].astype(np.uint64)
        goes_on = ends[:-1] == starts[1:]
        are_heads = np.concatenate(([True], ~goes_on))[: len(numbers)]
        heads.append((shard, starts[are_heads], numbers[are_heads]))
        tails.append(ends[np.concatenate((~goes_on, [True]))[-len(numbers) :]] if len(numbers) else tails[0])
    ends = np.concatenate(tails)
    bridges: dict[int, tuple[int, int]] = {}
    for shard, starts, numbers in heads:
        meet = np.isin(starts, ends)
        bridges |= {place: (shard, number) for place, number in zip(starts[meet].tolist(), numbers[meet].tolist())}
    return bridges


def _anchor_codes(text: bytes) -> np.ndarray:
    """For each place the 32 letters from there on, as 2 bits each of a 64-bit number; what is no base counts as A."""
    codes = _CODES[np.frombuffer(text, np.uint8)]
    for width in (1, 2, 4, 8, 16):
        codes = codes[:-width] << np.uint64(2 * width) | codes[width:]
    return codes


def _hash(codes: np.ndarray) -> np.ndarray:
    return (codes * _MULTIPLIER) >> np.uint64(64 - _FILTER_BITS)


def _iterate_blocks(shards: Sequence[Shard]) -> Iterator[_Block]:
    for number, (_, arrays) in enumerate(shards):
        yield from (_Block(number, first, end) for first, end in cut_blocks(arrays["offsets"], _BLOCK_TOKENS))
