"""Training batches that the device matches and masks one step ahead of the model."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dnazen.batches.collator import PackedDataset, move_batch
from dnazen.batches.device import DeviceBatch, measure_capacity
from dnazen.batches.sampler import MicroBatch, MicroBatchSampler

_CAPACITY_BATCHES = 64  # of the first epoch, on which the room that a batch needs is measured


class Prefetcher:
    """Launches the making of the next step's micro-batches before those of this step are used.

    Args:
        dataset: of training; its collator's tables are copied to `device`.
        sampler: of training.
        device: where the batches are made.
        impl: of the operators.

    Attributes:
        unmatched: the same data for the loader: packed, but neither matched nor masked.
    """

    def __init__(self, dataset: PackedDataset, sampler: MicroBatchSampler, device: torch.device, impl: str):
        self.unmatched = PackedDataset(dataset.split, dataset.collator, match=False)
        self._collator = dataset.collator.to(device)
        self._device, self._impl = device, impl
        first_epoch = sampler.micro_batches(0)
        chosen = np.unique(np.linspace(0, len(first_epoch) - 1, _CAPACITY_BATCHES).astype(int))
        self._capacity = measure_capacity(dataset, (MicroBatch(0, first_epoch[index]) for index in chosen))
        self._ahead: list[DeviceBatch] | None = None

    def take(self, items: Iterator[tuple[dict, int]], count: int) -> list[tuple[dict, int]]:
        """The next `count` micro-batches of `items` (see `unmatched`), each with the G-grams cut by the cap."""
        launched = self._launch(itertools.islice(items, count)) if self._ahead is None else self._ahead
        batches = [batch.result() for batch in launched]
        self._ahead = self._launch(itertools.islice(items, count))
        return batches

    def _launch(self, items: Iterable[tuple[dict, int]]) -> list[DeviceBatch]:
        return [
            DeviceBatch(self._collator, move_batch(batch, self._device), self._capacity, self._impl)
            for batch, _ in items
        ]
