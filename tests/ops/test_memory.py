"""What the fusion keeps and allocates grows with tokens, G-grams and edges, never with tokens times G-grams."""

import pytest
import torch

from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import ngram_fusion, residual_layer_norm, triton_impl
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense

HIDDEN_SIZE = 16
SIZES = [(16, 8, 10), (32, 16, 20), (48, 24, 30)]  # tokens, G-grams, edges


@pytest.fixture
def allocated(monkeypatch) -> list[int]:
    """Bytes of every tensor that launchers make for their kernels."""
    sizes = []

    def record(allocate):
        def allocate_and_record(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            sizes.append(tensor.nbytes)
            return tensor

        return allocate_and_record

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, record(getattr(owner, name)))
    return sizes


def make_inputs(num_tokens: int, num_ngrams: int, num_edges: int, device: torch.device):
    """fp32 states and both views of random edges."""
    token = torch.randint(num_tokens, (num_edges,)).sort().values
    ngram = torch.randint(num_ngrams, (num_edges,))
    views = []
    for rows, columns, size in ((token, ngram, num_tokens), (ngram.sort().values, token[ngram.argsort()], num_ngrams)):
        views += [torch.searchsorted(rows, torch.arange(size + 1)), columns]
    shapes = [(num_tokens, HIDDEN_SIZE)] * 2 + [(HIDDEN_SIZE,)] * 2 + [(num_ngrams, HIDDEN_SIZE)]
    states = [torch.randn(shape).to(device).requires_grad_() for shape in shapes]
    return states, NgramEdges(*(view.to(device, torch.int32) for view in views))


def saved_bytes(function) -> tuple[torch.Tensor, int]:
    """The output, and the bytes of all tensors kept for the backward, inputs among them."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), sum(saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("warps_per_sm", [8, 16])
@pytest.mark.parametrize("num_tokens, num_ngrams, num_edges", SIZES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_residual_layer_norm(
    num_tokens, num_ngrams, num_edges, dropout_p, warps_per_sm, device, allocated, monkeypatch
):
    """A program of the backward for each of the `WARPS_PER_SM` warps, as it stands at the launch.

    Of drop-out the seed alone is kept, and there is one more gradient; the other bias takes one more vector.
    """
    name = "WARPS_PER_SM_WITH_DROPOUT" if dropout_p else "WARPS_PER_SM"
    monkeypatch.setattr(triton_impl, name, warps_per_sm)
    (x, residual, weight, bias, ngrams), edges = make_inputs(num_tokens, num_ngrams, num_edges, device)
    allocated.clear()
    inputs = (x, residual, weight, bias, 0.5, ngrams, edges)
    dropout = dict(dropout_p=dropout_p, seed=torch.tensor(7, device=device) if dropout_p else None, x_bias=bias)
    output, saved = saved_bytes(lambda: residual_layer_norm(*inputs, **dropout, impl="triton"))
    row, statistics = 4 * HIDDEN_SIZE, 2 * 4 * num_tokens
    indices = 4 * (num_tokens + 1 + num_edges) + 4 * (num_ngrams + 1 + num_edges)
    seed = 8 * (dropout_p > 0)
    assert saved == 2 * num_tokens * row + row + statistics + indices + seed
    assert sum(allocated) == num_tokens * row + statistics
    allocated.clear()
    torch.autograd.grad(output.sum(), (x, residual, weight, bias, ngrams))
    num_programs = warps_per_sm if device.type == "cpu" else num_tokens  # a GPU has more than there are tokens
    num_gradients = num_tokens * (1 + (dropout_p > 0)) + num_ngrams
    assert sum(allocated) == (num_gradients + 3 * num_programs) * row


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens, num_ngrams, num_edges", SIZES)
def test_ngram_fusion(num_tokens, num_ngrams, num_edges, device, allocated):
    (x, *_, ngrams), edges = make_inputs(num_tokens, num_ngrams, num_edges, device)
    allocated.clear()
    output, saved = saved_bytes(lambda: ngram_fusion(x, ngrams, edges, impl="triton"))
    assert saved == 4 * (num_tokens + 1 + num_edges) + 4 * (num_ngrams + 1 + num_edges)
    assert sum(allocated) == 4 * HIDDEN_SIZE * num_tokens
    allocated.clear()
    torch.autograd.grad(output.sum(), (x, ngrams))
    assert sum(allocated) == 4 * HIDDEN_SIZE * num_ngrams


@pytest.mark.parametrize("num_tokens, num_ngrams, num_edges", SIZES)
def test_the_dense_definition_keeps_the_matrix(num_tokens, num_ngrams, num_edges):
    """So the measure above would see it."""
    (x, *_, ngrams), _ = make_inputs(num_tokens, num_ngrams, num_edges, torch.device("cpu"))
    matrix = torch.zeros(1, num_tokens, num_ngrams)
    _, saved = saved_bytes(lambda: ngram_fusion_dense(x[None], ngrams[None], matrix))
    assert saved >= 4 * num_tokens * num_ngrams
