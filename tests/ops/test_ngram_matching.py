"""Matching against a search by hand at every position; each case by the reference and the device's implementation."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dnazen_kernels.ngram_matching import NgramTable, ngram_matching, triton_impl
from dnazen_kernels.ngram_matching.table import FREE, home_slots, pack_ngrams
from tests.helpers.oracles import as_lists, match_slowly
from tests.helpers.synchronisations import ForbidSynchronisation

CLS, SEP = 1, 2
FIRST_MASKABLE = 5
with_fixtures = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def make_batch(sequences, device="cpu"):
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return tokens.to(device), lengths.cumsum(0, dtype=torch.int32).to(device)


def make_table(vocabulary, vocab_size):
    return NgramTable.build(list(vocabulary), list(vocabulary.values()), vocab_size)


def worst_case(sequences):
    """A capacity that no batch exceeds: 4 G-grams begin at a token and have 14 tokens."""
    num_tokens = sum(map(len, sequences))
    return 4 * num_tokens, 14 * num_tokens


def check(sequences, vocabulary, vocab_size, device, max_ngrams=None, capacity=None):
    """Both implementations against the slow search; returns what it found."""
    table = make_table(vocabulary, vocab_size)
    exact = ngram_matching(*make_batch(sequences), table, max_ngrams, impl="reference")
    assert as_lists(exact) == match_slowly(sequences, vocabulary, max_ngrams)
    capacity = worst_case(sequences) if capacity is None else capacity
    expected = match_slowly(sequences, vocabulary, max_ngrams, capacity)
    for impl, where in (("reference", torch.device("cpu")), ("triton", device)):
        batch = make_batch(sequences, where)
        matches = ngram_matching(*batch, table.to(where), max_ngrams, capacity=capacity, impl=impl)
        assert as_lists(matches) == expected, impl
        assert matches.ngram_input_ids.dtype == torch.int64
        others = matches.ngram_cu_seqlens, *matches.edges, matches.counts
        assert {tensor.dtype for tensor in others} == {torch.int32}
        assert {tensor.device.type for tensor in (matches.ngram_input_ids, *others)} == {where.type}
    return match_slowly(sequences, vocabulary, max_ngrams)


@st.composite
def vocabularies_and_batches(draw):
    """Few tokens, so that G-grams recur, overlap each other and themselves; vocab_size up to 2 * 12 bits and over."""
    vocab_size = draw(st.sampled_from([FIRST_MASKABLE + 3, 4096]))
    token = st.integers(vocab_size - 3, vocab_size - 1)
    ngrams = draw(st.lists(st.lists(token, min_size=2, max_size=5).map(tuple), max_size=12, unique=True))
    ids = draw(st.permutations(range(1, len(ngrams) + 1)))
    body = st.lists(token, max_size=25)
    sequences = draw(st.lists(body | body.map(lambda tokens: [CLS, *tokens, SEP]), max_size=5))
    return sequences, dict(zip(ngrams, ids, strict=True)), vocab_size, draw(st.none() | st.integers(1, 4))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(vocabularies_and_batches())
def test_reference_equals_slow_search(case):
    sequences, vocabulary, vocab_size, max_ngrams = case
    matches = ngram_matching(*make_batch(sequences), make_table(vocabulary, vocab_size), max_ngrams)
    assert as_lists(matches) == match_slowly(sequences, vocabulary, max_ngrams)


@pytest.mark.slow
@settings(max_examples=100, **with_fixtures)
@given(vocabularies_and_batches(), st.none() | st.tuples(st.integers(0, 20), st.integers(0, 60)))
def test_implementations_equal_slow_search(device, poisoned_memory, case, capacity):
    sequences, vocabulary, vocab_size, max_ngrams = case
    check(sequences, vocabulary, vocab_size, device, max_ngrams, capacity)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several programs on few tokens, the last of them not full."""
    monkeypatch.setattr(triton_impl, "BLOCK", 16)


