"""What counting alone says of hidden tokens: the models that a trained one must beat, on the same targets.

All of them are counted on the training split and never see the held-out text; what there is to choose (smoothing,
weights, order) is chosen on a tenth of the training split, with counts of the other nine.
"""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from transformers import PreTrainedTokenizerFast

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.sampler import MicroBatch
from dnazen.data.corpus import TokenSplit
from dnazen.evaluation.markov import (
    STRENGTHS,
    MarkovModel,
    choose_strengths,
    count_kmers,
    longest_kmer,
    markov_probabilities,
)
from dnazen.evaluation.targets import Scores, Spelling, Targets, collect_targets, sample_sequences
from dnazen.ngram.vocab import NgramVocabulary

TUNING_TARGETS = 2_000
_TUNING_BLOCK = 20  # neighboring sequences, so that both strands of a piece, and its halves, are on one side
_CHUNK_SCORES = 4_000_000  # targets times tokens that are scored at once
_EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)

# unnormalized log-probabilities [rows, V] of some of the targets it was made for
Model = Callable[[slice], np.ndarray]


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
        self._previous = self._choose(_previous, itertools.product(STRENGTHS))
        self._both = self._choose(_both, itertools.product(STRENGTHS, _EXPONENTS))
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
