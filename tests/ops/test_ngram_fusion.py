"""The fusion, alone and with residual and LayerNorm, against its dense definition in fp64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import ngram_fusion, residual_layer_norm
from dnazen_kernels.ngram_fusion.reference import keep_mask, ngram_fusion_dense
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HIDDEN_SIZES = [48, 64, 768, 37]
EDGES = ["none", "no_ngrams", "one", "duplicates", "one_over_all", "fourteen", "empty_rows", "unused"]
LAYOUTS = ["contiguous", "sliced"]
DROPOUT = [0.0, 0.1, 0.37, 0.5]
# Every pair of values meets in some case (test_cases_cover_all_pairs); all of every kind would be 1024 cases.
CASES = [
    (dtype, HIDDEN_SIZES[(d + e) % 4], pattern, LAYOUTS[(d // 2 + e) % 2], DROPOUT[(d + 3 * e + e // 4) % 4])
    for (d, dtype), (e, pattern) in itertools.product(enumerate(DTYPES), enumerate(EDGES))
]
over_cases = pytest.mark.parametrize(
    "dtype, hidden_size, pattern, layout, dropout_p", CASES, ids=lambda value: str(value).removeprefix("torch.")
)
NUM_TOKENS = 37  # no multiple of a block, of the unrolled edges, or of the backward's programs
EPS = 0.5  # large enough to matter against a variance of about 2


def make_matrix(pattern: str, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """A matching matrix `[T, N]`; its entries count edges."""
    matrix = torch.zeros(num_tokens, 0 if pattern == "no_ngrams" else 15)
    if pattern == "one":
        matrix[4, 2] = 1
    elif pattern == "duplicates":
        matrix[4, 2], matrix[5, 2], matrix[5, 3] = 2, 1, 5
    elif pattern == "one_over_all":
        matrix[:, 3] = 1
    elif pattern == "fourteen":
        matrix[7, 1:] = 1
    elif pattern in ("empty_rows", "unused"):
        matrix = (torch.rand(matrix.shape) < 0.2).float()
        matrix[::2], matrix[:, 5] = 0, 0
    return matrix


def make_edges(
    matrix: torch.Tensor, dtype: torch.dtype = torch.int32, device: torch.device | str = "cpu", num_unused: int = 0
) -> NgramEdges:
    """Both views, straight from the definition, with entries at the end that belong to no row."""
    views = []
    for rows in (matrix, matrix.T):
        counts = rows.sum(1).long()
        row, column = rows.nonzero().T
        indices = column.repeat_interleave(rows[row, column].long())
        views += [F.pad(counts.cumsum(0), (1, 0)), F.pad(indices, (0, num_unused))]
    return NgramEdges(*(view.to(device, dtype) for view in views))


def randn(*shape: int, dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> torch.Tensor:
    """Random numbers; "sliced" ones are every second column of a wider tensor."""
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(device, dtype)[..., ::2]
    return torch.randn(shape).to(device, dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(function, inputs, grad_output):
    """Output and the gradient of every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output)


def dense_residual_layer_norm(x, residual, weight, bias, ngrams, x_bias, matrix, dropout_p, seed):
    """The definition; `x` holds `x_bias` already, so that it is added and taken away again, for the gradient's sake."""
    x = x - x_bias.detach() + x_bias
    num_dropped = round(65536 * dropout_p)
    kept = keep_mask(seed, *x.shape, num_dropped, x.dtype)
    hidden_states = x * kept / (1 - num_dropped / 65536) + residual
    hidden_states = F.layer_norm(hidden_states, weight.shape, weight, bias, EPS)
    return ngram_fusion_dense(hidden_states[None], ngrams[None], matrix[None])[0]