@pytest.mark.parametrize(
    "sequences, num_ngrams",
    [
        ([], 0),
        ([[]], 0),
        ([[], [5, 6], []], 1),
        ([[5, 6], [5, 6], [6, 5]], 2),
        ([[5], [6]], 0),
        ([[5] * 100], 4),
        ([[CLS, *range(5, 14), SEP]], 8 + 7 + 6 + 5),
        ([[CLS, 5, 6, SEP], [CLS, 7, 8, 9, 10, 11, SEP]], 1 + 4 + 3 + 2 + 1),
        ([list(range(5, 14)) * 4 + [5, 6, 5]], 8 + 7 + 6 + 5),
    ],
    ids=["none", "empty", "two_tokens", "adjacent", "one_token", "over_all", "fourteen", "special", "repeats"],
)
def test_cases(device, poisoned_memory, small_blocks, sequences, num_ngrams):
    """All runs of 2 to 5 rising tokens are G-grams, and so are those of token 5 alone."""
    rising = [tuple(range(first, first + n)) for n in range(2, 6) for first in range(5, 14 - n + 1)]
    ngrams = rising + [(5,) * n for n in range(2, 6)]
    found = check(sequences, {ngram: 3 * k + 1 for k, ngram in enumerate(ngrams)}, 16, device)
    assert found["counts"][0] == num_ngrams
    if num_ngrams == 26 and sequences[0][0] == CLS:
        assert max(np.diff(found["token_offsets"])) == 14


@pytest.mark.parametrize("vocabulary", [{}, {(7, 8): 1}, {(7, 8, 7, 8, 7): 9}], ids=["empty", "pair", "five"])
def test_smallest_vocabularies(device, poisoned_memory, vocabulary):
    found = check([[7, 8, 7, 8, 7], [8, 7], [7]], vocabulary, 16, device)
    assert found["counts"][0] == len(vocabulary)


def test_one_home_for_all_keys(device, poisoned_memory, small_blocks):
    """63 keys at home in the last slot lie one behind the other past the table's end; a 64th is looked for in vain."""
    candidates = np.random.default_rng(0).integers(5, 4096, (20_000, 3))
    homes = home_slots(pack_ngrams(candidates.ravel(), np.arange(0, candidates.size, 3), 3, 12), 7)
    *present, absent = np.unique(candidates[homes == 127], axis=0)[:64].tolist()
    passes_the_prefilter_for_absent = (*absent[:2], 5)
    ngrams = [*map(tuple, present), passes_the_prefilter_for_absent]
    vocabulary = {ngram: k for k, ngram in enumerate(ngrams, 1)}
    assert len(vocabulary) == 64
    table = make_table(vocabulary, 4096)
    assert table.hash_bits == 7 and len(table.keys) == 127 + 63 + 1
    assert (table.keys[127:190] != FREE).all() and (table.keys[:127] != FREE).sum() == 1
    found = check([*present, absent], vocabulary, 4096, device)
    assert found["ngram_input_ids"] == list(range(1, 64))


def test_table_finds_every_key_and_keeps_its_load():
    """All lengths; the table is at most half full, and no G-gram is further from its home than the last filled slot."""
    rng = np.random.default_rng(1)
    ngrams = sorted({tuple(rng.integers(0, 4096, n).tolist()) for n in (2, 3, 4, 5) for _ in range(500)})
    table = NgramTable.build(ngrams, range(1, len(ngrams) + 1), 4096)
    used = table.keys != FREE
    assert used.sum() == len(ngrams) and 2 * len(ngrams) <= 1 << table.hash_bits
    assert sorted(table.ids[used].tolist()) == list(range(1, len(ngrams) + 1)) and not table.ids[~used].any()
    slots = torch.arange(len(table.keys))[used]
    homes = torch.from_numpy(home_slots(table.keys[used].numpy(), table.hash_bits))
    assert all(used[home : slot + 1].all() for home, slot in zip(homes.tolist(), slots.tolist(), strict=True))


