"""Whole-G-gram masking in plain PyTorch, on any device; paper section 2.4."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the masked tokens; the rest stay as they are


class MaskedBatch(NamedTuple):
    """A masked batch; the G-grams are those that survive, in their old order."""

    input_ids: torch.Tensor  # [T]
    labels: torch.Tensor  # [T] original id where masked, -100 elsewhere
    ngram_input_ids: torch.Tensor  # [N']
    ngram_cu_seqlens: torch.Tensor  # [B + 1]
    token_offsets: torch.Tensor  # [T + 1]
    token_ngrams: torch.Tensor  # [E']
    ngram_offsets: torch.Tensor  # [N' + 1]
    ngram_tokens: torch.Tensor  # [E']


def ngram_masking(
    input_ids: torch.Tensor,
    ordinary: torch.Tensor,
    random: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    token_offsets: torch.Tensor,
    token_ngrams: torch.Tensor,
    ngram_offsets: torch.Tensor,
    ngram_tokens: torch.Tensor,
    *,
    mlm_probability: float,
    mask_token_id: int,
    ordinary_ids: torch.Tensor,
    whole_ngram: bool = True,
) -> MaskedBatch:
    """Mask tokens and the G-grams they belong to; a pure function of its inputs; paper section 2.4.

    A token is drawn where it is ordinary and `random[:, 0] < mlm_probability`. A G-gram that covers a drawn token is
    hit, and all tokens of all hit G-grams are masked: one hop. G-grams that cover *any* masked token are removed,
    hit or not, since their states would tell the masked token. Of the masked tokens, those with `random[:, 1]` below
    0.8 become [MASK], those below 0.9 an entry of `ordinary_ids` chosen by `random[:, 2]`, and the rest stay.

    Args:
        input_ids: `[T]` int64.
        ordinary: `[T]` bool, False at special tokens.
        random: `[T, 3]` float64, uniform in [0, 1).
        ngram_input_ids, ngram_cu_seqlens: `[N]` and `[B + 1]`, the batch's G-grams, sequence by sequence.
        token_offsets, token_ngrams, ngram_offsets, ngram_tokens: both CSR views of the (token, G-gram) edges.
        mlm_probability: chance of an ordinary token to be drawn; more are masked, because G-grams are masked whole.
        ordinary_ids: `[V']`, the ids a random replacement is taken from.
        whole_ngram: False masks the drawn tokens alone (Table 3); G-grams are removed all the same.

    Raises:
        TypeError: `random` is not float64 or `ordinary` not bool.
        ValueError: `ordinary` or `random` does not fit `input_ids`.
    """
    if ordinary.dtype != torch.bool or random.dtype != torch.float64:
        raise TypeError(f"ordinary must be bool and random float64, got {ordinary.dtype} and {random.dtype}")
    if ordinary.shape != input_ids.shape or random.shape != (*input_ids.shape, 3):
        raise ValueError(
            f"ordinary and random must have shapes {tuple(input_ids.shape)} and {(*input_ids.shape, 3)}, "
            f"got {tuple(ordinary.shape)} and {tuple(random.shape)}"
        )
    masked = ordinary & (random[:, 0] < mlm_probability)
    if whole_ngram:
        hit = _any_in_row(masked[ngram_tokens], ngram_offsets)
        masked = masked | _any_in_row(hit[token_ngrams], token_offsets)
    kept = ~_any_in_row(masked[ngram_tokens], ngram_offsets)

    to_mask = masked & (random[:, 1] < MASK_SHARE)
    to_random = masked & ~to_mask & (random[:, 1] < MASK_SHARE + RANDOM_SHARE)
    replacement = ordinary_ids[(random[:, 2] * ordinary_ids.shape[0]).long()]
    masked_ids = torch.where(to_random, replacement, input_ids).masked_fill(to_mask, mask_token_id)

    new_number = _running_count(kept)  # [N + 1]
    token_edge_kept = kept[token_ngrams]
    ngram_sizes = ngram_offsets.diff()
    ngram_edge_kept = kept.repeat_interleave(ngram_sizes, output_size=ngram_tokens.shape[0])
    int_type = token_ngrams.dtype
    return MaskedBatch(
        input_ids=masked_ids,
        labels=torch.where(masked, input_ids, IGNORE_INDEX),
        ngram_input_ids=ngram_input_ids[kept],
        ngram_cu_seqlens=new_number[ngram_cu_seqlens].to(int_type),
        token_offsets=_running_count(token_edge_kept)[token_offsets].to(int_type),
        token_ngrams=new_number[token_ngrams[token_edge_kept]].to(int_type),
        ngram_offsets=_running_count(ngram_sizes[kept]).to(int_type),
        ngram_tokens=ngram_tokens[ngram_edge_kept],
    )


def _running_count(values: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, ..., n values."""
    return F.pad(values.cumsum(0), (1, 0))


def _any_in_row(edge_values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Per CSR row, whether any of its edges is True."""
    return _running_count(edge_values)[offsets].diff() > 0
