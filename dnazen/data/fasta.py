"""FASTA files: read and checked, in blocks or record by record, and cut into runs of A, C, G and T."""

import codecs
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from xopen import xopen

from dnazen.dna import IUPAC_BASES, split_stretches
from dnazen.files import InputError, sha256_file

STDIN = "-"
# Upper case, and RNA's U as T, in one pass over the bytes.
_UPPER = bytes(range(256)).upper().replace(b"U", b"T")
_CARRIAGE_RETURN = bytes(range(256)).replace(b"\r", b"\n")
# IUPAC nucleotide codes, and the gap and mask characters that genome files hold; anything else is not DNA.
_CODES = "".join(IUPAC_BASES).replace("U", "").encode() + b"-.X"
_BLANKS = b"\n \t"
_LINE_END = re.compile(rb"[ \t]*\n[ \t]*")
# The empty block that ends every BGZF file (SAM specification, section 4.1.2).
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_READ_BYTES = 1 << 20


class FastaRecord(NamedTuple):
    """`name` is the header up to the first white space; `sequence` is upper-case, U as T, with its IUPAC codes."""

    name: str
    sequence: str


class FastaBlock(NamedTuple):
    """Some letters of a record, from letter `start` on; a record's first block, and no other, has start 0."""

    name: str
    start: int
    sequence: bytes  # as in `FastaRecord`; not empty


class FastaReader:
    """The blocks of a FASTA file, plain or compressed (.gz, .bz2, .xz, .zst), or of standard input ("-").

    At most a few MB are in memory, however long a record or a line is. Lines may end in LF, CRLF or CR, and in blanks.
    Iterate once. `position` is the number of bytes of the file read so far, as they lie on disk; `text_bytes` and
    `text_sha256()` are those of the text read so far, decompressed, for standard input only.

    Raises:
        InputError: the file is absent, unreadable, empty, cut short, FASTQ, or has no records; a record has no name,
            no sequence, a name seen before, or a letter that is no nucleotide code.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path)
        self.position = 0
        self.text_bytes = 0
        self._digest = hashlib.sha256()

    def text_sha256(self) -> str:
        """SHA-256 of the text read so far, in hex."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[FastaBlock]:
        names: set[str] = set()
        name, length = None, 0
        for is_header, data in self._split():
            if is_header:
                if name is not None and not length:
                    raise InputError(f"{self.path}: record {name!r} has no sequence")
                words = data.decode(errors="replace").split(maxsplit=1)
                if not words:
                    number = len(names) + 1
                    raise InputError(f"{self.path}: record {number} has no name; expected '>name' before its sequence")
                name, length = words[0], 0
                if name in names:
                    raise InputError(f"{self.path}: record name {name!r} occurs twice; names must differ within a file")
                names.add(name)
            elif data:
                if name is None:
                    raise InputError(f"{self.path}: {_explain_start(data)}")
                place = f"{self.path}: cannot be read as FASTA: record {name!r}"
                yield FastaBlock(name, length, normalize_letters(data, place, length))
                length += len(data)
        if name is None:
            raise InputError(f"{self.path}: no records; expected FASTA, lines of sequence under a '>name' line")
        if not length:
            raise InputError(f"{self.path}: record {name!r} has no sequence")

    def _split(self) -> Iterator[tuple[bool, bytes]]:
        """Yield (True, header without its '>') and (False, letters without white space at the ends of lines)."""
        text, at, in_header = b"\n", 0, False  # as if a line had ended, so that a first '>' is like any other
        for block in self._read():
            text, at = text[at:] + block.translate(_CARRIAGE_RETURN), 0
            while (end := text.find(b"\n" if in_header else b"\n>", at)) >= 0:
                yield in_header, text[at:end] if in_header else _join_lines(text[at:end])
                at = end if in_header else end + 2
                in_header = not in_header
            # Blanks at the end are kept back: what follows tells whether they end a line, or a '>' begins one.
            if not in_header and (end := len(text.rstrip(_BLANKS))) > at:
                yield False, _join_lines(text[at:end])
                at = end
        yield in_header, text[at:] if in_header else _join_lines(text[at:])

    def _read(self) -> Iterator[bytes]:
        """Yield the file's text; every failure of opening or decompressing is an InputError."""
        is_stdin = str(self.path) == STDIN
        if not is_stdin:
            _check_file(self.path)
        try:
            with ExitStack() as stack:
                if is_stdin and sys.stdin is None:
                    raise InputError(f"{self.path}: standard input is closed; expected FASTA")
                file = sys.stdin.buffer if is_stdin else stack.enter_context(self.path.open("rb"))
                stream = xopen(file, "rb", threads=0)
                while block := stream.read(_READ_BYTES):
                    if is_stdin:
                        self._digest.update(block)
                        self.text_bytes += len(block)
                    else:
                        self.position = file.tell()
                    yield block
        except InputError:
            raise
        except Exception as error:  # each decompressor has errors of its own
            raise InputError(f"{self.path}: cannot be read as FASTA: {error}") from error


