"""Slopes, bias, the back-ends of attention against each other, and the choice among them."""

import itertools
import sys
import types

import numpy as np
import pytest
import torch

from dnazen.batches.collator import PackedCollator
from dnazen.data.tokenizer import train_tokenizer
from dnazen.files import InputError
from dnazen.layers.attention import BACKENDS, alibi_bias, alibi_slopes, packed_attention, select, select_attention
from dnazen.layers.attention.flex import sequence_block_mask
from dnazen.models import DNAZenModel
from dnazen.ngram.vocab import NgramVocabulary
from tests.helpers.synchronisations import ForbidSynchronisation

CPU = torch.device("cpu")
# Several in a tile and several tiles in one, whole tiles, one row more or less than a tile, empty at either end.
LENGTHS = {
    "mixed": [3, 3, 9, 0, 3],
    "all empty": [0, 0],
    "one row": [1],
    "empty at both ends": [0, 5, 0, 0, 5, 0],
    "whole tiles": [128, 256, 128],
    "across tiles": [127, 1, 129, 300, 2],
}


def _inputs(lengths, heads=3, head_dim=8, dtype=torch.float32, device=CPU):
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, total, heads, head_dim, generator=generator).to(device, dtype)
    return cu_seqlens, max(lengths), total, states


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [0.5 * k for k in range(1, 17)]),
        (4, [2, 4, 6, 8]),
        (1, [8]),
    ],
)
def test_slopes_by_hand(num_heads, exponents):
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32
    assert slopes.tolist() == torch.tensor([2.0**-e for e in exponents]).tolist()


