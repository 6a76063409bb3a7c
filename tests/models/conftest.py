"""Random packed batches with G-grams, and small configurations."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from dnazen.models import DNAZenConfig


def _csr(rows: np.ndarray, columns: np.ndarray, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = np.lexsort((columns, rows))
    offsets = np.concatenate([[0], np.bincount(rows, minlength=num_rows).cumsum()])
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(columns[order], dtype=torch.int32)


def _make_batch(
    lengths: Sequence[int], ngram_counts: Sequence[int], seed: int = 0, vocab_size: int = 50,
    ngram_vocab_size: int = 20, mask_rate: float | None = 0.3,
) -> dict:  # fmt: skip
    """A packed batch of sequences of `lengths` tokens ([CLS] and [SEP] counted), with `ngram_counts` G-grams each."""
    rng = np.random.default_rng(seed)
    sequences = [np.concatenate([[1], rng.integers(5, vocab_size, n - 2), [2]]) for n in lengths]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ngram_starts = np.concatenate([[0], np.cumsum(ngram_counts)])
    edges = set()
    for sequence, (length, count) in enumerate(zip(lengths, ngram_counts)):
        for ngram in range(ngram_starts[sequence], ngram_starts[sequence] + count):
            for _ in range(rng.integers(1, 4)):  # occurrences of this G-gram, which may overlap
                first = rng.integers(1, length - 1)
                last = min(first + rng.integers(1, 6), length - 1)
                edges |= {(starts[sequence] + position, ngram) for position in range(first, last)}
    tokens, ngrams = np.array(sorted(edges), dtype=np.int64).reshape(-1, 2).T
    input_ids = torch.tensor(np.concatenate(sequences))
    token_offsets, token_ngrams = _csr(tokens, ngrams, len(input_ids))
    ngram_offsets, ngram_tokens = _csr(ngrams, tokens, int(ngram_starts[-1]))
    batch = dict(
        input_ids=input_ids,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        ngram_input_ids=torch.tensor(rng.integers(1, ngram_vocab_size, ngram_starts[-1])),
        ngram_cu_seqlens=torch.tensor(ngram_starts, dtype=torch.int32),
        max_ngrams=max(ngram_counts),
        token_offsets=token_offsets,
        token_ngrams=token_ngrams,
        ngram_offsets=ngram_offsets,
        ngram_tokens=ngram_tokens,
    )
    if mask_rate is not None:
        masked = torch.tensor(rng.random(len(input_ids)) < mask_rate) & (input_ids > 4)
        batch["labels"] = torch.where(masked, input_ids, -100)
        batch["input_ids"] = torch.where(masked, 4, input_ids)
    return batch


def _pad_batch(batch: dict) -> dict:
    """The same batch in the padded form that published models take, by plain loops."""
    starts, ngram_starts = batch["cu_seqlens"].tolist(), batch["ngram_cu_seqlens"].tolist()
    batch_size, num_tokens, num_ngrams = len(starts) - 1, batch["max_seqlen"], batch["max_ngrams"]
    padded = dict(
        input_ids=torch.full((batch_size, num_tokens), 3),
        attention_mask=torch.zeros(batch_size, num_tokens, dtype=torch.long),
        ngram_input_ids=torch.zeros(batch_size, num_ngrams, dtype=torch.long),
        ngram_attention_mask=torch.zeros(batch_size, num_ngrams, dtype=torch.long),
        ngram_position_matrix=torch.zeros(batch_size, num_tokens, num_ngrams),
    )
    if "labels" in batch:
        padded["labels"] = torch.full((batch_size, num_tokens), -100)
    for b in range(batch_size):
        length, count = starts[b + 1] - starts[b], ngram_starts[b + 1] - ngram_starts[b]
        for name in ("input_ids", "labels"):
            if name in batch:
                padded[name][b, :length] = batch[name][starts[b] : starts[b + 1]]
        padded["attention_mask"][b, :length] = 1
        padded["ngram_input_ids"][b, :count] = batch["ngram_input_ids"][ngram_starts[b] : ngram_starts[b + 1]]
        padded["ngram_attention_mask"][b, :count] = 1
        for position in range(length):
            token = starts[b] + position
            row = batch["token_ngrams"][batch["token_offsets"][token] : batch["token_offsets"][token + 1]]
            padded["ngram_position_matrix"][b, position, row.long() - ngram_starts[b]] = 1
    return padded


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict]:
    return _make_batch


@pytest.fixture(scope="session")
def pad_batch() -> Callable[[dict], dict]:
    return _pad_batch


@pytest.fixture
def config() -> DNAZenConfig:
    """Small, without dropout; 3 heads, so that the slopes' interleaving rule is in play."""
    return DNAZenConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        num_hidden_ngram_layers=2, ngram_vocab_size=20, hidden_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
