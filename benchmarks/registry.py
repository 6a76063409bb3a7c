"""The operators to measure, as data: their implementations, the tests they must pass, and the bytes they must move.

An implementation makes a `Case` of the inputs; only `Case.run` is timed. Bytes are those the operator cannot do without
on packed input, each element of each operand once, whatever an implementation moves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import Batch, ngrams_of
from dnazen.layers.padding import PaddedLayout, dense_matching_matrix
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import ngram_fusion, residual_layer_norm
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense, residual_layer_norm_eager
from dnazen_kernels.ngram_masking import ngram_masking
from dnazen_kernels.ngram_matching import ngram_matching
from tests.helpers.oracles import as_lists, mask_slowly, match_slowly

MODES = ("fwd", "bwd", "fwdbwd")
EPS = 1e-12
ROOM = 1.25  # of a capacity, over what the batch needs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the bytes follow from. G-grams, edges and covered tokens are those before masking, for matching and masking,
    and those that survive it, for the fusion.
    """

    num_tokens: int
    num_sequences: int
    num_ngrams: int
    num_edges: int
    num_covered: int  # tokens with at least one edge
    hidden_size: int = 0
    itemsize: int = 0  # bytes of an element of the states
    num_maskable_ids: int = 0

    @property
    def csr_by_token(self) -> int:
        return 4 * (self.num_tokens + 1 + self.num_edges)

    @property
    def csr_by_ngram(self) -> int:
        return 4 * (self.num_ngrams + 1 + self.num_edges)

    @property
    def matching(self) -> int:
        """G-gram ids, where each sequence's begin, and both views."""
        return 8 * self.num_ngrams + 4 * (self.num_sequences + 1) + self.csr_by_token + self.csr_by_ngram

    def rows(self, count: int) -> int:
        return count * self.hidden_size * self.itemsize


class Case(NamedTuple):
    """What is timed, what takes gradients, and how its output becomes packed `[T, H]` (or the fields' lists)."""

    run: Callable[[], Any]
    leaves: list[Tensor]
    grad: Tensor | None
    packed: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Operator:
    """`implementations` by name: the kind of device it runs on, and what makes a Case of (inputs)."""

    make_inputs: Callable[..., Any]
    implementations: dict[str, tuple[str, Callable[[Any], Case]]]
    baseline: str
    tests: str
    num_bytes: dict[str, Callable[[Sizes], int]]  # by mode
    hidden_sizes: tuple[int, ...] = (0,)  # 0: has none
    dtypes: tuple[torch.dtype, ...] = (torch.int64,)


@dataclasses.dataclass(frozen=True)
class FusionInputs:
    """Packed states and the batch's edges, and the same padded to the longest sequence and the most G-grams."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    ngram_states: Tensor
    grad: Tensor
    edges: NgramEdges
    tokens: PaddedLayout
    ngrams: PaddedLayout
    matrix: Tensor  # [B, S, G] fp32, as the padded model has it
    sizes: Sizes


def fusion_inputs(batch: Batch, hidden_size: int, dtype: torch.dtype, device: torch.device) -> FusionInputs:
    """Random states for the batch as masking leaves it."""
    generator = torch.Generator(device).manual_seed(0)
    edges = batch.masked.edges.to(device)
    cu_seqlens, ngram_cu_seqlens = batch.cu_seqlens.to(device), batch.masked.ngram_cu_seqlens.to(device)
    max_seqlen, max_ngrams = int(cu_seqlens.diff().max()), int(ngram_cu_seqlens.diff().max())
    num_tokens, num_ngrams = len(batch.input_ids), len(batch.masked.ngram_input_ids)
    tokens = PaddedLayout.from_cu_seqlens(cu_seqlens, max_seqlen, num_tokens)
    ngrams = PaddedLayout.from_cu_seqlens(ngram_cu_seqlens, max_ngrams, num_ngrams)
    rows = (num_tokens, num_tokens, None, None, num_ngrams, num_tokens)  # None: a vector
    states = [
        torch.randn(
            [hidden_size] if count is None else [count, hidden_size], generator=generator, device=device, dtype=dtype
        )
        for count in rows
    ]
    num_edges, num_covered = len(edges.token_ngrams), int((edges.token_offsets.diff() > 0).sum())
    sizes = Sizes(num_tokens, len(batch.sequences), num_ngrams, num_edges, num_covered, hidden_size, dtype.itemsize)
    matrix = dense_matching_matrix(edges, tokens, ngrams)
    return FusionInputs(*states, edges, tokens, ngrams, matrix, sizes)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _packed_fusion(impl: str, compiled: bool = False) -> Callable[[FusionInputs], Case]:
    def prepare(inputs: FusionInputs) -> Case:
        leaves = _leaves(inputs.x, inputs.ngram_states)

        def fuse(x, ngram_states):
            return ngram_fusion(x, ngram_states, inputs.edges, impl=impl)

        return _case(fuse, leaves, inputs.grad, compiled)

    return prepare


def _packed_norm(impl: str, compiled: bool = False) -> Callable[[FusionInputs], Case]:
    def prepare(inputs: FusionInputs) -> Case:
        leaves = _leaves(inputs.x, inputs.residual, inputs.weight, inputs.bias, inputs.ngram_states)

        def normalize(x, residual, weight, bias, ngram_states):
            return residual_layer_norm(x, residual, weight, bias, EPS, ngram_states, inputs.edges, impl=impl)

        return _case(normalize, leaves, inputs.grad, compiled)

    return prepare


def _bmm(hidden_states: Tensor, ngram_states: Tensor, matrix: Tensor) -> Tensor:
    """The dense definition in the states' own type: in bf16 on tensor cores, the fastest dense form."""
    return torch.baddbmm(hidden_states, matrix, ngram_states)


