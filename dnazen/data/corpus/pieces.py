"""From letters to tokens: records are cut into pieces, and pieces tokenized, on one strand or both.

For example, with 2 tokens a sequence at most, so 8 bases a piece, and 3 bases or more:

    record         ACGTACGTTGCAAANNGG
    runs of bases  [ACGTACGTTGCAAA]  [GG]        the two N are cut out
    pieces         [ACGTACGT] [TGCAAA]           GG is under 3 bases: dropped
    sequences      [ACGT] [ACGT] [TGCAAA]        ACGTACGT has 3 tokens (ACG TACG T, say), so it was halved; its halves,
                                                 tokenized by themselves, have 1 or 2
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dnazen.data.corpus.shard import DTYPES, PIECE_DTYPE
from dnazen.data.fasta import FastaBlock, cut_runs
from dnazen.data.tokenizer import tokens_by_id
from dnazen.dna import BASES, reverse_complement
from dnazen.files import InputError

# of the pieces' digests: 16 bytes
DIGEST_DTYPE = np.dtype("S16")


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
    """Yield the pieces of at most `size` and at least `min_length` bases of a file's records; count all letters.

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
            counts.pieces += 1
            counts.bases += len(sequence)
            yield Piece(first_record + len(records) - 1, start, sequence)


class Tokenized(NamedTuple):
    """What becomes of n pieces: m sequences, both strands of a piece and its halves one after the other."""

    tokens: np.ndarray  # uint16, of all sequences
    lengths: np.ndarray  # int64 [m], in tokens
    rows: np.ndarray  # PIECE_DTYPE [m]
    pieces: np.ndarray  # int64 [m], which piece each sequence is of
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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, both_strands: bool):
        self._encode = tokenizer.backend_tokenizer.encode_batch_fast
        self._id_to_token = tokens_by_id(tokenizer)
        self._max_tokens = max_tokens
        self._both_strands = both_strands

    def __call__(self, pieces: list[Piece]) -> Tokenized:
        """Tokenize some pieces.

        Raises:
            InputError: the tokens do not spell a piece.
        """
        strands, digests = [], []
        for number, (record, start, data) in enumerate(pieces):
            bases = data.decode()
            other = reverse_complement(bases)
            digests.append(hashlib.blake2b(min(bases, other).encode(), digest_size=DIGEST_DTYPE.itemsize).digest())
            strands.append(_Strand(number, record, start, False, bases))
            if self._both_strands:
                strands.append(_Strand(number, record, start, True, other))
        tokens, lengths, rows, numbers = [], [], [], []
        for strand, ids in self._tokenize(strands):
            tokens += ids
            lengths.append(len(ids))
            rows.append((strand.record, strand.start, len(strand.bases), strand.reverse))
            numbers.append(strand.piece)
        return Tokenized(
            np.array(tokens, DTYPES["tokens"]),
            np.array(lengths, np.int64),
            np.array(rows, PIECE_DTYPE),
            np.array(numbers, np.int64),
            np.array(digests, DIGEST_DTYPE),
        )

    def _tokenize(self, strands: list[_Strand]) -> Iterator[tuple[_Strand, list[int]]]:
        """Yield each strand of a piece, or the halves of one that is too long, with its token ids."""
        encodings = self._encode([strand.bases for strand in strands], add_special_tokens=False)
        for strand, encoding in zip(strands, encodings):
            ids = encoding.ids
            tokens = list(map(self._id_to_token.__getitem__, ids))
            if "".join(tokens) != strand.bases:
                raise InputError(
                    f"the tokenizer does not spell every run of A, C, G, T: {strand.bases[:20]}... (record "
                    f"{strand.record}, base {strand.start}) became {' '.join(tokens[:5]) or 'nothing'}..."
                )
            if len(ids) <= self._max_tokens:
                yield strand, ids
            else:
                yield from self._tokenize(_halve(strand))


def _halve(strand: _Strand) -> list[_Strand]:
    middle = len(strand.bases) // 2
    first, second = strand.bases[:middle], strand.bases[middle:]
    # on the reverse strand the first half lies further along the record
    starts = (strand.start + len(second), strand.start) if strand.reverse else (strand.start, strand.start + middle)
    return [strand._replace(start=start, bases=half) for start, half in zip(starts, (first, second))]