def test_shared_prefilter(device, poisoned_memory):
    """13-bit tokens: pairs share entries of the prefilter, and no false match may come of it."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(8189 - 4, 8189, 200).tolist(), rng.choice([5, 4101, 8184], 200).tolist()]
    vocabulary = {(8188, 8187): 1, (4101, 8184, 5): 2, (5, 5, 5, 5): 3}
    assert check(sequences, vocabulary, 8189, device)["counts"][0] == 3


@pytest.mark.parametrize("vocab_size, length", [(4096, 5), (32768, 4)])
def test_largest_keys(device, poisoned_memory, vocab_size, length):
    """Five tokens of 12 bits, and four of 15, just fit."""
    ngram = (vocab_size - 1,) * length
    assert check([ngram], {ngram: 1}, vocab_size, device)["ngram_tokens"] == list(range(length))


@pytest.mark.parametrize(
    "max_ngrams, capacity, counts",
    [
        (None, (9, 20), [5, 14, 0, 0]),
        (None, (5, 14), [5, 14, 0, 0]),
        (None, (4, 14), [4, 12, 0, 1]),
        (None, (5, 13), [4, 12, 0, 1]),
        (None, (5, 6), [2, 5, 0, 3]),
        (None, (0, 14), [0, 0, 0, 5]),
        (None, (5, 0), [0, 0, 0, 5]),
        (1, (5, 14), [2, 7, 3, 0]),
        (1, (1, 14), [1, 3, 3, 1]),
        (0, (5, 14), [0, 0, 5, 0]),
    ],
)
def test_what_is_cut_is_counted(device, poisoned_memory, max_ngrams, capacity, counts):
    """The first sequence's G-grams have 3 and 2 edges, the third's 4 (they occur twice and meet), 3 and 2."""
    vocabulary = {(5, 6, 7): 1, (6, 7): 2, (8, 9): 3, (9, 8, 9): 4, (9, 5): 5}
    sequences = [[5, 6, 7], [], [8, 9, 8, 9, 5]]
    assert match_slowly(sequences, vocabulary)["ngram_offsets"] == [0, 3, 5, 9, 12, 14]
    check(sequences, vocabulary, 16, device, max_ngrams, capacity)
    assert match_slowly(sequences, vocabulary, max_ngrams, capacity)["counts"] == counts


def test_token_id_0_is_a_token(device):
    """And no stand-in for what is behind a sequence's end."""
    vocabulary = {(7, 0): 1, (0, 0, 0): 2, (0, 7, 0, 0): 3}
    found = check([[7], [0, 7], [0, 0], [7, 0], [0, 0, 0], [0, 7]], vocabulary, 16, device)
    assert found["ngram_input_ids"] == [1, 2]


def test_self_overlap_is_one_ngram(device):
    found = check([[7, 7, 7, 7, 9, 7, 7]], {(7, 7): 3}, 16, device)
    assert found["ngram_input_ids"] == [3] and found["ngram_tokens"] == [0, 1, 2, 3, 5, 6]


def test_tokens_that_do_not_fit_match_nothing_on_the_device(device):
    """Unchecked there; the bits above a token must not reach its neighbour's."""
    table = make_table({(5, 6): 1}, 16).to(device)
    tokens, cu_seqlens = make_batch([[5, 22, 5 + 16, 6, -11, 6, 5, 6]], device)
    matches = torch.ops.dnazen.ngram_matching(
        tokens, cu_seqlens, table.keys, table.ids, table.prefilter, table.bits, table.hash_bits, None, 4, 8, "triton"
    )
    assert matches[5].tolist()[:2] == [6, 7] and matches[6].tolist() == [1, 2, 0, 0]


def make_large_case(device):
    rng = np.random.default_rng(3)
    vocabulary = {tuple(rng.integers(5, 12, n).tolist()): 7 * n + k for n in range(2, 6) for k in range(7)}
    sequences = [rng.integers(5, 12, n).tolist() for n in (200, 0, 2, 111)]
    return *make_batch(sequences, device), make_table(vocabulary, 16).to(device)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64], ids=str)
def test_integer_types(device, dtype):
    tokens, cu_seqlens, table = make_large_case(device)
    expected = as_lists(ngram_matching(tokens, cu_seqlens, table, 9, capacity=(300, 3000), impl="triton"))
    assert expected["counts"][0] > 0
    tokens, cu_seqlens = tokens.to(dtype), cu_seqlens.long()
    for impl in ("triton", "reference"):
        assert as_lists(ngram_matching(tokens, cu_seqlens, table, 9, capacity=(300, 3000), impl=impl)) == expected


