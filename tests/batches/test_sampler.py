"""The order of the data: complete, within budget, and the same for any number of processes and any restart."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.batches.sampler import MicroBatchSampler, epoch_order, pack_by_budget

lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)


def take(sampler: MicroBatchSampler, count: int) -> list[tuple[int, list[int]]]:
    return [(epoch, sequences.tolist()) for epoch, sequences, _ in itertools.islice(sampler, count)]


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_strategy, seed=st.integers(0, 2**32), budget=st.integers(62, 300))
def test_each_epoch_holds_every_sequence_once_within_the_budget(lengths, seed, budget):
    sampler = MicroBatchSampler(lengths, budget, seed, start=0, rank=0, world_size=1)
    per_epoch = sampler.end_of_epoch(0)
    total = sampler.end_of_epoch(1)
    stream = take(sampler, total)
    for epoch, part in ((0, stream[:per_epoch]), (1, stream[per_epoch:])):
        assert {e for e, _ in part} == {epoch}
        assert sorted(itertools.chain(*[s for _, s in part])) == list(range(len(lengths)))
    for _, sequences in stream:
        assert sum(lengths[sequences] + 2) <= budget


@settings(deadline=None, max_examples=30)
@given(lengths=lengths_strategy, world_size=st.integers(1, 5), start=st.integers(0, 40))
def test_processes_together_read_the_stream_of_one(lengths, world_size, start):
    count = 6
    whole = take(MicroBatchSampler(lengths, 62, 7, start=0, rank=0, world_size=1), start + count * world_size)
    parts = [take(MicroBatchSampler(lengths, 62, 7, start, rank, world_size), count) for rank in range(world_size)]
    assert [parts[i % world_size][i // world_size] for i in range(count * world_size)] == whole[start:]


def test_next_fit_by_hand():
    lengths = np.array([8, 8, 18, 3])
    runs = pack_by_budget(lengths, np.array([0, 1, 2, 3]), 25)
    assert [run.tolist() for run in runs] == [[0, 1], [2, 3]]
    assert [run.tolist() for run in pack_by_budget(lengths, np.array([0, 1, 2, 3]), 20)] == [[0, 1], [2], [3]]


def test_order_depends_on_seed_and_epoch():
    first = epoch_order(1000, 1, 0)
    assert np.array_equal(first, epoch_order(1000, 1, 0))
    assert not np.array_equal(first, epoch_order(1000, 1, 1))
    assert not np.array_equal(first, epoch_order(1000, 2, 0))


def test_epoch_at_counts_with_fraction():
    sampler = MicroBatchSampler(np.full(10, 8), 20, 0, start=0, rank=0, world_size=1)
    assert [sampler.epoch_at(position) for position in (0, 1, 5, 12)] == [0.0, 0.2, 1.0, 2.4]


def test_sequence_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="--max-batch-tokens must hold the longest sequence, 12 tokens, got 11"):
        pack_by_budget(np.array([3, 10]), np.array([0, 1]), 11)
