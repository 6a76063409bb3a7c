"""Sequences by name, from FASTA or from the CSV files of benchmarks."""

import csv
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from xopen import xopen

from dnazen.data.fasta import FastaBlock, FastaReader, normalize_letters
from dnazen.files import InputError


def read_csv_sequences(path: str | PathLike) -> Iterator[tuple[int, str]]:
    """Yield line number and sequence (column `sequence`; upper-case, U as T) of each row of a CSV, plain or compressed.

    Raises:
        InputError: the file is absent, unreadable, has no column `sequence` or no row, or a row has no sequence.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a CSV with a column 'sequence'")
    is_empty = True
    try:
        with xopen(path, "r", threads=0, newline="") as file:
            reader = csv.DictReader(file)
            if "sequence" not in (reader.fieldnames or ()):
                raise InputError(f"{path}: expected a column 'sequence', found {reader.fieldnames}")
            for row in reader:
                if not row["sequence"]:
                    raise InputError(f"{path}: line {reader.line_num} has no sequence")
                is_empty = False
                yield reader.line_num, row["sequence"].strip().upper().replace("U", "T")
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # each decompressor has errors of its own
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if is_empty:
        raise InputError(f"{path}: expected a sequence in each row, found no rows")


def read_blocks(path: str | PathLike) -> Iterator[FastaBlock]:
    """Yield the blocks of a CSV file, if its name ends in .csv (.csv.gz, ...), or else of a FASTA file.

    The record of a CSV's row is named by the row's number, from 1.

    Raises:
        InputError: see `FastaReader` and `read_csv_sequences`; a sequence has a letter that is no nucleotide code.
    """
    if ".csv" not in Path(path).suffixes[-2:]:
        yield from FastaReader(path)
        return
    for number, (line, sequence) in enumerate(read_csv_sequences(path), 1):
        yield FastaBlock(str(number), 0, normalize_letters(sequence.encode(errors="replace"), f"{path}: line {line}"))
