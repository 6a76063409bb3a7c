"""From letters to tokens: records are cut into pieces, and pieces tokenized, on one strand or both.

For example, with 2 tokens a sequence at most, so 8 bases a piece, and 3 bases or more:

    record         ACGTACGTTGCAAANNGG
    runs of bases  [ACGTACGTTGCAAA]  [GG]        the two N are cut out
    pieces         [ACGTACGT] [TGCAAA]           GG is under 3 bases: dropped
    sequences      [ACGT] [ACGT] [TGCAAA]        ACGTACGT has 3 tokens (ACG TACG T, say), so it was halved; its halves,
                                                 tokenized by themselves, have 1 or 2

With pieces that fill the tokens, a run is cut into stretches instead, and a stretch into pieces of 2 tokens:

    stretch        [ACGTACGTTGCAAA]
    its tokens     ACG TACG TTG CAA A
    pieces         [ACGTACG] [TTGCAA] [A]        each has, tokenized by itself, the same 2 tokens
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dnazen.data.corpus.shard import DTYPES, PIECE_DTYPE
from dnazen.data.fasta import FastaBlock, cut_runs
from dnazen.data.tokenizer import tokens_by_id
from dnazen.dna import BASES, reverse_complement
from dnazen.files import InputError

# of the pieces' digests: 16 bytes
DIGEST_DTYPE = np.dtype("S16")
# DNABERT-2's protocol counts on n / 4 tokens in a sequence of n bases.
BASES_PER_TOKEN = 4
# A stretch is cut by itself, so that many are at once. Its last piece is half full: 0.5 % of a hundred.
STRETCH_PIECES = 100
# Tokenized at a time: what is left behind the last whole piece is tokenized again.
_WINDOW_PIECES = 8


class Piece(NamedTuple):
    """A stretch of A, C, G and T of a record."""

    record: int  # numbered over all files
    start: int
    bases: bytes


@dataclass
class Counts:
    """What became of the letters of a record, or of several."""

    length: int = 0
    pieces: int = 0  # kept
    bases: int = 0
    dropped_short: int = 0  # pieces
    dropped_bases: int = 0
    cut_runs: int = 0  # stretches of other letters
    cut_bases: int = 0
    duplicates: int = 0  # pieces, kept or not
    duplicate_bases: int = 0

    def add(self, other: "Counts") -> None:
        """Add what became of other letters."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Record(NamedTuple):
    """A record's name, and what became of it."""

    name: str
    counts: Counts


def cut_pieces(
    blocks: Iterable[FastaBlock], first_record: int, records: list[Record], size: int, min_length: int
) -> Iterator[Piece]:
    """Yield the pieces (or stretches) of `min_length` to `size` bases of a file's records; count all letters.

    Records are numbered from `first_record`. Each is appended to `records` where it begins, and counted on from there.
    """
    is_cut = False  # whether the last letters were other than A, C, G, T
    for name, start, sequence in cut_runs(blocks, size):
        if start == 0:
            records.append(Record(name, Counts()))
            is_cut = False
        counts = records[-1].counts
        counts.length += len(sequence)
        was_cut, is_cut = is_cut, sequence[0] not in BASES.encode()
        if is_cut:
            counts.cut_runs += not was_cut
            counts.cut_bases += len(sequence)
        elif len(sequence) < min_length:
            counts.dropped_short += 1
            counts.dropped_bases += len(sequence)
        else:
            counts.bases += len(sequence)
            yield Piece(first_record + len(records) - 1, start, sequence)


class Tokenized(NamedTuple):
    """What becomes of n pieces: m sequences, both strands of a piece and its halves one after the other."""

    tokens: np.ndarray  # uint16, of all sequences
    lengths: np.ndarray  # int64 [m], in tokens
    rows: np.ndarray  # PIECE_DTYPE [m]
    numbers: np.ndarray  # int64 [m], which piece each sequence is of
    pieces: np.ndarray  # PIECE_DTYPE [n]
    digests: np.ndarray  # DIGEST_DTYPE [n], the same for a piece and its reverse complement


class _Strand(NamedTuple):
    """A piece, or a part of one, as it is tokenized."""

    piece: int
    record: int
    start: int  # in the record, on the forward strand
    reverse: bool
    bases: str  # of this strand


