"""Sequences for tests, and the files they come in; written without the code under test."""

import csv
import gzip
import io
import random
from pathlib import Path

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A"}


def random_bases(length: int, seed: int | random.Random = 0) -> str:
    """Bases drawn evenly, from a generator or a new one with a seed."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    return "".join(rng.choices("ACGT", k=length))


def other_strand(bases: str) -> str:
    """The reverse complement, base by base; N, which may be any, stays."""
    return "".join(PAIRS.get(base, "N") for base in reversed(bases))


def write_fasta(path: Path, records: dict[str, str] | list[str]) -> Path:
    """Write records by name; those of a list are `record0`, `record1`, ..., with a description."""
    if isinstance(records, list):
        records = {f"record{i} description": sequence for i, sequence in enumerate(records)}
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    """Write rows by column, compressed if the name ends in .gz; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_sequences(path: Path, sequences: list[str]) -> Path:
    """Write a CSV with the columns `sequence`, and `label`, which is 0."""
    return write_csv(path, [{"sequence": sequence, "label": 0} for sequence in sequences])
