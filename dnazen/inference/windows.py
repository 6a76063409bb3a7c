"""Records cut into windows, which a model reads one at a time; and which window speaks for which base.

A record is cut at all letters but A, C, G and T. A stretch between them that is longer than a window is covered by
windows that overlap. Each base is then in several windows, and belongs to the core of the one in which it lies farthest
from the ends, for there the model sees most around it. Ten bases, with windows of 6 that begin at most 3 apart:

    base        0123456789
    window 0    ####--          [0, 6), core [0, 4)
    window 1      --##--        [2, 8), core [4, 6)
    window 2        --####      [4, 10), core [6, 10)
"""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, NamedTuple

from dnazen.data.fasta import FastaBlock, cut_runs
from dnazen.dna import BASES
from dnazen.files import InputError

_HELD_BYTES = 1 << 24
_PART_BASES = 1 << 20  # of a stretch, at a time


class Window(NamedTuple):
    """Bases of a record that are read at once. After a record's last window comes an empty one, at the record's end."""

    record: str
    start: int  # in the record, from 0
    sequence: str  # of A, C, G and T
    # core: the bases [core_start, core_end) that this window reports; no overlapping window gives them more context
    core_start: int  # in the record
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
    """Cut records at all letters but A, C, G, T, and the stretches between into windows; the module draws some.

    A stretch of at most `window` bases is one window. A longer one is cut into windows of `window` bases, spread
    evenly, as many as it takes for each to begin at most `stride` bases after the last; where two cores meet, each has
    half of what the windows share. The windows and cores of the reverse complement are the mirror images of these.
    """
    # windows depend on where a stretch ends, and that may be a chromosome's end: what is long is kept on disk
    with tempfile.SpooledTemporaryFile(_HELD_BYTES) as stretch:
        for record, of_record in groupby(cut_runs(blocks, _PART_BASES), key=lambda block: block.name):
            end = 0
            for block in of_record:
                if block.sequence[0] in BASES.encode():
                    stretch.write(block.sequence)
                else:
                    yield from _cut_stretch(record, block.start, stretch, window, stride)
                end = block.start + len(block.sequence)
            yield from _cut_stretch(record, end, stretch, window, stride)
            yield Window(record, end, "", end, end)


def _cut_stretch(record: str, end: int, stretch: IO[bytes], window: int, stride: int) -> Iterator[Window]:
    """The windows of the bases in the file `stretch`, which end at base `end` of the record; the file is emptied."""
    length = stretch.tell()
    count = 1 + max(0, -(-(length - window) // stride))
    if count % 2 == 0 and length % 2:
        count += 1  # or the base in the middle would lie as deep in one window as in another
    core_start = 0
    for number in range(count if length else 0):
        first, last = _span(number, count, length, window)
        core_end = length
        if number + 1 < count:
            seam = _span(number + 1, count, length, window)[0] + last
            # where what two share has a middle base, the inner window gets it, in either half of the stretch
            core_end = seam // 2 if number < count // 2 else -(-seam // 2)
        stretch.seek(first)
        start = end - length
        bases = stretch.read(last - first).decode()
        yield Window(record, start + first, bases, start + core_start, start + core_end)
        core_start = core_end
    stretch.seek(0)
    stretch.truncate()


def _span(number: int, count: int, length: int, window: int) -> tuple[int, int]:
    """Where in a stretch of `length` bases window `number` of `count` lies, `[start, end)`."""
    mirror = count - 1 - number
    if number > mirror:
        start, end = _span(mirror, count, length, window)
        return length - end, length - start
    start = -(-number * (length - window) // max(count - 1, 1))
    # a window in the very middle has a base less if no other lies evenly
    return start, length - start if number == mirror else start + window
