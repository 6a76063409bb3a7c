"""VCF files: read record by record, each with its line as the file has it, and written."""

import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import dropwhile
from os import PathLike
from pathlib import Path
from typing import Any

import pysam
from xopen import xopen

from dnazen.files import InputError


class VcfFile:
    """The records of a VCF or BCF file, each time anew.

    Raises:
        InputError: the file is absent, or not VCF; so do the methods.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path)
        self._stack = ExitStack()

    def __enter__(self) -> "VcfFile":
        if not self.path.is_file():
            problem = "not a regular file" if self.path.exists() else "no such file"
            raise InputError(f"{self.path}: {problem}; expected VCF")
        verbosity = pysam.set_verbosity(0)  # htslib's own words come without the file's name
        self._stack.callback(pysam.set_verbosity, verbosity)
        self._readable = self.path
        with open(self.path, "rb") as file:
            head = file.read(18)
        is_block_compressed = head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\x02\x00"
        if head[:2] == b"\x1f\x8b" and not is_block_compressed:  # which pysam cannot read
            copy = self._stack.enter_context(tempfile.NamedTemporaryFile(suffix=".vcf"))
            try:
                with xopen(self.path, "rb", threads=0) as packed:
                    shutil.copyfileobj(packed, copy)
            except (OSError, EOFError) as error:
                raise InputError(f"{self.path}: cannot be read as VCF: {error}") from error
            copy.flush()
            self._readable = Path(copy.name)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def extend_header(self, fields: Mapping[str, tuple[str, str]], comment: str) -> str:
        """The file's header with a comment and more INFO fields (type and text by name), a value for each ALT allele.

        Raises:
            InputError: the header has one of the fields.
        """
        with self._open() as file:
            if taken := sorted(fields.keys() & set(file.header.info)):
                found = "found it in the header: scored before?"
                raise InputError(f"{self.path}: expected no INFO field {taken[0]}, {found}")
            *lines, columns = str(file.header).splitlines()
        for name, (kind, text) in fields.items():
            lines.append(f'##INFO=<ID={name},Number=A,Type={kind},Description="{text}">')
        return "\n".join([*lines, f"##{comment}", columns]) + "\n"

    def records(self) -> Iterator[tuple[pysam.VariantRecord, bytes]]:
        """Its records, and the line of each as the file has it: pysam's has numbers of some six digits."""
        place = "the first record"
        with self._open() as file, xopen(self._readable, "rb", threads=0) as text:
            lines = dropwhile(lambda line: line.startswith(b"#"), text)
            while True:
                try:
                    record = next(file)
                    line = str(record).encode() if file.is_bcf else next(lines)
                except StopIteration:
                    return
                except (OSError, EOFError, ValueError) as error:
                    raise InputError(f"{self.path}: cannot be read as VCF: {place}: {error}") from error
                place = f"the record after {name_record(record)}"
                yield record, line.rstrip(b"\r\n")

    def _open(self) -> pysam.VariantFile:
        """The file, before its first record."""
        try:
            return pysam.VariantFile(str(self._readable))
        except (OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{self.path}: cannot be read as VCF: {error}") from error


def name_record(record: pysam.VariantRecord) -> str:
    """A record's name for messages: `chr1:50 (rs7)`."""
    return f"{record.chrom}:{record.pos}" + (f" ({record.id})" if record.id else "")


def add_info(line: bytes, fields: Mapping[str, str]) -> bytes:
    """A record's line with more values in its INFO column."""
    columns = line.split(b"\t")
    values = [f"{name}={value}".encode() for name, value in fields.items()]
    info = columns[7].rstrip(b";")
    columns[7] = b";".join([*([info] if info not in (b"", b".") else []), *values])
    return b"\t".join(columns)


@contextmanager
def create_vcf(target: Path, output: str | PathLike) -> Iterator[Any]:
    """`output` under its temporary name `target`, as a binary file: BGZF if it is to end in .gz."""
    try:
        with (pysam.BGZFile if str(output).endswith(".gz") else open)(str(target), "wb") as file:
            yield file
    except OSError as error:
        if error.errno is not None:
            raise
        # pysam names neither the file nor the reason
        raise OSError(errno.EIO, f"cannot be written; is the disk full? ({error})", str(output)) from error
