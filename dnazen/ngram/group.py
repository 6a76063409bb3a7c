"""The processes that one extraction runs in: this one alone, or those that `torchrun` or `deepspeed` started."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dnazen.files import InputError
from dnazen.ngram.count import Runs, cut_keys, merge_runs

_SAMPLE_KEYS = 1024  # of each process, to cut the keys into ranges by


class Group:
    """Processes that take the same steps in the same order.

    What they exchange goes through the CPU (gloo): it is little beside what each of them reads. An error of the
    exchange itself, such as that another process was killed, is an InputError.
    """

    def __init__(self, rank: int, size: int):
        self.rank = rank  # number of this process
        self.size = size
        self._failed = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; an error in one is an error in each.

        Raises:
            InputError: the block raised it, or another process failed.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except (InputError, OSError) as raised:
            error = raised
        if not self._failed:  # else all know
            with contextlib.suppress(InputError) if error else contextlib.nullcontext():
                self._gather_all(None, error)
        if error:
            raise error

    def agree(self, what: str, value: str) -> None:
        """InputError in every process if one has another `value` than the first."""
        first, *others = self._gather_all(value) if self.size > 1 else [value]
        for rank, other in enumerate(others, 1):
            if other != first:
                raise InputError(f"{what}: expected {first}, as in process 0, found {other} in process {rank}")

    def add(self, array: np.ndarray) -> None:
        """Replace an array by the sum of all processes'."""
        if self.size > 1:
            self._call(dist.all_reduce, torch.from_numpy(array))

    def broadcast(self, value: Any) -> Any:
        """The first process' value."""
        values = [value]
        if self.size > 1:
            self._call(dist.broadcast_object_list, values)
        return values[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every process' value, in the first process."""
        values = [value] * self.size if self.rank == 0 else None
        if self.size > 1:
            self._call(dist.gather_object, value, values)
        return values

    def exchange(self, runs: Runs) -> Runs:
        """Of the runs of all processes, merged, those whose keys are in this one's range; ranges rise with the rank."""
        if self.size == 1:
            return runs
        sample = runs.keys[:: max(1, len(runs.keys) // _SAMPLE_KEYS)].tolist()
        cuts = torch.searchsorted(runs.keys, cut_keys(sum(self._gather_all(sample), []), self.size))
        sizes = torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_full((1,), len(runs.keys)))
        received_sizes = torch.empty_like(sizes)
        self._call(dist.all_to_all_single, received_sizes, sizes)
        received = []
        for array in (runs.keys, runs.counts, runs.are_candidates.to(torch.uint8)):
            received.append(array.new_empty(int(received_sizes.sum())))
            self._call(dist.all_to_all_single, received[-1], array, received_sizes.tolist(), sizes.tolist())
        return merge_runs([Runs(received[0], received[1], received[2].bool())])

    def _gather_all(self, value: Any, error: Exception | None = None) -> list[Any]:
        """Every process' value; InputError if another has an error in place of one, wherever it stopped."""
        entries = [None] * self.size
        self._call(dist.all_gather_object, entries, (None if error is None else str(error), value))
        for rank, (text, _) in enumerate(entries):
            if text is not None:
                self._failed = True
                if rank != self.rank:
                    raise InputError(f"process {rank} of {self.size} failed: {text}")
        return [value for _, value in entries]

    def _call(self, function: Callable, *arguments: Any) -> None:
        try:
            function(*arguments)
        except RuntimeError as error:
            self._failed = True
            raise InputError(f"another of the {self.size} processes has ended or cannot be reached: {error}") from error


ALONE = Group(0, 1)


@contextlib.contextmanager
def join_group() -> Iterator[Group]:
    """The group of the processes that `torchrun` or `deepspeed` started this one with."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