def test_bias_is_bidirectional():
    bias = alibi_bias(alibi_slopes(8), 4)
    assert bias[1].tolist() == [
        [0, -0.25, -0.5, -0.75], [-0.25, 0, -0.25, -0.5], [-0.5, -0.25, 0, -0.25], [-0.75, -0.5, -0.25, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("with_alibi", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_equals_eager(lengths, with_alibi):
    cu_seqlens, longest, total, (*states, grad) = _inputs(LENGTHS[lengths])
    slopes = alibi_slopes(3) if with_alibi else None
    results = []
    for name in ("sdpa", "eager"):
        states = [s.detach().clone().requires_grad_() for s in states]
        context, weights = packed_attention(name, cu_seqlens, longest, total, slopes)(*states)
        context.backward(grad)
        results.append((context.detach(), *(s.grad for s in states)))
        assert (weights is None) == (name == "sdpa")
    # fp32: sums of at most 300 terms in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([9, 3, 0, 17, 3, 20] * 5, 1),  # as in fine-tuning
        ([500, 400, 401, 500, 30], 4),  # as in pretraining
        ([130, 129, 128, 127, 112, 50], 4),
        ([64], 1),
        ([600] * 3 + [1] * 200 + [90], 3),
    ],
)
def test_sdpa_calls_once_for_sequences_of_about_equal_length(lengths, calls, monkeypatch):
    attention, batches = torch.nn.functional.scaled_dot_product_attention, []
    record = lambda query, *args, **kwargs: batches.append(query.shape) or attention(query, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    cu_seqlens, longest, total, (*states, _) = _inputs(lengths)
    found, _ = packed_attention("sdpa", cu_seqlens, longest, total, alibi_slopes(3))(*states)
    assert len(batches) == calls
    # padding is never more work than a call is worth, for each line
    assert sum(count * width**2 for count, _, width, _ in batches) <= sum(n**2 + 4096 for n in lengths)
    alone = [
        packed_attention("sdpa", torch.tensor([0, end - start], dtype=torch.int32), end - start, end - start, slopes)(
            *(x[start:end] for x in states)
        )[0]
        for slopes in [alibi_slopes(3)]
        for start, end in itertools.pairwise(cu_seqlens.tolist())
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_alibi", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flex_equals_eager_forward(lengths, with_alibi):
    """On a CPU, where PyTorch runs it without tiles; the tiles are `test_tiles_of_sequences`'."""
    cu_seqlens, longest, total, (*states, _) = _inputs(LENGTHS[lengths])
    slopes = alibi_slopes(3) if with_alibi else None
    expected, found = (
        packed_attention(name, cu_seqlens, longest, total, slopes)(*states)[0] for name in ("eager", "flex_attention")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "length"),
    [
        ("sdpa", 12, 64, 4096), ("sdpa", 16, 64, 1000), ("sdpa", 12, 128, 1000), ("flex_attention", 12, 64, 1000),
        ("flex_attention", 16, 64, 1000), ("flex_attention", 12, 128, 1000), ("flex_attention", 1, 64, 4096),
    ],
)  # fmt: skip
def test_published_sizes_up_to_4096_tokens(name, heads, head_dim, length):
    """Against the formula at some rows. FlexAttention on a CPU computes all scores of a head: of 4096 tokens, for 1."""
    cu_seqlens, longest, total, (*states, _) = _inputs([1, length], heads, head_dim)
    sample = torch.tensor([0, 1, 2, 700, length])
    context = packed_attention(name, cu_seqlens, longest, total, alibi_slopes(heads))(*states)[0][sample]
    query, key, value = (s.double() for s in states)
    scores = torch.einsum("qhd,khd->hqk", query[sample], key) / head_dim**0.5
    scores -= alibi_slopes(heads)[:, None, None] * (sample[:, None] - torch.arange(total)).abs()
    scores[:, 0, 1:] = scores[:, 1:, 0] = -torch.inf
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [name for name, sizes in LENGTHS.items() if sum(sizes)])
def test_tiles_of_sequences(lengths):
    """Every pair of rows of one sequence lies in a tile that is computed, and tiles called full hold no other pair."""
    sizes = LENGTHS[lengths]
    total = sum(sizes)
    mask = sequence_block_mask(torch.tensor([0, *sizes]).cumsum(0).to(torch.int32), total)
    same = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    row = torch.arange(total)
    assert torch.equal(mask.mask_mod(0, 0, row[:, None], row), same)
    tiles = -(-total // 128)
    padded = torch.zeros(tiles * 128, tiles * 128, dtype=torch.bool)
    padded[:total, :total] = same
    padded = padded.unflatten(0, (tiles, 128)).unflatten(2, (tiles, 128))
    is_full = padded.all(3).all(1)
    for expected, count, columns in (
        (padded.any(3).any(1) & ~is_full, mask.kv_num_blocks, mask.kv_indices),
        (is_full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        found = [set(columns[0, 0, i, : count[0, 0, i]].tolist()) for i in range(tiles)]
        assert found == [set(expected[i].nonzero().flatten().tolist()) for i in range(tiles)]


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4, 2, 5], [0, 5, 5], [0, 4, 6], [0, 4]])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_bounds_that_do_not_fit_the_tokens(name, bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected to ascend from 0 to 5 by at most 4"):
        packed_attention(name, torch.tensor(bounds, dtype=torch.int32), 4, 5)


@pytest.mark.parametrize("bounds", [[0, 4], [0, 4, 6]])
@pytest.mark.parametrize("name", ["flash_attention_4", "flash_attention_2", "flex_attention"])
def test_rows_of_no_sequence_are_no_silent_garbage(name, bounds):
    """Where nothing is read on the host; on a GPU this is an assertion on the device."""
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with ForbidSynchronisation(CPU):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected to end at 5, the number of rows"):
            packed_attention(name, bounds, 4, 5)


def _record_calls(monkeypatch, module, result):
    """Stand-in for a package that cannot be installed here; it proves what is passed, not what a kernel does."""
    calls = []
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[module].flash_attn_varlen_func = lambda *args, **kwargs: calls.append((args, kwargs)) or result
    return calls


def test_what_flash_attention_2_is_given(monkeypatch):
    calls = _record_calls(monkeypatch, "flash_attn.flash_attn_interface", "context")
    cu_seqlens, longest, total, (*states, _) = _inputs([3, 0, 2])
    slopes = alibi_slopes(3)
    assert packed_attention("flash_attention_2", cu_seqlens, longest, total, slopes)(*states) == ("context", None)
    (((query, key, value, bounds, same_bounds, *longests), options),) = calls
    assert all(given is state for given, state in zip((query, key, value), states))
    assert bounds is same_bounds is cu_seqlens
    assert longests == [3, 3] and options["alibi_slopes"] is slopes


def test_what_flash_attention_4_is_given(monkeypatch):
    calls = _record_calls(monkeypatch, "flash_attn.cute.interface", ("context", "lse"))
    alibi = types.ModuleType("dnazen.layers.attention.flash_4_alibi")  # needs CuTe
    alibi.alibi, alibi.alibi_backward = object(), object()
    monkeypatch.setitem(sys.modules, alibi.__name__, alibi)
    cu_seqlens, longest, total, (*states, _) = _inputs([3, 0, 2])
    slopes = alibi_slopes(3)
    for given in (slopes, None):
        assert packed_attention("flash_attention_4", cu_seqlens, longest, total, given)(*states) == ("context", None)
    (args, options), (_, without) = calls
    assert all(given is state for given, state in zip(args, states))
    assert options.pop("cu_seqlens_q") is options.pop("cu_seqlens_k") is cu_seqlens
    assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k") == 3
    assert options == {"score_mod": alibi.alibi, "score_mod_bwd": alibi.alibi_backward, "aux_tensors": [slopes]}
    assert without.keys() == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_selection():
    """Checks are remembered; a test that changes what they see must neither find nor leave any."""
    select._OBSTACLES.clear()
    yield
    select._OBSTACLES.clear()


@pytest.mark.slow
def test_on_a_cpu_sdpa_is_chosen_and_each_better_one_has_its_reason():
    for requested, training in itertools.product([None, "auto"], [True, False]):
        name, reasons = select_attention(requested, CPU, torch.float32, 12, 64, training)
        assert name == "sdpa"
        assert reasons == {
            "flash_attention_4": "it needs a CUDA device, and this is cpu",
            "flash_attention_2": "it needs a CUDA device, and this is cpu",
            "flex_attention": "it has no backward on a CPU, and this is cpu",
        }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        (12, 64, torch.float32), (16, 64, torch.float32), (12, 128, torch.bfloat16), (3, 8, torch.float32),
        (3, 8, torch.bfloat16),
    ],
)  # fmt: skip
def test_those_that_run_on_a_cpu_pass_the_check(heads, head_dim, dtype):
    """Each published size in one type; the small one, which takes no time, in both."""
    for name, training in (("eager", True), ("sdpa", True), ("flex_attention", False)):
        assert select_attention(name, CPU, dtype, heads, head_dim, training) == (name, {})


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("flash_attention_4", "flash_attention_4 cannot run here: it needs a CUDA device, and this is cpu"),
        ("flash_attention_2", "flash_attention_2 cannot run here: it needs a CUDA device, and this is cpu"),
        ("flex_attention", "flex_attention cannot run here: it has no backward on a CPU, and this is cpu"),
        ("fast", "expected one of auto, flash_attention_4, .*, eager, found 'fast'"),
    ],
)
def test_what_was_asked_by_name_and_cannot_run(requested, message):
    with pytest.raises(ValueError, match=f"attn_implementation: {message}"):
        select_attention(requested, CPU, torch.float32, 12, 64)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "reason"),
    [
        ("flash_attention_4", (8, 0), torch.bfloat16, 64, "needs Hopper or Blackwell .*, and this is .* 8.0"),
        ("flash_attention_4", (12, 0), torch.bfloat16, 64, "needs Hopper or Blackwell .*, and this is .* 12.0"),
        ("flash_attention_4", (9, 0), torch.float32, 64, "needs bf16 or fp16, and this is torch.float32"),
        ("flash_attention_4", (9, 0), torch.bfloat16, 192, "a multiple of 8 up to 128, and this is 192"),
        ("flash_attention_2", (7, 5), torch.float16, 64, "needs Ampere or newer .*, and this is .* 7.5"),
        ("flash_attention_2", (8, 6), torch.float16, 20, "a multiple of 8 up to 256, and this is 20"),
        ("flash_attention_4", (10, 0), torch.bfloat16, 128, "package flash-attn-4 cannot be imported: "),
        ("flash_attention_2", (9, 0), torch.bfloat16, 64, "package flash-attn cannot be imported: "),
    ],
)
def test_what_the_flash_packages_exclude(name, capability, dtype, head_dim, reason, monkeypatch):
    for module in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, module, None)  # not installed, also where it is
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(select._flash_obstacle(name, capability, dtype, head_dim))


