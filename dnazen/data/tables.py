"""The sequences in CSV files such as GUE's, with the columns `sequence,label`."""

import csv
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from xopen import xopen

from dnazen.files import InputError

csv.field_size_limit(2**31 - 1)  # a sequence may be longer than the module expects of a field


def read_sequences(path: str | PathLike) -> Iterator[str]:
    """Yield the column `sequence` of a CSV file, plain or compressed, row by row: upper-case, with T for U.

    Raises:
        InputError: the file is absent, unreadable, has no column `sequence` or no row, or a row has nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a CSV with a column 'sequence'")
    is_empty = True
    try:
        with xopen(path, "r", threads=0, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "sequence" not in (reader.fieldnames or ()):
                raise InputError(f"{path}: expected a column 'sequence', found {reader.fieldnames}")
            for row in reader:
                sequence = (row["sequence"] or "").strip()
                if not sequence:
                    raise InputError(f"{path}: line {reader.line_num} has no sequence")
                is_empty = False
                yield sequence.upper().replace("U", "T")
    except InputError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if is_empty:
        raise InputError(f"{path}: expected a sequence in each row, found no rows")
