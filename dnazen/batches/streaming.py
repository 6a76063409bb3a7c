"""Running a model over a stream of sequences: in packed batches of similar lengths, in bounded memory, in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from dnazen.batches.collator import PackedCollator, move_batch
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE, pack_by_budget
from dnazen.defaults import MAX_BATCH_TOKENS

Key = TypeVar("Key")
Result = TypeVar("Result")

# Sequences are sorted by length within so many batches' worth; their tokens and results are all that is in memory.
_SORTED_BATCHES = 8


def run_batches(
    groups: Iterable[tuple[Key, Sequence[Sequence[int]]]],
    collator: PackedCollator,
    compute: Callable[[dict[str, Any]], Sequence[Result]],
    device: torch.device,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Iterator[tuple[Key, list[Result]]]:
    """Yield for each group its key and the results of its sequences, in the order of the input.

    Args:
        groups: a key and the sequences (token ids without special tokens) that belong together, perhaps none. Read as
            needed.
        collator: makes the packed batches.
        compute: from a packed batch on `device` to a result for each of its sequences, in order; without gradients.
        device: the model's.
        max_batch_tokens: tokens of a batch, special ones included; a longer sequence makes a batch of its own.
    """
    held: list[tuple[Key, Sequence[Sequence[int]]]] = []
    num_tokens = 0
    for key, sequences in groups:
        held.append((key, sequences))
        num_tokens += sum(len(sequence) + SPECIAL_TOKENS_PER_SEQUENCE for sequence in sequences)
        if num_tokens >= _SORTED_BATCHES * max_batch_tokens:
            yield from _run_held(held, collator, compute, device, max_batch_tokens)
            held, num_tokens = [], 0
    yield from _run_held(held, collator, compute, device, max_batch_tokens)


@torch.inference_mode()
def _run_held(held, collator, compute, device, max_batch_tokens) -> list[tuple[Any, list[Any]]]:
    sequences = [np.asarray(sequence, dtype=np.int64) for _, group in held for sequence in group]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    results: list[Any] = [None] * len(sequences)
    fitting = lengths.clip(max=max_batch_tokens - SPECIAL_TOKENS_PER_SEQUENCE)
    for run in pack_by_budget(fitting, lengths.argsort(kind="stable"), max_batch_tokens):
        batch = move_batch(collator([sequences[index] for index in run]), device)
        for index, result in zip(run, compute(batch), strict=True):
            results[index] = result
    in_order = iter(results)
    return [(key, [next(in_order) for _ in group]) for key, group in held]
