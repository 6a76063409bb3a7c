"""CSV files of labelled sequences, checked row by row."""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dnazen.data.tables import read_rows, read_sequence
from dnazen.dna import BASES
from dnazen.files import InputError

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
# what a run writes beside its model: what it says of the test split, and, last, its figures
PREDICTIONS_FILE, REPORT_FILE = "predictions.csv", "report.json"
_SINGLE, _PAIR = ("sequence",), ("sequence1", "sequence2")


class Table(NamedTuple):
    """The rows of one CSV file."""

    path: Path
    sequences: list[tuple[str, ...]]  # one or two a row, upper-case, U read as T
    labels: list[str] | None  # as written; None: no such column
    lines: list[int]  # the file's line on which each row ends
    num_unclear: int  # letters other than A, C, G, T
    others: list[dict[str, str]] | None = None  # further columns, as written; None: there are none

    @property
    def is_pair(self) -> bool:
        return len(self.sequences[0]) == 2


def read_table(path: str | PathLike, needs_labels: bool = True) -> Table:
    """Read a CSV file, plain or compressed: columns `sequence`, or `sequence1` and `sequence2`, and `label`.

    Other columns are kept as they are. Where labels are not needed, those of a file that has them in some rows alone
    are such a column too, which is logged. Letters other than A, C, G, T are kept, counted and logged: the tokenizer
    reads each as unknown.

    Raises:
        InputError: the file is absent or unreadable, lacks a column or has no rows; a row has an empty sequence, one
            with white space inside or no label, or more fields than there are columns.
    """
    path = Path(path)
    needed = {"label"} if needs_labels else set()
    expected = "columns sequence (or sequence1, sequence2)" + " and label" * needs_labels

    def has_columns(columns: Sequence[str]) -> bool:
        return needed <= set(columns) and any(set(names) <= set(columns) for names in (_SINGLE, _PAIR))

    sequences, labels, lines, others = [], [], [], []
    num_unclear = num_unclear_rows = 0
    has_labels = False
    for row in read_rows(path, has_columns, expected):
        names = _PAIR if row.fields.keys() >= set(_PAIR) else _SINGLE
        has_labels = "label" in row.fields
        texts = tuple(read_sequence(row, name) for name in names)
        for name, text in zip(names, texts):
            if len(text.split()) > 1:
                raise InputError(f"{row.place}: {name}: expected letters alone, found white space between them")
        label = row.fields.get("label", "").strip()
        if needs_labels and not label:
            raise InputError(f"{row.place}: expected a label, found nothing")
        unclear = sum(len(text) - sum(map(text.count, BASES)) for text in texts)
        num_unclear += unclear
        num_unclear_rows += unclear > 0
        sequences.append(texts)
        labels.append(label)
        others.append({name: value for name, value in row.fields.items() if name not in (*names, "label")})
        lines.append(row.line)
    if num_unclear:
        logger.warning(
            "%s: %s letters other than A, C, G, T, in %s of %s rows; each is read as an unknown token",
            path, f"{num_unclear:,}", f"{num_unclear_rows:,}", f"{len(sequences):,}",
        )  # fmt: skip
    if has_labels and not all(labels):
        others = [{"label": label, **row} for label, row in zip(labels, others)]
        if any(labels):
            found = f"{sum(map(bool, labels)):,} of {len(labels):,}"
            logger.warning("%s: %s rows have a label; there are metrics only if all have one", path, found)
        labels = None
    labels = labels if has_labels else None
    return Table(path, sequences, labels, lines, num_unclear, others if others[0] else None)


def find_splits(folder: str | PathLike) -> dict[str, Path]:
    """The CSV files of a folder by split: `train.csv`, `dev.csv`, `test.csv`, plain or .gz; some may be absent.

    Raises:
        InputError: a split is there twice.
    """
    found = {}
    for split in SPLITS:
        files = [path for path in (Path(folder) / f"{split}.csv", Path(folder) / f"{split}.csv.gz") if path.is_file()]
        if len(files) > 1:
            raise InputError(f"{folder}: expected one file for {split}, found {files[0].name} and {files[1].name}")
        if files:
            found[split] = files[0]
    return found


def read_splits(folder: str | PathLike) -> dict[str, Table]:
    """The tables of train, dev and, if it is there, test.

    Raises:
        InputError: train or dev is absent; see `read_table`; some splits have pairs and others do not.
    """
    paths = find_splits(folder)
    for split in ("train", "dev"):
        if split not in paths:
            raise InputError(f"{folder}: expected {split}.csv or {split}.csv.gz, found neither")
    tables = {split: read_table(path) for split, path in paths.items()}
    for table in tables.values():
        if table.is_pair != tables["train"].is_pair:
            raise InputError(f"{table.path}: expected pairs in all splits or in none, found another than in training")
    return tables


class Overlap(NamedTuple):
    """How much of a split stands elsewhere too: equal sequences (or pairs), whatever their labels."""

    rows: int
    repeats: int  # rows that repeat an earlier one of the split
    in_train: int  # different sequences that are in training too; of training itself 0
    in_dev: int  # of test alone: different sequences that are in dev too


def count_overlaps(tables: dict[str, Table]) -> dict[str, Overlap]:
    """Repeats within splits and leaks between them."""
    different = {split: set(table.sequences) for split, table in tables.items()}

    def shared(split: str, other: str) -> int:
        return len(different[split] & different.get(other, set())) if SPLITS.index(other) < SPLITS.index(split) else 0

    return {
        split: Overlap(
            len(table.sequences), len(table.sequences) - len(found), shared(split, "train"), shared(split, "dev")
        )
        for (split, table), found in zip(tables.items(), different.values())
    }


def describe_overlap(split: str, overlap: Overlap) -> str:
    """Repeats and leaks of a split, for people."""
    parts = [f"{split}: {overlap.rows:,} rows, {overlap.repeats:,} of them repeats"]
    if split != "train":
        parts.append(f"{overlap.in_train:,} sequences in train too")
    if split == "test":
        parts.append(f"{overlap.in_dev:,} in dev too")
    return ", ".join(parts)
