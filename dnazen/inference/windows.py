"""Records cut into windows: clean runs of A, C, G, T no longer than the model reads at once."""

import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, NamedTuple

from dnazen.data.fasta import FastaBlock
from dnazen.files import InputError

# What 510 tokens of a corpus take up, at 4 bases a token.
WINDOW_BASES = 2040
_RUN = re.compile(b"[ACGT]+|[^ACGT]+")
_HELD_BYTES = 1 << 24


class Window(NamedTuple):
    """A stretch of a record. After a record's last window comes one of no bases, at the record's end."""

    record: str
    start: int  # in the record, from 0
    sequence: str  # of A, C, G and T
    core_start: int  # of all windows, the bases [core_start, core_end) lie farthest from the ends in this one
    core_end: int

    @property
    def is_end(self) -> bool:
        """Whether this marks the end of the record, at `start`."""
        return not self.sequence


def check_window(window: int, stride: int) -> None:
    """InputError unless windows of `window` bases, each `stride` after the last, cover everything."""
    if window < 1 or not 1 <= stride <= window:
        raise InputError(f"window, stride: expected 1 <= stride <= window, found {window} and {stride} bases")


def cut_windows(blocks: Iterable[FastaBlock], window: int, stride: int) -> Iterator[Window]:
    """Cut records at all letters but A, C, G, T, and what is left into windows; see `Window`.

    A run of at most `window` bases is one window. A longer one is cut into as many windows of `window` bases as it
    takes for each to begin at most `stride` bases after the last, spread evenly; of two neighbours each owns its half
    of what they share. The windows of the reverse complement are the mirror images of these, and own the same bases.
    """
    # windows depend on where a run ends, and a run may be a chromosome: what is long is kept on disk
    with tempfile.SpooledTemporaryFile(_HELD_BYTES) as run:
        for record, of_record in groupby(blocks, key=lambda block: block.name):
            end = 0
            for block in of_record:
                end = block.start + len(block.sequence)
                for match in _RUN.finditer(block.sequence):
                    if match.group()[0] in b"ACGT":
                        run.write(match.group())
                    else:
                        yield from _cut_run(record, block.start + match.start(), run, window, stride)
            yield from _cut_run(record, end, run, window, stride)
            yield Window(record, end, "", end, end)


def _cut_run(record: str, end: int, run: IO[bytes], window: int, stride: int) -> Iterator[Window]:
    """The windows of the run of bases that `run` holds, which ends at base `end` of the record; `run` is emptied."""
    length = run.tell()
    count = 1 + max(0, -(-(length - window) // stride))
    if count % 2 == 0 and length % 2:
        count += 1  # or the base in the middle would lie as deep in one window as in another
    core_start = 0
    for number in range(count if length else 0):
        first, last = _span(number, count, length, window)
        core_end = length
        if number + 1 < count:
            seam = _span(number + 1, count, length, window)[0] + last
            # where what two share has a middle base, the inner one gets it, in either half of the run
            core_end = seam // 2 if number < count // 2 else -(-seam // 2)
        run.seek(first)
        start = end - length
        yield Window(record, start + first, run.read(last - first).decode(), start + core_start, start + core_end)
        core_start = core_end
    run.seek(0)
    run.truncate()


def _span(number: int, count: int, length: int, window: int) -> tuple[int, int]:
    """Where in a run of `length` bases window `number` of `count` lies, `[start, end)`."""
    mirror = count - 1 - number
    if number > mirror:
        start, end = _span(mirror, count, length, window)
        return length - end, length - start
    start = -(-number * (length - window) // max(count - 1, 1))
    # a window in the very middle has a base less if no other lies evenly
    return start, length - start if number == mirror else start + window
