"""Batches that are matched and masked on a device, a step ahead, so that the host never waits to learn their sizes."""

import copy
from collections.abc import Iterable

import torch

from dnazen.batches.collator import BatchCounts, PackedCollator, PackedDataset
from dnazen.batches.sampler import MicroBatch
from dnazen_kernels.ngram_matching.table import MAX_LENGTH, MIN_LENGTH


class DeviceBatch:
    """A batch whose making has been launched; `result` is the same as the collator's on the host, bit for bit.

    Args:
        collator: its tables on the device.
        packed: what `PackedCollator.pack` made, on the device.
        capacity: the size (G-grams, edges) of the tensors it is made in. If that is too small, the batch is made once
            more at the size of all that there can be, and then the host does wait.
        impl: of the operators.
    """

    def __init__(
        self, collator: PackedCollator, packed: dict[str, torch.Tensor | int], capacity: tuple[int, int], impl: str
    ):
        self._collator, self._packed, self._impl = collator, packed, impl
        self._launch(capacity)

    def _launch(self, capacity: tuple[int, int]) -> None:
        self._untrimmed, counts = self._collator.match_and_mask(**self._packed, capacity=capacity, impl=self._impl)
        self._counts, self._copied = counts, None
        if counts.is_cuda:
            self._counts = torch.empty_like(counts, device="cpu", pin_memory=True).copy_(counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _read_counts(self) -> BatchCounts:
        if self._copied is not None:
            self._copied.synchronize()
        return BatchCounts(*self._counts.tolist())

    def result(self) -> tuple[dict[str, torch.Tensor | int], int]:
        """The batch, and how many G-grams the vocabulary's cap has cut."""
        counts = self._read_counts()
        if counts.overflow:
            num_tokens = len(self._packed["input_ids"])
            lengths = range(MIN_LENGTH, MAX_LENGTH + 1)  # at most one G-gram of each begins at a token
            self._launch((len(lengths) * num_tokens, sum(lengths) * num_tokens))
            counts = self._read_counts()
        return self._collator.trim(self._untrimmed, counts), counts.dropped


def measure_capacity(
    dataset: PackedDataset, micro_batches: Iterable[MicroBatch], multiple: int = 64
) -> tuple[int, int]:
    """The capacity (G-grams, edges) that nearly all batches like these fit: half more than the fullest of them needs.

    Where the fullest has 1,000 G-grams and 3,000 edges, that is (1,536, 4,544): each half more, and up to the next
    multiple.
    """
    unmasked = copy.copy(dataset.collator)
    unmasked.masking, unmasked.use_ngrams = None, True  # room is needed before masking
    most = 0, 0
    for micro_batch in micro_batches:
        packed = unmasked.pack([dataset.split[index] for index in micro_batch.sequences])
        counts = BatchCounts(*unmasked.match_and_mask(**packed)[1].tolist())
        most = max(most[0], counts.ngrams), max(most[1], counts.edges)
    return tuple((need * 3 // 2 // multiple + 1) * multiple for need in most)
