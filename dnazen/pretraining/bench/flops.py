"""The arithmetic that a training step owes, and what devices can do."""

import numpy as np

from dnazen.models import DNAZenConfig

# dense bf16 TFLOP/s on the data sheets, by a part of the device's name
PEAK_TFLOPS = {"H200": 990, "H100": 990, "H800": 990, "GH200": 990, "A100": 312, "A800": 312, "B200": 2250}


def training_flops(config: DNAZenConfig, lengths: np.ndarray, ngram_lengths: np.ndarray, num_masked: int) -> float:
    """Floating-point operations that one forward and backward owe to these sequences: matrix products and attention.

    A multiply-add counts 2, the backward twice the forward. Multiply-adds of the forward: per token and layer of the
    token encoder `4 H^2 + 3 H F` and, in attention, `2 H n` where n is the length of its sequence; per G-gram and
    layer of the G-gram encoder `4 H^2 + 2 H F` and as much attention; per token `2 w H^2` in the embeddings if w
    neighbors on either side enter; per masked token `H^2 + H V` in the head. Nothing is owed to padding, nor for
    looking up, norms, the fusion or what is computed twice.

    Args:
        config: the model's sizes.
        lengths, ngram_lengths: tokens, and G-grams, of each sequence.
        num_masked: masked tokens in all.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    lengths, ngram_lengths = lengths.astype(np.float64), ngram_lengths.astype(np.float64)
    token = (4 * hidden**2 + 3 * hidden * feed_forward) * lengths.sum() + 2 * hidden * (lengths**2).sum()
    ngram = (4 * hidden**2 + 2 * hidden * feed_forward) * ngram_lengths.sum() + 2 * hidden * (ngram_lengths**2).sum()
    head = (hidden**2 + hidden * config.vocab_size) * num_masked
    neighbors = 2 * config.neighbor_window * hidden**2 * lengths.sum()
    return float(6 * (neighbors + config.num_hidden_layers * token + config.num_hidden_ngram_layers * ngram + head))


def skipped_flops(config: DNAZenConfig, num_tokens: int, num_masked: int) -> float:
    """Of those, what is not computed and not missed: after its attention the last layer needs the masked rows alone."""
    skipped_rows = num_tokens - num_masked if config.skips_unmasked_rows else 0
    return float(6 * skipped_rows * (config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size))