def assert_close_to_truth(names, truth, found, sizes, eager=None):
    """Error at most twice that of `eager` (if given) in the same dtype, plus what rounding alone may cost.

    That is, relative to the largest number: one rounding to the dtype, by a whole eps (the interpreter cuts bf16 off
    instead of rounding it), and sums of n terms, in which n roundings of eps / 2 add up like a random walk to
    sqrt(n) * eps / 2; doubled, for there are two of them in a row (mean and variance, their gradients).
    """
    for name, expected, ours, theirs in zip(names, truth, found, eager or truth, strict=True):
        assert ours.shape == expected.shape and (eager is None or ours.dtype == theirs.dtype), name
        if not expected.numel():
            continue
        accumulation_eps = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
        budget = torch.finfo(ours.dtype).eps + sum(map(math.sqrt, sizes)) * accumulation_eps
        error, eager_error = ((x.double() - expected).abs().max().item() for x in (ours, theirs))
        bound = 2 * eager_error + budget * expected.abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, reference {eager_error:.3g}, bound {bound:.3g}"


def test_cases_cover_all_pairs():
    for left, right in itertools.combinations(range(5), 2):
        values = [{case[position] for case in CASES} for position in (left, right)]
        assert {(case[left], case[right]) for case in CASES} == set(itertools.product(*values))
    assert [len({case[position] for case in CASES}) for position in range(5)] == [4, 4, 8, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "reference"])
@over_cases
def test_ngram_fusion(dtype, hidden_size, pattern, layout, dropout_p, impl, device, poisoned_memory):
    """Forward and every gradient against fp64 truth on the same (rounded) inputs."""
    matrix = make_matrix(pattern)
    shapes = [(NUM_TOKENS, hidden_size), (matrix.shape[1], hidden_size), (NUM_TOKENS, hidden_size)]
    *inputs, grad = (randn(*shape, dtype=dtype, device=device, layout=layout) for shape in shapes)
    edges = make_edges(matrix, torch.int64 if layout == "sliced" else torch.int32, device, 5 * (pattern == "unused"))
    dense = matrix.double().to(device)[None]
    exact = [x.double() for x in inputs]
    truth = run(lambda h, g: ngram_fusion_dense(h[None], g[None], dense)[0], exact, grad.double())
    ours = run(lambda h, g: ngram_fusion(h, g, edges, impl=impl), inputs, grad)
    # A row sums at most 38 numbers, each addition off by half an eps of a partial sum, and the partial sums are no
    # larger than the sum of absolute values (below 38 * 5 here); at the end one rounding to the tensor's own type.
    atol = 38 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2 * 38 * 5
    for name, expected, found in zip(("output", "grad_hidden", "grad_ngram"), truth, ours, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    if pattern == "one_over_all":
        assert ours[2][3].abs().min() > 0


NAMES = ("output", "grad_x", "grad_residual", "grad_weight", "grad_bias", "grad_ngram", "grad_x_bias")


def check_residual_layer_norm(dtypes, hidden_size, matrix, edges, layout, device, dropout_p=0.0):
    """`dtypes` of x, residual, weight, bias and G-grams; the bias in x has that of bias."""
    dtypes, seed = [*dtypes, dtypes[3]], torch.tensor(2**62 + 12345, device=device)
    rows = (NUM_TOKENS, NUM_TOKENS, None, None, matrix.shape[1], None)
    shapes = [(hidden_size,) if n is None else (n, hidden_size) for n in rows]
    inputs = [randn(*shape, dtype=dtype, device=device, layout=layout) for shape, dtype in zip(shapes, dtypes)]
    grad_dtype = torch.promote_types(*dtypes[:2])
    grad = randn(NUM_TOKENS, hidden_size, dtype=grad_dtype, device=device, layout=layout)
    dense = matrix.double().to(device)
    truth = run(
        lambda *args: dense_residual_layer_norm(*args, dense, dropout_p, seed),
        [x.double() for x in inputs], grad.double(),
    )  # fmt: skip

    def normalize(x, residual, weight, bias, ngrams, x_bias, impl):
        dropout = dict(dropout_p=dropout_p, seed=seed, x_bias=x_bias)
        return residual_layer_norm(x, residual, weight, bias, EPS, ngrams, edges, **dropout, impl=impl)

    reference, ours = (
        run(lambda *args, impl=impl: normalize(*args, impl), inputs, grad) for impl in ("reference", "triton")
    )
    assert ours[0].dtype == grad_dtype
    sizes = (hidden_size, NUM_TOKENS)
    assert_close_to_truth(NAMES, truth, ours, sizes, eager=reference)
    if min(torch.finfo(dtype).bits for dtype in dtypes) >= 32:
        assert_close_to_truth(NAMES, truth, reference, sizes)
    for name, gradient in zip(NAMES, ours):
        assert not gradient.numel() or name == "grad_ngram" or gradient.abs().max() > 0.1, name


@pytest.mark.slow
@over_cases
def test_residual_layer_norm(dtype, hidden_size, pattern, layout, dropout_p, device, poisoned_memory):
    matrix = make_matrix(pattern)
    edges = make_edges(matrix, torch.int64 if layout == "sliced" else torch.int32, device, 5 * (pattern == "unused"))
    check_residual_layer_norm([dtype] * 5, hidden_size, matrix, edges, layout, device, dropout_p)


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", [1024, 1536, 4096])
def test_rows_over_several_vectors_and_warps(hidden_size, device, poisoned_memory):
    matrix = make_matrix("empty_rows")
    edges = make_edges(matrix, device=device)
    check_residual_layer_norm([torch.bfloat16] * 5, hidden_size, matrix, edges, "contiguous", device, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float32],  # autocast
        [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32],
        [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float16],
    ],
    ids=["autocast", "fp32_parameters", "all_mixed"],
)
def test_mixed_dtypes(dtypes, device, poisoned_memory):
    """The output is in the type of x + residual, every gradient in that of its tensor."""
    matrix = make_matrix("empty_rows")
    edges = make_edges(matrix, device=device)
    check_residual_layer_norm(dtypes, 48, matrix, edges, "contiguous", device, 0.1)
    hidden, ngrams, grad = (
        randn(n, 48, dtype=dtype, device=device)
        for n, dtype in ((NUM_TOKENS, dtypes[0]), (15, dtypes[4]), (NUM_TOKENS, dtypes[0]))
    )
    truth = run(
        lambda h, g: ngram_fusion_dense(h[None], g[None], matrix.double().to(device)[None])[0],
        [hidden.double(), ngrams.double()],
        grad.double(),
    )
    reference, ours = (
        run(lambda h, g: ngram_fusion(h, g, edges, impl=impl), [hidden, ngrams], grad)
        for impl in ("reference", "triton")
    )
    assert_close_to_truth(("output", "grad_hidden", "grad_ngram"), truth, ours, (NUM_TOKENS,), eager=reference)


