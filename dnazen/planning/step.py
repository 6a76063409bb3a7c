"""The kernels of a training step, from the sizes of model and batch alone: what `benchmarks.budget` counts in PyTorch's
graphs, in closed form.

States are bf16, the ends of the sub-layers and the MLP compiled (`--torch-compile True`). R rows of H numbers are
`2 R H` bytes. The lists are in the order in which they run.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from dnazen.planning.devices import TILE
from dnazen.planning.kernel import Kernel, Part

# of a micro-batch: operations, and bytes a token with the G-grams that genomes have (benchmarks/README.md)
MATCHING, MASKING = (85, 4620), (19, 162)
FUSION_INDEX = 4  # bytes of an entry of the views of `NgramEdges`
MIN_ELEMENTS = 2**24  # `MIN_ELEMENTS` of dnazen/layers/linear.py


class BatchShape(NamedTuple):
    """The sizes of a packed micro-batch."""

    lengths: Sequence[int]  # tokens of each sequence
    ngram_lengths: Sequence[int]  # G-grams of each sequence that masking leaves
    num_edges: int
    num_masked: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_ngrams(self) -> int:
        return sum(self.ngram_lengths)


class Terms(NamedTuple):
    """What the step does without; none of it is what it did before, for comparison."""

    dropout_in_norm: bool = True  # drop-out and the bias' gradient are part of the LayerNorm's kernels
    gradients_joined: bool = True  # those of q, k, v are written side by side; by FlashAttention alone
    residual_added: bool = True  # to the residual's gradient, by the product of `Wqkv`'s, from `MIN_ELEMENTS` on
    last_layer_masked: bool = True  # the last layer's output and MLP run on masked rows alone, unless it is fused


PRESENT = Terms()
BEFORE = Terms(*[False] * len(PRESENT))


def linear(rows: int, inputs: int, outputs: int, bias: bool = True) -> Kernel:
    """Forward of a linear layer."""
    moved = rows * inputs + inputs * outputs + bias * outputs + rows * outputs
    return Kernel(2 * moved, 2 * rows * inputs * outputs, "matmul", inputs)


def linear_backward(rows: int, inputs: int, outputs: int, bias: bool = True, summed: bool = False) -> list[Kernel]:
    """Gradients of the input, of the weight and of the bias; `summed`: the product adds the residual's gradient."""
    moved, flops = 2 * (rows * inputs + inputs * outputs + rows * outputs), 2 * rows * inputs * outputs
    kernels = [
        Kernel(moved + 2 * summed * rows * inputs, flops, "matmul", outputs),
        Kernel(moved, flops, "matmul", rows),
    ]
    return kernels + [Kernel(2 * (rows + 1) * outputs)] * bias


