"""The order of the data: which sequences make up micro-batch number i of a run, whatever the number of processes.

A micro-batch is filled with sequences up to a token budget. An epoch's micro-batches depend on (seed, epoch) alone; a
process takes every `world_size`-th of them. A position in the data is therefore one integer, the number of
micro-batches that all processes together have consumed, and it means the same on one process and on a hundred.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from dnazen.files import InputError

SPECIAL_TOKENS_PER_SEQUENCE = 2  # [CLS] and [SEP]


class MicroBatch(NamedTuple):
    """Sequences of one epoch that are packed together; `sequences` are indices into a split of the corpus.

    `progress` is the share of the run's steps that are done before it.
    """

    epoch: int
    sequences: np.ndarray
    progress: float = 0.0


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `[0, num_sequences)` that depends on (seed, epoch) alone."""
    # the 1 keeps these draws apart from those of masking
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, 0, epoch])).permutation(num_sequences)


def pack_by_budget(lengths: np.ndarray, order: np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """Cut `order` into runs of at most `max_batch_tokens` tokens, special tokens included.

    Args:
        lengths: tokens of each sequence without special tokens, shape `[num_sequences]`.
        order: the sequences' indices in the order they are taken.
        max_batch_tokens: the budget.

    Raises:
        InputError: a sequence is longer than the budget.
    """
    ends = np.cumsum(lengths[order] + SPECIAL_TOKENS_PER_SEQUENCE)
    runs, start, consumed = [], 0, 0
    while start < len(order):
        stop = int(np.searchsorted(ends, consumed + max_batch_tokens, side="right"))
        if stop == start:
            longest = int(lengths[order[start]]) + SPECIAL_TOKENS_PER_SEQUENCE
            raise InputError(
                f"--max-batch-tokens must hold the longest sequence, {longest} tokens, got {max_batch_tokens}"
            )
        runs.append(order[start:stop])
        start, consumed = stop, int(ends[stop - 1])
    return runs


class MicroBatchSampler(Sampler[MicroBatch]):
    """Endless stream of this process's micro-batches, epoch after epoch, starting anywhere.

    Args:
        lengths: tokens of each sequence, shape `[num_sequences]`.
        max_batch_tokens: token budget of a micro-batch.
        seed: with the epoch, decides the order.
        start: micro-batches that all processes together have consumed.
        rank, world_size: this process takes micro-batches `start + rank`, `start + rank + world_size`, ...
    """

    def __init__(self, lengths: np.ndarray, max_batch_tokens: int, seed: int, start: int, rank: int, world_size: int):
        self.lengths, self.max_batch_tokens, self.seed = lengths, max_batch_tokens, seed
        self.start, self.rank, self.world_size = start, rank, world_size
        self._ends: list[int] = []  # micro-batches up to the end of each epoch
        self._steps: tuple[int, int, float] = 0, 1, math.inf

    def set_steps(self, first: int, micro_batches: int, total: int) -> None:
        """Say which steps take the micro-batches: `start` is in step `first` of `total`, and each takes so many."""
        self._steps = first, micro_batches, total

    def _progress_at(self, position: int) -> float:
        first, micro_batches, total = self._steps
        return (first + (position - self.start) // micro_batches) / total

    def micro_batches(self, epoch: int) -> list[np.ndarray]:
        """All micro-batches of one epoch, in order."""
        order = epoch_order(len(self.lengths), self.seed, epoch)
        return pack_by_budget(self.lengths, order, self.max_batch_tokens)

    def end_of_epoch(self, epoch: int) -> int:
        """Position at which `epoch` ends."""
        while len(self._ends) <= epoch:
            begin = self._ends[-1] if self._ends else 0
            self._ends.append(begin + len(self.micro_batches(len(self._ends))))
        return self._ends[epoch]

    def epoch_at(self, position: int) -> float:
        """Epochs completed at `position`, with a fraction."""
        epoch = 0
        while self.end_of_epoch(epoch) <= position:
            epoch += 1
        begin = self.end_of_epoch(epoch - 1) if epoch else 0
        return epoch + (position - begin) / (self.end_of_epoch(epoch) - begin)

    def __iter__(self) -> Iterator[MicroBatch]:
        position = self.start + self.rank
        epoch = int(self.epoch_at(position))
        while True:
            runs = self.micro_batches(epoch)
            begin = self.end_of_epoch(epoch) - len(runs)
            while position - begin < len(runs):
                yield MicroBatch(epoch, runs[position - begin], self._progress_at(position))
                position += self.world_size
            epoch += 1