def _matrix_for(fuse: Callable, inputs: FusionInputs) -> Tensor:
    return inputs.matrix.to(inputs.x.dtype) if fuse is _bmm else inputs.matrix


def _padded_fusion(fuse: Callable, compiled: bool = False) -> Callable[[FusionInputs], Case]:
    def prepare(inputs: FusionInputs) -> Case:
        leaves = _leaves(inputs.tokens.pad(inputs.x), inputs.ngrams.pad(inputs.ngram_states))
        matrix, grad = _matrix_for(fuse, inputs), inputs.tokens.pad(inputs.grad)
        return _case(lambda x, g: fuse(x, g, matrix), leaves, grad, compiled, inputs.tokens.unpad)

    return prepare


def _padded_norm(fuse: Callable, compiled: bool = False) -> Callable[[FusionInputs], Case]:
    def prepare(inputs: FusionInputs) -> Case:
        states = (inputs.tokens.pad(inputs.x), inputs.tokens.pad(inputs.residual))
        leaves = _leaves(*states, inputs.weight, inputs.bias, inputs.ngrams.pad(inputs.ngram_states))
        matrix = _matrix_for(fuse, inputs)

        def normalize(x, residual, weight, bias, ngram_states):
            return fuse(residual_layer_norm_eager(x, residual, weight, bias, EPS), ngram_states, matrix)

        return _case(normalize, leaves, inputs.tokens.pad(inputs.grad), compiled, inputs.tokens.unpad)

    return prepare


def _case(function, leaves, grad, compiled, packed=lambda output: output) -> Case:
    function = torch.compile(function) if compiled else function
    return Case(lambda: function(*leaves), leaves, grad, packed)


def _fusion_implementations(packed: Callable, padded: Callable) -> dict[str, tuple[str, Callable]]:
    return {
        "triton": ("cuda", packed("triton")),
        "index_add": ("cuda", packed("reference")),
        "index_add, compiled": ("cuda", packed("reference", True)),
        "einsum": ("cuda", padded(ngram_fusion_dense)),
        "einsum, compiled": ("cuda", padded(ngram_fusion_dense, True)),
        "bmm": ("cuda", padded(_bmm)),
    }


class IntegerInputs(NamedTuple):
    """A batch with its tensors on the device."""

    batch: Batch
    input_ids: Tensor
    cu_seqlens: Tensor
    ngrams: dict[str, Tensor | NgramEdges]  # before masking
    masking: dict[str, Any]
    sizes: Sizes


def integer_inputs(batch: Batch, hidden_size: int, dtype: torch.dtype, device: torch.device) -> IntegerInputs:
    def move(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in values.items()}

    ngrams, masking, edges = ngrams_of(batch.matches), move(batch.masking), batch.matches.edges
    sizes = Sizes(
        len(batch.input_ids), len(batch.sequences), len(batch.matches.ngram_input_ids), len(edges.token_ngrams),
        int((edges.token_offsets.diff() > 0).sum()), num_maskable_ids=len(masking["maskable_ids"]),
    )  # fmt: skip
    return IntegerInputs(batch, batch.input_ids.to(device), batch.cu_seqlens.to(device), move(ngrams), masking, sizes)


def _matching(impl: str) -> Callable[[IntegerInputs], Case]:
    def prepare(inputs: IntegerInputs) -> Case:
        table = inputs.batch.table.to(inputs.input_ids.device)
        needed = (inputs.sizes.num_ngrams, inputs.sizes.num_edges)
        capacity = tuple(int(ROOM * size) for size in needed) if impl == "triton" else None

        def packed(matches):
            num_ngrams, num_edges, _, _ = matches.counts.tolist()
            ids, edges = matches.ngram_input_ids[:num_ngrams], matches.edges.trimmed(num_ngrams, num_edges)
            return as_lists(matches._replace(ngram_input_ids=ids, edges=edges))

        def match():
            return ngram_matching(inputs.input_ids, inputs.cu_seqlens, table, capacity=capacity, impl=impl)

        return Case(match, [], None, packed)

    return prepare


