"""What goes through a training run: tokens, the share of them that is masked, the loss where they are hidden, time."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE


def sum_over_processes(value: Tensor, world_size: int) -> Tensor:
    """Add up `value`, in place, over all processes of the run."""
    if world_size > 1:
        torch.distributed.all_reduce(value)
    return value


class Meter:
    """Counts what this process trains on, and sums it over all processes when it is read.

    Args:
        device: of the losses.
        world_size: number of processes.
        totals, train_seconds: of the checkpoint that is resumed from.

    Attributes:
        totals: tokens, maskable tokens (without [CLS] and [SEP]), masked tokens and G-grams cut by the cap, of all
            processes from the run's beginning to the last reading, int64 `[4]`.
        train_seconds: time of training up to the last reading.
    """

    def __init__(
        self, device: torch.device, world_size: int, totals: Sequence[int] = (0, 0, 0, 0), train_seconds: float = 0.0
    ):
        self.totals, self.train_seconds = np.array(totals, dtype=np.int64), train_seconds
        self._device, self._world_size = device, world_size
        # of this process, since the last reading
        self._counts = np.zeros_like(self.totals)
        self._hidden = torch.zeros(2, dtype=torch.float64, device=device)  # loss and number of the hidden targets
        self._paused_seconds = 0.0
        self._read_at: float | None = None

    def start(self) -> None:
        """Start the clock; nothing happens if it runs."""
        if self._read_at is None:
            self._read_at, self._paused_seconds = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of a block, such as an evaluation, out of the time of training."""
        started = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - started

    def count_batch(self, batch: dict[str, Tensor | int], num_ngrams_cut: int) -> int:
        """Add a micro-batch; returns the number of its masked tokens."""
        tokens, masked = batch["input_ids"].numel(), len(batch["masked_positions"])
        special = SPECIAL_TOKENS_PER_SEQUENCE * (batch["cu_seqlens"].numel() - 1)
        self._counts += [tokens, tokens - special, masked, num_ngrams_cut]
        return masked

    @torch.no_grad()
    def count_hidden(self, batch: dict[str, Tensor | int], logits: Tensor, mask_token_id: int) -> None:
        """Add the loss of the targets that are hidden behind [MASK].

        Targets that are shown, as they are or as another token, say nothing about prediction.

        Args:
            batch: a micro-batch with n masked tokens.
            logits: of its masked tokens, `[n, V]`.
        """
        positions = batch["masked_positions"]
        hidden = batch["input_ids"].index_select(0, positions) == mask_token_id
        labels = batch["labels"].index_select(0, positions)
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        self._hidden += torch.stack([(losses * hidden).sum(), hidden.sum()])

    def read(self) -> dict[str, float]:
        """What came in since the last reading, over all processes; all of them must call this.

        Returns:
            `hidden_loss`: nats per hidden target; absent if there was none.
            `tokens_per_second`: of training time, padding none.
            `mask_rate`: masked tokens, as a share of the maskable.
            `ngrams_cut`: by the cap.
        """
        now = time.perf_counter()
        seconds = now - self._read_at - self._paused_seconds
        counts = torch.from_numpy(self._counts).to(self._device, copy=True)
        counts = sum_over_processes(counts, self._world_size).cpu().numpy()
        tokens, maskable, masked, cut = counts.tolist()
        hidden_loss, hidden = sum_over_processes(self._hidden, self._world_size).tolist()
        self.totals += counts
        self.train_seconds += seconds
        self._counts[:] = 0
        self._hidden.zero_()
        self._read_at, self._paused_seconds = now, 0.0
        rates = {"tokens_per_second": tokens / seconds, "mask_rate": masked / max(maskable, 1), "ngrams_cut": cut}
        return ({"hidden_loss": hidden_loss / hidden} if hidden else {}) | rates
