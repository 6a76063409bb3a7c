"""Cutting records into windows: every base owned once, whatever the blocks."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.data.fasta import FastaBlock
from dnazen.inference.windows import cut_windows


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
        owned = [base for found in mine for base in range(found.own_start, found.own_end)]
        assert owned == [base for base, letter in enumerate(record) if letter != "N"]
        for found in mine:
            stop = found.start + len(found.sequence)
            assert record[found.start : stop] == found.sequence and 0 < len(found.sequence) <= window
            assert found.start <= found.own_start <= found.own_end <= stop
            for base in range(found.own_start, found.own_end):
                run = next(m for m in re.finditer("[ACGT]+", record) if m.start() <= base < m.end())

                def depth(candidate):  # the ends of a run are no seam
                    last = candidate.start + len(candidate.sequence)
                    left = base - candidate.start if candidate.start > run.start() else len(record)
                    right = last - 1 - base if last < run.end() else len(record)
                    return min(left, right) if candidate.start <= base < last else -1

                assert depth(found) >= max(map(depth, mine)) - 1  # ties at a seam go to one side
