"""How well a masked-language model predicts hidden tokens of a text, beside counting in its training text."""

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


def choose_sequences(split: TokenSplit, candidates: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Evenly spaced sequences with some `WANTED_TARGETS` hidden tokens, and how often they are masked anew.

    Args:
        split: where they are from.
        candidates: the sequences to choose from, ascending; default: all.
    """
    candidates = np.arange(len(split)) if candidates is None else candidates
    expected = HELD_OUT_MASKING.mlm_probability * split.lengths[candidates].sum()
    count = min(len(candidates), max(1, round(len(candidates) * WANTED_TARGETS / max(expected, 1))))
    chosen = candidates[np.unique(np.linspace(0, len(candidates) - 1, count).astype(np.int64))]
    return chosen, int(np.clip(WANTED_TARGETS // max(expected, 1), 1, MAX_MASKINGS))


def evaluation_batches(
    split: TokenSplit, sequences: np.ndarray, max_batch_tokens: int, num_maskings: int
) -> list[MicroBatch]:
    """The micro-batches of these sequences, masking by masking (an epoch each)."""
    runs = pack_by_budget(split.lengths, sequences, max_batch_tokens)
    return [MicroBatch(masking, run) for masking in range(num_maskings) for run in runs]


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and whether the first guess is right, `[n]` each, of logits `[n, V]`."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def score_model(model: DNAZenForMaskedLM, dataset: PackedDataset, micro_batches: list[MicroBatch]) -> Scores:
    """A model's scores of the masked tokens of `micro_batches`, in their order."""
    parts = []
    for micro_batch in micro_batches:
        batch = move_batch(dataset[micro_batch][0], model.device)
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
    baselines = Baselines(train, tokenizer, vocabulary, HELD_OUT_MASKING)

    def compare_on(candidates: np.ndarray) -> Comparison | None:
        sequences, num_maskings = choose_sequences(split, candidates)
        micro_batches = evaluation_batches(split, sequences, max(8192, int(split.lengths.max()) + 2), num_maskings)
        batches = ((dataset[micro_batch][0], micro_batch.sequences) for micro_batch in micro_batches)
        targets = collect_targets(batches, spelling, special_ids)
        if not len(targets.truth):
            return None
        targets = targets._replace(sequence=stretch[targets.sequence])
        scores = score_model(model, dataset, micro_batches)
        without_ngrams = score_model(model, blind, micro_batches) if use_ngrams else None
        return compare(name, scores, baselines.score(targets), targets, without_ngrams)

    looked_at, shared, total = _count_shared(train, split, spelling, special_ids)
    apart = looked_at[shared == 0]
    comparison = compare_on(np.arange(len(split)))
    if comparison is None:
        raise InputError(f"too little held out to evaluate on: of {split.num_tokens:,} tokens none would be hidden")
    return Evaluation(
        comparison,
        compare_on(apart) if FEWEST_SEQUENCES <= len(apart) < len(looked_at) else None,
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

    known = np.unique(stretches(train)[0])
    codes, number = stretches(split)
    looked_at = sample_sequences(split)
    shared, total = (
        np.bincount(chosen, minlength=len(looked_at)) for chosen in (number[np.isin(codes, known)], number)
    )
    return looked_at, shared, total


def evaluation_record(evaluation: Evaluation, text: str) -> dict[str, Any]:
    """An evaluation as JSON values."""
    return {
        "text": text,
        **evaluation.comparison.to_json(),
        "overlap_with_training_text": evaluation.overlap,
        "sequences_that_share_nothing": evaluation.apart and evaluation.apart.to_json(),
    }
