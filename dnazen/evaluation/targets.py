"""Hidden tokens, what can be seen around them, and what a model says of them."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dnazen.data.corpus import TokenSplit
from dnazen.data.tokenizer import tokens_by_id
from dnazen_kernels.ngram_masking import IGNORE_INDEX

MAX_TOKENS = 20_000_000  # of a text that are looked at, evenly spaced over it
CONTEXT_BASES = 10  # known of each side of a target
UNKNOWN = 4  # a base that is hidden, or beyond the sequence's end


class Scores(NamedTuple):
    """What a model says of n hidden tokens: its loss in nats `[n]`, and whether its first guess is right `[n]`."""

    loss: np.ndarray
    correct: np.ndarray

    def take(self, indices: np.ndarray) -> "Scores":
        """Those of some of the tokens."""
        return Scores(self.loss[indices], self.correct[indices])


class Spelling:
    """The bases of a tokenizer's tokens.

    Attributes:
        lengths: bases of each token, `[V]`; 0 for special tokens, and for tokens that are not made of A, C, G, T.
        bases: their codes, 0 to 3, `[V, longest]`, filled up with 4.
        maskable: ids of the tokens with bases, by length, then id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        spelled = tokens_by_id(tokenizer)
        special = set(tokenizer.all_special_ids)
        is_dna = [i not in special and text != "" and set(text) <= set("ACGT") for i, text in enumerate(spelled)]
        self.lengths = np.array([len(text) if dna else 0 for text, dna in zip(spelled, is_dna)], dtype=np.int64)
        self.bases = np.full((len(spelled), int(self.lengths.max(initial=1))), UNKNOWN, dtype=np.uint8)
        for token, (text, dna) in enumerate(zip(spelled, is_dna)):
            if dna:
                self.bases[token, : len(text)] = ["ACGT".index(base) for base in text]
        order = np.argsort(self.lengths, kind="stable")
        self.maskable = order[self.lengths[order] > 0]

    def spell(self, tokens: np.ndarray, hidden: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The bases of a text, a token without any (special) or a hidden one as a single 4.

        Args:
            tokens: ids, `[T]`.
            hidden: which of them are not shown, `[T]`.

        Returns:
            The bases, and where each token starts in them, `[T]`.
        """
        lengths = self.lengths[tokens] if hidden is None else np.where(hidden, 0, self.lengths[tokens])
        written = np.maximum(lengths, 1)
        starts = np.cumsum(written) - written
        text = np.full(int(written.sum()), UNKNOWN, dtype=np.uint8)
        inside = np.arange(self.bases.shape[1]) < lengths[:, None]
        text[(starts[:, None] + np.arange(self.bases.shape[1]))[inside]] = self.bases[tokens][inside]
        return text, starts


class Targets(NamedTuple):
    """n hidden tokens and what can be seen around them."""

    truth: np.ndarray  # [n] the token
    sequence: np.ndarray  # [n] number of its sequence in its split
    length: np.ndarray  # [n] its bases
    left: np.ndarray  # [n] the token before it; -1 where that is hidden, special or absent
    right: np.ndarray  # [n] the token behind it, likewise
    left_bases: np.ndarray  # [n, CONTEXT_BASES] the bases before it, the nearest last; 4 from the first unknown one on
    right_bases: np.ndarray  # [n, CONTEXT_BASES] the bases behind it, the nearest first, likewise

    def take(self, indices: np.ndarray | slice) -> "Targets":
        """Some of them."""
        return Targets(*(column[indices] for column in self))


def collect_targets(
    batches: Iterable[tuple[dict[str, Any], np.ndarray]], spelling: Spelling, special_ids: list[int]
) -> Targets:
    """The masked tokens of packed batches, in their order.

    Args:
        batches: pairs of a packed batch with `input_ids`, `labels` and `cu_seqlens`, and the numbers of its sequences.
        spelling: of the tokenizer.
        special_ids: tokens that tell nothing.
    """
    parts = []
    for batch, sequences in batches:
        input_ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        hidden = labels != IGNORE_INDEX
        at = np.flatnonzero(hidden)
        seen = np.where(hidden | np.isin(input_ids, special_ids), -1, input_ids)
        text, starts = spelling.spell(np.where(hidden, labels, input_ids), hidden)
        text = np.pad(text, CONTEXT_BASES, constant_values=UNKNOWN)
        steps = np.arange(CONTEXT_BASES)
        right = text[starts[at, None] + CONTEXT_BASES + 1 + steps]
        left = text[starts[at, None] + CONTEXT_BASES - 1 - steps]  # the nearest first
        for context in (left, right):
            context[np.logical_or.accumulate(context == UNKNOWN, axis=1)] = UNKNOWN
        number = np.searchsorted(batch["cu_seqlens"].numpy(), at, side="right") - 1
        # [CLS] and [SEP] stand around every sequence, so that a masked token has neighbors
        parts.append(
            Targets(
                labels[at],
                sequences[number],
                spelling.lengths[labels[at]],
                seen[at - 1],
                seen[at + 1],
                left[:, ::-1],
                right,
            )
        )
    return Targets(*(np.concatenate(columns) for columns in zip(*parts)))


def count_unigrams(split: TokenSplit, vocab_size: int) -> np.ndarray:
    """Counts `[V]` of the tokens of a split."""
    return sum(np.bincount(tokens, minlength=vocab_size) for tokens, _ in split.shards)


def sample_sequences(split: TokenSplit) -> np.ndarray:
    """Numbers of evenly spaced sequences with some `MAX_TOKENS` tokens; all, if they have no more."""
    return np.arange(0, len(split), math.ceil(split.num_tokens / MAX_TOKENS) or 1)
