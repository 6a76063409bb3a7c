"""Records cut into windows: clean runs of A, C, G, T no longer than the model reads at once."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from dnazen.data.fasta import FastaBlock
from dnazen.files import InputError

# What 510 tokens of a corpus take up, at 4 bases a token.
WINDOW_BASES = 2040
_RUN = re.compile("[ACGT]+|[^ACGT]+")


class Window(NamedTuple):
    """A stretch of a record. After a record's last window comes one of no bases, at the record's end."""

    record: str
    start: int  # in the record, from 0
    sequence: str  # of A, C, G and T
    own_start: int  # of all windows, the bases [own_start, own_end) lie farthest from the ends in this one
    own_end: int

    @property
    def is_end(self) -> bool:
        """Whether this marks the end of the record, at `start`."""
        return not self.sequence


def check_window(window: int, stride: int) -> None:
    """InputError unless windows of `window` bases, each `stride` after the last, cover everything."""
    if window < 1 or not 1 <= stride <= window:
        raise InputError(f"window, stride: expected 1 <= stride <= window, found {window} and {stride} bases")


def cut_windows(blocks: Iterable[FastaBlock], window: int, stride: int) -> Iterator[Window]:
    """Cut records at all letters but A, C, G and T, and what is left into windows; see `Window`.

    A run of at most `window` bases is one window. A longer one is cut into windows that begin every `stride` bases, the
    last of which may be shorter; of two that overlap each owns its half of what they share.
    """
    for record, of_record in groupby(blocks, key=lambda block: block.name):
        held, at = "", 0  # bases that were read, and the first that the next window has
        start = own = end = 0  # in the record: of the next window; of what no window owns yet; of what was read
        for block in of_record:
            end = block.start + len(block.sequence)
            for match in _RUN.finditer(block.sequence.decode()):
                if match.group()[0] not in "ACGT":
                    if held:
                        yield Window(record, start, held[at:], own, start + len(held) - at)
                    held = ""
                    continue
                if not held:
                    start = own = block.start + match.start()
                    at = 0
                held += match.group()
                while len(held) - at > window:
                    seam = start + (stride + window) // 2
                    yield Window(record, start, held[at : at + window], own, seam)
                    own, start, at = seam, start + stride, at + stride
                held, at = held[at:], 0
        if held:
            yield Window(record, start, held, own, start + len(held))
        yield Window(record, end, "", end, end)
