"""Masking against loops that follow the paper's sentences, its invariants and rates; by both implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_masking import ngram_masking, reference, triton_impl
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching
from tests.helpers.oracles import as_lists, mask_slowly
from tests.helpers.synchronisations import ForbidSynchronisation

CLS, SEP, MASK = 1, 2, 4
MASKABLE_IDS = torch.arange(5, 12)
EMPTY = NgramEdges.empty(3, "cpu")
with_fixtures = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def make_inputs(sequences, vocabulary, seed, p=0.15, capacity=None):
    """Keyword arguments of `ngram_masking` for bodies of tokens, each put between [CLS] and [SEP]."""
    sequences = [[CLS, *body, SEP] for body in sequences]
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)
    table = NgramTable.build(vocabulary, range(1, len(vocabulary) + 1), 12)
    matches = ngram_matching(input_ids, cu_seqlens, table, capacity=capacity)
    return {
        "input_ids": input_ids,
        "maskable": input_ids >= 5,
        "random": torch.from_numpy(np.random.default_rng(seed).random((len(input_ids), 3))),
        "ngram_input_ids": matches.ngram_input_ids,
        "ngram_cu_seqlens": matches.ngram_cu_seqlens,
        "edges": matches.edges,
        "mlm_probability": p,
        "mask_token_id": MASK,
        "maskable_ids": MASKABLE_IDS,
    }


def to(inputs, device):
    return {name: x.to(device) if hasattr(x, "to") else x for name, x in inputs.items()}


def tensors(fields):
    """Every tensor of a result or of the arguments, by name."""
    flat = {**fields, **fields["edges"]._asdict()}
    return {name: x for name, x in flat.items() if isinstance(x, torch.Tensor)}


def check(inputs, device, whole_ngram=True):
    """Both implementations against the slow one; returns what they found, without the tail."""
    capacity = len(inputs["ngram_input_ids"]), len(inputs["edges"].ngram_tokens)
    expected = mask_slowly(as_lists(inputs), whole_ngram, capacity)
    for impl, where in (("reference", torch.device("cpu")), ("triton", device)):
        batch = ngram_masking(**to(inputs, where), whole_ngram=whole_ngram, impl=impl)
        assert as_lists(batch) == expected, impl
        assert as_lists(batch.trimmed()) == mask_slowly(as_lists(inputs), whole_ngram), impl
        found, given = tensors(batch._asdict()), tensors(inputs)
        assert len(found.keys() & given.keys()) == 7
        for name in found.keys() & given.keys():
            assert found[name].dtype == given[name].dtype and found[name].device.type == where.type
        assert batch.counts.dtype == torch.int32
    return mask_slowly(as_lists(inputs), whole_ngram)


def rows(offsets, values):
    return [values[a:b].tolist() for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


token = st.integers(5, 11)
cases = st.tuples(
    st.lists(st.lists(token, max_size=30), max_size=5),
    st.lists(st.lists(token, min_size=2, max_size=5).map(tuple), max_size=15, unique=True),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.15, 0.4, 1.0]),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases, st.booleans())
def test_reference_equals_slow_masking(case, whole_ngram):
    inputs = make_inputs(*case)
    batch = ngram_masking(**inputs, whole_ngram=whole_ngram, impl="reference").trimmed()
    assert as_lists(batch) == mask_slowly(as_lists(inputs), whole_ngram)


@pytest.mark.slow
@settings(max_examples=100, **with_fixtures)
@given(cases, st.booleans(), st.none() | st.tuples(st.integers(0, 40), st.integers(0, 150)))
def test_implementations_equal_slow_masking(device, poisoned_memory, case, whole_ngram, capacity):
    """With a capacity the G-grams that come in have padding behind them, or were cut."""
    check(make_inputs(*case, capacity), device, whole_ngram)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases, st.booleans())
def test_invariants(case, whole_ngram):
    inputs = make_inputs(*case)
    before = {name: value.clone() for name, value in tensors(inputs).items()}
    batch = ngram_masking(**inputs, whole_ngram=whole_ngram).trimmed()
    masked = batch.labels != -100
    assert inputs["maskable"][masked].all()
    assert torch.equal(batch.labels[masked], inputs["input_ids"][masked])
    assert torch.equal(batch.input_ids[~masked], inputs["input_ids"][~masked])
    assert not masked[batch.edges.ngram_tokens].any()
    if whole_ngram:
        drawn = inputs["maskable"] & (inputs["random"][:, 0] < inputs["mlm_probability"])
        for tokens in rows(inputs["edges"].ngram_offsets, inputs["edges"].ngram_tokens):
            assert masked[tokens].all() or not drawn[tokens].any()
    assert all(torch.equal(tensors(inputs)[name], value) for name, value in before.items())


@pytest.fixture
def small_blocks(monkeypatch):
    """Several programs on few tokens, the last of them not full."""
    monkeypatch.setattr(triton_impl, "BLOCK", 16)


RISING = [tuple(range(first, first + n)) for n in range(2, 6) for first in range(5, 12 - n + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize(
    "number, sequences, vocabulary, p, survivors",
    [
        (0, [], RISING, 0.15, 0),
        (1, [[], [], []], RISING, 1.0, 0),
        (2, [[5, 6, 9]] * 3, [(8, 9)], 0.15, 0),
        (3, [list(range(5, 12)), [], [5, 6]] * 5, RISING, 0.0, 95),
        (4, [list(range(5, 12)), [], [5, 6]] * 5, RISING, 1.0, 0),
        (5, [list(range(5, 12)), [], [5, 6]] * 20, RISING[:4], 0.15, None),
        (6, [[5] * 150], [(5, 5)], 0.002, None),
        (7, [[5] * 150], [(5, 5)], 0.0, 1),
        (8, [list(range(5, 12))], RISING, 0.0, 18),
    ],
    ids=["none", "empty", "no_edges", "nothing", "everything", "some", "over_all", "over_all_kept", "many_over_one"],
)
def test_cases(device, poisoned_memory, small_blocks, number, sequences, vocabulary, p, survivors, is_padded):
    """Each with either type of indices and with padding of more than a block or none; the two meet in turn."""
    index_dtype = torch.int64 if (number + is_padded) % 2 else torch.int32
    inputs = make_inputs(sequences, vocabulary, 3, p, (120, 340) if is_padded else None)
    inputs["ngram_cu_seqlens"] = inputs["ngram_cu_seqlens"].to(index_dtype)
    inputs["edges"] = NgramEdges(*(tensor.to(index_dtype) for tensor in inputs["edges"]))
    found = check(inputs, device)
    if survivors is None:
        masked = sum(label != -100 for label in found["labels"])
        assert masked and (found["counts"][0] > 0 or masked == 150)
    else:
        assert found["counts"][0] == survivors


def test_a_token_under_fourteen(device, poisoned_memory):
    """All runs of 2 to 5 of nine tokens: the middle one is under 14, and drawing it masks all nine."""
    vocabulary = [tuple(range(first, first + n)) for n in range(2, 6) for first in range(3, 12 - n + 1)]
    inputs = make_inputs([range(3, 12)], vocabulary, 0)
    inputs["maskable"][1:-1] = True
    assert inputs["edges"].token_offsets.diff().max() == 14
    inputs["random"] = torch.full((11, 3), 0.5, dtype=torch.float64)
    inputs["random"][5, 0] = 0.0
    assert check(inputs, device)["labels"] == [-100, *range(3, 12), -100]


def test_one_hop_and_no_leak(device):
    """Overlapping G-grams 5-6, 6-7, 7-8, token 5 drawn: 5-6 is hit, 6-7 touches the masked 6 and goes, 7-8 stays."""
    inputs = make_inputs([[5, 6, 7, 8]], [(5, 6), (6, 7), (7, 8)], 0)
    inputs["random"] = torch.ones(6, 3, dtype=torch.float64) * 0.5
    inputs["random"][1, 0] = 0.0
    found = check(inputs, device)
    assert found["labels"] == [-100, 5, 6, -100, -100, -100]
    assert found["input_ids"] == [CLS, MASK, MASK, 7, 8, SEP]
    assert found["ngram_input_ids"] == [3]
    found = check(inputs, device, whole_ngram=False)
    assert found["labels"] == [-100, 5, -100, -100, -100, -100]
    assert found["ngram_input_ids"] == [2, 3]


def test_token_id_0_is_a_token(device):
    inputs = make_inputs([[5, 6]], [], 0, p=0.5)
    inputs["input_ids"][1] = 0
    inputs["random"][:, :2] = 0
    assert check(inputs, device)["labels"] == [-100, 0, 6, -100]


@pytest.mark.parametrize("last", [0.0, 1 - 2**-53], ids=["first", "last"])
def test_replacement_is_an_ordinary_token(device, last):
    """The smallest and the largest uniform there is pick the first and the last maskable token."""
    inputs = make_inputs([[7]], [], 0, p=0.5)
    inputs["random"][1] = torch.tensor([0.0, 0.85, last], dtype=torch.float64)
    assert check(inputs, device)["input_ids"][1] == MASKABLE_IDS[0 if last == 0 else -1]


def test_thresholds_are_exact_to_the_last_bit(device):
    """A comparison in fp32 would take the neighbours below 0.15, 0.8 and 0.9 for the thresholds or beyond."""
    inputs = make_inputs([[7] * 6], [], 0)
    below = [np.nextafter(x, 0) for x in (0.15, 0.8, 0.9)]
    draws = [(below[0], 0), (0.15, 0), (0, below[1]), (0, 0.8), (0, below[2]), (0, 0.9)]
    inputs["random"][1:-1] = torch.tensor([(*draw, 0.99) for draw in draws], dtype=torch.float64)
    assert check(inputs, device)["input_ids"][1:-1] == [MASK, 7, MASK, 11, 11, 7]


def test_rates():
    """Rates of a million tokens inside 5 sigma of the binomial."""
    n, p = 1_000_000, 0.15
    body = np.random.default_rng(1).integers(5, 12, n).tolist()
    inputs = make_inputs([body], [(5, 6, 7)], 2, p)
    batch = ngram_masking(**inputs, whole_ngram=False)
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
    for token_id in MASKABLE_IDS:
        others = original != token_id
        check(int((replaced[others] == token_id).sum()), int(others.sum()), 0.1 / 7)

    whole = ngram_masking(**inputs).labels != -100
    assert whole.sum() > total and whole[1:-1][masked].all()


def make_large_case(device):
    """More tokens, G-grams and edges than one program takes."""
    rng = np.random.default_rng(3)
    sequences = [rng.integers(5, 12, n).tolist() for n in (200, 0, 2, 111)]
    vocabulary = sorted({tuple(rng.integers(5, 12, n).tolist()) for n in range(2, 6) for _ in range(30)})
    return to(make_inputs(sequences, vocabulary, 0, 0.02, (400, 1500)), device)


@pytest.mark.slow
def test_same_integers_on_every_run(device):
    inputs = make_large_case(device)
    first = as_lists(ngram_masking(**inputs, impl="triton"))
    assert 0 < first["counts"][0] < inputs["ngram_cu_seqlens"][-1]
    for _ in range(50 if device.type == "cuda" else 1):  # interpreted, programs run one after the other
        assert as_lists(ngram_masking(**inputs, impl="triton")) == first


def test_no_host_synchronisation(device):
    inputs = make_large_case(device)
    arguments = inputs["maskable"], inputs["ngram_input_ids"], inputs["ngram_cu_seqlens"], inputs["edges"], True
    with ForbidSynchronisation(device):
        triton_impl.mask_ngrams(*arguments)
    with pytest.raises((AssertionError, RuntimeError)), ForbidSynchronisation(device):
        reference.mask_ngrams(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("whole_ngram", [True, False], ids=["whole", "tokens"])
def test_opcheck(device, impl, whole_ngram):
    inputs = make_large_case(device)
    ngrams = inputs["ngram_input_ids"], inputs["ngram_cu_seqlens"], *inputs["edges"]
    arguments = inputs["maskable"], *ngrams, whole_ngram, impl
    torch.library.opcheck(torch.ops.dnazen.ngram_masking.default, arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_in_one_graph(device, impl):
    inputs = make_large_case(device)

    def mask(inputs):
        return ngram_masking(**inputs, impl=impl)

    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    assert as_lists(compiled(inputs)) == as_lists(mask(inputs))


def test_sliced_inputs(device):
    inputs = make_large_case(device)
    expected = as_lists(ngram_masking(**inputs, impl="triton"))
    sliced = tree_map_only(torch.Tensor, lambda x: torch.stack([x, x], dim=-1)[..., 0], inputs)
    assert not sliced["edges"].ngram_tokens.is_contiguous()
    assert as_lists(ngram_masking(**sliced, impl="triton")) == expected


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input_ids": torch.zeros(3)}, TypeError, "input_ids must be torch.int32 or torch.int64, got torch.float32"),
        ({"random": torch.zeros(3, 3)}, TypeError, "random must be torch.float64, got torch.float32"),
        ({"maskable": torch.zeros(3)}, TypeError, "maskable must be torch.bool, got torch.float32"),
        (
            {"random": torch.zeros(3, 2, dtype=torch.float64)},
            ValueError,
            r"random must have shape \[3, 3\], got \[3, 2\]",
        ),
        (
            {"edges": EMPTY._replace(token_offsets=torch.zeros(3, dtype=torch.int32))},
            ValueError,
            r"token_offsets must have shape \[4\], got \[3\]",
        ),
        (
            {"edges": EMPTY._replace(ngram_offsets=torch.zeros(1))},
            TypeError,
            "ngram_offsets must be torch.int32, got torch.float32",
        ),
        (
            {"edges": EMPTY._replace(token_offsets=torch.zeros(4))},
            TypeError,
            "token_offsets must be torch.int32 or torch.int64, got torch.float32",
        ),
        ({"edges": EMPTY.to("meta")}, ValueError, "token_offsets must be on cpu like the others, got meta"),
        (
            {"edges": EMPTY._replace(ngram_tokens=torch.zeros(2, dtype=torch.int32))},
            ValueError,
            r"ngram_tokens must have shape \[0\], got \[2\]",
        ),
        (
            {"ngram_cu_seqlens": torch.zeros(0, dtype=torch.int32)},
            ValueError,
            r"ngram_cu_seqlens must have shape \[1\]",
        ),
        ({"maskable_ids": torch.arange(5).int()}, TypeError, "maskable_ids must be torch.int64, got torch.int32"),
        (
            {"maskable_ids": torch.arange(5, device="meta")},
            ValueError,
            "maskable_ids must be on cpu like the others, got meta",
        ),
        ({"mlm_probability": 1.5}, ValueError, r"mlm_probability must lie in \[0, 1\], got 1.5"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contract(change, error, message):
    with pytest.raises(error, match=message):
        ngram_masking(**{**make_inputs([[5]], [], 0), **change})


def test_too_many_edges():
    """Tensors without memory are enough to see the limit of the packed scan."""
    inputs = to(make_inputs([[5]], [], 0), "meta")
    many = torch.empty(2**31, dtype=torch.int32, device="meta")
    inputs["edges"] = inputs["edges"]._replace(token_ngrams=many, ngram_tokens=many)
    with pytest.raises(ValueError, match="token_ngrams must hold fewer than 2.31 edges, got 2147483648"):
        ngram_masking(**inputs)
