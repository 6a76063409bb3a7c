"""Masking against loops that follow the paper's sentences, and its invariants and rates."""

import math

import numpy as np
import pytest
import torch
from dnazen_kernels.ngram_masking import ngram_masking
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching
from hypothesis import given, settings
from hypothesis import strategies as st

CLS, SEP, MASK = 1, 2, 4
ORDINARY_IDS = torch.arange(5, 12)


def make_inputs(sequences, vocabulary, seed):
    """Keyword arguments of `ngram_masking` for bodies of tokens, each put between [CLS] and [SEP]."""
    sequences = [[CLS, *body, SEP] for body in sequences]
    input_ids = np.array([token for sequence in sequences for token in sequence], np.int64)
    cu_seqlens = np.cumsum([0] + [len(sequence) for sequence in sequences])
    table = NgramTable.build(vocabulary, range(1, len(vocabulary) + 1), 12)
    matches = ngram_matching(input_ids, cu_seqlens, table)._asdict()
    del matches["num_dropped"]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "ordinary": torch.from_numpy(input_ids >= 5),
        "random": torch.from_numpy(np.random.default_rng(seed).random((len(input_ids), 3))),
        **{name: torch.from_numpy(array) for name, array in matches.items()},
        "mask_token_id": MASK,
        "ordinary_ids": ORDINARY_IDS,
    }


def mask_slowly(inputs, p, whole_ngram):
    """Input ids, labels, surviving G-grams, and the tokens that each of these covers."""
    ids, random = inputs["input_ids"].tolist(), inputs["random"].tolist()
    ordinary = inputs["ordinary"].tolist()
    covers = rows(inputs["ngram_offsets"], inputs["ngram_tokens"])
    drawn = {t for t in range(len(ids)) if ordinary[t] and random[t][0] < p}
    masked = set(drawn)
    if whole_ngram:
        for tokens in covers:
            if drawn.intersection(tokens):
                masked.update(tokens)
    labels = [ids[t] if t in masked else -100 for t in range(len(ids))]
    for t in masked:
        if random[t][1] < 0.8:
            ids[t] = MASK
        elif random[t][1] < 0.9:
            ids[t] = ORDINARY_IDS[math.floor(random[t][2] * len(ORDINARY_IDS))].item()
    survivors = [j for j, tokens in enumerate(covers) if not masked.intersection(tokens)]
    return ids, labels, survivors, [covers[j] for j in survivors]


def rows(offsets, values):
    return [values[a:b].tolist() for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


token = st.integers(5, 11)
cases = st.tuples(
    st.lists(st.lists(token, max_size=30), max_size=5),
    st.lists(st.lists(token, min_size=2, max_size=5).map(tuple), max_size=15, unique=True),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.15, 0.4, 1.0]),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(cases)
def test_masking_equals_slow_masking(case):
    sequences, vocabulary, seed, p, whole_ngram = case
    inputs = make_inputs(sequences, vocabulary, seed)
    batch = ngram_masking(**inputs, mlm_probability=p, whole_ngram=whole_ngram)
    ids, labels, survivors, covers = mask_slowly(inputs, p, whole_ngram)
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == labels
    assert batch.ngram_input_ids.tolist() == inputs["ngram_input_ids"][survivors].tolist()
    assert rows(batch.ngram_offsets, batch.ngram_tokens) == covers
    by_token = [[j for j, tokens in enumerate(covers) if t in tokens] for t in range(len(ids))]
    assert rows(batch.token_offsets, batch.token_ngrams) == by_token
    bounds = inputs["ngram_cu_seqlens"].tolist()
    assert batch.ngram_cu_seqlens.tolist() == [sum(j < bound for j in survivors) for bound in bounds]
    for name in ("ngram_cu_seqlens", "token_offsets", "token_ngrams", "ngram_offsets", "ngram_tokens"):
        assert getattr(batch, name).dtype == torch.int32


