"""What counting says of hidden tokens, against slow independent counting."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.batches.collator import IGNORE_INDEX, PackedCollator, PackedDataset
from dnazen.batches.sampler import MicroBatch
from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import tokens_by_id
from dnazen.evaluation.baselines import Baselines
from dnazen.evaluation.held_out import HELD_OUT_MASKING
from dnazen.evaluation.markov import MarkovModel, choose_strengths, count_kmers, markov_probabilities
from dnazen.evaluation.targets import CONTEXT_BASES, Spelling, Targets, collect_targets
from dnazen.ngram.vocab import load_ngrams
from tests.helpers.sequences import other_strand

UNKNOWN = 4


@pytest.fixture(scope="module")
def corpus(prepared):
    return Corpus.open(prepared.corpus)


@pytest.fixture(scope="module")
def dataset(prepared, corpus):
    collator = PackedCollator(corpus.tokenizer, load_ngrams(prepared.ngrams, corpus), HELD_OUT_MASKING)
    return PackedDataset(corpus.validation, collator)


@pytest.fixture(scope="module")
def targets(corpus, dataset):
    numbers = np.arange(len(corpus.validation))
    batch = dataset[MicroBatch(0, numbers)][0]
    return collect_targets([(batch, numbers)], Spelling(corpus.tokenizer), corpus.tokenizer.all_special_ids)


def test_targets_are_the_hidden_tokens_and_what_is_seen_around_them(corpus, dataset, targets):
    """Against a walk over the tokens of each sequence, one by one."""
    spelled = tokens_by_id(corpus.tokenizer)
    row = 0
    for number in range(len(corpus.validation)):
        batch = dataset[MicroBatch(0, np.array([number]))][0]
        original = corpus.validation[number].tolist()
        shown = [None if label != IGNORE_INDEX else i for i, label in zip(original, batch["labels"][1:-1].tolist())]
        for at in (i for i, token in enumerate(shown) if token is None):
            before, behind = "", ""
            for token in reversed(shown[:at]):
                if token is None:
                    break
                before = spelled[token] + before
            for token in shown[at + 1 :]:
                if token is None:
                    break
                behind += spelled[token]
            assert targets.truth[row] == original[at] and targets.sequence[row] == number
            assert targets.length[row] == len(spelled[original[at]])
            assert targets.left[row] == (-1 if at == 0 or shown[at - 1] is None else original[at - 1])
            assert targets.right[row] == (-1 if at + 1 == len(shown) or shown[at + 1] is None else original[at + 1])
            assert bases(targets.left_bases[row]) == before[-CONTEXT_BASES:]
            assert bases(targets.right_bases[row]) == behind[:CONTEXT_BASES]
            row += 1
    assert row == len(targets.truth) > 200


def bases(codes) -> str:
    return "".join("ACGT"[code] for code in codes if code != UNKNOWN)


@given(st.text("ACGTN", max_size=60))
@settings(max_examples=100, deadline=None)
def test_kmers_are_those_of_both_strands(text):
    codes = np.array(["ACGTN".index(base) for base in text], dtype=np.uint8)
    reverse = other_strand(text)
    for k, counts in enumerate(count_kmers(codes, 5), start=1):
        windows = (strand[i : i + k] for strand in (text, reverse) for i in range(len(text) - k + 1))
        expected = Counter(window for window in windows if "N" not in window)
        found = {i: n for i, n in enumerate(counts.tolist()) if n}
        number = {window: sum("ACGT".index(b) * 4**e for e, b in enumerate(reversed(window))) for window in expected}
        assert found == {number[window]: n for window, n in expected.items()}


def test_markov_probabilities_of_each_context_sum_to_one(corpus):
    spelling = Spelling(corpus.tokenizer)
    text, _ = spelling.spell(np.concatenate([corpus.train[i].astype(np.int64) for i in range(50)]))
    kmers = count_kmers(text, 7)
    strengths = choose_strengths(kmers, count_kmers(text[:5000], 7))
    for order, table in enumerate(markov_probabilities(kmers, strengths)):
        assert table.shape == (4**order, 4)
        np.testing.assert_allclose(table.sum(1), 1.0, rtol=1e-12)


def test_markov_model_multiplies_what_a_walk_over_the_bases_multiplies(corpus, targets):
    """log p(left, token, right) - log p(left) - log p(token), base by base in plain Python."""
    spelling, spelled = Spelling(corpus.tokenizer), tokens_by_id(corpus.tokenizer)
    text, _ = spelling.spell(np.concatenate([corpus.train[i].astype(np.int64) for i in range(50)]))
    tables = markov_probabilities(count_kmers(text, 4), [10.0, 30.0, 100.0])
    some = targets.take(slice(0, 12))
    gain = MarkovModel(tables, spelling).gain(some)

    def walk(context: str, following: str) -> float:
        total = 0.0
        for base in following:
            seen = context[-3:]
            code = sum("ACGT".index(b) * 4**e for e, b in enumerate(reversed(seen)))
            total += math.log(tables[len(seen)][code, "ACGT".index(base)])
            context += base
        return total

    maskable = spelling.maskable[::17]
    for row in range(12):
        left, right = bases(some.left_bases[row]), bases(some.right_bases[row])[:3]
        # what all tokens have in common does not count, and is not the same in both ways of writing it
        expected = np.array([walk(left, spelled[t] + right) - walk("", spelled[t]) for t in maskable])
        # some twenty fp32 sums of numbers below 5
        np.testing.assert_allclose(gain[row, maskable], expected, atol=20 * 5 * 2**-24 * 4)


@pytest.mark.slow
def test_token_baselines_equal_slow_counting(prepared, corpus, targets):
    """`unigram`, and `previous token` for the best of the strengths on offer, from dictionaries."""
    vocabulary = load_ngrams(prepared.ngrams, corpus)
    scores = Baselines(corpus.train, corpus.tokenizer, vocabulary, HELD_OUT_MASKING).score(targets)
    sequences = [corpus.train[i].tolist() for i in range(len(corpus.train))]
    special = set(corpus.tokenizer.all_special_ids)
    counts = Counter(token for sequence in sequences for token in sequence)
    total = sum(counts.values()) + len(corpus.tokenizer) - len(special)
    unigram = {token: (counts[token] + 1) / total for token in range(len(corpus.tokenizer)) if token not in special}
    # counts are exact; fp32 logarithms of about 5
    tolerance = dict(rtol=1e-5)
    np.testing.assert_allclose(
        scores["unigram"].loss, [-math.log(unigram[t]) for t in targets.truth.tolist()], **tolerance
    )
    pairs = Counter(pair for sequence in sequences for pair in zip(sequence, sequence[1:]))
    behind = Counter(left for sequence in sequences for left in sequence[:-1])

    def previous(strength: float) -> list[float]:
        losses = []
        for truth, left in zip(targets.truth.tolist(), targets.left.tolist()):
            p = unigram[truth]
            if left >= 0:
                p = (pairs[left, truth] + strength * p) / (behind[left] + strength)
            losses.append(-math.log(p))
        return losses

    # the chosen weights normalise over all tokens, of which the special ones have no share in either
    found = scores["previous token"].loss
    candidates = [previous(strength) for strength in (1, 3, 10, 30, 100, 300, 1000, 3000)]
    distances = [np.abs(found - candidate).max() for candidate in candidates]
    assert min(distances) < 1e-4
    assert sum(distance < 1e-4 for distance in distances) == 1
    assert scores["both neighbors"].loss.mean() < scores["previous token"].loss.mean() < scores["unigram"].loss.mean()
    for row in scores.values():
        assert np.isfinite(row.loss).all() and len(row.loss) == len(row.correct) == len(targets.truth)


def test_a_target_between_unknown_neighbors_has_the_unigram(prepared, corpus, targets):
    blind = Targets(
        targets.truth, targets.sequence, targets.length,
        np.full_like(targets.left, -1), np.full_like(targets.right, -1),
        np.full_like(targets.left_bases, UNKNOWN), np.full_like(targets.right_bases, UNKNOWN),
    )  # fmt: skip
    vocabulary = load_ngrams(prepared.ngrams, corpus)
    scores = Baselines(corpus.train, corpus.tokenizer, vocabulary, HELD_OUT_MASKING).score(blind)
    for row in scores.values():
        np.testing.assert_allclose(row.loss, scores["unigram"].loss, rtol=1e-5)