def test_residual_layer_norm_without_ngrams(device, poisoned_memory):
    """The same bits as with G-grams that cover no token."""
    x, residual, grad = (randn(NUM_TOKENS, 48, dtype=torch.float32, device=device) for _ in range(3))
    weight, bias = (randn(48, dtype=torch.float32, device=device) for _ in range(2))
    inputs, edges = [x, residual, weight, bias], make_edges(make_matrix("none"), device=device)
    ngrams = randn(15, 48, dtype=torch.float32, device=device)
    plain = run(lambda *args: residual_layer_norm(*args, EPS, impl="triton"), inputs, grad)
    fused = run(lambda *args: residual_layer_norm(*args, EPS, ngrams, edges, impl="triton"), inputs, grad)
    assert all(map(torch.equal, plain, fused))
    truth = run(lambda x, r, w, b: F.layer_norm(x + r, (48,), w, b, EPS), [x.double() for x in inputs], grad.double())
    assert_close_to_truth(NAMES[:5], truth, plain, (48, NUM_TOKENS))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_constant_rows_give_the_bias(impl, device):
    """A variance of 0, and the model's eps of 1e-12, which fp32 holds."""
    x, weight, bias = (values.to(device) for values in (torch.full((5, 64), 3.0), torch.ones(64), torch.arange(64.0)))
    output = residual_layer_norm(x, x, weight, bias, 1e-12, impl=impl)
    assert torch.equal(output, bias.expand(5, 64))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_halves_are_accumulated_in_fp32(impl, device):
    """2048 + 1 + 1 is 2050 in fp16 only if the ones are added up before they are rounded away."""
    edges = make_edges(torch.ones(1, 2), device=device)
    hidden = torch.full((1, 4), 2048, dtype=torch.float16, device=device)
    output = ngram_fusion(hidden, torch.ones(2, 4, dtype=torch.float16, device=device), edges, impl=impl)
    assert output.tolist() == [[2050.0] * 4]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_tokens(impl, device):
    edges = make_edges(torch.zeros(0, 0), device=device)
    empty = torch.zeros(0, 8, device=device)
    assert ngram_fusion(empty, empty, edges, impl=impl).shape == (0, 8)
    parameters = [torch.ones(8, device=device), torch.ones(8, device=device)]
    inputs = [empty, empty, *parameters]
    output, *gradients = run(lambda *args: residual_layer_norm(*args, EPS, empty, edges, impl=impl), inputs, empty)
    assert output.shape == (0, 8)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_gradcheck(impl, device):
    edges = make_edges(make_matrix("empty_rows", 4)[:, :5], device=device)
    shapes = [(4, 3), (4, 3), (3,), (3,), (5, 3)]
    x, residual, weight, bias, ngrams = (
        randn(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in shapes
    )
    assert torch.autograd.gradcheck(lambda h, g: ngram_fusion(h, g, edges, impl=impl), (x, ngrams))
    seed, (product, x_bias) = torch.tensor(7, device=device), (x, weight.detach().clone().requires_grad_())

    def normalize(product, x_bias, residual, weight, bias, ngrams):
        dropout = dict(dropout_p=0.3, seed=seed, x_bias=x_bias)
        x = product + x_bias.detach()
        return residual_layer_norm(x, residual, weight, bias, EPS, ngrams, edges, **dropout, impl=impl)

    assert torch.autograd.gradcheck(normalize, (product, x_bias, residual, weight, bias, ngrams))


@pytest.mark.slow
def test_same_bits_on_every_run(device):
    num_tokens, num_ngrams, hidden_size = (4099, 700, 768) if device.type == "cuda" else (11, 5, 24)
    matrix = (torch.rand(num_tokens, num_ngrams) < 0.3).float()
    edges = make_edges(matrix, device=device)
    shapes = [(num_tokens, hidden_size)] * 2 + [(hidden_size,)] * 2 + [(num_ngrams, hidden_size)]
    inputs = [randn(*shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    grad = randn(num_tokens, hidden_size, dtype=torch.bfloat16, device=device)

    dropout, (x, residual, *parameters, ngrams) = dict(dropout_p=0.1, seed=torch.tensor(7, device=device)), inputs

    def normalize(x, residual, weight, bias, ngrams, x_bias):
        more = dict(**dropout, x_bias=x_bias, impl="triton")
        return residual_layer_norm(x, residual, weight, bias, EPS, ngrams, edges, **more)

    def run_both():
        fused = run(normalize, (x, residual, *parameters, ngrams, parameters[1]), grad)
        return *fused, *run(lambda h, g: ngram_fusion(h, g, edges, impl="triton"), (inputs[0], inputs[4]), grad)

    first = run_both()
    for _ in range(50 if device.type == "cuda" else 1):  # interpreted, programs run one after the other
        assert all(map(torch.equal, first, run_both()))


def operator_arguments(device):
    edges = make_edges(make_matrix("empty_rows", 5)[:, :3], device=device)
    x, residual, weight, bias, ngrams = (
        randn(*shape, dtype=torch.float32, device=device).requires_grad_()
        for shape in ((5, 8), (5, 8), (8,), (8,), (3, 8))
    )
    rows = [torch.ones(5, device=device) for _ in range(2)]
    norm, seed = (x, residual, weight, bias, EPS), torch.tensor(7, device=device)
    norm_gradient = tuple(t.detach() for t in (x, x, residual, weight, *rows))
    return {
        "ngram_fusion": [(x, ngrams, *edges), (None, ngrams, *edges)],
        "residual_layer_norm": [(*norm, ngrams, *edges, 0, None, None), (*norm, *[None] * 5, 20000, seed, bias)],
        "residual_layer_norm_backward": [(*norm_gradient, 0, None, False), (*norm_gradient, 20000, seed, True)],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram_fusion", "residual_layer_norm", "residual_layer_norm_backward"])
def test_opcheck(name, device):
    for arguments in operator_arguments(device)[name]:
        torch.library.opcheck(getattr(torch.ops.dnazen, name).default, arguments)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_without_a_graph_break(impl, device):
    x, residual, weight, bias, _, ngrams, *views = operator_arguments(device)["residual_layer_norm"][0][:10]
    edges = NgramEdges(*views)

    def function(x, r, w, b, g, x_bias):
        dropout = dict(dropout_p=0.3, seed=torch.randint(2**63 - 1, (), device=device), x_bias=x_bias)
        x = ngram_fusion(x, g, edges, impl=impl)
        return residual_layer_norm(x, r, w, b, EPS, g, edges, **dropout, impl=impl)

    inputs, grad = (x, residual, weight, bias, ngrams, bias), torch.randn(x.shape).to(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for variant in (function, compiled):
        torch.manual_seed(1)
        results.append(run(variant, inputs, grad))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a CUDA device with 40 GiB free")
    num_tokens, hidden_size = 2**31 // 768 + 1000, 768
    x = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(hidden_size)
    counts = torch.zeros(num_tokens + 1, dtype=torch.int32, device="cuda")
    counts[0], counts[-1] = 0, 1  # the last token is covered by the last G-gram, and that is all
    index = torch.tensor([num_tokens - 1], dtype=torch.int32, device="cuda")
    edges = NgramEdges(counts, index, counts, index)
    assert torch.equal(ngram_fusion(x, x, edges, impl="triton")[-1], 2 * x[-1])
    parameters = (torch.ones(hidden_size, device="cuda"), torch.zeros(hidden_size, device="cuda"))
    output = residual_layer_norm(x, x, *parameters, EPS, x, edges, impl="triton")[-1:]
    expected = residual_layer_norm(x[-1:], x[-1:], *parameters, EPS, impl="triton") + x[-1:]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("capacity", [None, (4, 20)], ids=["exact", "capacity"])
def test_fusion_takes_the_matcher_s_edges(capacity):
    table = NgramTable.build([(7, 8), (8, 9, 7)], [1, 2], 16)
    tokens, cu_seqlens = torch.tensor([1, 7, 8, 9, 7, 8, 2]), torch.tensor([0, 7], dtype=torch.int32)
    matches = ngram_matching(tokens, cu_seqlens, table, capacity=capacity)
    states = torch.full((len(matches.ngram_input_ids), 1), 100.0)
    states[:2] = torch.tensor([[1.0], [10.0]])
    output = ngram_fusion(torch.zeros(7, 1), states, matches.edges)
    assert output.squeeze(1).tolist() == [0, 1, 11, 10, 11, 1, 0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.zeros(3, 4, dtype=torch.long)}, TypeError, "hidden_states must be floating point, got torch.int64"),
        ({1: torch.zeros(2, 5)}, ValueError, r"ngram_hidden_states must have shape \[rows, 4\], got \[2, 5\]"),
        ({0: torch.zeros(1, 3, 4)}, ValueError, r"hidden_states must have shape \[rows, 4\], got \[1, 3, 4\]"),
        (
            {"token_offsets": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"token_offsets must have shape \[4\], got \[3\]",
        ),
        ({"ngram_offsets": torch.zeros(3, dtype=torch.int64)}, TypeError, "ngram_offsets must be .* got torch.int64"),
        (
            {"ngram_tokens": torch.zeros(1, dtype=torch.int32)},
            ValueError,
            r"ngram_tokens must have shape \[0\], got \[1\]",
        ),
    ],
    ids=["dtype", "columns", "dimensions", "offsets", "index_dtype", "edges"],
)
def test_contract_of_ngram_fusion(change, error, message):
    arguments = [torch.zeros(3, 4), torch.zeros(2, 4), make_edges(torch.zeros(3, 2))]
    for position, value in change.items():
        if isinstance(position, str):
            position, value = 2, arguments[2]._replace(**{position: value})
        arguments[position] = value
    with pytest.raises(error, match=message):
        ngram_fusion(*arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({1: torch.zeros(3, 4).long()}, TypeError, "residual must be floating point, got torch.int64"),
        ({0: torch.zeros(3, 5)}, ValueError, r"x must have shape \[rows, 4\], got \[3, 5\]"),
        ({1: torch.zeros(2, 4)}, ValueError, r"residual must have shape \[3, 4\], got \[2, 4\]"),
        ({3: torch.zeros(5)}, ValueError, r"bias must have shape \[4\], got \[5\]"),
        ({2: torch.zeros(1, 4)}, ValueError, r"weight must have shape \[H\], got \[1, 4\]"),
        ({2: torch.zeros(4).long()}, TypeError, "weight must be floating point, got torch.int64"),
        ({6: None}, ValueError, "ngram_hidden_states and edges must be given both or neither"),
        ({5: torch.zeros(2, 5)}, ValueError, r"ngram_hidden_states must have shape \[rows, 4\], got \[2, 5\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"seed": None}, ValueError, "seed must be given with dropout_p 0.1, got None"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must be torch.int64, got torch.float32"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed must have shape \[\], got \[2\]"),
        ({"x_bias": torch.zeros(5)}, ValueError, r"x_bias must have shape \[4\], got \[5\]"),
    ],
    ids=[
        "dtype", "columns", "rows", "bias", "weight", "weight_dtype", "some", "ngrams", "dropout", "no_seed",
        "seed_dtype", "seed", "x_bias",
    ],
)  # fmt: skip
def test_contract_of_residual_layer_norm(change, error, message):
    parameters = [torch.zeros(4), torch.zeros(4), EPS]
    edges = make_edges(torch.zeros(3, 2))
    arguments = [torch.zeros(3, 4), torch.zeros(3, 4), *parameters, torch.zeros(2, 4), edges]
    dropout = {"dropout_p": 0.1, "seed": torch.tensor(1)}
    for position, value in change.items():
        (dropout if isinstance(position, str) else arguments)[position] = value
    with pytest.raises(error, match=message):
        residual_layer_norm(*arguments, **dropout)


def test_dense_definition_accumulates_in_fp32_under_autocast():
    """1 + 2^-12 is lost where the states or their sum are rounded to bf16."""
    states, ngrams, matrix = torch.zeros(1, 1, 8), torch.tensor([[[1.0] * 8, [2.0**-12] * 8]]), torch.ones(1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ngram_fusion_dense(states, ngrams, matrix) == 1 + 2.0**-12).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("num_ngrams", [0, 2])
def test_spare_entries_reach_nothing_even_if_what_they_name_is_not_finite(impl, num_ngrams, device):
    states = torch.ones(3, 8, device=device)
    ngrams = torch.full((num_ngrams, 8), torch.inf, device=device)
    offsets = [torch.zeros(size, dtype=torch.int32, device=device) for size in (4, num_ngrams + 1)]
    spare = torch.zeros(5, dtype=torch.int32, device=device)
    assert torch.equal(
        ngram_fusion(states, ngrams, NgramEdges(offsets[0], spare, offsets[1], spare), impl=impl), states
    )
