"""CSV files: read row by row, each row with its place for errors; and the sequences in files such as GUE's."""

import contextlib
import csv
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from xopen import xopen

from dnazen.files import InputError

_MAX_LETTERS = 2**31 - 1  # of a field; the csv module expects 131,072 at most, fewer than a long sequence has


class Row(NamedTuple):
    """A row of a CSV file."""

    line: int  # the file's line on which the row ends
    place: str  # file and line, for errors
    fields: dict[str, str]  # by column


def read_rows(path: str | PathLike, has_columns: Callable[[Sequence[str]], bool], expected: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, plain or compressed, whose first line names the columns.

    Args:
        path: of the file.
        has_columns: whether the columns of these names will do.
        expected: which columns those are, in words, for errors.

    Raises:
        InputError: the file is absent or unreadable, lacks columns or has no rows; a row has more or fewer fields than
            there are columns.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a CSV with {expected}")
    is_empty = True
    try:
        # the mark that spreadsheets put first is no part of a column's name
        with xopen(path, "r", threads=0, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            with _long_fields():
                columns = reader.fieldnames or ()
            if not has_columns(columns):
                raise InputError(f"{path}: expected {expected}, found {', '.join(columns) or 'none'}")
            while True:
                with _long_fields():
                    fields = next(reader, None)
                if fields is None:
                    break
                is_empty, place = False, f"{path}: line {reader.line_num}"
                if None in fields or None in fields.values():
                    found = sum(text is not None for name, text in fields.items() if name) + len(fields.get(None, ()))
                    raise InputError(f"{place}: expected {len(columns)} fields, found {found}")
                yield Row(reader.line_num, place, fields)
    except InputError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if is_empty:
        raise InputError(f"{path}: expected a sequence in each row, found no rows")


def read_sequence(row: Row, column: str) -> str:
    """A row's sequence: upper-case, with T for U.

    Raises:
        InputError: there is nothing in the column.
    """
    sequence = row.fields[column].strip()
    if not sequence:
        raise InputError(f"{row.place}: expected a {column}, found nothing")
    return sequence.upper().replace("U", "T")


def read_sequences(path: str | PathLike) -> Iterator[str]:
    """Yield the column `sequence` of a CSV file row by row: upper-case, with T for U.

    Raises:
        InputError: see `read_rows` and `read_sequence`.
    """
    for row in read_rows(path, lambda columns: "sequence" in columns, "a column 'sequence'"):
        yield read_sequence(row, "sequence")


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read long fields in the block; it has one limit, which is everyone's."""
    limit = csv.field_size_limit(_MAX_LETTERS)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
