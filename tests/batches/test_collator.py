"""Packed batches: what is in them, and that masking belongs to the sequence and not to its company."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dnazen.batches.collator import (
    Masking,
    PackedCollator,
    PackedDataset,
    calibrate_mlm_probability,
    masking_uniforms,
)
from dnazen.batches.sampler import MicroBatch, MicroBatchSampler
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.prefetch import Prefetcher

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def tokenizer():
    generator = np.random.default_rng(0)
    return train_tokenizer(["".join(generator.choice(list("ACGT"), 20_000))], vocab_size=NUM_TOKENS)


@pytest.fixture(scope="module")
def vocabulary():
    generator = np.random.default_rng(1)
    ngrams = {tuple(generator.integers(5, 12, generator.integers(2, 6)).tolist()) for _ in range(60)}
    return NgramVocabulary(sorted(ngrams), list(range(1, len(ngrams) + 1)))


# few distinct tokens, so that G-grams abound
sequences_strategy = st.lists(
    st.lists(st.integers(5, 11), min_size=1, max_size=40).map(lambda ids: np.array(ids, dtype=np.uint16)),
    min_size=1,
    max_size=6,
)


def per_sequence(batch) -> list[tuple]:
    """Each sequence's own part of a batch: ids, labels, and its G-grams with the positions they cover."""
    parts = []
    for b in range(len(batch["cu_seqlens"]) - 1):
        start, end = batch["cu_seqlens"][b : b + 2].tolist()
        first, last = batch["ngram_cu_seqlens"][b : b + 2].tolist()
        ngrams = []
        for j in range(first, last):
            edges = slice(*batch["ngram_offsets"][j : j + 2].tolist())
            ngrams.append((batch["ngram_input_ids"][j].item(), (batch["ngram_tokens"][edges] - start).tolist()))
        parts.append((batch["input_ids"][start:end].tolist(), batch["labels"][start:end].tolist(), ngrams))
    return parts


@settings(deadline=None, max_examples=60)
@given(sequences=sequences_strategy, epoch=st.integers(0, 3), whole=st.booleans(), p=st.sampled_from([0.05, 0.15, 0.5]))
def test_masking_invariants(tokenizer, vocabulary, sequences, epoch, whole, p):
    """No special token is masked, labels are the originals, no G-gram that survives touches a masked token."""
    batch = PackedCollator(tokenizer, vocabulary, Masking(p, whole, 3))(sequences, np.arange(len(sequences)), epoch)
    plain = PackedCollator(tokenizer, vocabulary)(sequences)
    assert "labels" not in plain
    original, labels, masked = plain["input_ids"], batch["labels"], batch["labels"] != -100
    expected = [id for s in sequences for id in (tokenizer.cls_token_id, *s.tolist(), tokenizer.sep_token_id)]
    assert original.tolist() == expected
    assert torch.equal(labels[masked], original[masked])
    assert torch.equal(batch["input_ids"][~masked], original[~masked])
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert not masked[special].any()
    allowed = set(range(NUM_TOKENS)) - set(tokenizer.all_special_ids) | {tokenizer.mask_token_id}
    assert set(batch["input_ids"][masked].tolist()) <= allowed
    assert not masked[batch["ngram_tokens"].long()].any()
    assert batch["max_ngrams"] == batch["ngram_cu_seqlens"].diff().max()
    assert batch["max_seqlen"] == max(map(len, sequences)) + 2
    # the drawn tokens, recomputed from the generator alone
    drawn = np.concatenate([masking_uniforms(3, epoch, i, len(s) + 2)[:, 0] < p for i, s in enumerate(sequences)])
    drawn = torch.from_numpy(drawn) & ~special
    if not whole:
        assert torch.equal(masked, drawn)
        return
    hit = drawn.clone()
    for j in range(len(plain["ngram_input_ids"])):
        covered = plain["ngram_tokens"][plain["ngram_offsets"][j] : plain["ngram_offsets"][j + 1]].long()
        if drawn[covered].any():
            hit[covered] = True
    assert torch.equal(masked, hit)


@settings(deadline=None, max_examples=40)
@given(sequences=sequences_strategy, data=st.data(), epoch=st.integers(0, 5))
def test_a_sequence_is_masked_the_same_way_in_any_batch(tokenizer, vocabulary, sequences, data, epoch):
    collator = PackedCollator(tokenizer, vocabulary, Masking(0.15, True, 11))
    ids = np.array(data.draw(st.permutations(range(100, 100 + len(sequences)))))
    together = per_sequence(collator(sequences, ids, epoch))
    for sequence, sequence_id, part in zip(sequences, ids, together, strict=True):
        assert per_sequence(collator([sequence], np.array([sequence_id]), epoch)) == [part]


def test_draws_differ_between_epochs_sequences_and_seeds():
    base = masking_uniforms(1, 2, 3, 50)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not np.array_equal(base, masking_uniforms(*other, 50))
    assert np.array_equal(base[:20], masking_uniforms(1, 2, 3, 20))


def test_rates_are_inside_five_sigma(tokenizer, vocabulary):
    """Drawn tokens are Binomial(n, p); of the masked ones 80 % become [MASK], 10 % another token, 10 % stay."""
    generator = np.random.default_rng(5)
    maskable = sorted(set(range(NUM_TOKENS)) - set(tokenizer.all_special_ids))
    sequences = [generator.choice(maskable, 400).astype(np.uint16) for _ in range(150)]
    batch = PackedCollator(tokenizer, vocabulary, Masking(0.15, False, 0))(sequences, np.arange(150))
    masked = batch["labels"] != -100
    ids, labels = batch["input_ids"][masked], batch["labels"][masked]

    def check(count: int, n: int, p: float) -> None:
        assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5, (count, n, p)

    check(int(masked.sum()), 150 * 400, 0.15)
    check(int((ids == tokenizer.mask_token_id).sum()), len(ids), 0.8)
    # a random token is the original with chance 1 / V, which adds to those that stay
    check(int((ids == labels).sum()), len(ids), 0.1 + 0.1 / len(maskable))


