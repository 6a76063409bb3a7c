"""The sparse fusion against the dense einsum that defines it."""

import pytest
import torch
from dnazen_kernels.ngram_fusion import ngram_fusion
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching

EDGES = ["none", "no_ngrams", "one", "dense", "one_over_all", "empty_rows"]


def make_matrix(edges: str, num_tokens: int = 23) -> torch.Tensor:
    """A 0/1 matching matrix `[T, N]`."""
    matrix = torch.zeros(num_tokens, 0 if edges == "no_ngrams" else 9)
    if edges == "one":
        matrix[4, 2] = 1
    elif edges == "dense":
        matrix = torch.ones_like(matrix)
    elif edges == "one_over_all":
        matrix[:, 3] = 1
    elif edges == "empty_rows":
        matrix = (torch.rand(matrix.shape) < 0.2).float()
        matrix[::2], matrix[:, 5] = 0, 0
    return matrix


def make_csr(matrix: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Both views, straight from the definition."""
    views = []
    for rows in (matrix, matrix.T):
        counts = rows.sum(1).long()
        views += [torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(dtype), rows.nonzero()[:, 1].to(dtype)]
    return views


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(function, hidden_states, ngram_hidden_states, grad_output):
    inputs = [x.clone().requires_grad_() for x in (hidden_states, ngram_hidden_states)]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fusion_equals_dense_definition(dtype, edges, index_dtype, impl):
    """Forward and every gradient against fp64 truth on the same (rounded) inputs."""
    matrix = make_matrix(edges)
    tensors = [torch.randn(len(matrix), 48), torch.randn(matrix.shape[1], 48), torch.randn(len(matrix), 48)]
    tensors = [x.to(dtype) for x in tensors]
    csr = make_csr(matrix, index_dtype)
    truth = run(
        lambda h, g: ngram_fusion_dense(h[None], g[None], matrix.double()[None])[0], *(x.double() for x in tensors)
    )
    ours = run(lambda h, g: ngram_fusion(h, g, *csr, impl=impl), *tensors)
    # A row sums at most 24 numbers, each addition off by half an eps of a partial sum, and the partial sums are no
    # larger than the sum of absolute values (below 24 * 5 here); at the end one rounding to the tensor's own type.
    accumulation_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, expected, found in zip(("output", "grad_hidden", "grad_ngram"), truth, ours, strict=True):
        assert found.dtype == dtype
        atol = 24 * accumulation_eps / 2 * 24 * 5
        torch.testing.assert_close(
            found.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    if edges == "dense":
        assert ours[2].abs().min() > 0


def test_fusion_gradcheck():
    csr = make_csr(make_matrix("empty_rows", 7), torch.int32)
    states = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 9)]
    assert torch.autograd.gradcheck(lambda h, g: ngram_fusion(h, g, *csr), states)


def test_fusion_same_bits_on_every_run():
    matrix = (torch.rand(300, 70) < 0.3).float()
    csr = make_csr(matrix, torch.int32)
    tensors = [torch.randn(n, 64) for n in (300, 70, 300)]
    first = run(lambda h, g: ngram_fusion(h, g, *csr), *tensors)
    for _ in range(50):
        again = run(lambda h, g: ngram_fusion(h, g, *csr), *tensors)
        assert all(map(torch.equal, first, again))


def test_fusion_accumulates_halves_in_fp32():
    """2048 + 1 + 1 is 2050 in fp16 only if the ones are added up before they are rounded away."""
    csr = make_csr(torch.ones(1, 2), torch.int32)
    hidden = torch.full((1, 4), 2048, dtype=torch.float16)
    output = ngram_fusion(hidden, torch.ones(2, 4, dtype=torch.float16), *csr)
    assert output.tolist() == [[2050.0] * 4]


def test_fusion_of_no_tokens():
    csr = make_csr(torch.zeros(0, 0), torch.int32)
    assert ngram_fusion(torch.zeros(0, 8), torch.zeros(0, 8), *csr).shape == (0, 8)


def test_fusion_takes_the_matcher_s_edges():
    table = NgramTable.build([(7, 8), (8, 9, 7)], [1, 2], 16)
    matches = ngram_matching([1, 7, 8, 9, 7, 8, 2], [0, 7], table)
    csr = [torch.from_numpy(x) for x in matches[2:6]]
    output = ngram_fusion(torch.zeros(7, 1), torch.tensor([[1.0], [10.0]]), *csr)
    assert output.squeeze(1).tolist() == [0, 1, 11, 10, 11, 1, 0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.zeros(3, 4, dtype=torch.long)}, TypeError, "hidden_states must be floating point, got torch.int64"),
        ({1: torch.zeros(2, 5)}, ValueError, r"ngram_hidden_states must have shape \[rows, 4\], got \[2, 5\]"),
        ({0: torch.zeros(1, 3, 4)}, ValueError, r"hidden_states must have shape \[rows, 4\], got \[1, 3, 4\]"),
        ({2: torch.zeros(3, dtype=torch.int32)}, ValueError, r"token_offsets must have shape \[4\], got \[3\]"),
        ({4: torch.zeros(3, dtype=torch.int64)}, TypeError, "ngram_offsets must be .* got torch.int64"),
        ({5: torch.zeros(1, dtype=torch.int32)}, ValueError, r"ngram_tokens must have shape \[0\], got \[1\]"),
    ],
    ids=["dtype", "columns", "dimensions", "offsets", "index_dtype", "edges"],
)
def test_fusion_contract(change, error, message):
    arguments = [torch.zeros(3, 4), torch.zeros(2, 4), *make_csr(torch.zeros(3, 2), torch.int32)]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(error, match=message):
        ngram_fusion(*arguments)


def test_fusion_unknown_impl():
    csr = make_csr(torch.zeros(3, 2), torch.int32)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        ngram_fusion(torch.zeros(3, 4), torch.zeros(2, 4), *csr, impl="cuda")