def _wrong_scale(*args):
    attention = BACKENDS["eager"](*args)
    return lambda query, key, value: attention(query * 1.1, key, value)


def _no_slopes(cu_seqlens, max_seqlen, total, slopes):
    return BACKENDS["eager"](cu_seqlens, max_seqlen, total, None)


def _looks_at_neighbours(cu_seqlens, max_seqlen, total, slopes):
    return BACKENDS["eager"](cu_seqlens[[0, -1]], int(cu_seqlens[-1]), total, slopes)


def _wrong_gradient(*args):
    attention = BACKENDS["eager"](*args)
    return lambda query, key, value: attention(query.detach(), key, value + 0 * query)


def _garbage_behind(*args):
    attention = BACKENDS["eager"](*args)

    def attend(query, key, value):
        context, weights = attention(query, key, value)
        return torch.cat([context[:-1], context[-1:] * 0 + torch.nan]), weights

    return attend


def _does_not_launch(*args):
    raise RuntimeError("out of shared memory\nat line 3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_wrong_scale, "differs from eager"),
        (_no_slopes, "differs from eager"),
        (_looks_at_neighbours, "differs from eager"),
        (_wrong_gradient, "differs from eager"),
        (_garbage_behind, "not finite"),
        (_does_not_launch, "its check failed: RuntimeError: out of shared memory$"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_agree_with_eager_is_not_taken(broken, reason, dtype, monkeypatch, fresh_selection):
    monkeypatch.setitem(BACKENDS, "sdpa", broken)
    name, reasons = select_attention(None, CPU, dtype, 3, 8)
    assert name == "eager"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons["sdpa"])
    with pytest.raises(ValueError, match=f"sdpa cannot run here: .*{reason}"):
        select_attention("sdpa", CPU, dtype, 3, 8)


# Which kernel FlashAttention-4 compiles for a number of sequences and the longest one, beside what is fixed in a run:
# by architecture and head_dim, read in its `_flash_attn_fwd` (`BIN_BATCH_SEARCH_THRESH`, tile_m times q_stage).
FLASH_4_KERNELS = {
    "Hopper, head_dim 64": lambda count, longest: (count > 256, longest > 192),
    "Hopper, head_dim 128": lambda count, longest: (count > 256, longest > 128),
    "Blackwell": lambda count, longest: (count > 256, longest > 128, longest > 256),
}


def _record_shapes(monkeypatch, name, attention):
    """Number of sequences, the longest, rows, and whether there is ALiBi, of each call of a back-end."""
    shapes = set()

    def record(cu_seqlens, max_seqlen, total, slopes):
        shapes.add((len(cu_seqlens) - 1, max_seqlen, total, slopes is not None))
        return attention(cu_seqlens, max_seqlen, total, slopes)

    monkeypatch.setitem(BACKENDS, name, record)
    return shapes


@pytest.fixture
def checked_shapes(monkeypatch, fresh_selection) -> set[tuple[int, int, int, bool]]:
    with monkeypatch.context() as patch:
        shapes = _record_shapes(patch, "sdpa", BACKENDS["sdpa"])
        assert select_attention("sdpa", CPU, torch.float32, 4, 32).name == "sdpa"
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FLASH_4_KERNELS.values(), ids=FLASH_4_KERNELS)
def test_the_check_runs_every_kernel_of_flash_attention_4(checked_shapes, kernel):
    for with_alibi in (True, False):
        checked = {kernel(count, longest) for count, longest, _, alibi in checked_shapes if alibi == with_alibi}
        assert checked == {kernel(count, longest) for count in (1, 256, 257, 999) for longest in range(1, 600)}