def test_without_ngrams_masks_the_same_tokens(tokenizer, vocabulary):
    sequences = [np.array([5, 6, 7, 8, 5, 6, 7] * 6, dtype=np.uint16)] * 3
    masking = Masking(0.15, True, 0)
    with_ngrams = PackedCollator(tokenizer, vocabulary, masking)(sequences, np.arange(3))
    without = PackedCollator(tokenizer, vocabulary, masking, use_ngrams=False)(sequences, np.arange(3))
    assert torch.equal(with_ngrams["labels"], without["labels"])
    assert torch.equal(with_ngrams["input_ids"], without["input_ids"])
    assert len(with_ngrams["ngram_input_ids"]) and not len(without["ngram_input_ids"])
    assert without["token_offsets"].tolist() == [0] * (len(without["input_ids"]) + 1)
    assert without["ngram_offsets"].tolist() == [0] and without["max_ngrams"] == 0


def test_cap_cuts_and_counts(tokenizer, vocabulary):
    sequences = [np.array([5, 6, 7, 8, 9, 10, 11] * 5, dtype=np.uint16)]
    full = PackedCollator(tokenizer, vocabulary)(sequences)
    capped_vocabulary = NgramVocabulary(vocabulary.ngrams, vocabulary.ids, max_ngrams=2)
    collator = PackedCollator(tokenizer, capped_vocabulary)
    capped = collator(sequences)
    assert len(full["ngram_input_ids"]) > 2
    assert capped["ngram_input_ids"].tolist() == full["ngram_input_ids"][:2].tolist()
    assert collator.num_dropped == len(full["ngram_input_ids"]) - 2


@pytest.fixture(scope="module")
def dataset(tokenizer, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(2)
    (folder / "a.fa").write_text(">a\n" + "".join(generator.choice(list("ACGT"), 60_000)) + "\n")
    build_corpus([folder / "a.fa"], tokenizer, folder / "c", max_tokens=100, validation_fraction=0.1)
    corpus = Corpus.open(folder / "c")
    return PackedDataset(corpus.train, PackedCollator(tokenizer, vocabulary, Masking(0.15, True, 9)))


def test_loader_workers_do_not_change_a_bit(dataset):
    def read(workers: int, start: int, count: int):
        sampler = MicroBatchSampler(dataset.split.lengths, 512, 4, start, rank=0, world_size=1)
        loader = iter(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers))
        return [next(loader)[0] for _ in range(count)]

    straight = read(0, 0, 12)
    for other in (read(2, 0, 12), read(0, 0, 5) + read(1, 5, 7)):
        for expected, found in zip(straight, other, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[name])), name


STEPS, PER_STEP = 10, 4


@pytest.mark.parametrize(
    ("world_size", "first", "workers", "ahead"),
    [(1, 0, 0, False), (2, 0, 0, False), (4, 0, 1, False), (2, 7, 0, False), (1, 3, 0, True), (4, 9, 0, True)],
)
def test_mask_rate_is_that_of_the_step(dataset, world_size, first, workers, ahead):
    """From 0.5 to 0.1 over 10 steps, by hand from the draws: on 1, 2 and 4 processes, resumed, read or made ahead."""
    collator = copy.copy(dataset.collator)
    collator.masking = Masking(0.5, False, 9, mlm_probability_end=0.1)
    falling = PackedDataset(dataset.split, collator)
    batches = {}
    for rank in range(world_size):
        sampler = MicroBatchSampler(falling.split.lengths, 512, 4, PER_STEP * first, rank, world_size)
        sampler.set_steps(first, PER_STEP, STEPS)
        prefetcher = Prefetcher(falling, sampler, torch.device("cpu"), "reference") if ahead else None
        source = prefetcher.unmatched if ahead else falling
        loader = iter(DataLoader(source, sampler=sampler, batch_size=None, num_workers=workers))
        of_rank = PER_STEP // world_size
        for step in range(first, STEPS):
            made = prefetcher.take(loader, of_rank) if ahead else [next(loader) for _ in range(of_rank)]
            for i, (batch, _) in enumerate(made):
                batches[step, i * world_size + rank] = batch
    runs = [run for epoch in (0, 1) for run in sampler.micro_batches(epoch)]
    in_first = len(sampler.micro_batches(0))
    for (step, i), batch in batches.items():
        number = PER_STEP * step + i
        drawn = [
            masking_uniforms(9, int(number >= in_first), index, len(dataset.split[index]) + 2)[1:-1, 0]
            for index in runs[number]
        ]
        masked = [np.pad(draws < 0.5 - 0.4 * step / 10, 1) for draws in drawn]
        assert torch.equal(batch["labels"] != -100, torch.from_numpy(np.concatenate(masked))), (step, i)


def test_effective_mask_target_is_met(dataset):
    probability = calibrate_mlm_probability(dataset, 0.15)
    collator = copy.copy(dataset.collator)
    collator.masking = Masking(probability, True, 9)
    sequences = np.arange(len(dataset.split))
    batch, _ = PackedDataset(dataset.split, collator)[MicroBatch(1, sequences)]
    n = dataset.split.num_tokens
    rate = (batch["labels"] != -100).sum().item() / n
    assert probability < 0.15
    # another epoch's draws: masked tokens come in G-grams, so the spread is that of about 2-token clumps
    assert abs(rate - 0.15) < 5 * (2 * 0.15 * 0.85 / n) ** 0.5
    assert dataset.collator.masking.mlm_probability == 0.15
