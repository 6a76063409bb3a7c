"""Batches of other sizes run the kernels that the first one had compiled: Triton would key them all alike."""

import functools
from collections import defaultdict

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from dnazen.batches.collator import Masking, PackedCollator
from dnazen.batches.device import DeviceBatch
from dnazen.data.corpus import Corpus
from dnazen.ngram.vocab import load_ngrams
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import ngram_fusion, residual_layer_norm
from dnazen_kernels.ngram_masking.triton_impl import _any_kernel
from tests.helpers.genome import prepare_part

HIDDEN_SIZE, LENGTH = 16, 7  # short rows and sequences, for kernels may be interpreted
SIZES = [5, *(1 + 3 * number % 17 for number in range(50))]  # sequences: 5, then 1 to 17 three times over, in disorder
FUSION = "dnazen_kernels.ngram_fusion.triton_impl"
VARIANTS = {  # 2 where an argument may be None
    "_any_kernel": 2, "_survivors_kernel": 1, "_token_counts_kernel": 1, "_compact_ngrams_kernel": 1,
    "_compact_tokens_kernel": 1, "_look_up_kernel": 1, "_ngram_fusion_kernel": 2, "_residual_layer_norm_kernel": 2,
    "_residual_layer_norm_backward_kernel": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """The first 100 kb of the packaged genome in sequences of at most 28 tokens; G-grams in `../ngrams`."""
    folder = tmp_path_factory.mktemp("variants")
    prepare_part(folder, num_bases=100_000, max_tokens=28)
    return Corpus.open(folder / "corpus")


@pytest.fixture
def variants(monkeypatch) -> dict[str, set[str]]:
    """By kernel, the keys of the variants that all launches ask for, as for compute capability 9.0.

    The fusion's kernels are launched no further: nobody reads what they write.
    """
    keys, backend = defaultdict(set), make_backend(GPUTarget("cuda", 90, 32))
    kind = type(_any_kernel)  # compiled, or interpreted
    launch = kind.run

    @functools.cache
    def binder(kernel):
        compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        return create_function_from_signature(compiled.signature, compiled.params, backend)

    def record(kernel, *args, grid, warmup, **kwargs):
        _, specialization, options = binder(kernel)(*args, **kwargs)
        keys[kernel.__name__].add(compute_cache_key({}, specialization, options))
        if kernel.fn.__module__ != FUSION:
            launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(kind, "run", record)
    return keys


def run_fusions(batch: dict, device: torch.device) -> None:
    """Both operators, forward and backward, on the edges of a batch."""
    num_tokens, num_ngrams = len(batch["input_ids"]), len(batch["ngram_input_ids"])
    shapes = [(num_tokens, HIDDEN_SIZE)] * 2 + [(HIDDEN_SIZE,)] * 2 + [(num_ngrams, HIDDEN_SIZE)]
    x, residual, weight, bias, ngrams = (
        torch.ones(shape, dtype=torch.bfloat16, device=device).requires_grad_() for shape in shapes
    )
    edges = NgramEdges(*(batch[name] for name in NgramEdges._fields))
    options = dict(dropout_p=0.1, seed=torch.tensor(7, device=device), x_bias=bias, impl="triton")
    states = residual_layer_norm(x, residual, weight, bias, 1e-12, **options)
    states = residual_layer_norm(states, residual, weight, bias, 1e-12, ngrams, edges, **options)
    ngram_fusion(states, ngrams, edges, impl="triton").sum().backward()


@pytest.mark.slow
def test_batches_of_other_sizes_ask_for_no_other_variant(corpus, device, variants):
    """From matching to the fusion's backward, on real batches; the first has all variants that there are."""
    vocabulary = load_ngrams(corpus.path.parent / "ngrams", corpus)
    collator = PackedCollator(corpus.tokenizer, vocabulary, Masking(0.15, whole_ngram=True, seed=0)).to(device)
    first = 0
    for size in SIZES:
        run = np.arange(first, first := first + size)
        packed = collator.pack([corpus.train[index][:LENGTH] for index in run], run)
        packed = {name: value.to(device) if torch.is_tensor(value) else value for name, value in packed.items()}
        num_tokens = len(packed["input_ids"])
        capacity = num_tokens, 2 * num_tokens  # varies with the batch, as where one must be matched again
        batch, _ = DeviceBatch(collator, packed, capacity, "triton").result()
        run_fusions(batch, device)
        assert {name: len(keys) for name, keys in variants.items()} == VARIANTS
