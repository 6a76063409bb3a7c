"""Batches made on a device a step ahead are those that the host makes."""

import contextlib

import numpy as np
import pytest
import torch

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.device import DeviceBatch, measure_capacity
from dnazen.batches.sampler import MicroBatch, MicroBatchSampler
from dnazen.data.corpus import TokenSplit
from dnazen.data.tokenizer import train_tokenizer
from dnazen.ngram.vocab import NgramVocabulary
from tests.helpers.synchronisations import ForbidSynchronisation

AMPLE, SMALL = (200, 600), (3, 9)


@pytest.fixture(scope="module")
def tokenizer():
    generator = np.random.default_rng(0)
    return train_tokenizer(["".join(generator.choice(list("ACGT"), 20_000))], vocab_size=64)


@pytest.fixture(params=[None, 2], ids=["all", "capped"])
def vocabulary(request):
    generator = np.random.default_rng(1)
    ngrams = {tuple(generator.integers(5, 12, generator.integers(2, 6)).tolist()) for _ in range(60)}
    return NgramVocabulary(sorted(ngrams), list(range(1, len(ngrams) + 1)), request.param)


@pytest.fixture(
    params=[(0.1, True, None), (0.0, False, 0.2), (0.0, True, None), None], ids=["whole", "token", "nothing", "none"]
)
def masking(request):
    if request.param is None:
        return None
    start, whole, end = request.param
    return Masking(start, whole, seed=3, mlm_probability_end=end)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [AMPLE, SMALL], ids=["ample", "small"])
@pytest.mark.parametrize("use_ngrams", [True, False])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equal_to_the_hosts_bit_for_bit(tokenizer, vocabulary, masking, device, impl, use_ngrams, capacity):
    generator = np.random.default_rng(5)
    sequences = [generator.integers(5, 12, length) for length in (30, 1, 17, 64, 2)]
    collator = PackedCollator(tokenizer, vocabulary, masking, use_ngrams)
    expected = collator(sequences, np.arange(5), epoch=2, progress=0.5)
    packed = collator.pack(sequences, np.arange(5), epoch=2, progress=0.5)
    packed = {name: value.to(device) if torch.is_tensor(value) else value for name, value in packed.items()}
    moved = collator.to(device)  # from memory that is not pinned, for which the host waits
    # the reference goes through the host
    with ForbidSynchronisation(device) if impl == "triton" else contextlib.nullcontext():
        pending = DeviceBatch(moved, packed, capacity, impl)
    batch, num_dropped = pending.result()
    assert num_dropped == collator.num_dropped and (vocabulary.max_ngrams is None) == (num_dropped == 0)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert batch[name].device.type == device.type
            assert torch.equal(batch[name].cpu(), value) and batch[name].dtype == value.dtype, name
        else:
            assert batch[name] == value, name


def test_measured_capacity_holds_the_batches_it_was_measured_on(tokenizer):
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 60, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(5, 12, offsets[-1]).astype(np.uint16)
    split = TokenSplit([{"tokens": tokens, "offsets": offsets, "pieces": np.zeros(len(lengths))}])
    vocabulary = NgramVocabulary([(5, 6), (6, 7, 8), (9, 9)], [1, 2, 3])
    dataset = PackedDataset(split, PackedCollator(tokenizer, vocabulary, Masking(0.15, True, 9)))
    runs = MicroBatchSampler(split.lengths, 200, 1, start=0, rank=0, world_size=1).micro_batches(0)
    micro_batches = [MicroBatch(0, run) for run in runs]
    capacity = measure_capacity(dataset, micro_batches)
    unmasked = PackedCollator(tokenizer, vocabulary)
    matched = [unmasked([split[i] for i in run]) for run in runs]
    for name, room in zip(("ngram_input_ids", "token_ngrams"), capacity):
        most = max(len(batch[name]) for batch in matched)
        assert room % 64 == 0 and 1.5 * most <= room + 1 <= 1.5 * most + 65
