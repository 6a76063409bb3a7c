"""Known motifs from files in the formats that JASPAR offers: MEME, TRANSFAC and JASPAR's own.

Biopython parses each record. What it would pass over in silence (a matrix cut short, a record without one, a
row too many) is refused here, and every fault is told with the record's place in the file.
"""

import io
import itertools
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xopen import xopen

from dnazen.files import InputError

_MEME_HEADER = "MEME version 4\n\nALPHABET= ACGT\n\nBackground letter frequencies\nA 0.25 C 0.25 G 0.25 T 0.25\n\n"
# what a row of a matrix begins with, by Biopython's name of the format
_ROW = {"minimal": r"\s*[\d.]", "jaspar": r"\s*\S", "transfac": r"\d"}
_PROBABILITY_TOLERANCE = 0.02  # files round to a few digits


class Motif(NamedTuple):
    """A position frequency matrix."""

    motif_id: str
    name: str
    counts: np.ndarray  # float64 [width, 4]: A, C, G, T


class _Record(NamedTuple):
    line: int  # of its first line, from 1
    lines: list[str]


def load_motifs(path: str | PathLike) -> list[Motif]:
    """Read all motifs of a file, plain or compressed; its first line tells the format.

    MEME files hold probabilities, which become counts by their `nsites` (20 where none is given).

    Raises:
        InputError: the file is absent or unreadable, of none of the formats, not of DNA, or a record in it is malformed
            or has the name of an earlier one; the message names file, line and motif.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected motifs in MEME, TRANSFAC or JASPAR format")
    try:
        with xopen(path, "r", threads=0) as file:
            lines = file.read().splitlines()
    except Exception as error:  # each decompressor has errors of its own
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("MEME version"):
        form, records = "minimal", _split_meme(path, lines)
    elif first.startswith(">"):
        form, records = "jaspar", _split_before(lines, r">")
    elif re.match(r"(AC|ID|VV|XX|NA|DE)\b", first):
        form, records = "transfac", _split_transfac(path, lines)
    else:
        expected = "MEME ('MEME version'), TRANSFAC ('AC  ...') or JASPAR ('>...') format"
        raise InputError(f"{path}: expected motifs in {expected}, found {first[:40]!r}")
    motifs: dict[str, Motif] = {}
    for record in records:
        motif = _parse(path, record, form)
        if motif.motif_id in motifs:
            found = f"found {motif.motif_id} again"
            raise InputError(f"{path}: line {record.line}: expected a motif of another name, {found}")
        motifs[motif.motif_id] = motif
    if not motifs:
        raise InputError(f"{path}: expected motifs, found none")
    return list(motifs.values())


def _split_before(lines: list[str], start: str) -> Iterator[_Record]:
    starts = [number for number, line in enumerate(lines) if re.match(start, line)]
    for first, end in itertools.pairwise([*starts, len(lines)]):
        yield _Record(first + 1, lines[first:end])


def _split_meme(path: Path, lines: list[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, 1):
        if line.startswith("ALPHABET") and not re.fullmatch(r"ALPHABET=\s*ACGT\s*", line):
            raise InputError(f"{path}: line {number}: expected motifs of DNA (ALPHABET= ACGT), found {line.strip()!r}")
    yield from _split_before(lines, r"MOTIF\b")


def _split_transfac(path: Path, lines: list[str]) -> Iterator[_Record]:
    first = 0
    for number, line in enumerate(lines):
        if line.strip() == "//":
            if any(re.match(r"(AC|ID|P[0O])\b", entry) for entry in lines[first:number]):  # else the file's version
                yield _Record(first + 1, lines[first : number + 1])
            first = number + 1
    if any(line.strip() for line in lines[first:]):
        raise InputError(f"{path}: line {first + 1}: expected a record that ends with '//', found the end of the file")


def _parse(path: Path, record: _Record, form: str) -> Motif:
    from Bio import motifs

    place = f"{path}: line {record.line}"
    text = "\n".join(record.lines).strip() + "\n\n"
    try:
        # a record of TRANSFAC that is strict has two spaces where most files have a tab
        found = motifs.parse(io.StringIO(_MEME_HEADER + text if form == "minimal" else text), form, strict=False)
    except Exception as error:  # IndexError, KeyError, ... as it comes
        raise InputError(f"{place}: not a motif in {form} format: {error!r}") from error
    motif_id, name = _names(record, form)
    place = f"{place}: motif {motif_id}"
    if len(found) != 1:
        raise InputError(f"{place}: expected a matrix, found {len(found) or 'none'}")
    counts = np.array([found[0].counts[base] for base in "ACGT"], float).T
    numbers = [line for line in record.lines[1:] if re.match(_ROW[form], line)]
    expected = 4 if form == "jaspar" else len(counts)
    if len(numbers) != expected or not len(counts):
        raise InputError(f"{place}: expected a matrix of {expected or 'some'} rows, found {len(numbers)}")
    if form == "minimal":
        _check_probabilities(place, record, numbers)
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts.sum(1) > 0).all()):
        raise InputError(f"{place}: expected counts of 0 or more, some in each position, found others")
    return Motif(motif_id, name, counts)


def _names(record: _Record, form: str) -> tuple[str, str]:
    if form == "transfac":
        fields = {words[0]: words[1] for line in record.lines if len(words := line.split(None, 1)) == 2}
        motif_id = fields.get("AC") or fields.get("ID") or "without AC"
        return motif_id.strip(), fields.get("ID", motif_id).strip()
    words = record.lines[0].removeprefix(">" if form == "jaspar" else "MOTIF").split()
    return (words or ["without a name"])[0], (words or ["without a name"])[-1]


def _check_probabilities(place: str, record: _Record, numbers: list[str]) -> None:
    width = re.search(r"\bw=\s*(\d+)", "\n".join(record.lines))
    if width and int(width[1]) != len(numbers):
        raise InputError(f"{place}: expected a matrix of {width[1]} rows (w={width[1]}), found {len(numbers)}")
    for line in numbers:
        if abs(sum(map(float, line.split())) - 1) > _PROBABILITY_TOLERANCE:
            raise InputError(f"{place}: expected probabilities that add up to 1, found {line.strip()!r}")