class PieceTokenizer:
    """Tokenizes pieces, and takes their digests.

    Args:
        tokenizer: of A, C, G and T.
        max_tokens: of a sequence; what has more is halved until it has not, each half tokenized by itself.
        both_strands: whether the reverse complement of each piece is a sequence too.
        fill_from: None, or what is given are stretches, to be cut into pieces of `max_tokens` tokens, and a rest of
            fewer bases than this is joined to the piece before it, and both halved.

    Raises:
        InputError: stretches are to be cut, and the tokenizer is not one of plain BPE.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, both_strands: bool, fill_from: int | None = None
    ):
        backend = tokenizer.backend_tokenizer
        if fill_from is not None and (other := _describe_unless_plain(backend)):
            raise InputError(f"piece_length auto: expected a tokenizer of plain BPE, found {other}")
        self._encode = backend.encode_batch_fast
        self._id_to_token = tokens_by_id(tokenizer)
        self._max_tokens = max_tokens
        self._both_strands = both_strands
        self._fill_from = fill_from

    def __call__(self, pieces: list[Piece]) -> Tokenized:
        """Tokenize some pieces, or cut and tokenize some stretches.

        Raises:
            InputError: the tokens do not spell a piece.
        """
        if self._fill_from is None:
            strands = [strand for number, piece in enumerate(pieces) for strand in self._strands_of(number, piece)]
            sequences = list(self._tokenize(strands))
        else:
            filled = [found for stretch in pieces for found in self._fill(stretch)]
            pieces = [piece for piece, _ in filled]
            sequences = [
                sequence
                for number, (piece, encoded) in enumerate(filled)
                for strand, ids in zip(self._strands_of(number, piece), encoded)
                for sequence in self._fit(strand, ids)
            ]
        return Tokenized(
            np.array(list(itertools.chain.from_iterable(ids for _, ids in sequences)), DTYPES["tokens"]),
            np.array([len(ids) for _, ids in sequences], np.int64),
            np.array([(s.record, s.start, len(s.bases), s.reverse) for s, _ in sequences], PIECE_DTYPE),
            np.array([strand.piece for strand, _ in sequences], np.int64),
            np.array([(piece.record, piece.start, len(piece.bases), False) for piece in pieces], PIECE_DTYPE),
            np.array([_digest(piece.bases.decode()) for piece in pieces], DIGEST_DTYPE),
        )

    def _strands_of(self, number: int, piece: Piece) -> list[_Strand]:
        forward = _Strand(number, piece.record, piece.start, False, piece.bases.decode())
        if not self._both_strands:
            return [forward]
        return [forward, forward._replace(reverse=True, bases=reverse_complement(forward.bases))]

    def _tokenize(self, strands: list[_Strand]) -> Iterator[tuple[_Strand, list[int]]]:
        """Yield each strand of a piece, or the halves of one that is too long, with its token ids."""
        encodings = self._encode([strand.bases for strand in strands], add_special_tokens=False)
        for strand, encoding in zip(strands, encodings):
            yield from self._fit(strand, encoding.ids)

    def _fit(self, strand: _Strand, ids: list[int]) -> Iterator[tuple[_Strand, list[int]]]:
        self._spell(strand.bases, ids, strand.record, strand.start)
        if len(ids) <= self._max_tokens:
            yield strand, ids
        else:
            yield from self._tokenize(_halve(strand))

    def _spell(self, bases: str, ids: list[int], record: int, start: int) -> list[str]:
        """The bases of each token; InputError unless all are those of the text."""
        tokens = list(map(self._id_to_token.__getitem__, ids))
        if "".join(tokens) != bases:
            raise InputError(
                f"the tokenizer does not spell every run of A, C, G, T: {bases[:20]}... (record "
                f"{record}, base {start}) became {' '.join(tokens[:5]) or 'nothing'}..."
            )
        return tokens

    def _fill(self, stretch: Piece) -> Iterator[tuple[Piece, tuple[list[int], list[int]]]]:
        """Cut a stretch into pieces of `max_tokens` tokens, and no more on the other strand; each with its ids on both.

        BPE merges neighbors, the best pair first. Where text is cut between two of its tokens, no merge has crossed
        the cut, so that either side, tokenized by itself, goes through the same merges and has the same tokens.
        """
        text, at = stretch.bases.decode(), 0
        size = window = _WINDOW_PIECES * BASES_PER_TOKEN * self._max_tokens
        while at < len(text):
            bases = text[at : at + size]
            (encoding,) = self._encode([bases], add_special_tokens=False)
            tokens = self._spell(bases, encoding.ids, stretch.record, stretch.start + at)
            ends = np.cumsum([0, *map(len, tokens)]).tolist()
            is_last, first = at + size >= len(text), 0
            while len(tokens) - first >= (1 if is_last else self._max_tokens):
                last, other = self._choose_end(bases, ends, first, is_last)
                piece = bases[ends[first] : ends[last]].encode()
                yield Piece(stretch.record, stretch.start + at + ends[first], piece), (encoding.ids[first:last], other)
                first = last
            size = window if first else 2 * size  # not one piece was filled: its tokens are very long
            at += ends[first]

    def _choose_end(self, bases: str, ends: list[int], first: int, is_last: bool) -> tuple[int, list[int]]:
        """Where the piece ends that begins at a token, as a token's number, and the ids of its other strand."""
        left = len(ends) - 1 - first
        count, other = min(self._max_tokens, left), []
        while True:
            if is_last and 0 < ends[-1] - ends[first + count] < self._fill_from:
                count = min(count, (left + 1) // 2)
            if self._both_strands:
                piece = bases[ends[first] : ends[first + count]]
                other = self._encode([reverse_complement(piece)], add_special_tokens=False)[0].ids
            if len(other) <= self._max_tokens or count == 1:
                return first + count, other
            count = max(1, min(count - 1, count * self._max_tokens // len(other)))


def _describe_unless_plain(backend: Tokenizer) -> str | None:
    """What a tokenizer is, if it does more to a run of bases than to merge neighbors in it."""
    if not isinstance(backend.model, models.BPE):
        return type(backend.model).__name__
    if backend.model.ignore_merges:
        return "BPE with ignore_merges"
    if backend.pre_tokenizer and len(backend.pre_tokenizer.pre_tokenize_str(100 * BASES)) > 1:
        return "one that cuts its input first"
    return None


def _digest(bases: str) -> bytes:
    text = min(bases, reverse_complement(bases))
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_DTYPE.itemsize).digest()


def _halve(strand: _Strand) -> list[_Strand]:
    middle = len(strand.bases) // 2
    first, second = strand.bases[:middle], strand.bases[middle:]
    # on the reverse strand the first half lies further along the record
    starts = (strand.start + len(second), strand.start) if strand.reverse else (strand.start, strand.start + middle)
    return [strand._replace(start=start, bases=half) for start, half in zip(starts, (first, second))]
