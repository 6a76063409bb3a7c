"""Sequences by name, from FASTA or from the CSV files of benchmarks."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from dnazen.data.fasta import FastaBlock, FastaReader, normalize_letters
from dnazen.data.tables import read_sequences


def is_csv(path: str | PathLike) -> bool:
    """Whether a file of sequences is read as CSV, by its name: .csv, .csv.gz, ...; others are FASTA."""
    return ".csv" in Path(path).suffixes[-2:]


def read_blocks(path: str | PathLike) -> Iterator[FastaBlock]:
    """Yield the blocks of a CSV file, if its name ends in .csv (.csv.gz, ...), or else of a FASTA file.

    The record of a CSV's row is named by the row's number, from 1.

    Raises:
        InputError: see `FastaReader` and `read_sequences`; a sequence has a letter that is no nucleotide code.
    """
    if not is_csv(path):
        yield from FastaReader(path)
        return
    for number, sequence in enumerate(read_sequences(path), 1):
        yield FastaBlock(str(number), 0, normalize_letters(sequence.encode(errors="replace"), f"{path}: row {number}"))
