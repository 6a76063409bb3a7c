"""From token sequences to a packed, matched and masked batch."""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch
from dnazen.data.corpus import TokenSplit
from dnazen.ngram.vocab import NgramVocabulary
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_masking import IGNORE_INDEX, MASK_SHARE, RANDOM_SHARE, ngram_masking
from dnazen_kernels.ngram_matching import ngram_matching


class Masking(NamedTuple):
    """How tokens are chosen to be masked (paper section 2.4).

    Args:
        mlm_probability: chance of each maskable token to be drawn.
        whole_ngram: mask all tokens of every G-gram that covers a drawn token; else the drawn tokens alone.
        seed: with the epoch and the sequence, decides every draw.
        mask_share, random_share: of the masked tokens, how many are shown as [MASK] (hidden), and as a random token;
            the rest are shown as they are.
        mlm_probability_end: the chance at the end of a run, over which it changes linearly; None: it does not.
    """

    mlm_probability: float
    whole_ngram: bool
    seed: int
    mask_share: float = MASK_SHARE
    random_share: float = RANDOM_SHARE
    mlm_probability_end: float | None = None

    def probability_at(self, progress: float) -> float:
        """The chance of a token to be drawn when a share of a run's steps is done."""
        change = 0.0 if self.mlm_probability_end is None else self.mlm_probability_end - self.mlm_probability
        return self.mlm_probability + change * min(progress, 1.0)


