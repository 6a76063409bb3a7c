"""How well a masked-language model predicts hidden tokens of a text, beside counting in its training text."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset, move_batch
from dnazen.batches.sampler import MicroBatch, pack_by_budget
from dnazen.data.corpus import TokenSplit
from dnazen.evaluation.baselines import Baselines
from dnazen.evaluation.metrics import FEWEST_SEQUENCES, Comparison, compare
from dnazen.evaluation.targets import UNKNOWN, Scores, Spelling, collect_targets, sample_sequences
from dnazen.files import InputError
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.vocab import NgramVocabulary

# the same in every run, whatever training masks: 15 % of the tokens, one by one, and all of them hidden
HELD_OUT_MASKING = Masking(mlm_probability=0.15, whole_ngram=False, seed=0, mask_share=1.0, random_share=0.0)
WANTED_TARGETS, MAX_MASKINGS = 20_000, 4
OVERLAP_BASES = 31  # a stretch of so many that two texts share is no chance
_STRETCH_BASES = 2040  # of a genome, as long as the longest piece of a corpus


class Sample(NamedTuple):
    """Sequences of a split (their numbers), and how often each is masked anew."""

    sequences: np.ndarray
    num_maskings: int


def choose_sequences(split: TokenSplit, candidates: np.ndarray | None = None) -> Sample:
    """Evenly spaced sequences with some `WANTED_TARGETS` hidden tokens in all their maskings.

    Args:
        split: where they are from.
        candidates: the sequences to choose from, ascending; default: all.
    """
    candidates = np.arange(len(split)) if candidates is None else candidates
    expected = HELD_OUT_MASKING.mlm_probability * split.lengths[candidates].sum()
    count = min(len(candidates), max(1, round(len(candidates) * WANTED_TARGETS / max(expected, 1))))
    chosen = candidates[np.unique(np.linspace(0, len(candidates) - 1, count).astype(np.int64))]
    return Sample(chosen, int(np.clip(WANTED_TARGETS // max(expected, 1), 1, MAX_MASKINGS)))


def evaluation_batches(split: TokenSplit, samples: list[Sample], max_batch_tokens: int) -> list[MicroBatch]:
    """The micro-batches of these samples, masking by masking (an epoch each); what two have in common is in one."""
    micro_batches = []
    for masking in range(max(sample.num_maskings for sample in samples)):
        needed = [sample.sequences for sample in samples if masking < sample.num_maskings]
        runs = pack_by_budget(split.lengths, np.unique(np.concatenate(needed)), max_batch_tokens)
        micro_batches += [MicroBatch(masking, run) for run in runs]
    return micro_batches


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and whether the first guess is right, `[n]` each, of logits `[n, V]`."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def score_model(model: DNAZenForMaskedLM, batches: Iterable[dict[str, Any]]) -> Scores:
    """A model's scores of the masked tokens of packed batches, in their order."""
    parts = []
    for batch in batches:
        batch = move_batch(batch, model.device)
        targets = batch["labels"].index_select(0, batch["masked_positions"])
        parts.append(score_logits(model(**batch).logits, targets))
    loss, correct = (torch.cat(column).cpu().numpy() for column in zip(*parts))
    return Scores(loss.astype(np.float64), correct)


class Evaluation(NamedTuple):
    """A model on one text."""

    comparison: Comparison
    # the same on the sequences that share nothing with the training text; None if those are all, or (nearly) none
    apart: Comparison | None
    overlap: float  # share of the stretches of `OVERLAP_BASES` bases that the training text has, on either strand

    def describe(self, text: str) -> str:
        """Tables and verdicts; `text` says what was evaluated."""
        lines = [
            f"Hidden tokens of {text} ({self.comparison.num_targets:,} in {self.comparison.num_sequences:,} sequences):"
        ]
        lines += [self.comparison.table(), self.comparison.verdict()]
        lines.append(f"{100 * self.overlap:.1f} % of its stretches of {OVERLAP_BASES} bases are in the training text.")
        if self.apart is not None:
            lines += [
                f"Of the {self.apart.num_sequences:,} sequences that share none with it "
                f"({self.apart.num_targets:,} hidden tokens):",
                self.apart.table(),
                self.apart.verdict(),
            ]
        return "\n".join(lines)