def test_the_check_runs_what_a_batch_of_pretraining_runs(checked_shapes, config, monkeypatch):
    """65,536 tokens in sequences of up to 512, and the G-grams found in them."""
    tokenizer = train_tokenizer(["ACGT" * 50], vocab_size=12)
    generator = np.random.default_rng(0)
    lengths = generator.integers(310, 511, 156)
    sequences = [generator.integers(5, 12, length) for length in [*lengths, 65_536 - sum(lengths) - 2 * 157]]
    ngrams = [tuple(generator.integers(5, 12, 4).tolist()) for _ in range(150)]
    vocabulary = NgramVocabulary(sorted(set(ngrams)), [1] * len(set(ngrams)))
    batch = PackedCollator(tokenizer, vocabulary)(sequences)
    config.ngram_vocab_size, config.num_hidden_layers, config.num_hidden_ngram_layers = vocabulary.vocab_size, 1, 1
    model = DNAZenModel(config)
    model.set_attn_implementation("sdpa")
    model.select_attention(CPU, torch.float32, training=False)
    sum_only = lambda *_: lambda query, key, value: (query + key + value, None)  # noqa: E731
    shapes = _record_shapes(monkeypatch, "sdpa", sum_only)
    with torch.no_grad():
        model(**batch)
    tokens, grams = sorted(shapes, reverse=True, key=lambda shape: shape[-1])
    assert tokens == (157, batch["max_seqlen"], 65_536, True) and batch["max_seqlen"] > 500
    assert grams[0] == 157 and 10 < grams[1] < 64 and 2000 < grams[2] < 8000 and not grams[3]
    for kernel in FLASH_4_KERNELS.values():
        run, checked = (
            {(kernel(count, longest), alibi) for count, longest, _, alibi in calls}
            for calls in (shapes, checked_shapes)
        )
        assert run <= checked
    # FlexAttention's: more than one tile of rows; one tile is there too
    assert {total > 128 for _, _, total, _ in checked_shapes} == {False, True}