def masking_uniforms(seed: int, epoch: int, sequence: int, length: int) -> np.ndarray:
    """Uniforms of shape `[length, 3]` for one sequence: the same whatever the batch, worker, process or restart.

    The generator is counter-based: (seed) is its key, (sequence, epoch) the high words of its counter.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sequence, epoch])).random((length, 3))


class BatchCounts(NamedTuple):
    """What the host must know of a batch that is matched and masked, so as to trim it."""

    ngrams: int
    edges: int
    max_ngrams: int  # of one sequence
    masked: int  # tokens
    dropped: int  # G-grams cut by the vocabulary's cap
    overflow: int  # G-grams beyond the capacity


class PackedCollator:
    """Packs token sequences end to end, finds their G-grams and masks them.

    Calling it does so in three steps: `pack` on the host; `match_and_mask` on the device of its input; and `trim`, for
    which the host must know the sizes. With a `capacity` the second does not wait for the device, because its tensors
    are as long as that, whatever is in them (see `NgramMatches`).

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
        self.maskable_ids = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        self.table = vocabulary.table(len(tokenizer))
        self.max_ngrams = vocabulary.max_ngrams
        self.masking, self.use_ngrams = masking, use_ngrams
        self.num_dropped = 0

    def to(self, device: torch.device | str) -> "PackedCollator":
        """The collator with its tables on another device."""
        moved = copy.copy(self)
        moved.table, moved.maskable_ids = self.table.to(device), self.maskable_ids.to(device)
        return moved

    def __call__(
        self, sequences: list[np.ndarray], sequence_ids: np.ndarray | None = None, epoch: int = 0, progress: float = 0.0
    ) -> dict[str, torch.Tensor | int]:
        """All three steps; see `pack` for the arguments and `trim` for the result.

        G-grams cut by the vocabulary's cap are counted in `num_dropped`.
        """
        untrimmed, counts = self.match_and_mask(**self.pack(sequences, sequence_ids, epoch, progress))
        counts = BatchCounts(*counts.tolist())
        self.num_dropped = counts.dropped
        return self.trim(untrimmed, counts)

    def pack(
        self, sequences: list[np.ndarray], sequence_ids: np.ndarray | None = None, epoch: int = 0, progress: float = 0.0
    ) -> dict[str, Any]:
        """Pack `sequences` (token ids without special tokens); `sequence_ids` and `epoch` key the masking.

        `progress` is the share of the run's steps that are done.

        Returns:
            `input_ids [T]`, `cu_seqlens [B+1]`, `max_seqlen`, and, if masking, `maskable [T]`, False at special tokens,
            `random [T, 3]`, and `mlm_probability`.
        """
        lengths = np.array([len(sequence) + SPECIAL_TOKENS_PER_SEQUENCE for sequence in sequences], dtype=np.int64)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        input_ids = np.empty(cu_seqlens[-1], dtype=np.int64)
        maskable = np.ones(cu_seqlens[-1], dtype=bool)
        input_ids[cu_seqlens[:-1]], input_ids[cu_seqlens[1:] - 1] = self.cls_token_id, self.sep_token_id
        maskable[cu_seqlens[:-1]] = maskable[cu_seqlens[1:] - 1] = False
        if len(sequences):
            input_ids[maskable] = np.concatenate(sequences)
        packed: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids), "cu_seqlens": torch.from_numpy(cu_seqlens)}
        packed["max_seqlen"] = int(lengths.max(initial=0))
        if self.masking is not None:
            random = [
                masking_uniforms(self.masking.seed, epoch, int(sequence), int(length))
                for sequence, length in zip(sequence_ids, lengths, strict=True)
            ]
            packed["maskable"] = torch.from_numpy(maskable)
            packed["random"] = torch.from_numpy(np.concatenate(random))
            packed["mlm_probability"] = self.masking.probability_at(progress)
        return packed

    def match_and_mask(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        maskable: torch.Tensor | None = None,
        random: torch.Tensor | None = None,
        mlm_probability: float = 0.0,
        *,
        capacity: tuple[int, int] | None = None,
        impl: str = "auto",
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Find the G-grams of what `pack` returned, and mask.

        Args:
            capacity: the size (G-grams, edges) that the tensors get; G-grams beyond it are left out and counted in
                `overflow`. None: as many as there are, which the host must wait to learn.
            impl: of the operators.

        Returns:
            The batch, padded to `capacity`, its `NgramEdges` under `edges`; and the fields of `BatchCounts` as a
            tensor.
        """
        matches = ngram_matching(input_ids, cu_seqlens, self.table, self.max_ngrams, capacity=capacity, impl=impl)
        batch: dict[str, Any] = {"input_ids": input_ids, **matches._asdict()}
        num_ngrams, num_edges, dropped, overflow = batch.pop("counts").unbind()
        num_masked = torch.zeros_like(dropped)
        if self.masking is not None:
            masked = ngram_masking(
                maskable=maskable,
                random=random,
                **batch,
                mlm_probability=mlm_probability,
                mask_token_id=self.mask_token_id,
                maskable_ids=self.maskable_ids,
                whole_ngram=self.masking.whole_ngram,
                mask_share=self.masking.mask_share,
                random_share=self.masking.random_share,
                impl=impl,
            )
            batch = masked._asdict()
            num_ngrams, num_edges = batch.pop("counts").unbind()
            num_masked = (batch["labels"] != IGNORE_INDEX).sum()
        if not self.use_ngrams:
            batch |= no_ngrams(input_ids, cu_seqlens)
            num_ngrams = num_edges = torch.zeros_like(dropped)
        longest = batch["ngram_cu_seqlens"].diff().amax()
        batch["cu_seqlens"], batch["max_seqlen"] = cu_seqlens, max_seqlen
        counts = num_ngrams, num_edges, longest, num_masked, dropped, overflow
        return batch, torch.stack([count.to(torch.int32) for count in counts])

    def trim(self, batch: dict[str, Any], counts: BatchCounts) -> dict[str, torch.Tensor | int]:
        """What `match_and_mask` returned, without what is behind the content.

        Returns:
            The packed batch: `input_ids [T]`, `cu_seqlens [B+1]`, `max_seqlen`, `ngram_input_ids [N]`,
            `ngram_cu_seqlens [B+1]`, `max_ngrams`, both CSR views of the matching matrix, and, if masking, `labels [T]`
            and the indices of the masked tokens in them, `masked_positions`.
        """
        batch = {**batch, "ngram_input_ids": batch["ngram_input_ids"][: counts.ngrams], "max_ngrams": counts.max_ngrams}
        edges = batch.pop("edges").trimmed(counts.ngrams, counts.edges)
        batch |= edges._asdict()  # one by one, as models take them
        if "labels" in batch:
            number = (batch["labels"] != IGNORE_INDEX).cumsum(0)
            wanted = torch.arange(1, counts.masked + 1, device=number.device)
            batch["masked_positions"] = torch.searchsorted(number, wanted)
        return batch


def move_batch(batch: dict[str, torch.Tensor | int], device: torch.device) -> dict[str, torch.Tensor | int]:
    """The batch on a device; from pinned memory nobody waits for the copy."""
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for name, value in batch.items()
    }


def no_ngrams(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> dict[str, Any]:
    """The fields of G-grams, in a batch of these tokens that has none."""
    return {
        "ngram_input_ids": input_ids.new_zeros(0, dtype=torch.int64),
        "ngram_cu_seqlens": torch.zeros_like(cu_seqlens, dtype=torch.int32),
        "edges": NgramEdges.empty(len(input_ids), input_ids.device),
    }


class PackedDataset(Dataset):
    """Packed batches of a corpus split, indexed by `MicroBatch`; each with its count of G-grams cut by the cap.

    Args:
        split: the sequences.
        collator: makes the batches.
        match: False to leave them as `PackedCollator.pack` makes them.
    """

    def __init__(self, split: TokenSplit, collator: PackedCollator, match: bool = True):
        self.split, self.collator, self.match = split, collator, match

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[dict[str, torch.Tensor | int], int]:
        sequences = [self.split[index] for index in micro_batch.sequences]
        if not self.match:
            return self.collator.pack(sequences, micro_batch.sequences, micro_batch.epoch, micro_batch.progress), 0
        batch = self.collator(sequences, micro_batch.sequences, micro_batch.epoch, micro_batch.progress)
        return batch, self.collator.num_dropped


def calibrate_mlm_probability(dataset: PackedDataset, target: float, max_tokens: int = 200_000) -> float:
    """The drawing probability at which `target` of all maskable tokens end up masked (`--mask-target effective`).

    Whole-G-gram masking masks more tokens than it draws. The effective rate grows with the probability, so it is
    bisected, on the first sequences of the split.

    Args:
        dataset: the data to calibrate on; its collator's masking is used with other probabilities.
        target: wanted share of maskable tokens, 0 to 1.
        max_tokens: tokens of the split that are looked at.
    """
    lengths = dataset.split.lengths
    sequences = np.arange(max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens))))
    maskable = int(lengths[sequences].sum())
    collator, low, high = dataset.collator, 0.0, target
    masking = collator.masking
    for _ in range(12):
        middle = (low + high) / 2
        collator.masking = masking._replace(mlm_probability=middle)
        batch, _ = dataset[MicroBatch(0, sequences)]
        masked = int((batch["labels"] != -100).sum())
        low, high = (middle, high) if masked < target * maskable else (low, middle)
    collator.masking = masking
    return (low + high) / 2
