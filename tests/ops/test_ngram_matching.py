"""Matching against a search by hand at every position."""

import numpy as np
import pytest
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching
from hypothesis import given, settings
from hypothesis import strategies as st

CLS, SEP = 1, 2
FIRST_ORDINARY = 5


def match_slowly(sequences, vocabulary, max_ngrams):
    """Per sequence, the (id, positions) of its G-grams in order, and how many were cut."""
    matches, dropped, start = [], 0, 0
    for sequence in sequences:
        positions = {}  # insertion order is the order of first position, then length
        for i in range(len(sequence)):
            for length in range(2, 6):
                ngram = tuple(sequence[i : i + length])
                if len(ngram) == length and ngram in vocabulary:
                    positions.setdefault(vocabulary[ngram], set()).update(range(start + i, start + i + length))
        found = [(ngram_id, sorted(covered)) for ngram_id, covered in positions.items()]
        matches.append(found[:max_ngrams])
        dropped += len(found) - len(matches[-1])
        start += len(sequence)
    return matches, dropped


def make_batch(sequences):
    cu_seqlens = np.cumsum([0] + [len(sequence) for sequence in sequences])
    return np.array([token for sequence in sequences for token in sequence], np.int64), cu_seqlens


@st.composite
def vocabularies_and_batches(draw):
    """Few tokens, so that G-grams recur, overlap each other and themselves; vocab_size up to 2 * 12 bits and over."""
    vocab_size = draw(st.sampled_from([FIRST_ORDINARY + 3, 4096]))
    token = st.integers(vocab_size - 3, vocab_size - 1)
    ngrams = draw(st.lists(st.lists(token, min_size=2, max_size=5).map(tuple), max_size=12, unique=True))
    ids = draw(st.permutations(range(1, len(ngrams) + 1)))
    body = st.lists(token, max_size=25)
    sequences = draw(st.lists(body | body.map(lambda tokens: [CLS, *tokens, SEP]), max_size=5))
    return vocab_size, dict(zip(ngrams, ids, strict=True)), sequences, draw(st.none() | st.integers(1, 4))


@settings(max_examples=300, deadline=None)
@given(vocabularies_and_batches())
def test_matching_equals_slow_search(case):
    vocab_size, vocabulary, sequences, max_ngrams = case
    table = NgramTable.build(list(vocabulary), list(vocabulary.values()), vocab_size)
    input_ids, cu_seqlens = make_batch(sequences)
    matches = ngram_matching(input_ids, cu_seqlens, table, max_ngrams)
    expected, dropped = match_slowly(sequences, vocabulary, max_ngrams)
    flat = [ngram for sequence in expected for ngram in sequence]

    assert matches.num_dropped == dropped
    assert matches.ngram_input_ids.tolist() == [ngram_id for ngram_id, _ in flat]
    assert matches.ngram_cu_seqlens.tolist() == np.cumsum([0] + [len(found) for found in expected]).tolist()
    assert rows(matches.ngram_offsets, matches.ngram_tokens) == [covered for _, covered in flat]
    by_token = [[j for j, (_, covered) in enumerate(flat) if t in covered] for t in range(len(input_ids))]
    assert rows(matches.token_offsets, matches.token_ngrams) == by_token
    assert matches.ngram_input_ids.dtype == np.int64
    assert {array.dtype for array in matches[1:6]} == {np.dtype(np.int32)}


def rows(offsets, values):
    assert offsets[0] == 0 and offsets[-1] == len(values)
    return [values[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def test_matching_with_a_shared_prefilter():
    """13-bit tokens: pairs share entries of the prefilter, and no false match may come of it."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(8189 - 4, 8189, 200).tolist(), rng.choice([5, 4101, 8184], 200).tolist()]
    vocabulary = {(8188, 8187): 1, (4101, 8184, 5): 2, (5, 5, 5, 5): 3}
    table = NgramTable.build(list(vocabulary), list(vocabulary.values()), 8189)
    matches = ngram_matching(*make_batch(sequences), table)
    expected, _ = match_slowly(sequences, vocabulary, None)
    assert matches.ngram_input_ids.tolist() == [ngram_id for found in expected for ngram_id, _ in found]
    assert matches.ngram_input_ids.size == 3


def test_matching_self_overlap_is_one_ngram():
    matches = ngram_matching([7, 7, 7, 7, 9, 7, 7], [0, 7], NgramTable.build([(7, 7)], [3], 16))
    assert matches.ngram_input_ids.tolist() == [3]
    assert matches.ngram_tokens.tolist() == [0, 1, 2, 3, 5, 6]


def test_matching_stays_inside_a_sequence():
    table = NgramTable.build([(7, 8)], [1], 16)
    assert len(ngram_matching([7, 8], [0, 1, 2], table).ngram_input_ids) == 0
    assert ngram_matching([7, 8, 7, 8], [0, 2, 2, 4], table).ngram_cu_seqlens.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "ngrams, ids, vocab_size, message",
    [
        ([(5,)], [1], 16, r"2 to 5 tokens, got \(5,\)"),
        ([(5, 6), (5,) * 6], [1, 2], 16, r"2 to 5 tokens, got \(5, 5, 5, 5, 5, 5\)"),
        ([(5, 6), (6, 5), (5, 6)], [1, 2, 3], 16, r"must differ, got \(5, 6\) twice"),
        ([(5, 16)], [1], 16, r"must lie in \[0, 16\), got 5 to 16"),
        ([(5, 6)], [1, 2], 16, "one entry per G-gram"),
        ([(5,) * 5], [1], 4097, "need 68 bits, but a key has 63"),
    ],
    ids=["short", "long", "twice", "token", "ids", "key"],
)
def test_table_refuses(ngrams, ids, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        NgramTable.build(ngrams, ids, vocab_size)


def test_table_takes_the_largest_keys():
    """Five tokens of 12 bits, and four of 15, just fit."""
    for vocab_size, length in ((4096, 5), (32768, 4)):
        ngram = (vocab_size - 1,) * length
        table = NgramTable.build([ngram], [1], vocab_size)
        assert ngram_matching(ngram, [0, length], table).ngram_tokens.tolist() == list(range(length))


@pytest.mark.parametrize("cu_seqlens", [[], [0], [1, 3], [0, 2], [0, 2, 1, 3]])
def test_matching_refuses_wrong_cu_seqlens(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 3"):
        ngram_matching([5, 6, 7], cu_seqlens, NgramTable.build([(5, 6)], [1], 16))


def test_matching_refuses_tokens_that_do_not_fit():
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 16\), got 5 to 16"):
        ngram_matching([5, 16], [0, 2], NgramTable.build([(5, 6)], [1], 16))