def test_what_has_passed_is_not_checked_again(monkeypatch, fresh_selection):
    """Neither asked for by name, nor without its backward, nor numbered; but in another type, and for another size."""
    checked = []
    monkeypatch.setattr(select, "_disagreement", lambda name, *rest: checked.append((name, *rest)))
    for requested, training in itertools.product(["auto", "sdpa"], [True, False]):
        assert select_attention(requested, CPU, torch.float32, 3, 8, training).name == "sdpa"
    select_attention("auto", torch.device("cpu", 0), torch.float32, 3, 8)
    assert checked == [("sdpa", CPU, torch.float32, 3, 8, True)]
    select_attention("sdpa", CPU, torch.bfloat16, 3, 8, training=False)
    select_attention("auto", CPU, torch.bfloat16, 3, 8)
    select_attention("auto", CPU, torch.bfloat16, 4, 8)
    assert [(str(dtype), heads, training) for _, _, dtype, heads, _, training in checked[1:]] == [
        ("torch.bfloat16", 3, False), ("torch.bfloat16", 3, True), ("torch.bfloat16", 4, True)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_check_leaves_random_numbers_alone(fresh_selection):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    select_attention("sdpa", CPU, torch.float32, 3, 8)
    assert torch.equal(torch.rand(1), expected)


# -- through the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", [None, "auto", "eager", "sdpa", "flex_attention", "flash_attention_4"])
def test_attn_implementation_of_hugging_face_reaches_the_choice(requested, config, tmp_path):
    DNAZenModel(config).save_pretrained(tmp_path)
    model = DNAZenModel.from_pretrained(tmp_path, attn_implementation=requested)
    expected = None if requested == "auto" else requested
    assert model.config._attn_implementation == expected
    if requested in (None, "auto", "eager", "sdpa"):
        assert model.select_attention(CPU, torch.float32).name == (expected or "sdpa")
    else:
        with pytest.raises(InputError, match=f"{requested} cannot run here"):
            model.select_attention(CPU, torch.float32)


def test_what_cannot_run_is_an_error_of_the_forward(config, make_batch):
    model = DNAZenModel(config)
    model.set_attn_implementation("flash_attention_2")
    with pytest.raises(InputError, match="flash_attention_2 cannot run here: it needs a CUDA device"):
        model(**make_batch([5], [1], mask_rate=None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_model_on_flex_equals_eager(config, make_batch):
    model, batch = DNAZenModel(config).eval(), make_batch([3, 140, 17], [0, 4, 1], mask_rate=None)
    results = []
    for name in ("eager", "flex_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(model(**batch).last_hidden_state)
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def _device_that_runs(name, heads, head_dim) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        select_attention(name, device, torch.bfloat16, heads, head_dim)
    except ValueError as error:
        if "cannot be imported" in str(error) or "compute capability" in str(error):
            pytest.skip(str(error))
        raise
    return device


def _assert_agrees_with_eager(name, lengths, num_compared, heads, head_dim, device, dtype=torch.bfloat16):
    """Forward and gradients of the first sequences; each may err twice as much as eager in that type does."""
    cu_seqlens, longest, total, drawn = _inputs(lengths, heads, head_dim, dtype, device)
    compared = sum(lengths[:num_compared])
    for slopes in (alibi_slopes(heads, device), None):
        results = []
        for backend, kind in (("eager", torch.float64), ("eager", dtype), (name, dtype)):
            rows, bounds = (total, cu_seqlens) if backend == name else (compared, cu_seqlens[: num_compared + 1])
            *states, grad = (s[:rows].to(kind).requires_grad_() for s in drawn)
            context, _ = packed_attention(backend, bounds, longest, rows, slopes)(*states)
            context.backward(grad)
            result = torch.stack([context.detach(), *(s.grad for s in states)])
            assert result.isfinite().all()
            results.append(result[:, :compared].double())
        if compared:
            error, bound = ((found - results[0]).abs().max() for found in (results[2], results[1]))
            assert error <= 2 * bound + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (16, 64), (12, 128)])
@pytest.mark.parametrize("name", ["flash_attention_4", "flash_attention_2", "flex_attention"])
def test_kernels_agree_with_eager_on_a_gpu(name, heads, head_dim):
    """Forward and gradients, up to 4,096 tokens."""
    device = _device_that_runs(name, heads, head_dim)
    for sizes in [*LENGTHS.values(), [4096, 1, 513]]:
        _assert_agrees_with_eager(name, sizes, len(sizes), heads, head_dim, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (12, 128)])
@pytest.mark.parametrize("name", ["flash_attention_4", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize(
    ("count", "longest", "total"),
    [(160, 512, 65_536), (300, 512, 65_536), (157, 45, 3000), (300, 45, 3000)],
    ids=["tokens", "tokens of many sequences", "G-grams", "G-grams of many sequences"],
)
def test_kernels_agree_with_eager_at_the_sizes_of_pretraining(name, heads, head_dim, count, longest, total):
    """All sequences run, and the first ones are compared, for `eager` pads; lengths vary around their mean."""
    device = _device_that_runs(name, heads, head_dim)
    lengths = [longest, 0, 1, longest - 1]
    mean, remainder = divmod(total - sum(lengths), count - len(lengths))
    for offset in np.random.default_rng(2).integers(0, min(mean, longest - mean - 1), (count - len(lengths) + 1) // 2):
        lengths += [mean + offset, mean - offset]
    lengths = [int(length) for length in lengths[:count]]
    lengths[-1] += total - sum(lengths) - remainder  # the last one has no partner if their number is odd
    lengths[4 : 4 + remainder] = [length + 1 for length in lengths[4 : 4 + remainder]]
    assert sum(lengths) == total and len(lengths) == count and max(lengths) == longest and min(lengths) == 0
    _assert_agrees_with_eager(name, lengths, 24, heads, head_dim, device)
