"""Memory of one GPU in training, in bytes: weights and their states by ZeRO stage, and what the backward needs.

What layers keep is counted as PyTorch's autograd keeps it without compiling; compiled layers keep less.
"""

from typing import Any, NamedTuple

from dnazen.planning.step import BatchShape

BUCKET = 5e7  # `reduce_bucket_size` of ds_configs
LIVE_PARAMETERS = 1e9  # gathered under ZeRO-3 and kept: DeepSpeed's `stage3_max_live_parameters`
OVERHEAD = 2e9  # CUDA, NCCL, workspaces of the matrix products; assumed
FRAGMENTS = 1.05  # of what tensors take: the allocator's rest; assumed


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float  # fp32 weights and two moments
    activations: float  # kept for the backward, and what it works with
    head: float  # logits and what they come from

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return FRAGMENTS * sum(self) + OVERHEAD


def parameters(config: Any) -> int:
    """Number of parameters of the masked-language model."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    norm = 2 * hidden
    attention = 4 * (hidden * hidden + hidden) + norm
    token_layer = attention + 3 * hidden * inner + hidden + norm
    ngram_layer = attention + 2 * hidden * inner + inner + hidden + norm
    embeddings = (
        (vocab + config.ngram_vocab_size + 4) * hidden + 2 * norm + 2 * config.neighbor_window * hidden * hidden
    )
    head = hidden * hidden + hidden + norm + vocab
    return config.num_hidden_layers * token_layer + config.num_hidden_ngram_layers * ngram_layer + embeddings + head


def table(config: Any) -> int:
    """Parameters of the table of G-grams' embeddings."""
    return config.ngram_vocab_size * config.hidden_size


def layer_bytes(config: Any) -> tuple[int, int]:
    """Kept for the backward of a layer: bytes a token of the token encoder, and a G-gram of the G-gram encoder.

    States of bf16: the layer's input, q, k, v, the context, both sums that are normalized, the state between
    attention and feed-forward; inside it 4 (gated) and 2 (plain) times its width. Beside them the moments of both norms
    and the logsumexp of each head, fp32.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    both = 16 * hidden + 16 + 4 * config.num_attention_heads
    return both + 8 * inner, both + 4 * inner


def activations(config: Any, batch: BatchShape, checkpointing: bool) -> float:
    """Kept for the backward of all layers and embeddings, and the gradients inside the layer it is in."""
    tokens, ngrams, hidden = batch.num_tokens, batch.num_ngrams, config.hidden_size
    token, ngram = layer_bytes(config)
    kept = config.num_hidden_layers * token * tokens + config.num_hidden_ngram_layers * ngram * ngrams
    if checkpointing:  # the inputs of each layer, and one layer whole
        inputs = config.num_hidden_layers * tokens + config.num_hidden_ngram_layers * (tokens + ngrams)
        kept = 2 * hidden * inputs + token * tokens
    embedded = (3 * hidden + 16 + 4 * hidden * config.neighbor_window) * (tokens + ngrams)
    working = (6 * config.intermediate_size + 6 * hidden) * tokens
    return kept + embedded + working + 2 * hidden * tokens


def head(config: Any, batch: BatchShape) -> float:
    """Four states, and for each entry of the vocabulary logits and their gradient in bf16 and fp32 and the
    probabilities in fp32."""
    return batch.num_masked * (8 * config.hidden_size + (2 + 4 + 4 + 4 + 2) * config.vocab_size)


def memory(config: Any, batch: BatchShape, gpus: int, stage: int, checkpointing: bool = False) -> Memory:
    """Of one of `gpus` GPUs under ZeRO `stage` 1 to 3, by `ds_configs`."""
    count, largest = parameters(config), table(config)
    weights, optimizer = 2.0 * count, 12.0 * count / gpus
    buckets = 2 * 2 * BUCKET + 2 * (largest if largest > BUCKET else 0)  # two of bf16, and the table's own gradient
    gradients = 2.0 * count if stage == 1 else 4.0 * count / gpus + buckets
    if stage == 3:
        weights = 2.0 * count / gpus + 2.0 * min(count, LIVE_PARAMETERS)
    return Memory(weights, gradients, optimizer, activations(config, batch, checkpointing), head(config, batch))