def read_fasta(path: str | PathLike) -> Iterator[FastaRecord]:
    """Read the records of a FASTA file one by one, each whole; see `FastaReader` for what is read and refused."""
    name, blocks = None, []
    for block in FastaReader(path):
        if block.start == 0 and name is not None:
            yield FastaRecord(name, b"".join(blocks).decode())
            blocks = []
        name = block.name
        blocks.append(block.sequence)
    yield FastaRecord(name, b"".join(blocks).decode())


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


def normalize_letters(letters: bytes, place: str, start: int = 0) -> bytes:
    """Upper-case nucleotide codes, U as T.

    `place` names the sequence in errors; the first letter is number `start` of it, from 0.

    Raises:
        InputError: a letter is no nucleotide code.
    """
    sequence = letters.translate(_UPPER)
    if foreign := sequence.translate(None, _CODES):
        index = sequence.index(foreign[0])
        raise InputError(
            f"{place} has {chr(letters[index])!r} at position {start + index + 1}; expected nucleotides "
            f"({_CODES.decode()} or U, in either case). Is it protein?"
        )
    return sequence


def cut_runs(blocks: Iterable[FastaBlock], size: int) -> Iterator[FastaBlock]:
    """Cut records anew, into blocks that are bases (A, C, G, T) alone or other letters alone.

    A run of bases gives blocks of `size` bases, and one of what is left at its end. With a size of 4, the record
    `ACGTACNNG` gives `ACGT`, `AC`, `NN` and `G`, whatever blocks it came in. A stretch of other letters may be given in
    parts.
    """
    carry = None  # the end of a run so far, which may go on in the next block
    for block in blocks:
        if carry is not None and block.start == 0:
            yield carry
        elif carry is not None:
            block = FastaBlock(block.name, carry.start, carry.sequence + block.sequence)
        carry = None
        name, first, sequence = block
        for start, end, are_bases in split_stretches(sequence):
            if not are_bases:
                yield FastaBlock(name, first + start, sequence[start:end])
                continue
            for at in range(start, end, size):
                part = FastaBlock(name, first + at, sequence[at : min(at + size, end)])
                if end == len(sequence) and len(part.sequence) < size:
                    carry = part
                else:
                    yield part
    if carry is not None:
        yield carry


def _join_lines(text: bytes) -> bytes:
    text = text.rstrip(_BLANKS)
    return _LINE_END.sub(b"", text) if b" " in text or b"\t" in text else text.translate(None, b"\n")


def _explain_start(data: bytes) -> str:
    if data.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark (BOM); expected plain text: save it as UTF-8 without BOM"
    if data.startswith(b"@"):
        return (
            "this is FASTQ; expected FASTA: assembled sequence, not reads, which overlap and have errors, so that one "
            "place would be both trained on and held out"
        )
    return f"cannot be read as FASTA: Expected '>' at the start of a record, found {data[:20]!r}"


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; expected FASTA")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected FASTA")
    try:
        with path.open("rb") as file:
            _check_bgzf_end(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as FASTA: {error}") from error


def _check_bgzf_end(path: Path, file: Any) -> None:
    """Refuse a block-compressed .gz cut between two blocks, which decompresses without an error."""
    head = file.read(18)
    if head[:4] != b"\x1f\x8b\x08\x04" or head[12:16] != b"BC\x02\x00":
        return
    file.seek(max(0, path.stat().st_size - len(_BGZF_END)))
    if file.read() != _BGZF_END:
        raise InputError(f"{path}: the compressed file is cut short (no BGZF end-of-file block)")