def evaluate_split(
    name: str,
    model: DNAZenForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: NgramVocabulary,
    train: TokenSplit,
    split: TokenSplit,
) -> Evaluation:
    """Hold a model (in evaluation mode) against counting in `train`, on hidden tokens of `split`.

    Every target is hidden: a token that is shown as it is, or as another, as BERT's training has them, would measure
    copying and not prediction.

    Raises:
        InputError: nothing of the split would be hidden.
    """
    use_ngrams = model.config.use_ngrams and len(vocabulary.ngrams) > 0
    dataset, blind = (
        PackedDataset(split, PackedCollator(tokenizer, vocabulary, HELD_OUT_MASKING, shown))
        for shown in (use_ngrams, False)
    )
    spelling, special_ids = Spelling(tokenizer), tokenizer.all_special_ids
    pieces = np.concatenate(split.pieces)
    # both strands of a piece, and its halves, are no independent evidence
    _, stretch = np.unique([pieces["record"], pieces["start"] // _STRETCH_BASES], axis=1, return_inverse=True)
    looked_at, shared, total = _count_shared(train, split, spelling, special_ids)
    apart = looked_at[shared == 0]
    samples = [choose_sequences(split)]
    if FEWEST_SEQUENCES <= len(apart) < len(looked_at):
        samples.append(choose_sequences(split, apart))

    micro_batches = evaluation_batches(split, samples, max(8192, int(split.lengths.max()) + 2))
    batches = [dataset[micro_batch][0] for micro_batch in micro_batches]
    sequences = (micro_batch.sequences for micro_batch in micro_batches)
    targets = collect_targets(zip(batches, sequences), spelling, special_ids)
    masking = np.repeat([batch.epoch for batch in micro_batches], [len(batch["masked_positions"]) for batch in batches])
    rows_of = [
        np.flatnonzero(np.isin(targets.sequence, sample.sequences) & (masking < sample.num_maskings))
        for sample in samples
    ]
    if not len(rows_of[0]):
        raise InputError(f"too little held out to evaluate on: of {split.num_tokens:,} tokens none would be hidden")
    scores = score_model(model, batches)
    without_ngrams = (
        score_model(model, (blind[micro_batch][0] for micro_batch in micro_batches)) if use_ngrams else None
    )
    counted = Baselines(train, tokenizer, vocabulary, HELD_OUT_MASKING).score(targets)

    def compare_on(rows: np.ndarray) -> Comparison:
        chosen = targets.take(rows)
        chosen = chosen._replace(sequence=stretch[chosen.sequence])
        baselines = {baseline: of_it.take(rows) for baseline, of_it in counted.items()}
        return compare(name, scores.take(rows), baselines, chosen, without_ngrams and without_ngrams.take(rows))

    return Evaluation(
        compare_on(rows_of[0]),
        compare_on(rows_of[1]) if len(rows_of) > 1 and len(rows_of[1]) else None,
        float(shared.sum() / max(total.sum(), 1)),
    )


def _count_shared(
    train: TokenSplit, split: TokenSplit, spelling: Spelling, special_ids: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretches of `OVERLAP_BASES` bases that the training text has too.

    Of either text some `MAX_TOKENS` tokens are looked at, evenly spaced.

    Returns:
        The numbers of the n sequences that were looked at, and of each its shared stretches and all, `[n]` each.
    """

    def stretches(text: TokenSplit) -> tuple[np.ndarray, np.ndarray]:
        parts = [part for i in sample_sequences(text) for part in (text[i].astype(np.int64), [special_ids[0]])]
        bases, _ = spelling.spell(np.concatenate(parts))
        forward, backward = np.zeros((2, max(len(bases) - OVERLAP_BASES + 1, 0)), dtype=np.int64)
        whole = np.ones(len(forward), dtype=bool)
        for offset in range(OVERLAP_BASES):
            window = bases[offset : offset + len(forward)]
            whole &= window != UNKNOWN
            forward = forward * 4 + (window & 3)
            backward += (3 - (window.astype(np.int64) & 3)) << (2 * offset)
        # a special token ends each sequence, so that the number of those before a stretch is its sequence's
        number = np.cumsum(bases == UNKNOWN)[: len(forward)]
        return np.minimum(forward, backward)[whole], number[whole]

    known = np.append(np.sort(stretches(train)[0]), -1)  # behind all others stands what no stretch is
    codes, number = stretches(split)
    looked_at = sample_sequences(split)
    is_known = known[np.searchsorted(known[:-1], codes)] == codes
    shared, total = (np.bincount(chosen, minlength=len(looked_at)) for chosen in (number[is_known], number))
    return looked_at, shared, total


def evaluation_record(evaluation: Evaluation, text: str) -> dict[str, Any]:
    """An evaluation as JSON values."""
    return {
        "text": text,
        **evaluation.comparison.to_json(),
        "overlap_with_training_text": evaluation.overlap,
        "sequences_that_share_nothing": evaluation.apart and evaluation.apart.to_json(),
    }