@settings(max_examples=100, deadline=None)
@given(cases)
def test_masking_invariants(case):
    sequences, vocabulary, seed, p, whole_ngram = case
    inputs = make_inputs(sequences, vocabulary, seed)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    batch = ngram_masking(**inputs, mlm_probability=p, whole_ngram=whole_ngram)
    masked = batch.labels != -100
    assert inputs["ordinary"][masked].all()
    assert torch.equal(batch.labels[masked], inputs["input_ids"][masked])
    assert torch.equal(batch.input_ids[~masked], inputs["input_ids"][~masked])
    assert not masked[batch.ngram_tokens].any()
    if whole_ngram:
        drawn = inputs["ordinary"] & (inputs["random"][:, 0] < p)
        for tokens in rows(inputs["ngram_offsets"], inputs["ngram_tokens"]):
            assert masked[tokens].all() or not drawn[tokens].any()
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_masking_is_one_hop_and_leaks_nothing():
    """Overlapping G-grams 5-6, 6-7, 7-8, token 5 drawn: 5-6 is hit, 6-7 touches the masked 6 and goes, 7-8 stays."""
    inputs = make_inputs([[5, 6, 7, 8]], [(5, 6), (6, 7), (7, 8)], 0)
    inputs["random"] = torch.ones(6, 3, dtype=torch.float64) * 0.5
    inputs["random"][1, 0] = 0.0
    batch = ngram_masking(**inputs, mlm_probability=0.15)
    assert batch.labels.tolist() == [-100, 5, 6, -100, -100, -100]
    assert batch.input_ids.tolist() == [CLS, MASK, MASK, 7, 8, SEP]
    assert batch.ngram_input_ids.tolist() == [3]
    batch = ngram_masking(**inputs, mlm_probability=0.15, whole_ngram=False)
    assert batch.labels.tolist() == [-100, 5, -100, -100, -100, -100]
    assert batch.ngram_input_ids.tolist() == [2, 3]


def test_masking_token_id_0_is_a_token():
    inputs = make_inputs([[5, 6]], [], 0)
    inputs["input_ids"][1] = 0
    inputs["random"][:, :2] = 0
    assert ngram_masking(**inputs, mlm_probability=0.5).labels.tolist() == [-100, 0, 6, -100]


@pytest.mark.parametrize("last", [0.0, 1 - 2**-53], ids=["first", "last"])
def test_masking_replacement_is_an_ordinary_token(last):
    """The smallest and the largest uniform there is pick the first and the last ordinary token."""
    inputs = make_inputs([[7]], [], 0)
    inputs["random"][1] = torch.tensor([0.0, 0.85, last], dtype=torch.float64)
    expected = ORDINARY_IDS[0 if last == 0 else -1]
    assert ngram_masking(**inputs, mlm_probability=0.5).input_ids[1] == expected


def test_masking_rates():
    """Rates of a million tokens inside 5 sigma of the binomial."""
    n, p = 1_000_000, 0.15
    body = np.random.default_rng(1).integers(5, 12, n).tolist()
    inputs = make_inputs([body], [(5, 6, 7)], 2)
    batch = ngram_masking(**inputs, mlm_probability=p, whole_ngram=False)
    masked = (batch.labels != -100)[1:-1]

    def check(found, trials, probability):
        sigma = math.sqrt(trials * probability * (1 - probability))
        assert abs(found - trials * probability) < 5 * sigma

    total = int(masked.sum())
    check(total, n, p)
    replaced, original = batch.input_ids[1:-1][masked], batch.labels[1:-1][masked]
    check(int((replaced == MASK).sum()), total, 0.8)
    # One random replacement in seven is the original itself.
    check(int(((replaced != original) & (replaced != MASK)).sum()), total, 0.1 * 6 / 7)
    check(int((replaced == original).sum()), total, 0.1 + 0.1 / 7)
    for token_id in ORDINARY_IDS:
        others = original != token_id
        check(int((replaced[others] == token_id).sum()), int(others.sum()), 0.1 / 7)

    whole = ngram_masking(**inputs, mlm_probability=p).labels != -100
    assert whole.sum() > total and whole[1:-1][masked].all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"random": torch.zeros(3, 3)}, TypeError, "random float64, got torch.bool and torch.float32"),
        ({"ordinary": torch.zeros(3)}, TypeError, "ordinary must be bool"),
        ({"random": torch.zeros(3, 2, dtype=torch.float64)}, ValueError, r"\(3, 3\), got \(3,\) and \(3, 2\)"),
    ],
    ids=["random_dtype", "ordinary_dtype", "shape"],
)
def test_masking_contract(change, error, message):
    with pytest.raises(error, match=message):
        ngram_masking(**{**make_inputs([[5]], [], 0), **change}, mlm_probability=0.15)