@pytest.mark.slow
def test_same_integers_on_every_run(device):
    batch = make_large_case(device)
    first = as_lists(ngram_matching(*batch, capacity=(300, 3000), impl="triton"))
    for _ in range(50 if device.type == "cuda" else 1):  # interpreted, programs run one after the other
        assert as_lists(ngram_matching(*batch, capacity=(300, 3000), impl="triton")) == first


def test_no_host_synchronisation(device):
    batch = make_large_case(device)
    with ForbidSynchronisation(device):
        counts = triton_impl.match_ngrams(*batch, 9, (300, 3000))[-1]
    assert counts.tolist()[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("max_ngrams", [None, 5])
def test_opcheck(device, impl, max_ngrams):
    tokens, cu_seqlens, table = make_large_case(device)
    table_arguments = table.keys, table.ids, table.prefilter, table.bits, table.hash_bits
    arguments = (tokens, cu_seqlens, *table_arguments, max_ngrams, 300, 3000, impl)
    torch.library.opcheck(torch.ops.dnazen.ngram_matching.default, arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_in_one_graph(device, impl):
    tokens, cu_seqlens, table = make_large_case(device)

    def match(tokens, cu_seqlens):
        return ngram_matching(tokens, cu_seqlens, table, 9, capacity=(300, 3000), impl=impl)

    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    assert as_lists(compiled(tokens, cu_seqlens)) == as_lists(match(tokens, cu_seqlens))


@pytest.mark.parametrize(
    "ngrams, vocab_size, message",
    [
        ([(5, 16)], 16, r"must lie in \[0, 16\), got 5 to 16"),
        ([(5,) * 5], 4097, "need 68 bits, but a key has 63"),
        ([(5,)], 16, r"must have 2 to 5 tokens, got \(5,\)"),
        ([(5,) * 6], 16, "must have 2 to 5 tokens"),
        ([(5, 6), (7, 8), (5, 6)], 16, "got one twice"),
    ],
    ids=["token", "key", "short", "long", "twice"],
)
def test_table_refuses(ngrams, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        NgramTable.build(ngrams, [1] * len(ngrams), vocab_size)


@pytest.mark.parametrize("cu_seqlens", [[], [0], [1, 3], [0, 2], [0, 2, 1, 3]])
def test_refuses_wrong_cu_seqlens(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 3"):
        starts = torch.tensor(cu_seqlens, dtype=torch.int32)
        ngram_matching(torch.tensor([5, 6, 7]), starts, NgramTable.build([(5, 6)], [1], 16))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input_ids": torch.tensor([5, 16])}, ValueError, r"input_ids must lie in \[0, 16\), got 5 to 16"),
        ({"input_ids": torch.tensor([5.0, 6.0])}, TypeError, "input_ids must be of integers, got torch.float32"),
        ({"cu_seqlens": torch.tensor([False, True])}, TypeError, "cu_seqlens must be of integers, got torch.bool"),
        ({"input_ids": torch.tensor([[5, 6]])}, ValueError, r"input_ids must have one dimension, got shape \[1, 2\]"),
        (
            {"input_ids": torch.zeros(2, dtype=torch.long, device="meta")},
            ValueError,
            "must be on cpu like the table, got meta",
        ),
        ({"max_ngrams": -1}, ValueError, "max_ngrams must not be negative, got -1"),
        ({"capacity": (3, -2)}, ValueError, r"capacity must not be negative, got \(3, -2\)"),
        ({"impl": "triton"}, ValueError, r"capacity must be \(G-grams, edges\) for impl='triton', got None"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    ],
    ids=["tokens", "dtype", "bool", "dimensions", "device", "limit", "capacity", "no_capacity", "impl"],
)
def test_contract(change, error, message):
    table = NgramTable.build([(5, 6)], [1], 16)
    arguments = {"input_ids": torch.tensor([5, 6]), "cu_seqlens": torch.tensor([0, 2]), "table": table, **change}
    with pytest.raises(error, match=message):
        ngram_matching(**arguments)
