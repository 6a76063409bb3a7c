"""What counting alone says of hidden tokens: the models that a trained one must beat, on the same targets.

All of them are counted on the training split and never see the held-out text; what there is to choose (smoothing,
weights, order) is chosen on a tenth of the training split, with counts of the other nine.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.sampler import MicroBatch
from dnazen.data.corpus import TokenSplit
from dnazen.data.tokenizer import tokens_by_id
from dnazen.ngram.vocab import NgramVocabulary
from dnazen_kernels.ngram_masking import IGNORE_INDEX

MAX_TOKENS = 20_000_000  # of the training split that are counted, evenly spaced over it
MAX_ORDER = 10  # of the Markov model: 4^11 counts
TUNING_TARGETS = 2_000
_TUNING_BLOCK = 20  # neighboring sequences, so that both strands of a piece, and its halves, are on one side
UNKNOWN = 4  # a base that is hidden, or beyond the sequence's end
_CHUNK_SCORES = 4_000_000  # targets times tokens that are scored at once
_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)

# unnormalized log-probabilities [rows, V] of some of the targets it was made for
Model = Callable[[slice], np.ndarray]


class Scores(NamedTuple):
    """What a model says of n hidden tokens: its loss in nats `[n]`, and whether its first guess is right `[n]`."""

    loss: np.ndarray
    correct: np.ndarray


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
    left_bases: np.ndarray  # [n, MAX_ORDER] the bases before it, the nearest last; 4 from the first unknown one on
    right_bases: np.ndarray  # [n, MAX_ORDER] the bases behind it, the nearest first, likewise

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
        text = np.pad(text, MAX_ORDER, constant_values=UNKNOWN)
        steps = np.arange(MAX_ORDER)
        right = text[starts[at, None] + MAX_ORDER + 1 + steps]
        left = text[starts[at, None] + MAX_ORDER - 1 - steps]  # the nearest first
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


class Baselines:
    """What counting knows of a text, to score hidden tokens of another.

    - `unigram` guesses by the frequency of tokens.
    - `previous token` by what follows the token to the left.
    - `both neighbors` by what follows the token to the left and precedes the one to the right, as if the two were
      independent given the token.
    - `Markov model` by bases: the order-k model (interpolated over all lower orders, of both strands) of a token's
      bases given those before it, times that of the bases behind it given both; relative to its probability without
      any context, and times the token's frequency, which stands for how the tokenizer cuts.

    A neighbor that is hidden too, or is no token, tells nothing: then the model has what is left.

    Args:
        train: the text that is counted, at most `MAX_TOKENS` of it.
        tokenizer: of both texts.
        vocabulary, masking: how the hidden tokens are hidden, so that those the tuning needs are hidden alike.
    """

    def __init__(
        self, train: TokenSplit, tokenizer: PreTrainedTokenizerFast, vocabulary: NgramVocabulary, masking: Masking
    ):
        spelling, special_ids = Spelling(tokenizer), tokenizer.all_special_ids
        self._vocab_size = len(spelling.lengths)
        numbers = sample_sequences(train)
        is_tuning = np.arange(len(numbers)) // _TUNING_BLOCK % 10 == 9
        if not is_tuning.any():
            is_tuning[-max(1, len(numbers) // 10) :] = True
        fitted = is_tuning if is_tuning.all() else ~is_tuning  # a single sequence is tuned on itself
        longest = longest_kmer(int(spelling.lengths[np.concatenate([train[i] for i in numbers])].sum()))
        self._fit, tune, self._full = (
            _Counts(train, numbers[chosen], spelling, special_ids, longest)
            for chosen in (fitted, is_tuning, fitted | is_tuning)
        )

        expected = masking.mlm_probability * train.lengths[numbers[is_tuning]].sum()
        sample = numbers[is_tuning][:: max(1, int(expected // TUNING_TARGETS))]
        batch = PackedDataset(train, PackedCollator(tokenizer, vocabulary, masking))[MicroBatch(0, sample)][0]
        self._tuning = collect_targets([(batch, sample)], spelling, special_ids)
        self._previous = self._choose(_previous, itertools.product(_STRENGTHS))
        self._both = self._choose(_both, itertools.product(_STRENGTHS, _EXPONENTS))
        strengths = choose_strengths(self._fit.kmers, tune.kmers)
        gain = MarkovModel(markov_probabilities(self._fit.kmers, strengths), spelling).gain(self._tuning)

        def markov(counts: _Counts, _: Targets, weight: float) -> Model:
            return lambda rows: counts.log_unigram + weight * gain[rows]

        (self._weight,) = self._choose(markov, itertools.product(_EXPONENTS))
        self._markov = MarkovModel(markov_probabilities(self._full.kmers, strengths), spelling)

    def score(self, targets: Targets) -> dict[str, Scores]:
        """What each of them says of hidden tokens, by its name."""
        full = self._full
        models = {
            "unigram": lambda rows: np.tile(full.log_unigram, (len(targets.truth[rows]), 1)),
            "previous token": _previous(full, targets, *self._previous),
            "both neighbors": _both(full, targets, *self._both),
            f"Markov model of order {self._markov.order}": (
                lambda rows: full.log_unigram + self._weight * self._markov.gain(targets.take(rows))
            ),
        }
        return {name: _score(model, targets, self._vocab_size) for name, model in models.items()}

    def _choose(self, make_model: Callable[..., Model], candidates: Iterable[tuple]) -> tuple:
        """The candidate with which the model, counted without the tuning part, has the lowest loss there."""
        tuning = self._tuning
        return min(
            candidates,
            key=lambda choice: _score(make_model(self._fit, tuning, *choice), tuning, self._vocab_size).loss.sum(),
        )


def _previous(counts: "_Counts", targets: Targets, strength: float) -> Model:
    return lambda rows: counts.log_unigram + counts.neighbor(targets.left[rows], strength, side=0)


def _both(counts: "_Counts", targets: Targets, strength: float, weight: float) -> Model:
    def model(rows: slice) -> np.ndarray:
        left, right = (
            counts.neighbor(tokens[rows], strength, side) for side, tokens in enumerate((targets.left, targets.right))
        )
        # two say the same in part; one alone counts whole
        weights = np.where((targets.left[rows] >= 0) & (targets.right[rows] >= 0), weight, 1.0)[:, None]
        return counts.log_unigram + weights * (left + right)

    return model


class _Counts:
    """Counts of tokens, of adjacent tokens, and of k-mers on both strands."""

    def __init__(
        self, split: TokenSplit, sequences: np.ndarray, spelling: Spelling, special_ids: list[int], longest: int
    ):
        vocab_size = len(spelling.lengths)
        gap = np.array([-1])
        text = np.concatenate([part for i in sequences for part in (split[i].astype(np.int64), gap)])
        self.special_ids = special_ids
        unigrams = np.bincount(text[text >= 0], minlength=vocab_size)
        inside = (text[:-1] >= 0) & (text[1:] >= 0)
        codes, counts = np.unique(text[:-1][inside] * vocab_size + text[1:][inside], return_counts=True)
        self.pairs = np.zeros(vocab_size * vocab_size, dtype=np.int32)
        self.pairs[codes] = counts
        self.pairs = self.pairs.reshape(vocab_size, vocab_size)
        bases, _ = spelling.spell(np.where(text < 0, special_ids[0], text))
        self.kmers = count_kmers(bases, longest)
        weights = unigrams + 1.0
        weights[special_ids] = 0.0
        with np.errstate(divide="ignore"):
            self.log_unigram = np.log(weights / weights.sum()).astype(np.float32)

    def neighbor(self, neighbors: np.ndarray, strength: float, side: int) -> np.ndarray:
        """log p(token | neighbor) / p(token), `[n, V]`; 0 where the neighbor is unknown.

        The counts are drawn towards the unigram as if it had been seen `strength` times behind each neighbor.
        """
        known = neighbors >= 0
        pairs = (self.pairs if side == 0 else self.pairs.T)[neighbors[known]].astype(np.float32)
        unigram = np.exp(self.log_unigram)
        total = pairs.sum(1, keepdims=True)
        gain = np.zeros((len(neighbors), len(unigram)), dtype=np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain[known] = np.log((pairs / unigram + strength) / (total + strength))
        gain[:, self.special_ids] = 0.0
        return gain


def count_unigrams(split: TokenSplit, vocab_size: int) -> np.ndarray:
    """Counts `[V]` of the tokens of a split."""
    return sum(np.bincount(tokens, minlength=vocab_size) for tokens, _ in split.shards)


def sample_sequences(split: TokenSplit) -> np.ndarray:
    """Numbers of evenly spaced sequences with some `MAX_TOKENS` tokens; all, if they have no more."""
    return np.arange(0, len(split), math.ceil(split.num_tokens / MAX_TOKENS) or 1)


def longest_kmer(num_bases: int) -> int:
    """The longest k-mers worth counting in so many bases: one base longer than those the text could hold once each."""
    return min(MAX_ORDER, int(math.log(max(num_bases, 4), 4))) + 1


def count_kmers(bases: np.ndarray, longest: int) -> list[np.ndarray]:
    """Counts `[4^k]` of the k-mers of a text and of its reverse complement, for k = 1 to `longest`.

    Args:
        bases: codes 0 to 3, and 4 where the text is interrupted.
    """
    reverse = np.where(bases == UNKNOWN, UNKNOWN, 3 - bases)[::-1]
    text = np.concatenate([bases, [UNKNOWN], reverse]).astype(np.int64)
    code, whole = np.zeros(len(text), dtype=np.int64), np.ones(len(text), dtype=bool)
    counts = []
    for k in range(1, longest + 1):  # k-mers that end at each base
        code = (code if k == 1 else code[:-1] * 4) + (text[k - 1 :] & 3)
        whole = (whole if k == 1 else whole[:-1]) & (text[k - 1 :] != UNKNOWN)
        counts.append(np.bincount(code[whole], minlength=4**k).astype(np.int32))
    return counts


def markov_probabilities(kmers: list[np.ndarray], strengths: list[float]) -> list[np.ndarray]:
    """p(base | the k bases before it) for k = 0 to `len(strengths)`, `[4^k, 4]` each.

    Each order is drawn towards the one below, as if that had been seen `strengths[k - 1]` times in each context.
    """
    tables = [((kmers[0] + 1.0) / (kmers[0].sum() + 4.0)).reshape(1, 4)]
    for counts, strength in zip(kmers[1:], strengths):
        counts = counts.reshape(-1, 4)
        lower = np.tile(tables[-1], (4, 1))  # without its first, farthest base
        tables.append((counts + strength * lower) / (counts.sum(1, keepdims=True) + strength))
    return tables


def choose_strengths(fit: list[np.ndarray], tune: list[np.ndarray]) -> list[float]:
    """For each order, while it helps, the strength with which `fit` predicts `tune` best."""
    strengths: list[float] = []
    lowest = math.inf
    for k in range(1, len(fit)):
        seen = tune[k].reshape(-1, 4)
        losses = {}
        for strength in _STRENGTHS:
            probabilities = markov_probabilities(fit[: k + 1], [*strengths, strength])[-1]
            losses[strength] = -(seen * np.log(probabilities)).sum() / max(seen.sum(), 1)
        best = min(losses, key=losses.__getitem__)
        if losses[best] >= lowest:
            break
        lowest = losses[best]
        strengths.append(best)
    return strengths


class MarkovModel:
    """A Markov model of bases that guesses tokens between two stretches of bases.

    Args:
        probabilities: see `markov_probabilities`.
        spelling: of the tokens.
    """

    def __init__(self, probabilities: list[np.ndarray], spelling: Spelling):
        self.order = len(probabilities) - 1
        self.spelling = spelling
        # all orders behind one another: that of order k starts at (4^(k + 1) - 4) / 3
        self._logs = np.log(np.concatenate([table.ravel() for table in probabilities])).astype(np.float32)
        self._starts = np.array([(4 ** (k + 1) - 4) // 3 for k in range(self.order + 1)])
        nothing = np.full((1, MAX_ORDER), UNKNOWN, dtype=np.uint8)
        self._alone = self._chain(nothing, nothing)

    def gain(self, targets: Targets) -> np.ndarray:
        """log p(left, token, right) / p(left) p(token) for each target and token, but for a constant, `[n, V]`."""
        maskable = self.spelling.maskable
        chain = self._chain(targets.left_bases, targets.right_bases) - self._alone
        # what has no bases fits nowhere better than the worst of what has
        gain = np.repeat(chain.min(1, keepdims=True), len(self.spelling.lengths), axis=1)
        gain[:, maskable] = chain
        return gain

    def _chain(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """log p(token's bases, then `right` | `left`) for each maskable token, `[n, maskable]`."""
        maskable = self.spelling.maskable
        lengths, bases = self.spelling.lengths[maskable], self.spelling.bases[maskable].astype(np.int64)
        known = (left != UNKNOWN).sum(1)
        powers = 4 ** np.arange(left.shape[1])[::-1]
        context = (np.where(left == UNKNOWN, 0, left) * powers).sum(1) % 4**self.order
        shape = len(left), len(maskable)
        codes = np.broadcast_to(context[:, None], shape).copy()
        orders = np.broadcast_to(np.minimum(known, self.order)[:, None], shape).copy()
        total = np.zeros(shape, dtype=np.float32)

        def read(columns: slice, base: np.ndarray, rows: np.ndarray | slice = slice(None)) -> None:
            order, code = orders[rows, columns], codes[rows, columns]
            # the code holds no more bases than the order has, for unknown ones are 0
            following = code * 4 + base
            total[rows, columns] += self._logs[self._starts[order] + following]
            codes[rows, columns] = following % 4**self.order
            orders[rows, columns] = np.minimum(order + 1, self.order)

        for step in range(int(lengths.max())):
            first = int(np.searchsorted(lengths, step + 1))
            read(slice(first, None), bases[first:, step])
        for step in range(min(right.shape[1], self.order)):
            rows = np.flatnonzero(right[:, step] != UNKNOWN)
            if len(rows):
                read(slice(None), right[rows, step, None].astype(np.int64), rows)
        return total


def _score(model: Model, targets: Targets, vocab_size: int) -> Scores:
    losses, corrects = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    chunk = max(1, _CHUNK_SCORES // vocab_size)
    for start in range(0, len(targets.truth), chunk):
        rows = slice(start, start + chunk)
        scores, truth = model(rows).astype(np.float64), targets.truth[rows]
        scores -= scores.max(1, keepdims=True)
        losses.append(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(truth)), truth])
        corrects.append(scores.argmax(1) == truth)
    return Scores(np.concatenate(losses), np.concatenate(corrects))
