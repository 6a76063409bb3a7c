"""From token sequences to a packed, matched and masked batch."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dnazen.data.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch
from dnazen.data.shards import TokenSplit
from dnazen.ngram.vocab import NgramVocabulary
from dnazen_kernels.ngram_masking import ngram_masking
from dnazen_kernels.ngram_matching import ngram_matching


class Masking(NamedTuple):
    """How tokens are chosen to be masked (paper section 2.4).

    Args:
        mlm_probability: chance of each ordinary token to be drawn.
        whole_ngram: mask all tokens of every G-gram that covers a drawn token; else the drawn tokens alone.
        seed: with the epoch and the sequence, decides every draw.
    """

    mlm_probability: float
    whole_ngram: bool
    seed: int


def masking_uniforms(seed: int, epoch: int, sequence: int, length: int) -> np.ndarray:
    """Uniforms of shape `[length, 3]` for one sequence: the same whatever the batch, worker, process or restart.

    The generator is counter-based: (seed) is its key, (sequence, epoch) the high words of its counter.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sequence, epoch])).random((length, 3))


class PackedCollator:
    """Packs token sequences end to end, finds their G-grams and masks them.

    Args:
        tokenizer: for the ids of the special tokens.
        vocabulary: the G-grams to look for.
        masking: how to mask, or None for a batch without `labels`.
        use_ngrams: hand the surviving G-grams to the model; without, it sees tokens alone (masking is unchanged).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: NgramVocabulary,
        masking: Masking | None = None,
        use_ngrams: bool = True,
    ):
        self.cls_token_id, self.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.ordinary_ids = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        self.table = vocabulary.table(len(tokenizer))
        self.max_ngrams = vocabulary.max_ngrams
        self.masking, self.use_ngrams = masking, use_ngrams
        self.num_dropped = 0

    def __call__(
        self, sequences: list[np.ndarray], sequence_ids: np.ndarray | None = None, epoch: int = 0
    ) -> dict[str, torch.Tensor | int]:
        """Pack `sequences` (token ids without special tokens); `sequence_ids` and `epoch` key the masking.

        Returns:
            The packed batch: `input_ids [T]`, `cu_seqlens [B+1]`, `max_seqlen`, `ngram_input_ids [N]`,
            `ngram_cu_seqlens [B+1]`, `max_ngrams`, both CSR views of the matching matrix, and, if masking, `labels [T]`
            and the indices of the masked tokens in them, `masked_positions`.
            G-grams cut by the vocabulary's cap are counted in `num_dropped`, for this batch.
        """
        lengths = np.array([len(sequence) + SPECIAL_TOKENS_PER_SEQUENCE for sequence in sequences], dtype=np.int64)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        input_ids = np.empty(cu_seqlens[-1], dtype=np.int64)
        ordinary = np.ones(cu_seqlens[-1], dtype=bool)
        input_ids[cu_seqlens[:-1]], input_ids[cu_seqlens[1:] - 1] = self.cls_token_id, self.sep_token_id
        ordinary[cu_seqlens[:-1]] = ordinary[cu_seqlens[1:] - 1] = False
        if len(sequences):
            input_ids[ordinary] = np.concatenate(sequences)

        tokens, starts = torch.from_numpy(input_ids), torch.from_numpy(cu_seqlens)
        matches = ngram_matching(tokens, starts, self.table, self.max_ngrams)
        self.num_dropped = int(matches.counts[2])
        fields = matches._asdict()
        del fields["counts"]
        batch: dict[str, Any] = {"input_ids": tokens, **fields}
        if self.masking is not None:
            random = [
                masking_uniforms(self.masking.seed, epoch, int(sequence), int(length))
                for sequence, length in zip(sequence_ids, lengths, strict=True)
            ]
            masked = ngram_masking(
                ordinary=torch.from_numpy(ordinary),
                random=torch.from_numpy(np.concatenate(random)),
                **batch,
                mlm_probability=self.masking.mlm_probability,
                mask_token_id=self.mask_token_id,
                ordinary_ids=self.ordinary_ids,
                whole_ngram=self.masking.whole_ngram,
            )
            batch = masked.trimmed()._asdict()
            del batch["counts"]
            # found here: on a GPU their number would have to be waited for
            batch["masked_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
        if not self.use_ngrams:
            batch = without_ngrams(batch)
        batch["cu_seqlens"] = starts
        batch["max_seqlen"] = int(lengths.max(initial=0))
        batch["max_ngrams"] = int(batch["ngram_cu_seqlens"].diff().max())
        return batch


def without_ngrams(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with no G-gram in it."""
    empty = {name: batch[name][:0] for name in ("ngram_input_ids", "token_ngrams", "ngram_tokens")}
    zeros = {name: torch.zeros_like(batch[name]) for name in ("ngram_cu_seqlens", "token_offsets")}
    return {**batch, **empty, **zeros, "ngram_offsets": batch["ngram_offsets"][:1]}


class PackedDataset(Dataset):
    """Packed batches of a corpus split, indexed by `MicroBatch`; each with its count of G-grams cut by the cap."""

    def __init__(self, split: TokenSplit, collator: PackedCollator):
        self.split, self.collator = split, collator

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[dict[str, torch.Tensor | int], int]:
        sequences = [self.split[index] for index in micro_batch.sequences]
        return self.collator(sequences, micro_batch.sequences, micro_batch.epoch), self.collator.num_dropped


def calibrate_mlm_probability(dataset: PackedDataset, target: float, max_tokens: int = 200_000) -> float:
    """The drawing probability at which `target` of all ordinary tokens end up masked (`--mask-target effective`).

    Whole-G-gram masking masks more tokens than it draws. The effective rate grows with the probability, so it is
    bisected, on the first sequences of the split.

    Args:
        dataset: the data to calibrate on; its collator's masking is used with other probabilities.
        target: wanted share of ordinary tokens, 0 to 1.
        max_tokens: tokens of the split that are looked at.
    """
    lengths = dataset.split.lengths
    sequences = np.arange(max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens))))
    ordinary = int(lengths[sequences].sum())
    collator, low, high = dataset.collator, 0.0, target
    masking = collator.masking
    for _ in range(12):
        middle = (low + high) / 2
        collator.masking = masking._replace(mlm_probability=middle)
        batch, _ = dataset[MicroBatch(0, sequences)]
        masked = int((batch["labels"] != -100).sum())
        low, high = (middle, high) if masked < target * ordinary else (low, middle)
    collator.masking = masking
    return (low + high) / 2
