"""Cutting records into windows: every base owned once, whatever the blocks."""

import re
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.data.fasta import FastaBlock
from dnazen.dna import reverse_complement
from dnazen.inference.windows import cut_windows


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ACGTN", min_size=1, max_size=60), min_size=1, max_size=3),
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 30),
)  # fmt: skip
def test_every_base_is_owned_by_the_window_it_lies_deepest_in(records, window, stride, block):
    stride = min(stride, window)
    blocks = [
        FastaBlock(str(number), start, record[start : start + block].encode())
        for number, record in enumerate(records)
        for start in range(0, len(record), block)
    ]
    windows = list(cut_windows(blocks, window, stride))
    for number, record in enumerate(records):
        *mine, end = [found for found in windows if found.record == str(number)]
        assert end.is_end and end.start == len(record)
        owned = [base for found in mine for base in range(found.core_start, found.core_end)]
        assert owned == [base for base, letter in enumerate(record) if letter != "N"]
        for found in mine:
            stop = found.start + len(found.sequence)
            assert record[found.start : stop] == found.sequence and 0 < len(found.sequence) <= window
            assert found.start <= found.core_start <= found.core_end <= stop
            for base in range(found.core_start, found.core_end):
                run = next(m for m in re.finditer("[ACGT]+", record) if m.start() <= base < m.end())

                def depth(candidate):  # the ends of a run are no seam
                    last = candidate.start + len(candidate.sequence)
                    left = base - candidate.start if candidate.start > run.start() else len(record)
                    right = last - 1 - base if last < run.end() else len(record)
                    return min(left, right) if candidate.start <= base < last else -1

                assert depth(found) >= max(map(depth, mine)) - 1  # ties at a seam go to one side


@settings(max_examples=300, deadline=None)
@given(st.text("ACGTN", min_size=1, max_size=300), st.integers(1, 20), st.integers(1, 20))
def test_windows_of_the_reverse_complement_are_the_mirror_images(record, window, stride):
    stride = min(stride, window)
    both = []
    for text in (record, reverse_complement(record)):
        *found, end = cut_windows([FastaBlock("r", 0, text.encode())], window, stride)
        assert end.start == len(record)
        both.append(found)
    mirrored = [
        (len(record) - (part.start + len(part.sequence)), reverse_complement(part.sequence),
         len(record) - part.core_end, len(record) - part.core_start)
        for part in both[1][::-1]
    ]  # fmt: skip
    assert [part[1:] for part in both[0]] == mirrored
    starts = [part.start for part in both[0]]
    for run in re.finditer("[ACGT]+", record):
        within = [start for start in starts if run.start() <= start < run.end()]
        assert all(0 <= after - before <= stride for before, after in zip(within, within[1:]))


def test_a_run_that_is_kept_on_disk():
    """17 Mb, read in blocks."""
    letters = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", np.uint8), 17_000_001).tobytes()
    blocks = (FastaBlock("r", start, letters[start : start + 10**6]) for start in range(0, len(letters), 10**6))
    owned = count = 0
    for part in cut_windows(chain(blocks, [FastaBlock("s", 0, b"ACGT")]), 2040, 1020):
        if part.record == "r" and not part.is_end:
            assert part.core_start == owned
            assert part.sequence.encode() == letters[part.start : part.start + len(part.sequence)]
            owned, count = part.core_end, count + 1
    assert owned == len(letters) and count == 16_667 and part == ("s", 4, "", 4, 4)
