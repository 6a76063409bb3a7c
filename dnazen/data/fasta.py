"""FASTA files: read, check, and find the runs of A, C, G and T in a sequence."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import dnaio

from dnazen.files import InputError, sha256_file

# Upper case, and RNA's U as T, in one pass over the bytes.
_UPPER = bytes(range(256)).upper().replace(b"U", b"T")
# IUPAC nucleotide codes, and the gap and mask characters that genome files hold; anything else is not DNA.
_CODES = b"ACGTRYSWKMBDHVN-.X"
_COMPLEMENT = str.maketrans("ACGTRYKMBVDHacgtrykmbvdh", "TGCAYRMKVBHDtgcayrmkvbhd")
_CLEAN_RUN = re.compile("[ACGT]+")
# The empty block that ends every BGZF file (SAM specification, section 4.1.2).
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class FastaRecord(NamedTuple):
    """`name` is the header up to the first white space; `sequence` is upper-case, U as T, with its IUPAC codes."""

    name: str
    sequence: str


def read_fasta(path: str | PathLike) -> Iterator[FastaRecord]:
    """Read the records of a FASTA file, plain or compressed (.gz, .bz2, .xz, .zst), one in memory at a time.

    Raises:
        InputError: the file is absent, unreadable, empty, cut short, FASTQ, or has no records; a record has no name,
            no sequence, a name seen before, or a letter that is no nucleotide code.
    """
    path = Path(path)
    names: set[str] = set()
    for header, letters in _parse(path):
        if not header.strip():
            raise InputError(f"{path}: record {len(names) + 1} has no name; expected '>name' before its sequence")
        name = header.split(maxsplit=1)[0]
        if name in names:
            raise InputError(f"{path}: record name {name!r} occurs twice; names must differ within a file")
        names.add(name)
        if not letters:
            raise InputError(f"{path}: record {name!r} has no sequence")
        sequence = letters.encode(errors="replace").translate(_UPPER)
        if foreign := sequence.translate(None, _CODES):
            position = sequence.index(foreign[0]) + 1
            raise InputError(
                f"{path}: record {name!r} has {letters[position - 1]!r} at position {position}; expected nucleotides "
                f"({_CODES.decode()} or U, in either case). Is it protein?"
            )
        yield FastaRecord(name, sequence.decode())
    if not names:
        raise InputError(f"{path}: no records; expected FASTA, lines of sequence under a '>name' line")


def describe_sources(paths: Sequence[str | PathLike]) -> list[dict[str, Any]]:
    """Name, SHA-256 and size of each file: what is recorded with everything that is made from them.

    Raises:
        InputError: a file is absent, or two have the same content.
    """
    sources: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; expected FASTA")
        checksum = sha256_file(path)
        if checksum in sources:
            raise InputError(f"{path}: given twice (or a copy), so that held-out sequences would be trained on")
        sources[checksum] = {"path": path.name, "sha256": checksum, "bytes": path.stat().st_size}
    return list(sources.values())


def find_clean_runs(sequence: str) -> list[tuple[int, int]]:
    """Find the longest runs of A, C, G and T in an upper-case sequence, as `[start, end)`."""
    return [match.span() for match in _CLEAN_RUN.finditer(sequence)]


def reverse_complement(sequence: str) -> str:
    """Complement every base (IUPAC codes included) and reverse their order: the other strand, 5' to 3'."""
    return sequence.translate(_COMPLEMENT)[::-1]


def _parse(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (header, letters) of each record; every failure of opening, decompressing or parsing is an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; expected FASTA")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected FASTA")
    try:
        _check_bgzf_end(path)
        with dnaio.open(path, fileformat="fasta") as reader:
            for record in reader:
                yield record.name, record.sequence
    except InputError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        if _is_fastq(path):
            raise InputError(f"{path}: this is FASTQ; expected FASTA") from error
        raise InputError(f"{path}: cannot be read as FASTA: {error}") from error


def _check_bgzf_end(path: Path) -> None:
    """Refuse a block-compressed .gz cut between two blocks, which decompresses without an error."""
    with path.open("rb") as file:
        head = file.read(18)
        if head[:4] != b"\x1f\x8b\x08\x04" or head[12:16] != b"BC\x02\x00":
            return
        file.seek(max(0, path.stat().st_size - len(_BGZF_END)))
        if file.read() != _BGZF_END:
            raise InputError(f"{path}: the compressed file is cut short (no BGZF end-of-file block)")


def _is_fastq(path: Path) -> bool:
    with contextlib.suppress(Exception), dnaio.open(path, fileformat="fastq") as reader:
        return next(iter(reader), None) is not None
    return False