def _matching_in_python(inputs: IntegerInputs) -> Case:
    batch = inputs.batch
    return Case(lambda: match_slowly(batch.sequences, batch.vocabulary), [], None, lambda fields: fields)


def _masking(impl: str) -> Callable[[IntegerInputs], Case]:
    def prepare(inputs: IntegerInputs) -> Case:
        def mask():
            return ngram_masking(inputs.input_ids, **inputs.ngrams, **inputs.masking, impl=impl)

        return Case(mask, [], None, lambda masked: as_lists(masked.trimmed()))

    return prepare


def _masking_in_python(inputs: IntegerInputs) -> Case:
    lists = as_lists({"input_ids": inputs.input_ids, **inputs.ngrams, **inputs.masking})
    return Case(lambda: mask_slowly(lists, whole_ngram=True), [], None, lambda fields: fields)


def _with_sum(forward: Callable[[Sizes], int], backward: Callable[[Sizes], int]) -> dict[str, Callable[[Sizes], int]]:
    return {"fwd": forward, "bwd": backward, "fwdbwd": lambda sizes: forward(sizes) + backward(sizes)}


def fusion_forward_bytes(sizes: Sizes) -> int:
    """Read hidden states, G-gram states and the view by token; write the sum."""
    return sizes.rows(2 * sizes.num_tokens + sizes.num_ngrams) + sizes.csr_by_token


def fusion_backward_bytes(sizes: Sizes) -> int:
    """Read the gradients of covered tokens and the view by G-gram; write the G-grams'. The tokens' is the one given."""
    return sizes.rows(sizes.num_covered + sizes.num_ngrams) + sizes.csr_by_ngram


def norm_forward_bytes(sizes: Sizes, dropout: bool = False) -> int:
    """Read both addends, weight, bias, G-gram states and the view by token, with drop-out its seed; write the sum and 2
    fp32 per row.
    """
    rows = sizes.rows(3 * sizes.num_tokens + sizes.num_ngrams + 2)
    return rows + 8 * sizes.num_tokens + (sizes.csr_by_token if sizes.num_edges else 0) + 8 * dropout


def norm_backward_bytes(sizes: Sizes, dropout: bool = False, x_bias: bool = False) -> int:
    """Read the gradient, both addends, weight, 2 fp32 per row and the view by G-gram, with drop-out its seed; write one
    gradient for both addends, with drop-out one for each, those of weight and bias, if asked for that of the bias
    before, and those of G-grams.
    """
    rows = sizes.rows((5 if dropout else 4) * sizes.num_tokens + sizes.num_ngrams + 3 + x_bias)
    return rows + 8 * sizes.num_tokens + (sizes.csr_by_ngram if sizes.num_edges else 0) + 8 * dropout


def matching_bytes(sizes: Sizes) -> int:
    """Read tokens, sequences, a byte of the prefilter per token, key and id of each G-gram; write the matching."""
    read = 9 * sizes.num_tokens + 4 * (sizes.num_sequences + 1) + 16 * sizes.num_ngrams
    return read + sizes.matching + 16


def masking_bytes(sizes: Sizes) -> int:
    """Read tokens, maskable, 3 fp64 for each, the matching, the maskable ids; write tokens, labels, the matching."""
    return (8 + 1 + 24 + 16) * sizes.num_tokens + 2 * sizes.matching + 8 * sizes.num_maskable_ids + 8


_STATES = {"hidden_sizes": (768, 1536), "dtypes": (torch.float32, torch.bfloat16)}
OPERATORS = {
    "ngram_fusion": Operator(
        fusion_inputs, _fusion_implementations(_packed_fusion, _padded_fusion), "einsum",
        "tests/ops/test_ngram_fusion.py", _with_sum(fusion_forward_bytes, fusion_backward_bytes), **_STATES,
    ),
    "residual_layer_norm": Operator(
        fusion_inputs, _fusion_implementations(_packed_norm, _padded_norm), "einsum",
        "tests/ops/test_ngram_fusion.py", _with_sum(norm_forward_bytes, norm_backward_bytes), **_STATES,
    ),
    "ngram_masking": Operator(
        integer_inputs,
        {"triton": ("cuda", _masking("triton")), "PyTorch": ("cpu", _masking("reference")),
         "plain Python": ("cpu", _masking_in_python)},
        "plain Python", "tests/ops/test_ngram_masking.py", {"fwd": masking_bytes},
    ),
    "ngram_matching": Operator(
        integer_inputs,
        {"triton": ("cuda", _matching("triton")), "numpy": ("cpu", _matching("reference")),
         "plain Python": ("cpu", _matching_in_python)},
        "plain Python", "tests/ops/test_ngram_matching.py", {"fwd": matching_bytes},
    ),
}  # fmt: skip