def attention_kernels(lengths: Sequence[int], hidden_size: int) -> tuple[list[Kernel], list[Kernel]]:
    """Of flash attention: one forward; backward a preparation, the gradients (for which scores are computed again), a
    conversion.

    Args:
        lengths: rows of each sequence.
        hidden_size: of all heads together.
    """
    state, tiles = 2 * sum(lengths) * hidden_size, [-(-rows // TILE) * TILE for rows in lengths]
    scores, filled = sum(rows**2 for rows in lengths), sum(rows**2 for rows in tiles)
    size = filled / max(sum(tiles), 1) or TILE  # what a query meets
    product = 2 * hidden_size  # FLOPs of a score in one of the products
    forward = [Kernel(4 * state, 2 * product * scores, "forward", size, 2 * product * filled)]
    gradients = Kernel(8 * state, 5 * product * scores, "backward", size, 5 * product * filled)
    return forward, [Kernel(2 * state), gradients, Kernel(2 * state)]


class _Layers:
    """The parts of the layers, for one configuration, batch and choice of terms."""

    def __init__(self, config: Any, batch: BatchShape, terms: Terms) -> None:
        self.hidden, self.feed_forward = config.hidden_size, config.intermediate_size
        self.has_dropout = config.hidden_dropout_prob > 0
        self.batch, self.terms = batch, terms

    def state(self, rows: int) -> int:
        return 2 * rows * self.hidden

    def residual_output(self, rows: int, inputs: int, fused: bool = False) -> tuple[list[Kernel], list[Kernel]]:
        """Projection, drop-out, LayerNorm of the sum with the residual, perhaps fusion."""
        state, hidden, inside = self.state(rows), self.hidden, self.terms.dropout_in_norm
        moments = 8 * rows  # mean and reciprocal deviation, fp32
        views = 2 * FUSION_INDEX * self.batch.num_edges + FUSION_INDEX * (rows + self.batch.num_ngrams + 2)
        ngrams = self.state(self.batch.num_ngrams)
        forward = [linear(rows, inputs, hidden)]
        backward = [Kernel((5 if inside and self.has_dropout else 4) * state + moments + 10 * hidden)]
        backward += [Kernel(state + ngrams + views)] * fused
        backward += [Kernel(6 * hidden)] * (2 + inside)
        if self.has_dropout:
            forward += [Kernel(8), Kernel(16) if inside else Kernel(2.5 * state + 8, draws=rows * hidden)]  # seed, draw
            backward += [Kernel(2.5 * state)] * (not inside)  # reads the mask, a byte an element
        forward += [Kernel(3 * state + moments + 4 * hidden + fused * (ngrams + views))]
        return forward, backward + linear_backward(rows, inputs, hidden, bias=not inside)

    def mlp(self, rows: int, fused: bool) -> tuple[list[Kernel], list[Kernel]]:
        """The gated MLP."""
        inner = 2 * rows * self.feed_forward
        forward, backward = self.residual_output(rows, self.feed_forward, fused)
        forward = [linear(rows, self.hidden, 2 * self.feed_forward, bias=False), Kernel(3 * inner), *forward]
        backward += [Kernel(5 * inner), *linear_backward(rows, self.hidden, 2 * self.feed_forward, bias=False)]
        return forward, [*backward, Kernel(3 * self.state(rows))]

    def token_projections(self) -> tuple[list[Kernel], list[Kernel]]:
        """q, k and v in one product; the gradient of the residual beside them is added to theirs."""
        rows, hidden = self.batch.num_tokens, self.hidden
        summed = self.terms.residual_added and rows * hidden >= MIN_ELEMENTS
        backward = [Kernel(6 * self.state(rows))] * (not self.terms.gradients_joined)
        backward += linear_backward(rows, hidden, 3 * hidden, summed=summed)
        return [linear(rows, hidden, 3 * hidden)], backward + [Kernel(3 * self.state(rows))] * (not summed)

    def masked_rows(self, times: int = 1) -> tuple[list[Kernel], list[Kernel]]:
        """Taken from as many states of all tokens; their gradients put back among zeros."""
        rows, masked = self.batch.num_tokens, self.batch.num_masked
        backward = [Kernel(self.state(rows) + self.state(masked)), Kernel(3 * self.state(masked) + 8 * masked)]
        return [Kernel(2 * self.state(masked) + 8 * masked)] * times, backward * times

    def ngram_projections(self) -> tuple[list[Kernel], list[Kernel]]:
        rows, hidden = self.batch.num_ngrams, self.hidden
        backward = [*linear_backward(rows, hidden, hidden), Kernel(3 * self.state(rows))]
        return [linear(rows, hidden, hidden)] * 3, backward * 3

    def ngram_inner(self) -> tuple[list[Kernel], list[Kernel]]:
        rows, inner = self.batch.num_ngrams, 2 * self.batch.num_ngrams * self.feed_forward
        forward = [linear(rows, self.hidden, self.feed_forward), Kernel(2 * inner)]
        return forward, [Kernel(3 * inner), *linear_backward(rows, self.hidden, self.feed_forward)]

    def embeddings(self, rows: int, vocab_size: int, types: int, window: int) -> tuple[list[Kernel], list[Kernel]]:
        """Look-up, token type, neighbors on either side, LayerNorm, drop-out."""
        state, hidden = self.state(rows), self.hidden
        norm = state * 2 + 8 * rows + 4 * hidden
        forward = [
            Kernel(2 * state + 8 * rows),
            Kernel(8 * rows + 8),
            Kernel(4 * hidden + 8),
            Kernel(2 * state + 2 * hidden),
        ]
        backward = [Kernel(norm + state + 4 * hidden), Kernel(state + 2 * hidden), Kernel(2 * hidden * (types + 1) + 8)]
        if window:
            forward += [Kernel(8 * rows), *[Kernel(16 * rows)] * 4]
        for _ in range(2 * window):  # neighbors: where they are, the states, the product, the sum
            where = [Kernel(16 * rows), Kernel(13 * rows), Kernel(13 * rows), Kernel(3 * rows)]
            forward += [*where, Kernel(2 * state), Kernel(2 * state + rows), linear(rows, hidden, hidden, False)]
            forward += [Kernel(3 * state)]
            backward += [*linear_backward(rows, hidden, hidden, False), Kernel(2 * state + rows), Kernel(2 * state)]
            backward += [Kernel(3 * state)]
        forward += [Kernel(norm)]
        backward += [Kernel(state + 8 * rows + 2 * vocab_size * hidden)]
        if self.has_dropout:
            forward += [Kernel(2 * state), Kernel(2 * state), Kernel(3 * state)]
            backward = [Kernel(3 * state), *backward]
        return forward, backward

    def head(self, vocab_size: int) -> tuple[list[Kernel], list[Kernel]]:
        """Of the masked tokens: transform, decoder, cross-entropy in fp32."""
        rows, hidden = self.batch.num_masked, self.hidden
        state, logits = self.state(rows), 2 * rows * vocab_size
        norm = 2 * state + 8 * rows + 4 * hidden
        forward = [linear(rows, hidden, hidden), Kernel(2 * state), Kernel(norm), linear(rows, hidden, vocab_size)]
        forward += [Kernel(3 * logits), Kernel(4 * logits), Kernel(2 * logits + 8 * rows + 8)]
        backward = [Kernel(4 * logits + 8 * rows + 8), Kernel(6 * logits), Kernel(3 * logits)]
        backward += [*linear_backward(rows, hidden, vocab_size), Kernel(6 * vocab_size * hidden)]  # tied: summed
        backward += [Kernel(norm + state + 4 * hidden), Kernel(3 * state), *linear_backward(rows, hidden, hidden)]
        return forward, backward


def parts_of_step(config: Any, batch: BatchShape, terms: Terms = PRESENT) -> list[Part]:
    """Everything in forward and backward of one micro-batch.

    Args:
        config: with the fields of `DNAZenConfig`.
        batch: its sizes.
        terms: what the step does without.
    """
    hidden, layers, fused = config.hidden_size, config.num_hidden_layers, config.num_hidden_ngram_layers
    of, tokens, ngrams = _Layers(config, batch, terms), batch.num_tokens, batch.num_ngrams
    integers = [
        Part(f"`ngram_{name}`", 1, [Kernel(tokens * num_bytes / launches)] * launches, [])
        for name, (launches, num_bytes) in (("matching", MATCHING), ("masking", MASKING))
    ]
    attention, ngram_attention = (attention_kernels(n, hidden) for n in (batch.lengths, batch.ngram_lengths))
    skips = terms.last_layer_masked and fused < layers
    last = [
        Part("tokens, last layer: masked rows", 1, *of.masked_rows(2)),
        Part("tokens, last layer: attention's output", 1, *of.residual_output(batch.num_masked, hidden)),
        Part("tokens, last layer: MLP", 1, *of.mlp(batch.num_masked, False)),
    ]
    return [
        *integers,
        Part("embeddings: tokens", 1, *of.embeddings(tokens, config.vocab_size, 2, config.neighbor_window)),
        Part("embeddings: G-grams", 1, *of.embeddings(ngrams, config.ngram_vocab_size, 2, 0)),
        Part("tokens: q, k, v", layers, *of.token_projections()),
        Part("tokens: attention", layers, *attention),
        Part("tokens: attention's output", layers - skips, *of.residual_output(tokens, hidden)),
        Part("tokens: MLP", layers - skips - fused, *of.mlp(tokens, False)),
        Part("tokens: MLP, then fusion", fused, *of.mlp(tokens, True)),
        *(last if skips else [Part("masked rows", 1, *of.masked_rows())]),
        Part("G-grams: q, k, v", fused, *of.ngram_projections()),
        Part("G-grams: attention", fused, *ngram_attention),
        Part("G-grams: attention's output", fused, *of.residual_output(ngrams, hidden)),
        Part("G-grams: MLP, inner", fused, *of.ngram_inner()),
        Part("G-grams: MLP, outer", fused, *of.residual_output(ngrams, config.intermediate_size)),
        Part("masked-language head", 1, *of.head(config.vocab_size)),
    ]


def spread(total: int, lengths: Sequence[int]) -> list[int]:
    """`total` rows over the sequences, in proportion to their lengths."""
    found, before, rows = [], 0, sum(lengths)
    for end in accumulate(lengths):
        found.append(total * end // rows - before)
        before += found[-1]
    return found
